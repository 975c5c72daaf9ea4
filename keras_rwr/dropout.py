"""Dropout by a counter-based hash: every implementation drops the same pairs."""

from keras import ops

# Constants of MurmurHash3's 32-bit finaliser and of Fibonacci hashing, as signed 32-bit integers:
# int32 is the one integer type that wraps around alike on every backend.
_MIX_1 = 0x85EBCA6B - 2**32
_MIX_2 = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B9 - 2**32


def keep_mask(seed, rate, batch, heads, rows, columns):
    """Which pairs of positions keep their probability.

    The bit of pair (i, j) is a hash of (seed, batch, head, i, j) alone, so that tile order and
    backend do not matter and a backward pass can make it again.

    Args:
        seed: Int, or int tensor of shape `(2,)`; an int s means `(s, 0)`.
        rate: Float in [0, 1). Share of the pairs to drop.
        batch: Int, or scalar tensor. Batch size B.
        heads: Int. Number of heads N.
        rows: Int tensor of query positions, of shape `(..., M, 1)`.
        columns: Int tensor of key positions that broadcasts with `rows`, `(..., 1 or M, L)`.

    Returns:
        Bool tensor of shape `(B, N, ..., M, L)`, true where the pair is kept.
    """
    first, second = seed_words(seed)
    inner = (1,) * len(rows.shape)
    batch = ops.reshape(ops.arange(batch, dtype="int32"), (-1, 1, *inner))
    head = ops.reshape(ops.arange(heads, dtype="int32"), (-1, *inner))
    row = _mix(ops.bitwise_xor(_mix(first), second))
    for counter in (batch, head, ops.cast(rows, "int32")):
        row = _mix(ops.bitwise_xor(row, counter))
    pair = _mix(row + ops.cast(columns, "int32") * _GOLDEN)
    return ops.bitwise_and(pair, 2**31 - 1) >= int(rate * 2**31)


def seed_words(seed):
    """A seed as two int32 tensors of shape `(1,)`."""
    if isinstance(seed, int):
        seed = [(seed + 2**31) % 2**32 - 2**31, 0]
        seed = ops.convert_to_tensor(seed, dtype="int32")
    seed = ops.cast(seed, "int32")
    return seed[:1], seed[1:]


def _mix(x):
    x = ops.bitwise_xor(x, _shift(x, 16)) * _MIX_1
    x = ops.bitwise_xor(x, _shift(x, 13)) * _MIX_2
    return ops.bitwise_xor(x, _shift(x, 16))


def _shift(x, bits):
    """Logical right shift."""
    return ops.bitwise_and(ops.right_shift(x, bits), 2 ** (32 - bits) - 1)
