"""KerasHub models with RWR attention. This needs `keras-hub`; importing keras_rwr does not.

`convert` makes one of a stock model. Besides the classes listed here there are a
`RWR{family}Backbone` and a `RWR{family}CausalLM` for each other family.
"""

from keras_rwr.models.convert import CLASSES, convert
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone
from keras_rwr.models.gpt2_causal_lm import RWRGPT2CausalLM
from keras_rwr.models.gpt2_preprocessor import (
    RWRGPT2CausalLMPreprocessor,
    RWRGPT2Preprocessor,
    RWRGPT2Tokenizer,
)
from keras_rwr.models.patching import patch_gpt2_with_rwr, unpatch_gpt2

globals().update(CLASSES)

__all__ = [
    "RWRGPT2Backbone",
    "RWRGPT2CausalLM",
    "RWRGPT2CausalLMPreprocessor",
    "RWRGPT2Preprocessor",
    "RWRGPT2Tokenizer",
    "convert",
    "patch_gpt2_with_rwr",
    "unpatch_gpt2",
]
