"""GPT-2's transformer with RWR attention."""

import keras
import keras_hub

from keras_rwr.models.backbone import RWRBackbone
from keras_rwr.models.layout import get_layout_map


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2Backbone(RWRBackbone, keras_hub.models.GPT2Backbone):
    """KerasHub's `GPT2Backbone` with RWR attention.

    Weights have the names and paths of `GPT2Backbone`, so a stock `.weights.h5` file loads with
    `load_weights`; see also `from_backbone`. Options that add weights (such as
    `edge_weight="exponential"`) leave them at their initial values then. With `window` at least
    the context and `lens_strength=0` the outputs are those of `GPT2Backbone`.

    Made inside `keras.RematScope()`, it keeps only the inputs of each transformer layer for the
    backward pass, which runs the layer again: gradient checkpointing.

    Args:
        vocabulary_size: Int. Size of the token vocabulary.
        num_layers: Int. Number of transformer layers.
        num_heads: Int. Number of attention heads in each.
        hidden_dim: Int. Size of the hidden states.
        intermediate_dim: Int. Hidden size of the feedforward networks.
        dropout: Float in [0, 1). Dropout rate. Defaults to 0.1.
        max_sequence_length: Int. Number of positions. Defaults to 1024.
        dtype: String or `keras.DTypePolicy` of all layers.
        name: String.
        trainable: Bool.
        rwr_layers: `None` or list of ints, the numbers of the transformer layers that walk;
            negative ones count from the end. `None` means all.
        rwr_others: `"local"` (the default): the others are LOCAL alone, with the same window.
            `"stock"`: they keep the attention of `GPT2Backbone`.
        **rwr_options: Options of RWR attention, such as `window`: the arguments that
            `keras_rwr.RWRAttention` has besides those of `keras.layers.MultiHeadAttention`.

    Call arguments:
        inputs: Dict of `"token_ids"`, an int tensor of shape `(B, S)`, and `"padding_mask"`, of the
            same shape, true at real tokens.

    Returns:
        Tensor of shape `(B, S, hidden_dim)`.

    Raises:
        ValueError: If an argument is outside its range or two do not fit together.
        TypeError: If an argument is of the wrong type, or unknown.

    Example:

    ```python
    # Every second layer walks, on one graph for all heads.
    backbone = keras_rwr.models.RWRGPT2Backbone(
        vocabulary_size=512,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        rwr_layers=[1, 3],
        graph_heads=1,
        edge_weight="exponential",
        topk=8,
        neighbor_block=1,
    )
    ```
    """

    stock_cls = keras_hub.models.GPT2Backbone
    get_layout_map = staticmethod(get_layout_map)
