"""GPT-2 with RWR attention as a language model."""

from typing import Any

import keras
import keras_hub

from keras_rwr.models import gpt2_preprocessor as preprocessing
from keras_rwr.models.causal_lm import RWRCausalLM
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2CausalLM(RWRCausalLM, keras_hub.models.GPT2CausalLM):
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

    @classmethod
    def _from_stock_preprocessor(cls, preprocessor: Any) -> Any:
        return preprocessing.convert(preprocessor, preprocessing.TO_RWR)

    def _to_stock_preprocessor(self) -> Any:
        return preprocessing.convert(self.preprocessor, preprocessing.TO_STOCK)
