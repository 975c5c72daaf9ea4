"""GPT-2 with RWR attention as a language model."""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2CausalLM(keras_hub.models.GPT2CausalLM):
    """KerasHub's `GPT2CausalLM` on a `RWRGPT2Backbone`.

    Everything but the backbone is KerasHub's: the preprocessor and the tokenizer, `compile`, `fit`,
    `generate` and `score`. `generate` keeps no cache of keys and values: each new token takes a
    forward pass over the whole sequence, so it costs as much as the model does on `max_length`
    tokens.

    The weights of a stock task come with its backbone, by `RWRGPT2Backbone.from_backbone` or
    `backbone.load_weights`: Keras's file of a whole task names the backbone after its class, so
    that a stock one raises here.

    Args:
        backbone: A `RWRGPT2Backbone`.
        preprocessor: `None` or a `keras_hub.models.GPT2CausalLMPreprocessor`. Without one, inputs
            are already tokenized.
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
    preprocessor_cls = keras_hub.models.GPT2CausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        if not isinstance(backbone, RWRGPT2Backbone):
            raise TypeError(
                f"`backbone` must be a `RWRGPT2Backbone`. Received: backbone={backbone}"
            )
        super().__init__(backbone=backbone, preprocessor=preprocessor, **kwargs)

    def make_generate_function(self):
        """Creates or returns the compiled generation function, which checks its prompts."""
        generate_function = super().make_generate_function()

        def checked_generate_function(inputs, stop_token_ids=None):
            _check_prompts(inputs["padding_mask"])
            return generate_function(inputs, stop_token_ids=stop_token_ids)

        return checked_generate_function

    def call_with_cache(self, token_ids, cache, cache_update_index):
        """Forward pass of new tokens, given the tokens before them.

        The cache holds the ids of all tokens, and the whole model runs on them. What stands behind
        the new tokens does not matter, since every layer is causal.

        Args:
            token_ids: Int tensor of shape `(B, T)`, the new tokens.
            cache: Int tensor of shape `(B, S)`, the ids of all tokens.
            cache_update_index: Int or int tensor, the position of the first new token.

        Returns:
            Tuple of the logits `(B, T, vocabulary_size)` and hidden states `(B, T, hidden_dim)` of
            the new tokens, and the updated cache.
        """
        if len(cache.shape) != 2 or keras.backend.is_float_dtype(
            keras.backend.standardize_dtype(cache.dtype)
        ):
            raise ValueError(
                "`cache` must be an int tensor of shape (B, S), the token ids. "
                f"Received: cache of shape {tuple(cache.shape)} and dtype {cache.dtype}"
            )
        cache = ops.slice_update(cache, [0, cache_update_index], ops.cast(token_ids, cache.dtype))
        hidden_states = self.backbone(
            {"token_ids": cache, "padding_mask": ops.ones_like(cache)}, training=False
        )  # (B, S, hidden_dim)
        batch, length = ops.shape(token_ids)
        hidden_states = ops.slice(
            hidden_states, [0, cache_update_index, 0], [batch, length, self.backbone.hidden_dim]
        )
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, cache

    def _build_cache(self, token_ids):
        _, hidden_states, cache = self.call_with_cache(token_ids, ops.zeros_like(token_ids), 0)
        return hidden_states, cache


def _check_prompts(padding_mask):
    """Checks that each row is a prompt of at least one token with padding behind it."""
    mask = ops.convert_to_numpy(padding_mask).astype("bool")
    if not (mask[:, 0].all() and (np.diff(mask.astype("int32"), axis=-1) <= 0).all()):
        raise ValueError(
            "`padding_mask` must be true at the tokens of each prompt, at least one, and false "
            f"behind them. Received: padding_mask={mask.astype('int32').tolist()}"
        )
