"""GPT-2 with RWR attention as a language model."""

import gc
from typing import Any, Self

import keras
import keras_hub

from keras_rwr.models import checkpointing
from keras_rwr.models import gpt2_conversion as conversion
from keras_rwr.models import gpt2_preprocessor as preprocessing
from keras_rwr.models.generation import WalkCacheGeneration
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2CausalLM(WalkCacheGeneration, keras_hub.models.GPT2CausalLM):
    """KerasHub's `GPT2CausalLM` on a `RWRGPT2Backbone`.

    Everything but the backbone and the cache of `generate` is KerasHub's: the preprocessor and the
    tokenizer, `compile`, `fit`, `generate` and `score`. A new token takes work in each layer that
    does not depend on the tokens before it, besides one score for each block of
    `neighbor_block` of them; see `RWRAttention.empty_cache`.

    The weights of a stock task come with `from_preset`, or with its backbone, by
    `RWRGPT2Backbone.from_backbone` or `backbone.load_weights`: Keras's file of a whole task names
    the backbone after its class, so that a stock one raises here.

    Args:
        backbone: A `RWRGPT2Backbone`.
        preprocessor: `None` or a `RWRGPT2CausalLMPreprocessor`; KerasHub's
            `GPT2CausalLMPreprocessor` does as well. Without one, inputs are already tokenized.
        **kwargs: `name` and `trainable`.

    Raises:
        TypeError: If `backbone` is not a `RWRGPT2Backbone`.

    Example:

    ```python
    backbone = keras_rwr.models.RWRGPT2Backbone(
        vocabulary_size=512, num_layers=2, num_heads=4, hidden_dim=64, intermediate_dim=128
    )
    language_model = keras_rwr.models.RWRGPT2CausalLM(backbone)
    language_model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[5, 7, 2, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]]),
    }
    language_model.generate(prompt, stop_token_ids=None)["token_ids"]  # (1, 8)
    ```
    """

    backbone_cls = RWRGPT2Backbone
    preprocessor_cls = preprocessing.RWRGPT2CausalLMPreprocessor
    stock_cls = keras_hub.models.GPT2CausalLM
    presets = conversion.StockPresets()

    def __init__(self, backbone: RWRGPT2Backbone, preprocessor: Any = None, **kwargs: Any):
        if not isinstance(backbone, RWRGPT2Backbone):
            raise TypeError(
                f"`backbone` must be a `RWRGPT2Backbone`. Received: backbone={backbone}"
            )
        with checkpointing.blocks_only():
            super().__init__(backbone=backbone, preprocessor=preprocessor, **kwargs)

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Self:
        """Loads a GPT-2 preset with its preprocessor, and converts it if it is a stock one.

        A stock preset gives a task with its weights and the RWR options asked for. A preset that
        `save_to_preset` of this class wrote loads as it was saved.

        Args:
            preset: String. A name in `RWRGPT2CausalLM.presets` such as `"gpt2_base_en"`, a Kaggle
                handle `"kaggle://..."`, a Hugging Face handle `"hf://..."`, or a local folder.
            load_weights: Bool. Whether to load the weights, instead of drawing them.
            **kwargs: RWR options, such as `window`, and arguments of
                `keras_hub.models.GPT2CausalLM.from_preset`, such as `dtype`, or
                `preprocessor=None` for a task that takes tokens.

        Returns:
            A `RWRGPT2CausalLM`.

        Raises:
            ValueError: If KerasHub finds no GPT-2 there, or one with RWR attention and other
                options than those asked for.
            TypeError: If an argument is unknown.

        Example:

        ```python
        language_model = keras_rwr.models.RWRGPT2CausalLM.from_preset("gpt2_base_en", window=64)
        language_model.generate("RWR attention is", max_length=40)
        ```
        """
        options, arguments = conversion.split_arguments(kwargs, cls.stock_cls, "dtype")
        task = conversion.load_preset(cls.stock_cls, preset, load_weights, arguments)
        backbone = task.backbone
        if isinstance(backbone, RWRGPT2Backbone):
            conversion.check_same_options(backbone, options)
        else:
            backbone = RWRGPT2Backbone.from_backbone(backbone, **options)
        if isinstance(task, cls):
            return task
        preprocessor = preprocessing.convert(task.preprocessor, preprocessing.TO_RWR)
        task = cls(backbone, preprocessor, name=task.name)
        # Models are cycles of references: free the weights of the stock one now.
        gc.collect()
        return task

    def to_stock(self, drop_rwr_weights: bool = False) -> keras_hub.models.GPT2CausalLM:
        """Makes a stock task with the weights and the preprocessor of this one.

        Args:
            drop_rwr_weights: Bool. Whether to leave out the weights that only RWR attention has.
                Defaults to `False`; see `RWRGPT2Backbone.to_stock`.

        Returns:
            A `keras_hub.models.GPT2CausalLM` with copies of the weights, compiled as KerasHub does
            by default.

        Raises:
            ValueError: If there are such weights and `drop_rwr_weights` is false, or LoRA's.
        """
        return self.stock_cls(
            self.backbone.to_stock(drop_rwr_weights),
            preprocessing.convert(self.preprocessor, preprocessing.TO_STOCK),
            name=self.name,
        )
