"""Generation with the walk cache, for KerasHub's GPT-2 task."""

from collections.abc import Callable
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_rwr._cache import WalkCache
from keras_rwr.models.gpt2_decoder import TransformerDecoder

Tensor = Any


class WalkCacheGeneration:
    """Cached generation for a `GPT2CausalLM` whose decoder blocks may have RWR attention.

    The cache is a tuple with one entry a block: the tensors of a `WalkCache` by name, or for a
    stock block KerasHub's tensor `(B, 2, S, N, H)`. KerasHub's samplers carry it through their
    loops.
    """

    backbone: Any
    compute_dtype: Any

    def make_generate_function(self) -> Callable:
        """Creates or returns the compiled generation function, which checks its prompts."""
        # Named, not `super()`: patching binds these methods to stock tasks.
        generate_function = keras_hub.models.GPT2CausalLM.make_generate_function(self)

        def checked_generate_function(inputs: Any, stop_token_ids: Any = None) -> Any:
            check_prompts(inputs["padding_mask"])
            return generate_function(inputs, stop_token_ids=stop_token_ids)

        return checked_generate_function

    def call_with_cache(
        self, token_ids: Tensor, cache: tuple, cache_update_index: Any
    ) -> tuple[Tensor, Tensor, tuple]:
        """Forward pass of new tokens, given the cache of the tokens before them.

        Args:
            token_ids: Int tensor of shape `(B, T)`, the new tokens.
            cache: Tuple with one entry a decoder block, from `empty_cache` or an earlier call. On
                torch, where no gradient is recorded, it is updated in place.
            cache_update_index: Int or int tensor, the position of the first new token. The int 0
                begins the sequences in one forward pass.

        Returns:
            Tuple of the logits `(B, T, vocabulary_size)` and hidden states `(B, T, hidden_dim)` of
            the new tokens, and the updated cache.

        Raises:
            ValueError: If `cache` was made for another model.
        """
        blocks = self.backbone.transformer_layers
        _check_cache(cache, blocks)
        tokens = self.backbone.token_embedding(token_ids)
        positions = self.backbone.position_embedding(tokens, start_index=cache_update_index)
        x = self.backbone.embeddings_add((tokens, positions))
        x = self.backbone.embeddings_dropout(x)
        updated = []
        for block, entry in zip(blocks, cache, strict=True):
            walks = isinstance(block, TransformerDecoder)
            x, entry = block(
                x,
                self_attention_cache=WalkCache(**entry) if walks else entry,
                self_attention_cache_update_index=cache_update_index,
            )
            updated.append(entry.tensors() if walks else entry)
        hidden_states = self.backbone.layer_norm(x)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, tuple(updated)

    def empty_cache(self, batch_size: Any, length: int) -> tuple:
        """A cache without tokens.

        Args:
            batch_size: Int, or scalar tensor.
            length: Int. Number of positions, prompt included.

        Returns:
            Tuple with one entry a decoder block, for `call_with_cache`.
        """
        cache = []
        for block in self.backbone.transformer_layers:
            if isinstance(block, TransformerDecoder):
                cache.append(block.empty_cache(batch_size, length).tensors())
            else:
                heads = self.backbone.num_heads
                shape = (batch_size, 2, length, heads, self.backbone.hidden_dim // heads)
                cache.append(ops.zeros(shape, dtype=self.compute_dtype))
        return tuple(cache)

    def _build_cache(self, token_ids: Tensor) -> tuple[Tensor, tuple]:
        cache = self.empty_cache(*ops.shape(token_ids))
        _, hidden_states, cache = self.call_with_cache(token_ids, cache, 0)
        return hidden_states, cache


def check_prompts(padding_mask: Tensor) -> None:
    """Checks that each row is a prompt of at least one token with padding behind it."""
    mask = ops.convert_to_numpy(padding_mask).astype("bool")
    if not (mask[:, 0].all() and (np.diff(mask.astype("int32"), axis=-1) <= 0).all()):
        raise ValueError(
            "`padding_mask` must be true at the tokens of each prompt, at least one, and false "
            f"behind them. Received: padding_mask={mask.astype('int32').tolist()}"
        )


def _check_cache(cache: Any, blocks: Any) -> None:
    """Checks that there is one entry for each block and that it is of the block's kind."""
    if not isinstance(cache, tuple) or len(cache) != len(blocks):
        received = f"a tuple of {len(cache)}" if isinstance(cache, tuple) else type(cache).__name__
        raise ValueError(
            f"`cache` must be made by `empty_cache`: a tuple of {len(blocks)} entries, one for "
            f"each decoder block. Received: cache={received}"
        )
    for number, (entry, block) in enumerate(zip(cache, blocks, strict=True)):
        if isinstance(entry, dict) != isinstance(block, TransformerDecoder):
            kind = "a dict" if isinstance(block, TransformerDecoder) else "a tensor"
            raise ValueError(
                f"`cache[{number}]` must be {kind} for a block of the class "
                f"{type(block).__module__}.{type(block).__name__}. "
                f"Received: cache[{number}] of the type {type(entry).__name__}"
            )
