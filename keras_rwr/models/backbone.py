"""What the backbones with RWR attention have in common."""

import gc
import inspect
from collections.abc import Mapping
from typing import Any, Self

from keras_rwr.models import attention, checkpointing, conversion
from keras_rwr.models.families import Family, family_of


class RWRBackbone:
    """A backbone of KerasHub with RWR attention: the base of one class for each family.

    A class `RWRLlamaBackbone(RWRBackbone, LlamaBackbone)` takes the arguments of `LlamaBackbone`,
    and these besides. Weights have the names and paths of the stock class, so a stock
    `.weights.h5` file loads with `load_weights`; see also `from_backbone`. Options that add weights
    (such as `edge_weight="exponential"`) leave them at their initial values then. With `window` at
    least the context and `lens_strength=0` the outputs are those of the stock class.

    Made inside `keras.RematScope()`, it keeps only the inputs of each decoder block for the
    backward pass, which runs the block again: gradient checkpointing.

    Args:
        *args: Arguments of the stock class.
        rwr_layers: `None` or list of ints, the numbers of the decoder blocks that walk; negative
            ones count from the end. `None` means all.
        rwr_others: `"local"` (the default): the others are LOCAL alone, with the same window.
            `"stock"`: they keep the attention of the stock class.
        rwr_packed: Bool. Whether the input `"padding_mask"` numbers the documents of each row from
            1 on, with 0 at padding, as `keras_rwr.data.pack` does: tokens of different documents do
            not see each other. Needs `neighbor_block=1` or `topk=0`. Defaults to `False`.
        **kwargs: Arguments of the stock class, and options of RWR attention, such as `window`: the
            arguments that `keras_rwr.RWRAttention` has besides those of
            `keras.layers.MultiHeadAttention`.

    Raises:
        ValueError: If an argument is outside its range, two do not fit together, or the model's
            attention does something that RWR attention does not.
        TypeError: If an argument is of the wrong type, or unknown.
    """

    stock_cls: Any
    from_config: Any
    transformer_layers: Any
    rwr_options: dict[str, Any]
    presets = conversion.StockPresets()

    def __init__(
        self,
        *args: Any,
        rwr_layers: Any = None,
        rwr_others: str = "local",
        rwr_packed: bool = False,
        **kwargs: Any,
    ):
        options, arguments = conversion.split_arguments(kwargs, self.stock_cls)
        bound = inspect.signature(self.stock_cls).bind(*args, **arguments)
        bound.apply_defaults()
        _check_stock_arguments(bound.arguments, self.family, rwr_packed)
        options |= {
            "rwr_layers": rwr_layers,
            "rwr_others": rwr_others,
            "rwr_packed": rwr_packed,
        }
        rwr_options = conversion.check_model_options(
            options, bound.arguments["num_layers"], bound.arguments.get("max_sequence_length")
        )
        with checkpointing.blocks_only() as mode:
            super().__init__(*args, **arguments)
            for number, block in enumerate(self.transformer_layers):
                block._remat_mode = mode
                layer_options = conversion.layer_options(rwr_options, number)
                if layer_options is not None:
                    conversion.convert_block(self, block, layer_options, rwr_packed)
        attention.refresh_torch(self)
        # Keras would make lists of its own of those inside.
        self.__dict__["rwr_options"] = rwr_options

    @property
    def family(self) -> Family:
        """Where this family keeps what RWR attention needs."""
        return family_of(self.stock_cls)

    def get_config(self) -> dict[str, Any]:
        config = self.stock_cls.get_config(self)
        return {**config, **conversion.left_out(self, self.stock_cls), **self.rwr_options}

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Self:
        """Loads a preset of the family, and converts it if it is a stock one.

        A stock preset gives a model with its weights and the RWR options asked for. A preset that
        `save_to_preset` of this class wrote loads as it was saved.

        Args:
            preset: String. A name in `presets` such as `"gpt2_base_en"`, a Kaggle handle
                `"kaggle://..."`, a Hugging Face handle `"hf://..."`, or a local folder.
            load_weights: Bool. Whether to load the weights, instead of drawing them.
            **kwargs: RWR options, such as `window`, and arguments of
                the stock class's `from_preset`, such as `dtype`.

        Returns:
            A backbone of this class.

        Raises:
            ValueError: If KerasHub finds no model of the family there, or one with RWR attention
                and other options than those asked for.
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
        if isinstance(backbone, cls):
            conversion.check_same_options(backbone, options)
            return backbone
        new = cls.from_backbone(backbone, **options)
        # Models are cycles of references: free the weights of the stock one now.
        del backbone
        gc.collect()
        return new

    @classmethod
    def from_backbone(cls, backbone: Any, **rwr_options: Any) -> Self:
        """Makes a backbone with RWR attention and the weights of a stock one.

        Args:
            backbone: A backbone of the stock class, which may be quantised.
            **rwr_options: `rwr_layers`, `rwr_others` and options of RWR attention, such as
                `window`. Other arguments are those of `backbone`; so are the options, where it has
                RWR attention already or is patched.

        Returns:
            A backbone of this class with copies of the weights.

        Raises:
            TypeError: If `backbone` is not of the stock class, or an option is unknown.
            ValueError: If `backbone` has weights that the new one has not, such as LoRA's.

        Example:

        ```python
        stock = keras_hub.models.GPT2Backbone.from_preset("gpt2_base_en")
        backbone = keras_rwr.models.RWRGPT2Backbone.from_backbone(stock, edge_weight="exponential")
        ```
        """
        if not isinstance(backbone, cls.stock_cls):
            raise TypeError(
                f"`backbone` must be a `keras_hub.models.{cls.stock_cls.__name__}`. "
                f"Received: backbone={backbone}"
            )
        config = {
            **backbone.get_config(),
            **conversion.left_out(backbone, cls.stock_cls),
            **conversion.patched_options(backbone),
            **rwr_options,
        }
        new = cls.from_config(config)
        conversion.copy_weights(backbone, new)
        return new

    def to_stock(self, drop_rwr_weights: bool = False) -> Any:
        """Makes a stock backbone with the weights of this one.

        Args:
            drop_rwr_weights: Bool. Whether to leave out the weights that only RWR attention has.
                Defaults to `False`.

        Returns:
            A backbone of the stock class with copies of the weights. Its attention is the full
            one, so its outputs differ, unless `window` is at least the context and `lens_strength`
            0.

        Raises:
            ValueError: If there are such weights and `drop_rwr_weights` is false, or LoRA's.
        """
        dropped = [weight.path for weight in conversion.walk_weights(self)]
        if dropped and not drop_rwr_weights:
            raise ValueError(
                "A stock model has no place for the weights of RWR attention: pass "
                f"`drop_rwr_weights=True` to leave them out. Received: weights {dropped}"
            )
        config = {k: v for k, v in self.get_config().items() if k not in self.rwr_options}
        stock = self.stock_cls.from_config(config)
        conversion.copy_weights(self, stock, drop_walk=True)
        return stock

    def freeze_stock_weights(self) -> None:
        """Makes the weights that only RWR attention has the only trainable ones.

        Compile the task afterwards, so that training takes note.

        Raises:
            ValueError: If the options give the model no such weight.
        """
        weights = conversion.walk_weights(self)
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


def _check_stock_arguments(arguments: Mapping[str, Any], family: Family, is_packed: bool) -> None:
    """Checks the arguments of a stock class where RWR attention asks for more than it does."""
    size, heads = arguments["hidden_dim"], arguments.get("num_heads", 1)
    if size % heads:
        raise ValueError(
            "`hidden_dim` must be a multiple of `num_heads`. "
            f"Received: hidden_dim={size}, num_heads={heads}"
        )
    if is_packed and family.weighs_by_mask:
        raise ValueError(
            "`rwr_packed` must be false for this family: the loss of its experts weighs each token "
            f"by its padding mask. Received: rwr_packed={is_packed}"
        )
    for name in family.impossible:
        if arguments.get(name):
            raise ValueError(
                f"`{name}` must be off: RWR attention has nothing like it. "
                f"Received: {name}={arguments[name]}"
            )
