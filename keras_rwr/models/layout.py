"""How the weights of GPT-2 with RWR attention lie on a mesh of devices."""

import keras


def get_layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_parallel_dim_name: str = "model",
    data_parallel_dim_name: str = "batch",
) -> keras.distribution.LayoutMap:
    """Makes a `keras.distribution.LayoutMap` for model parallel training and generation.

    Attention is divided by heads and the feedforward networks by hidden units over the model axis,
    so that a transformer layer adds up its devices' results twice and moves nothing else between
    them. As in KerasHub's models, the other axis of each kernel, and the hidden axis of the
    embeddings, are divided over the data axis. (GPT-2's 50,257 tokens are 29 × 1,733: no usual
    number of devices divides them.) All other weights lie on every device.

    Both the number of heads and the intermediate size must be multiples of the mesh's model axis,
    and the hidden size a multiple of its data axis.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        model_parallel_dim_name: String, the mesh's axis that divides heads and hidden units.
        data_parallel_dim_name: String, the mesh's axis that divides the data.

    Returns:
        `keras.distribution.LayoutMap` of the weights.

    Raises:
        ValueError: If `device_mesh` is no `DeviceMesh` or lacks an axis.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layout_map = keras_rwr.models.RWRGPT2Backbone.get_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    with distribution.scope():
        language_model = keras_rwr.models.RWRGPT2CausalLM.from_preset("gpt2_base_en")
    ```
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: device_mesh={device_mesh!r}"
        )
    for argument, name in (
        ("model_parallel_dim_name", model_parallel_dim_name),
        ("data_parallel_dim_name", data_parallel_dim_name),
    ):
        if name not in device_mesh.axis_names:
            raise ValueError(
                f"`{argument}` must be one of the mesh's axes {list(device_mesh.axis_names)}. "
                f"Received: {argument}={name!r}"
            )
    model, data = model_parallel_dim_name, data_parallel_dim_name
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map[".*(token|position)_embedding/embeddings"] = (None, data)
    # Kernels (D, N, H) and biases (N, H), then (N, H, D).
    attention = ".*transformer_layer_[0-9]+/self_attention"
    layout_map[f"{attention}/(query|key|value)/(kernel|lora_kernel_a)"] = (data, model, None)
    layout_map[f"{attention}/(query|key|value)/bias"] = (model, None)
    layout_map[f"{attention}/attention_output/kernel"] = (model, None, data)
    # Of the walk's weights, those with one entry a head; `discoverability` and `log_concentration`
    # may have one a graph, and a graph may be shared by all heads.
    layout_map[f"{attention}/walk/graph_(query|key)"] = (data, None, None)
    layout_map[f"{attention}/walk/hop_gate"] = (data, model, None)
    layout_map[f"{attention}/walk/hop_weights"] = (model, None)
    layout_map[f"{attention}/walk/lens_strength"] = (model,)
    feedforward = ".*transformer_layer_[0-9]+/feedforward"
    layout_map[f"{feedforward}_intermediate_dense/kernel"] = (data, model)
    layout_map[f"{feedforward}_intermediate_dense/bias"] = (model,)
    layout_map[f"{feedforward}_output_dense/kernel"] = (model, data)
    return layout_map
