"""What the causal language models with RWR attention have in common."""

import gc
from typing import Any, Self

from keras_rwr.models import checkpointing, conversion
from keras_rwr.models.backbone import RWRBackbone
from keras_rwr.models.generation import WalkCacheGeneration


class RWRCausalLM(WalkCacheGeneration):
    """A causal language model of KerasHub on a `RWRBackbone`: the base of one class a family.

    Everything but the backbone and the cache of `generate` is KerasHub's: the preprocessor and the
    tokenizer, `compile`, `fit`, `generate` and `score`.

    Args:
        backbone: A backbone of `backbone_cls`.
        preprocessor: `None`, or a preprocessor of the stock class. Without one, inputs are already
            tokenized.
        **kwargs: `name` and `trainable`.

    Raises:
        TypeError: If `backbone` is of another class.
    """

    backbone_cls: Any
    stock_cls: Any
    preprocessor: Any
    name: str
    presets = conversion.StockPresets()

    def __init__(self, backbone: Any, preprocessor: Any = None, **kwargs: Any):
        if not isinstance(backbone, self.backbone_cls):
            raise TypeError(
                f"`backbone` must be a `{self.backbone_cls.__name__}`. "
                f"Received: backbone={backbone}"
            )
        with checkpointing.blocks_only():
            # KerasHub's tasks take these in different orders.
            super().__init__(**{"backbone": backbone, "preprocessor": preprocessor, **kwargs})

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Self:
        """Loads a preset of the family with its preprocessor, and converts it if it is a stock one.

        A stock preset gives a task with its weights and the RWR options asked for. A preset that
        `save_to_preset` of this class wrote loads as it was saved.

        Args:
            preset: String. A name in `presets` such as `"gpt2_base_en"`, a Kaggle
                handle `"kaggle://..."`, a Hugging Face handle `"hf://..."`, or a local folder.
            load_weights: Bool. Whether to load the weights, instead of drawing them.
            **kwargs: RWR options, such as `window`, and arguments of
                the stock class's `from_preset`, such as `dtype`, or `preprocessor=None` for a task
                that takes tokens.

        Returns:
            A task of this class.

        Raises:
            ValueError: If KerasHub finds no model of the family there, or one with RWR attention
                and other options than those asked for.
            TypeError: If an argument is unknown.

        Example:

        ```python
        language_model = keras_rwr.models.RWRGPT2CausalLM.from_preset("gpt2_base_en", window=64)
        language_model.generate("RWR attention is", max_length=40)
        ```
        """
        options, arguments = conversion.split_arguments(kwargs, cls.stock_cls)
        task = conversion.load_preset(cls.stock_cls, preset, load_weights, arguments)
        backbone = task.backbone
        if isinstance(backbone, RWRBackbone):
            conversion.check_same_options(backbone, options)
        else:
            backbone = cls.backbone_cls.from_backbone(backbone, **options)
        if isinstance(task, cls):
            return task
        task = cls(backbone, cls._from_stock_preprocessor(task.preprocessor), name=task.name)
        # Models are cycles of references: free the weights of the stock one now.
        gc.collect()
        return task

    def to_stock(self, drop_rwr_weights: bool = False) -> Any:
        """Makes a stock task with the weights and the preprocessor of this one.

        Args:
            drop_rwr_weights: Bool. Whether to leave out the weights that only RWR attention has.
                Defaults to `False`; see `RWRBackbone.to_stock`.

        Returns:
            A task of the stock class with copies of the weights, compiled as KerasHub does by
            default.

        Raises:
            ValueError: If there are such weights and `drop_rwr_weights` is false, or LoRA's.
        """
        return self.stock_cls(
            backbone=self.backbone.to_stock(drop_rwr_weights),
            preprocessor=self._to_stock_preprocessor(),
            name=self.name,
        )

    @classmethod
    def _from_stock_preprocessor(cls, preprocessor: Any) -> Any:
        return preprocessor

    def _to_stock_preprocessor(self) -> Any:
        return self.preprocessor
