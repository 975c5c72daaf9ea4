"""Tokenizer and preprocessors of GPT-2 with RWR attention.

They do what KerasHub's do. They are classes of their own because KerasHub looks for the classes of
a preset by its backbone: so it finds these for our presets, and its own for its own.
"""

from typing import Any, Self

import keras
import keras_hub

from keras_rwr.models.conversion import StockPresets
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone


class _Converted:
    """`from_preset` for presets of KerasHub's `stock_cls` and ours."""

    stock_cls: Any
    presets = StockPresets()

    @classmethod
    def from_preset(cls, preset: str, **kwargs: Any) -> Self:
        """Loads it from a stock GPT-2 preset or one of ours.

        Args:
            preset: String, a name in `presets`, a Kaggle or Hugging Face handle, or a folder.
            **kwargs: Further arguments of KerasHub's `from_preset`.
        """
        return convert(cls.stock_cls.from_preset(preset, **kwargs), TO_RWR)


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2Tokenizer(_Converted, keras_hub.models.GPT2Tokenizer):
    """KerasHub's `GPT2Tokenizer` for `RWRGPT2Backbone`."""

    backbone_cls = RWRGPT2Backbone
    stock_cls = keras_hub.models.GPT2Tokenizer


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2Preprocessor(_Converted, keras_hub.models.GPT2Preprocessor):
    """KerasHub's `GPT2Preprocessor` for `RWRGPT2Backbone`."""

    backbone_cls = RWRGPT2Backbone
    tokenizer_cls = RWRGPT2Tokenizer
    stock_cls = keras_hub.models.GPT2Preprocessor


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2CausalLMPreprocessor(_Converted, keras_hub.models.GPT2CausalLMPreprocessor):
    """KerasHub's `GPT2CausalLMPreprocessor` for `RWRGPT2CausalLM`."""

    backbone_cls = RWRGPT2Backbone
    tokenizer_cls = RWRGPT2Tokenizer
    stock_cls = keras_hub.models.GPT2CausalLMPreprocessor


_OURS = (RWRGPT2Tokenizer, RWRGPT2Preprocessor, RWRGPT2CausalLMPreprocessor)
TO_RWR = {cls.stock_cls: cls for cls in _OURS}
TO_STOCK = {cls: cls.stock_cls for cls in _OURS}


def convert(layer: Any, classes: dict[Any, Any]) -> Any:
    """Makes a tokenizer or preprocessor of another class that does the same.

    Args:
        layer: `None`, or a tokenizer or preprocessor.
        classes: `TO_RWR` or `TO_STOCK`.

    Returns:
        A new layer; `layer` itself where its class has no counterpart.
    """
    cls = classes.get(type(layer))
    if cls is None:
        return layer
    config = layer.get_config()
    if isinstance(layer, keras_hub.models.GPT2Tokenizer):
        # These are files, and no part of the configuration.
        config |= {"vocabulary": layer.vocabulary, "merges": layer.merges}
    else:
        config["tokenizer"] = convert(layer.tokenizer, classes)
    return cls.from_config(config)
