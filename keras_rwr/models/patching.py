"""RWR attention in a stock GPT-2 that exists already, in place."""

import gc
import sys
import types
from typing import Any

import keras
import keras_hub

from keras_rwr.models import attention, conversion
from keras_rwr.models.attention import WalkingBlock, refresh_torch
from keras_rwr.models.generation import WalkCacheGeneration
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone

_GENERATION = ("make_generate_function", "call_with_cache", "empty_cache", "_build_cache")
_FUNCTIONS = ("train_function", "test_function", "predict_function", "generate_function")
_LOOPS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


def patch_gpt2_with_rwr(model: Any, *, layers: Any = None, **rwr_options: Any) -> Any:
    """Puts RWR attention into a stock GPT-2 in place.

    The model may be compiled, trained, with LoRA, or quantised. Its projections stay the same
    layers: their weights, paths and optimizer state too. Options that add weights (such as
    `edge_weight="exponential"`) add them at their initial values, trainable if the attention layer
    is, with new state in the optimizer. Every model that contains the backbone is patched with it,
    and compiles its functions anew at its next use. `generate` then uses the walk cache. Undo it
    with `unpatch_gpt2`.

    **What does not survive saving** is the patch: `.keras` files and presets hold a stock model,
    which loads with full attention, or not at all where options added weights. To save a model with
    RWR attention, convert it: `RWRGPT2Backbone.from_backbone(model)` takes a patched backbone's
    weights and options. Weights files by themselves (`save_weights`) load into a model patched the
    same way.

    Args:
        model: A `keras_hub.models.GPT2Backbone`, or a task that has one, such as `GPT2CausalLM`.
        layers: `None` or list of ints, the numbers of the transformer layers to patch; negative
            ones count from the end. `None` means all. Layers patched earlier keep their options.
        **rwr_options: Options of RWR attention, such as `window`; see `keras_rwr.RWRAttention`.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is not a stock GPT-2, or an option is of the wrong type or unknown.
        ValueError: If a layer does not exist or is patched already, an option is outside its range
            or does not fit the model, or the model is in `fit`, `evaluate` or `predict`.

    Example:

    ```python
    language_model = keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")
    keras_rwr.models.patch_gpt2_with_rwr(language_model, layers=[0, 1, 2], window=64)
    ```
    """
    backbone = _stock_backbone(model)
    conversion.check_options(rwr_options, backbone.max_sequence_length, others=["layers"])
    decoders = _choose(backbone.transformer_layers, layers)
    models = _models_with(backbone)
    _refuse_while_running(models)
    for decoder in decoders:
        conversion.convert_block(backbone, decoder, rwr_options)
    for owner in models:
        if isinstance(owner, keras_hub.models.GPT2CausalLM):
            for name in _GENERATION:
                method = getattr(WalkCacheGeneration, name)
                vars(owner)[name] = types.MethodType(method, owner)
        _renew(owner)
    return model


def unpatch_gpt2(model: Any) -> Any:
    """Undoes `patch_gpt2_with_rwr` on all layers.

    The weights stay as they are now; those that only RWR attention has are dropped.

    Args:
        model: The backbone or task that was patched.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is not a stock GPT-2.
        ValueError: If nothing is patched, or the model is in `fit`, `evaluate` or `predict`.
    """
    backbone = _stock_backbone(model)
    decoders: Any = [x for x in backbone.transformer_layers if isinstance(x, WalkingBlock)]
    if not decoders:
        raise ValueError(
            "`model` must have layers patched by `patch_gpt2_with_rwr`. "
            f"Received: model={model} with none"
        )
    models = _models_with(backbone)
    _refuse_while_running(models)
    for decoder in decoders:
        attention.restore(decoder, decoder._self_attention_layer)
    for owner in models:
        for name in _GENERATION:
            vars(owner).pop(name, None)
        _renew(owner)
    return model


def _stock_backbone(model: Any) -> keras_hub.models.GPT2Backbone:
    backbone = model.backbone if isinstance(model, keras_hub.models.Task) else model
    if isinstance(backbone, RWRGPT2Backbone):
        raise TypeError(
            "`model` must be a stock GPT-2, and this one has RWR attention already: change its "
            f"options with `RWRGPT2Backbone.from_backbone`. Received: model={model}"
        )
    if not isinstance(backbone, keras_hub.models.GPT2Backbone):
        raise TypeError(
            "`model` must be a `keras_hub.models.GPT2Backbone` or a task that has one. "
            f"Received: model={model}"
        )
    return backbone


def _choose(decoders: list, layers: Any) -> list:
    """The decoders of the given numbers, none of them patched."""
    numbers = list(range(len(decoders)))
    if layers is not None:
        numbers = conversion.layer_numbers("layers", layers, len(decoders))
    if not numbers:
        raise ValueError(f"`layers` must be one or more layers. Received: layers={layers!r}")
    patched = [x for x in numbers if isinstance(decoders[x], WalkingBlock)]
    if patched:
        raise ValueError(
            "`layers` must be stock layers: call `unpatch_gpt2` first to patch them anew. "
            f"Received: layers={layers!r}, patched already: {patched}"
        )
    return [decoders[x] for x in numbers]


def _models_with(backbone: Any) -> list[keras.Model]:
    """The backbone and all models around it, whose compiled functions have it inside."""
    models = [x for x in gc.get_objects() if issubclass(type(x), keras.Model)]
    # A model whose constructor failed may still be around, and has no layers.
    models = [x for x in models if hasattr(x, "_layers")]
    return [x for x in models if any(layer is backbone for layer in x._flatten_layers())]


def _refuse_while_running(models: list[keras.Model]) -> None:
    frame: Any = sys._getframe()
    while frame is not None:
        name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if name in _LOOPS and any(owner is model for model in models):
            raise ValueError(
                f"`model` must not be running: patch or unpatch before `{name}`, or between calls "
                f"of it. Received: model in {type(owner).__name__}.{name}()"
            )
        frame = frame.f_back


def _renew(model: keras.Model) -> None:
    """Forgets a model's compiled functions, and fits its optimizer's state to its weights."""
    for name in _FUNCTIONS:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    refresh_torch(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return
    known = [id(variable) for variable in optimizer._trainable_variables]
    variables = [x for x in model.variables if x.trainable or id(x) in known]
    if [id(variable) for variable in variables] == known:
        return
    state = {variable.path: variable for variable in optimizer.variables}
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(variables)
    for variable in new.variables:
        if variable.path in state:
            variable.assign(state[variable.path])
    # It stays the object that callbacks and users hold.
    vars(optimizer).clear()
    vars(optimizer).update(vars(new))
