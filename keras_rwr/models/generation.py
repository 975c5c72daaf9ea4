"""Generation with the walk cache, for KerasHub's causal language models."""

from collections.abc import Callable
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_rwr._cache import WalkCache
from keras_rwr.models.attention import WalkingBlock, head_sizes
from keras_rwr.models.families import family_of

Tensor = Any


class WalkCacheGeneration:
    """Cached generation for a causal language model whose blocks may have RWR attention.

    The cache is a tuple with one entry a block: the tensors of a `WalkCache` by name, or for a
    stock block KerasHub's, keys and values of shape `(B, S, M, H)`. KerasHub's samplers carry it
    through their loops.
    """

    backbone: Any
    compute_dtype: Any

    def make_generate_function(self) -> Callable:
        """Creates or returns the compiled generation function, which checks its prompts."""
        # Named, not `super()`: patching binds these methods to stock tasks.
        generate_function = keras_hub.models.CausalLM.make_generate_function(self)

        def checked_generate_function(inputs: Any, stop_token_ids: Any = None) -> Any:
            check_prompts(inputs["padding_mask"])
            return generate_function(inputs, stop_token_ids=stop_token_ids)

        return checked_generate_function

    def call_with_cache(
        self, token_ids: Tensor, cache: tuple, cache_update_index: Any, **others: Any
    ) -> tuple[Tensor, Tensor, tuple]:
        """Forward pass of new tokens, given the cache of the tokens before them.

        Args:
            token_ids: Int tensor of shape `(B, T)`, the new tokens.
            cache: Tuple with one entry a decoder block, from `empty_cache` or an earlier call. On
                torch, where no gradient is recorded, it is updated in place.
            cache_update_index: Int or int tensor, the position of the first new token. The int 0
                begins the sequences in one forward pass.
            **others: What some of KerasHub's models pass besides. The masks are not needed: a
                token of a prompt is written again as it was.

        Returns:
            Tuple of the logits `(B, T, vocabulary_size)` and hidden states `(B, T, hidden_dim)` of
            the new tokens, and the updated cache.

        Raises:
            ValueError: If `cache` was made for another model.
        """
        backbone, family = self.backbone, family_of(type(self.backbone))
        _check_cache(cache, backbone.transformer_layers)
        x = family.embed(backbone, token_ids, cache_update_index)
        updated = []
        for block, entry in zip(backbone.transformer_layers, cache, strict=True):
            walks = isinstance(block, WalkingBlock)
            given = WalkCache(**entry) if walks else entry
            x, entry = family.step(block, x, given, cache_update_index)
            updated.append(entry.tensors() if walks else entry)
        hidden_states = getattr(backbone, family.norm)(x)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, tuple(updated)

    def empty_cache(self, batch_size: Any, length: int) -> tuple:
        """A cache without tokens.

        Args:
            batch_size: Int, or scalar tensor.
            length: Int. Number of positions, prompt included.

        Returns:
            Tuple with one entry a decoder block, for `call_with_cache`.
        """
        family = family_of(type(self.backbone))
        cache = []
        for block in self.backbone.transformer_layers:
            attention = family.attention_of(block)
            if isinstance(block, WalkingBlock):
                cache.append(attention.empty_cache(batch_size, length).tensors())
                continue
            sizes = head_sizes(family.kind, attention, self.backbone.hidden_dim)
            shape = (batch_size, length, sizes["kv_heads"], sizes["key_dim"])
            entries = [ops.zeros(shape, dtype=self.compute_dtype) for _ in range(2)]
            cache.append(tuple(entries) if family.cache_is_pair else ops.stack(entries, axis=1))
        return tuple(cache)

    def _build_cache(self, token_ids: Tensor, *others: Any) -> tuple[Tensor, tuple]:
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
        if isinstance(entry, dict) != isinstance(block, WalkingBlock):
            kind = "a dict" if isinstance(block, WalkingBlock) else "a tensor"
            raise ValueError(
                f"`cache[{number}]` must be {kind} for a block of the class "
                f"{type(block).__module__}.{type(block).__name__}. "
                f"Received: cache[{number}] of the type {type(entry).__name__}"
            )
