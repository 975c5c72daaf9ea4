"""GPT-2's transformer with RWR attention."""

import gc
from typing import Any, Self

import keras
import keras_hub

from keras_rwr.models import checkpointing
from keras_rwr.models import gpt2_conversion as conversion
from keras_rwr.models import gpt2_decoder as decoder
from keras_rwr.models.layout import get_layout_map


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2Backbone(keras_hub.models.GPT2Backbone):
    """KerasHub's `GPT2Backbone` with `RWRAttention` in every layer.

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
            negative ones count from the end. `None` means all. The others are LOCAL alone, with
            the same window.
        **rwr_options: Options of the attention layers, such as `window`: the arguments that
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
    presets = conversion.StockPresets()

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        dropout: float = 0.1,
        max_sequence_length: int = 1024,
        dtype: Any = None,
        *,
        name: str | None = None,
        trainable: bool = True,
        rwr_layers: Any = None,
        **rwr_options: Any,
    ):
        if hidden_dim % num_heads:
            raise ValueError(
                "`hidden_dim` must be a multiple of `num_heads`. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}"
            )
        conversion.split_arguments(rwr_options, self.stock_cls)  # refuses unknown names
        rwr_options = conversion.check_model_options(
            {**rwr_options, "rwr_layers": rwr_layers}, num_layers, max_sequence_length
        )
        with checkpointing.blocks_only() as mode:
            super().__init__(
                vocabulary_size,
                num_layers,
                num_heads,
                hidden_dim,
                intermediate_dim,
                dropout,
                max_sequence_length,
                dtype,
                name=name,
                trainable=trainable,
            )
            for number, block in enumerate(self.transformer_layers):
                decoder.convert(block, conversion.layer_options(rwr_options, number))
                block._remat_mode = mode
        decoder.refresh_torch(self)
        # Keras would make lists of its own of those inside.
        self.__dict__["rwr_options"] = rwr_options

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.rwr_options}

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Self:
        """Loads a GPT-2 preset, and converts it if it is a stock one.

        A stock preset gives a model with its weights and the RWR options asked for. A preset that
        `save_to_preset` of this class wrote loads as it was saved.

        Args:
            preset: String. A name in `RWRGPT2Backbone.presets` such as `"gpt2_base_en"`, a Kaggle
                handle `"kaggle://..."`, a Hugging Face handle `"hf://..."`, or a local folder.
            load_weights: Bool. Whether to load the weights, instead of drawing them.
            **kwargs: RWR options, such as `window`, and arguments of
                `keras_hub.models.GPT2Backbone.from_preset`, such as `dtype`.

        Returns:
            A `RWRGPT2Backbone`.

        Raises:
            ValueError: If KerasHub finds no GPT-2 there, or one with RWR attention and other
                options than those asked for.
            TypeError: If an argument is unknown.

        Example:

        ```python
        backbone = keras_rwr.models.RWRGPT2Backbone.from_preset("gpt2_base_en", window=64)
        ```
        """
        options, arguments = conversion.split_arguments(kwargs, cls.stock_cls)
        dtype = conversion.quantized_dtype(preset)
        if dtype is not None:
            arguments.setdefault("dtype", dtype)
        backbone = conversion.load_preset(cls.stock_cls, preset, load_weights, arguments)
        if isinstance(backbone, RWRGPT2Backbone):
            conversion.check_same_options(backbone, options)
            return backbone
        new = cls.from_backbone(backbone, **options)
        # Models are cycles of references: free the weights of the stock one now.
        del backbone
        gc.collect()
        return new

    @classmethod
    def from_backbone(cls, backbone: keras_hub.models.GPT2Backbone, **rwr_options: Any) -> Self:
        """Makes a backbone with RWR attention and the weights of a stock one.

        Args:
            backbone: A `keras_hub.models.GPT2Backbone`, which may be quantised.
            **rwr_options: `rwr_layers` and options of RWR attention, such as `window`. Other
                arguments are those of `backbone`; so are the options, where it has RWR attention
                already or is patched.

        Returns:
            A `RWRGPT2Backbone` with copies of the weights.

        Raises:
            TypeError: If `backbone` is not a `GPT2Backbone`, or an option is unknown.
            ValueError: If `backbone` has weights that the new one has not, such as LoRA's.

        Example:

        ```python
        stock = keras_hub.models.GPT2Backbone.from_preset("gpt2_base_en")
        backbone = keras_rwr.models.RWRGPT2Backbone.from_backbone(stock, edge_weight="exponential")
        ```
        """
        if not isinstance(backbone, keras_hub.models.GPT2Backbone):
            raise TypeError(
                "`backbone` must be a `keras_hub.models.GPT2Backbone`. "
                f"Received: backbone={backbone}"
            )
        config = {**backbone.get_config(), **conversion.patched_options(backbone), **rwr_options}
        new = cls.from_config(config)
        conversion.copy_weights(backbone, new)
        return new

    def to_stock(self, drop_rwr_weights: bool = False) -> keras_hub.models.GPT2Backbone:
        """Makes a stock backbone with the weights of this one.

        Args:
            drop_rwr_weights: Bool. Whether to leave out the weights that only RWR attention has.
                Defaults to `False`.

        Returns:
            A `keras_hub.models.GPT2Backbone` with copies of the weights. Its attention is the
            full one, so its outputs differ, unless `window` is at least the context and
            `lens_strength` 0.

        Raises:
            ValueError: If there are such weights and `drop_rwr_weights` is false, or LoRA's.
        """
        dropped = [weight.path for weight in self._rwr_weights()]
        if dropped and not drop_rwr_weights:
            raise ValueError(
                "A stock GPT-2 has no place for the weights of RWR attention: pass "
                f"`drop_rwr_weights=True` to leave them out. Received: weights {dropped}"
            )
        config = {k: v for k, v in self.get_config().items() if k not in self.rwr_options}
        stock = self.stock_cls.from_config(config)
        conversion.copy_weights(self, stock, dropped)
        return stock

    def freeze_stock_weights(self) -> None:
        """Makes the weights that only RWR attention has the only trainable ones.

        Compile the task afterwards, so that training takes note.

        Raises:
            ValueError: If the options give the model no such weight.
        """
        weights = self._rwr_weights()
        if not weights:
            raise ValueError(
                "Without weights of its own, RWR attention has nothing to train: use an option "
                "that adds some, such as `edge_weight='exponential'` or `stopping='gated'`. "
                f"Received: rwr_options={self.rwr_options}"
            )
        self.trainable = False
        self._trainable = True
        for weight in weights:
            weight.trainable = True

    get_layout_map = staticmethod(get_layout_map)

    def _rwr_weights(self) -> list[keras.Variable]:
        layers = [block._self_attention_layer for block in self.transformer_layers]
        return [weight for layer in layers for weight in layer.extra_weights]
