"""Which token may see which: padding, packed documents and causality."""

import dataclasses
from typing import Any, Self

import numpy as np
from keras import ops

from keras_rwr._checks import as_tensor, check_bool, check_shape, compatible, has_values
from keras_rwr._tensors import where

Tensor = Any

PADDING = -(2**31)  # the label of padding


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a call. A token sees those of its own label, and when causal none after it.

    Attributes:
        size: Int, or scalar tensor where the length is dynamic. Number of positions S.
        labels: Int tensor of shape `(B or 1, 1, S, 1)`: a token's segment, or `PADDING`.
        is_causal: Bool. Whether a token sees only itself and its past.
        has_segments: Bool. Whether labels of real tokens can differ.
        has_padding: Bool. Whether some tokens can be padding.
        ends: `None` or int32 tensor of shape `(B,)`, where kernels end each sequence: at its first
            token that is not finite.
    """

    size: Any
    labels: Tensor
    is_causal: bool
    has_segments: bool = False
    has_padding: bool = False
    ends: Tensor = None

    @classmethod
    def create(
        cls, size: Any, is_causal: bool, padding_mask: Tensor = None, segment_ids: Tensor = None
    ) -> Self:
        """Takes masks of shape `(B, S)`, each of which may be `None`."""
        if segment_ids is None:
            labels = ops.zeros((1, size) if padding_mask is None else ops.shape(padding_mask))
        else:
            labels = segment_ids
        labels = ops.cast(labels, "int32")
        if padding_mask is not None:
            labels = where(ops.cast(padding_mask, "bool"), labels, PADDING)
        return cls(
            size,
            labels[:, None, :, None],
            is_causal,
            has_segments=segment_ids is not None,
            has_padding=padding_mask is not None,
        )

    def end_at(self, ends: Tensor) -> Self:
        """The same tokens with other `ends`."""
        return dataclasses.replace(self, ends=ends)

    @property
    def real(self) -> Tensor:
        """Bool tensor `(B or 1, 1, S, 1)`, true at tokens that are no padding."""
        return self.labels != PADDING

    def pairs(self) -> Tensor:
        """Which query may see which key, bool `(B or 1, 1, S, S)`."""
        columns = ops.swapaxes(self.labels, -1, -2)
        seen = ops.logical_and(self.labels == columns, self.real)
        if self.is_causal:
            positions = ops.arange(self.size, dtype="int32")
            seen = ops.logical_and(seen, positions[None, :] <= positions[:, None])
        return seen


def check_sequences(query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
    """Checks that the inputs can be one sequence of shape `(B, S, dim)`."""
    shapes = {"query": query_shape, "value": value_shape}
    if key_shape is not None:
        shapes["key"] = key_shape
    for name, shape in shapes.items():
        if len(shape) != 3:
            raise ValueError(
                f"`{name}` must have shape (B, S, dim). Received: {name} of shape {tuple(shape)}"
            )
        if not compatible(shape[:2], query_shape[:2]):
            raise ValueError(
                f"`query` and `{name}` must be the same sequence, of one batch size and length: "
                "RWR attention is self-attention. Received: query of shape "
                f"{tuple(query_shape)}, {name} of shape {tuple(shape)}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """What the masks of a layer's call say.

    Attributes:
        padding_mask: `None` or bool tensor of shape `(B, S)`, true at real tokens.
        segment_ids: `None` or int tensor of shape `(B, S)`.
        is_causal: Bool.
    """

    padding_mask: Tensor
    segment_ids: Tensor
    is_causal: bool


_TAKEN = (
    "(B, S), (B, 1, S) or (B, 1, 1, S), true at real tokens, or (B, S, S) or (B, 1, S, S) that "
    "says padding, causality and packed documents and nothing else"
)


def read_masks(
    query: Tensor,
    use_causal_mask: bool,
    attention_mask: Tensor = None,
    segment_ids: Tensor = None,
    **keras_masks: Tensor,
) -> Masks:
    """Reads all masks of a layer's call.

    Args:
        query: Tensor or symbol of shape `(B, S, dim)`.
        use_causal_mask: Bool.
        attention_mask: `None` or tensor; `_TAKEN` lists the shapes.
        segment_ids: `None` or int tensor of shape `(B, S)`.
        **keras_masks: Keras's masks by name, each `None` or of shape `(B, S)`.

    Raises:
        ValueError: If a mask says anything else.
        TypeError: If a mask is no tensor or `use_causal_mask` no bool.
    """
    check_bool("use_causal_mask", use_causal_mask)
    batch, size = query.shape[:2]
    padding_mask = None
    seen: list[Tensor] = []

    def add(mask: Tensor) -> None:
        nonlocal padding_mask
        mask = ops.cast(mask, "bool")
        padding_mask = mask if padding_mask is None else ops.logical_and(padding_mask, mask)

    for name, mask in keras_masks.items():
        # Keras attaches one mask to all inputs that come from one tensor.
        if mask is None or any(mask is other for other in seen):
            continue
        seen.append(mask)
        mask = as_tensor(name, mask, "any")
        check_shape(name, mask, "(B, S)", (batch, size), (1, size))
        add(mask)
    if segment_ids is not None:
        segment_ids = as_tensor("segment_ids", segment_ids, "int")
        check_shape("segment_ids", segment_ids, "(B, S)", (batch, size), (1, size))
    if attention_mask is not None and not any(attention_mask is other for other in seen):
        mask = as_tensor("attention_mask", attention_mask, "any")
        given = tuple(mask.shape)
        if len(mask.shape) == 4 and mask.shape[1] == 1:
            mask = ops.squeeze(mask, axis=1)
        row = len(mask.shape) == 3 and mask.shape[1] == 1
        square = len(mask.shape) == 3 and not row
        if row:
            mask = ops.squeeze(mask, axis=1)
        wanted = (size, size) if square else (size,)
        if len(mask.shape) not in (2, 3) or not any(
            compatible(mask.shape, (b, *wanted)) for b in (batch, 1)
        ):
            raise ValueError(
                f"`attention_mask` must have one of the shapes {_TAKEN}. Received: attention_mask "
                f"of shape {given} for query of shape {tuple(query.shape)}"
            )
        if square:
            mask, packed, use_causal_mask = _read_square(mask, use_causal_mask)
            if packed is not None and segment_ids is not None:
                raise ValueError(
                    "`segment_ids` must be `None` where `attention_mask` says which documents are "
                    f"packed. Received: segment_ids of shape {tuple(segment_ids.shape)}"
                )
            segment_ids = packed if segment_ids is None else segment_ids
        add(mask)
    shape = ops.shape(query)[:2]
    if padding_mask is not None:
        padding_mask = ops.broadcast_to(padding_mask, shape)
    if segment_ids is not None:
        segment_ids = ops.broadcast_to(segment_ids, shape)
    return Masks(padding_mask, segment_ids, use_causal_mask)


def _read_square(mask: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, bool]:
    """Padding mask, segments or `None`, and causality of a mask `(B, S, S)`."""
    if not has_values(mask):
        raise ValueError(
            "`attention_mask` of shape (B, S, S) must have known values, which a compiled call has "
            "not: pass padding as (B, S), documents as `segment_ids`, and `use_causal_mask`. "
            f"Received: attention_mask of shape {tuple(mask.shape)}"
        )
    seen = ops.convert_to_numpy(mask).astype(bool)
    size = seen.shape[-1]
    real = np.diagonal(seen, axis1=1, axis2=2)  # (B, S)
    above = np.triu(np.ones((size, size), bool), 1)
    is_causal = is_causal or (not (seen & above).any() and size > 1)
    past = np.tri(size, dtype=bool) if is_causal else np.ones((size, size), bool)
    # The first token that a token sees begins its document.
    first = np.argmax(seen & past, axis=-1)
    meant = past & (first[:, :, None] == first[:, None, :]) & real[:, :, None] & real[:, None, :]
    # Nothing sees padding; what padding sees does not matter.
    wrong = (seen & past) != meant
    if (wrong & (real[:, :, None] | ~real[:, None, :])).any():
        raise ValueError(
            f"`attention_mask` must have one of the shapes {_TAKEN}. Received: attention_mask of "
            f"shape {tuple(mask.shape)} that says something else"
        )
    is_packed = any(len(np.unique(row[valid])) > 1 for row, valid in zip(first, real, strict=True))
    segments = ops.convert_to_tensor(first, dtype="int32") if is_packed else None
    return ops.convert_to_tensor(real), segments, is_causal
