"""Dropout's hash, as `keras_rwr.dropout` defines it: the keep bit of a pair of positions.

A bit depends on (seed, batch, head, i, j) alone, so that the backward pass makes it again.
"""

import tensorflow as tf

# MurmurHash3's finaliser and Fibonacci hashing, as signed 32-bit integers.
_MIX_1 = 0x85EBCA6B - 2**32
_MIX_2 = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B9 - 2**32


def seed_words(seed):
    """A seed as an int32 tensor of shape `(4,)`."""
    if isinstance(seed, int):
        seed = [(seed + 2**31) % 2**32 - 2**31, 0]
    seed = tf.cast(tf.convert_to_tensor(seed), tf.int32)
    return tf.pad(seed, [[0, 4 - seed.shape[0]]])


def row_hashes(words, batch, heads, size):
    """The hash of (seed, batch, head, i): `(B N, S, 1)`."""
    row = _mix(tf.bitwise.bitwise_xor(_mix(words[0]), words[1]))
    row = _mix(tf.bitwise.bitwise_xor(row, tf.range(batch)[:, None] + words[2]))
    row = _mix(tf.bitwise.bitwise_xor(row, tf.range(heads) + words[3]))  # (B, N)
    row = tf.reshape(row, (-1, 1))
    return _mix(tf.bitwise.bitwise_xor(row, tf.range(size)))[..., None]


def keep_factor(rows, columns, rate, dtype):
    """`1 / (1 - rate)` where a pair is kept and 0 where not.

    Args:
        rows: Int tensor of row hashes, `(..., M, 1)`.
        columns: Int tensor of key positions that broadcasts with it, `(..., 1, M)`.
        rate: Float in (0, 1).
        dtype: The dtype of the result.

    Returns:
        Tensor of shape `(..., M, M)`.
    """
    pair = tf.bitwise.bitwise_and(_mix(rows + columns * _GOLDEN), 2**31 - 1)
    return tf.cast(pair >= int(rate * 2**31), dtype) / (1.0 - rate)


def _mix(x):
    x = tf.bitwise.bitwise_xor(x, _shift(x, 16)) * _MIX_1
    x = tf.bitwise.bitwise_xor(x, _shift(x, 13)) * _MIX_2
    return tf.bitwise.bitwise_xor(x, _shift(x, 16))


def _shift(x, bits):
    """Logical right shift."""
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, bits), 2 ** (32 - bits) - 1)
