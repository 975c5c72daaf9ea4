"""Dropout by a counter-based hash: every implementation drops the same pairs.

A seed is an int, or an int tensor of two words. When a call is one piece of a larger one, as on one
of several devices, the tensor has two more: the position of the call's first batch entry and of its
first head in the larger one, so that together the pieces drop what the whole would.
"""

from typing import Any

from keras import ops

Tensor = Any

# Constants of MurmurHash3's 32-bit finaliser and of Fibonacci hashing, as signed 32-bit integers:
# int32 is the one integer type that wraps around alike on every backend.
_MIX_1 = 0x85EBCA6B - 2**32
_MIX_2 = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B9 - 2**32


def keep_mask(
    seed: Any, rate: float, batch: Any, heads: int, rows: Tensor, columns: Tensor
) -> Tensor:
    """Which pairs of positions keep their probability.

    The bit of pair (i, j) is a hash of (seed, batch, head, i, j) alone, so that tile order, backend
    and the division over devices do not matter and a backward pass can make it again.

    Args:
        seed: Int, or int tensor of shape `(2,)` or `(4,)`; an int s means `(s, 0)`, and the last
            two are the position of the first batch entry and of the first head, 0 by default.
        rate: Float in [0, 1). Share of the pairs to drop.
        batch: Int, or scalar tensor. Batch size B.
        heads: Int. Number of heads N.
        rows: Int tensor of query positions, of shape `(..., M, 1)`.
        columns: Int tensor of key positions that broadcasts with `rows`, `(..., 1 or M, L)`.

    Returns:
        Bool tensor of shape `(B, N, ..., M, L)`, true where the pair is kept.
    """
    words = seed_words(seed)
    first, second = words[:1], words[1:2]
    inner = (1,) * len(rows.shape)
    batch, head = ops.arange(batch, dtype="int32"), ops.arange(heads, dtype="int32")
    if words.shape[0] == 4:
        batch, head = batch + words[2], head + words[3]
    batch, head = ops.reshape(batch, (-1, 1, *inner)), ops.reshape(head, (-1, *inner))
    row = _mix(ops.bitwise_xor(_mix(first), second))
    for counter in (batch, head, ops.cast(rows, "int32")):
        row = _mix(ops.bitwise_xor(row, counter))
    pair = _mix(row + ops.cast(columns, "int32") * _GOLDEN)
    return ops.bitwise_and(pair, 2**31 - 1) >= int(rate * 2**31)


def seed_words(seed: Any) -> Tensor:
    """A seed as an int32 tensor of shape `(2,)` or `(4,)`."""
    if isinstance(seed, int):
        seed = [(seed + 2**31) % 2**32 - 2**31, 0]
        return ops.convert_to_tensor(seed, dtype="int32")
    return ops.cast(seed, "int32")


def _mix(x: Tensor) -> Tensor:
    x = ops.bitwise_xor(x, _shift(x, 16)) * _MIX_1
    x = ops.bitwise_xor(x, _shift(x, 13)) * _MIX_2
    return ops.bitwise_xor(x, _shift(x, 16))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return ops.bitwise_and(ops.right_shift(x, bits), 2 ** (32 - bits) - 1)
