"""RWR attention in the decoder blocks of KerasHub's models.

A block keeps all of its layers, so that weights, paths, LoRA and quantisation stay what they are.
It and its attention layer change their class: the block's gives the attention the padding mask in
place of one of S² entries, the attention's computes RWR attention of the heads that it
projects and rotates as before.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops
from keras.src.backend import compute_output_spec

from keras_rwr._attend import attend
from keras_rwr._cache import WalkCache
from keras_rwr._core import WalkCore
from keras_rwr._self_attention import WithWalk
from keras_rwr._tokens import Masks
from keras_rwr.models import checkpointing
from keras_rwr.options import Call, Options, Tuning

Tensor = Any


class WalkingAttention(WithWalk):
    """RWR attention in place of what an attention layer of KerasHub computes.

    A subclass for each kind of attention layer says how that projects its input to heads and joins
    them again; `convert` gives a built layer one of these classes.

    Attributes:
        is_causal: Bool.
        is_packed: Bool. Whether the padding mask numbers the documents of each row.
    """

    is_causal = True
    is_packed: bool

    def project(self, x: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as LOCAL takes them.

        Args:
            x: Tensor of shape `(B, S, dim)`.
            start: Int or int tensor, the position of the first token.

        Returns:
            Tensors of shape `(B, S, N, H)`, `(B, S, M, H)` and `(B, S, M, V)`.
        """
        raise NotImplementedError

    def join(self, heads: Tensor, training: bool | None) -> Tensor:
        """The layer's output from heads `(B, S, N, V)`."""
        raise NotImplementedError

    @property
    def dropout_layer_of_probabilities(self) -> Any:
        """`None`, or the layer that drops attention probabilities out."""
        return None

    def attend(
        self,
        x: Tensor,
        mask: Tensor,
        cache: WalkCache | None,
        index: Any,
        training: bool | None,
    ) -> Any:
        """What `call` returns.

        Args:
            x: Tensor of shape `(B, S, dim)`.
            mask: `None` or tensor of shape `(B, S, 1)`: true at real tokens, or the number of their
                document.
            cache: `None` or a `WalkCache`.
            index: `None`, or the position of the first token, with a cache.
            training: Bool. Whether dropout is active.

        Returns:
            Tensor of shape `(B, S, dim)`; with a cache, a tuple of that and the updated cache.
        """
        query, key, value = self.project(x, 0 if index is None else index)
        if cache is not None:
            output, cache = self.walk.attend_cached(x, query, key, value, cache, index)
            return self.join(output, training), cache
        dropout = self.dropout_layer_of_probabilities
        rate = dropout.rate if training and dropout is not None else 0.0
        call = Call(self.is_causal, rate)
        seed = dropout.seed_generator.next() if rate > 0 else None
        mask = None if mask is None else mask[:, :, 0]
        segment_ids = None if mask is None or not self.is_packed else ops.cast(mask, "int32")
        masks = Masks(mask, segment_ids, self.is_causal)
        inputs = self.walk.inputs(x, query, key, value, masks, seed)
        return self.join(attend(inputs, self.options, call, self.tuning), training)

    def empty_cache(self, batch_size: Any, length: int) -> WalkCache:
        """A cache without tokens; see `keras_rwr.RWRAttention.empty_cache`."""
        sizes = head_sizes(type(self), self, self._dim)
        return self.walk.empty_cache(
            batch_size, length, sizes["kv_heads"], sizes["value_dim"], self.compute_dtype
        )


class WalkingBlock(keras.layers.Layer):
    """A decoder block whose attention is a `WalkingAttention`."""

    def _compute_self_attention_mask(
        self,
        decoder_sequence: Tensor,
        decoder_padding_mask: Tensor,
        decoder_attention_mask: Tensor = None,
        use_causal_mask: bool = True,
        **others: Any,
    ) -> Tensor:
        if decoder_attention_mask is not None or not use_causal_mask:
            raise ValueError(
                "`decoder_attention_mask` must be `None` and `use_causal_mask` true: RWR attention "
                "in a decoder block is causal and takes `decoder_padding_mask`. Received: "
                f"decoder_attention_mask={decoder_attention_mask}, "
                f"use_causal_mask={use_causal_mask}"
            )
        # Mixtures of experts look for an axis of keys, too.
        return None if decoder_padding_mask is None else decoder_padding_mask[:, :, None]

    def _compute_attention_mask(self, x: Tensor, padding_mask: Tensor, *others: Any) -> Tensor:
        """Gemma's name of it."""
        return self._compute_self_attention_mask(x, padding_mask)

    def rematerialized_call(self, layer_call: Callable, *args: Any, **kwargs: Any) -> Callable:
        """The call that gradient checkpointing makes of `call`; see `keras.RematScope`."""
        if checkpointing.checkpoints(self):
            return checkpointing.checkpointed(self, layer_call)
        return super().rematerialized_call(layer_call, *args, **kwargs)


def convert(
    block: Any,
    attention: Any,
    kind: type[WalkingAttention],
    options: Mapping[str, Any],
    dim: int,
    is_packed: bool = False,
) -> None:
    """Puts RWR attention into a built decoder block, in place of the attention there.

    Args:
        block: Decoder block.
        attention: Its attention layer.
        kind: The subclass of `WalkingAttention` for such a layer.
        options: Mapping of the options of RWR attention.
        dim: Int. Size of the hidden states.
        is_packed: Bool. Whether padding masks number the documents of each row.

    Raises:
        ValueError: If an option does not fit the layer.
    """
    meaning, tuning = Options.pick(options), Tuning.pick(options)
    Call(kind.is_causal).check(meaning, has_segments=is_packed)
    sizes = head_sizes(kind, attention, dim)
    walk = WalkCore(
        meaning, sizes["heads"], sizes["key_dim"], dtype=attention.dtype_policy, name="walk"
    )
    with attention._open_name_scope():
        walk.build((None, None, dim))
    walk.trainable = attention.trainable
    attention.__class__ = _mixed(kind, type(attention))
    block.__class__ = _mixed(WalkingBlock, type(block))
    attention.options, attention.tuning = meaning, tuning
    attention.is_packed, attention._dim = is_packed, dim
    attention._tracker.unlock()
    attention.walk = walk
    attention._tracker.lock()
    refresh_torch(attention)
    refresh_torch(block)


def restore(block: Any, attention: Any) -> None:
    """Undoes `convert`: the weights of the walk are dropped."""
    attention._tracker.untrack(attention.walk)
    for name in ("walk", "options", "tuning", "is_packed", "_dim"):
        delattr(attention, name)
    for layer in (attention, block):
        layer.__class__ = layer.stock_cls
        refresh_torch(layer)


def head_sizes(kind: type[WalkingAttention], attention: Any, dim: int) -> dict[str, int]:
    """The sizes of an attention layer's heads.

    Args:
        kind: The subclass of `WalkingAttention` for such a layer.
        attention: The layer, stock or converted.
        dim: Int. Size of the hidden states.
    """
    x = keras.KerasTensor((1, 1, dim), dtype=attention.compute_dtype)
    query, _, value = compute_output_spec(functools.partial(kind.project, attention, start=0), x)
    return {
        "heads": query.shape[2],
        "key_dim": query.shape[3],
        "kv_heads": value.shape[2],
        "value_dim": value.shape[3],
    }


_MIXED: dict[tuple[type, type], type] = {}


def _mixed(ours: type, stock: type) -> type:
    """The class of a stock layer that is one of ours; the same class each time."""
    # Keras names the layers of a list in a weights file after their class.
    new = type(stock.__name__, (ours, stock), {"stock_cls": stock})
    return _MIXED.setdefault((ours, stock), new)


def refresh_torch(layer: keras.layers.Layer) -> None:
    """Brings up to date what torch takes for the parameters of a layer."""
    if keras.backend.backend() == "torch" and "_torch_params" in layer._modules:
        layer._track_variables()
