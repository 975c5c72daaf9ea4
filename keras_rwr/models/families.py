"""The families of KerasHub's models that take RWR attention, and how each makes its heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras_hub
from keras import ops

from keras_rwr._cache import WalkCache
from keras_rwr.models.attention import WalkingAttention

Tensor = Any


class MultiHead(WalkingAttention):
    """GPT-2's and OPT's attention."""

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._query_dense(x), self._key_dense(x), self._value_dense(x)

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        return self._output_dense(heads)

    @property
    def dropout_layer_of_probabilities(self) -> Any:
        return self._dropout_layer

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        attention_mask: Tensor = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
    ) -> Any:
        return self.attend(query, attention_mask, cache, cache_update_index, training)


class Encoder(MultiHead):
    """The attention of BERT and its like: in both directions."""

    is_causal = False

    def call(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        **keras_masks: Any,
    ) -> Any:
        if return_attention_scores:
            raise ValueError(
                "`return_attention_scores` must be false: see `keras_rwr.statistics.record_calls`. "
                f"Received: return_attention_scores={return_attention_scores}"
            )
        if attention_mask is not None and attention_mask.shape[1] != 1:
            raise ValueError(
                "`attention_mask` must be `None`: pass `padding_mask`. "
                f"Received: attention_mask of shape {tuple(attention_mask.shape)}"
            )
        # Keras's own masks are in it: the block has merged them.
        mask = None if attention_mask is None else ops.swapaxes(attention_mask, 1, 2)
        return self.attend(query, mask, None, None, training)


class Rotary(WalkingAttention):
    """The attention of Llama and of those that follow it, some with normalised heads."""

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (_part(self, f"{name}_dense")(x) for name in ("query", "key", "value"))
        if hasattr(self, "_query_dense_layer_norm"):
            query, key = self._query_dense_layer_norm(query), self._key_dense_layer_norm(key)
        rotate = self.rotary_embedding_layer
        return rotate(query, start_index=start), rotate(key, start_index=start), value

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        heads = _part(self, "dropout_layer")(heads, training=training)
        return _part(self, "output_dense")(heads)

    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
    ) -> Any:
        return self.attend(hidden_states, attention_mask, cache, cache_update_index, training)


class GPTNeoX(Rotary):
    """GPT-NeoX's attention: one projection for all three, and a part of each head rotated."""

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ops.split(self._qkv_dense(x), 3, axis=-1)
        size, rotate = self.rotary_dim, self.rotary_embedding_layer
        query, key = (
            ops.concatenate([rotate(x[..., :size], start_index=start), x[..., size:]], axis=-1)
            for x in (query, key)
        )
        return query, key, value

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        return self._output_dense(ops.reshape(heads, (*ops.shape(heads)[:2], self.hidden_dim)))

    @property
    def dropout_layer_of_probabilities(self) -> Any:
        return self._attn_dropout_layer

    def attend(self, x: Tensor, mask: Tensor, cache: Any, *others: Any) -> Any:
        output = super().attend(x, mask, cache, *others)
        return (output, None) if cache is None else output


class SmolLM3(WalkingAttention):
    """SmolLM3's attention, which rotates in some layers only."""

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = ops.shape(x)[:2]
        query, key, value = (
            ops.reshape(dense(x), (batch, length, -1, self.head_dim))
            for dense in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.use_rope:
            cos, sin = self.rotary_embedding(query, start_index=start)
            query, key = (
                x * cos[:, :, None] + _quarter_turn(x) * sin[:, :, None] for x in (query, key)
            )
        return query, key, value

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        return self.o_proj(heads)

    def call(
        self,
        hidden_states: Tensor,
        training: bool = False,
        attention_mask: Tensor = None,
        self_attention_cache: Any = None,
        **others: Any,
    ) -> Any:
        at = self_attention_cache or _Position(None, None)
        return self.attend(hidden_states, attention_mask, at.cache, at.index, training)


class Gemma(WalkingAttention):
    """The attention of Gemma 1 to 3."""

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query_dense(x), self.key_dense(x)
        if getattr(self, "use_query_key_norm", False):
            query, key = self.query_norm(query), self.key_norm(key)
        return self._apply_rope(query, start), self._apply_rope(key, start), self.value_dense(x)

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        return self.output_dense(heads)

    @property
    def dropout_layer_of_probabilities(self) -> Any:
        return self.dropout_layer if self.dropout else None

    def call(
        self,
        x: Tensor,
        attention_mask: Tensor = None,
        cache: Any = None,
        cache_update_index: Any = 0,
        cache_update_mask: Tensor = None,
        training: bool = False,
    ) -> Any:
        return self.attend(x, attention_mask, cache, cache_update_index, training)


def _embed(model: Any, token_ids: Tensor, start: Any) -> Tensor:
    return model.token_embedding(token_ids)


def _embed_gpt2(model: Any, token_ids: Tensor, start: Any) -> Tensor:
    tokens = model.token_embedding(token_ids)
    positions = model.position_embedding(tokens, start_index=start)
    return model.embeddings_dropout(model.embeddings_add((tokens, positions)))


def _embed_opt(model: Any, token_ids: Tensor, start: Any) -> Tensor:
    return model.embeddings(token_ids, start_index=start)


def _embed_scaled(model: Any, token_ids: Tensor, start: Any) -> Tensor:
    tokens = model.token_embedding(token_ids)
    return tokens * ops.cast(ops.sqrt(model.hidden_dim), tokens.dtype)


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the models of a family keep what RWR attention needs.

    Attributes:
        kind: The subclass of `WalkingAttention` for its attention layers.
        embed: Function of a backbone, token ids `(B, T)` and the position of the first to the
            hidden states `(B, T, dim)` that enter the first block.
        attention: String, the name of a block's attention layer.
        cache: String, the name of the argument of a block's call that takes its cache.
        norm: String, the name of the backbone's last layer.
        cache_is_pair: Bool. Whether the stock cache of a block is a pair of keys and values, not
            one tensor of both.
        weighs_by_mask: Bool. Whether a loss of its blocks weighs each token by the padding mask.
        impossible: Names of arguments of a backbone that change its attention in a way that RWR
            attention has not: they must be off.
    """

    kind: type[WalkingAttention]
    embed: Callable[[Any, Tensor, Any], Tensor] = _embed
    attention: str = "_self_attention_layer"
    cache: str = "self_attention_cache"
    norm: str = "layer_norm"
    cache_is_pair: bool = False
    weighs_by_mask: bool = False
    impossible: tuple[str, ...] = ()

    def attention_of(self, block: Any) -> Any:
        """The attention layer of a block."""
        return getattr(block, self.attention)

    def step(self, block: Any, x: Tensor, cache: Any, index: Any) -> tuple[Tensor, Any]:
        """The call of a block with a cache, where `index` is the position of the first token."""
        return block(x, **{self.cache: cache, f"{self.cache}_update_index": index})


class _SmolLM3Family(Family):
    """SmolLM3's blocks take both in one dict, which Keras wants all of tensors or without any."""

    def step(self, block: Any, x: Tensor, cache: Any, index: Any) -> tuple[Tensor, Any]:
        if isinstance(cache, WalkCache):
            return block(x, self_attention_cache=_Position(cache, index))
        return super().step(block, x, cache, ops.convert_to_tensor(index, dtype="int32"))


@dataclasses.dataclass(frozen=True, eq=False)
class _Position:
    """A cache and the position of the next token."""

    cache: WalkCache | None
    index: Any


_LLAMA = Family(Rotary)
_ENCODER = Family(Encoder)
_GEMMA = Family(
    Gemma,
    _embed_scaled,
    attention="attention",
    cache="cache",
    impossible=("attention_logit_soft_cap", "vision_encoder", "use_bidirectional_attention"),
)

# The families by the names of their classes in `keras_hub.models`, without "Backbone".
FAMILIES = {
    "GPT2": Family(MultiHead, _embed_gpt2),
    "OPT": Family(MultiHead, _embed_opt),
    "GPTNeoX": Family(GPTNeoX),
    "Llama": _LLAMA,
    "Llama3": _LLAMA,
    "Mistral": _LLAMA,
    "Mixtral": dataclasses.replace(_LLAMA, weighs_by_mask=True),
    "Qwen": _LLAMA,
    "QwenMoe": _LLAMA,
    "Qwen3": _LLAMA,
    "Qwen3Moe": _LLAMA,
    "Phi3": Family(Rotary, attention="attention", cache="attention_cache"),
    "SmolLM3": _SmolLM3Family(SmolLM3, attention="self_attn", norm="norm"),
    "Gemma": _GEMMA,
    "Gemma3": dataclasses.replace(_GEMMA, cache_is_pair=True),
    "Bert": _ENCODER,
    "DistilBert": _ENCODER,
    "Roberta": _ENCODER,
}


_BY_CLASS = {getattr(keras_hub.models, f"{name}Backbone"): x for name, x in FAMILIES.items()}


def family_of(cls: type) -> Family:
    """The family of a class of backbones that has one here."""
    return next(_BY_CLASS[x] for x in cls.__mro__ if x in _BY_CLASS)


def _part(layer: Any, name: str) -> Any:
    """A sublayer that some families name with an underscore in front."""
    return getattr(layer, f"_{name}", None) or getattr(layer, name)


def _quarter_turn(x: Tensor) -> Tensor:
    """Rotates pairs of entries, half a head apart, by a right angle."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([-second, first], axis=-1)
