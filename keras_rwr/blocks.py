"""Products with the key blocks that each query chose, a chunk of queries at a time.

Letters: B batch, S positions, N heads, F features, J blocks, b tokens in a block, K = `topk`.
"""

import keras
from keras import ops

# Numbers gathered at once: a buffer that stays in a core's cache, whatever the length.
_GATHERED = 2**20
NEGATIVE = -1e30  # the score of what cannot be chosen
# Up to so many slots, one pass of `argmax` for each is faster than `top_k`.
_FEW_SLOTS = 4


def far_dot(query, blocks, key, block):
    """`query_i · key_j` for the far keys j of i: `(B, N, S, F)` to `(B, N, S, K)`."""
    table = _table(key, block)
    shape = (-1, blocks.shape[-1] * block, key.shape[-1])

    @_checkpoint
    def dot(table, rows, queries):
        keys = ops.reshape(ops.take(table, rows, axis=0), shape)
        return ops.einsum("rf,rkf->rk", queries, keys)

    result = map_chunks(
        lambda chunk: dot(table, *chunk), (_table_rows(blocks, block), _rows(query)), _chunk(shape)
    )
    return ops.reshape(result, (*ops.shape(blocks)[:3], shape[1]))


def far_sum(weights, blocks, x, block):
    """`sum_k weights_ik x_key(i, k)` over the far keys: `(B, N, S, F)` to the same shape."""
    table = _table(x, block)
    shape = (-1, blocks.shape[-1] * block, x.shape[-1])

    @_checkpoint
    def weighted_sum(table, rows, weights):
        values = ops.reshape(ops.take(table, rows, axis=0), shape)
        return ops.einsum("rk,rkf->rf", weights, values)

    result = map_chunks(
        lambda chunk: weighted_sum(table, *chunk),
        (_table_rows(blocks, block), _rows(weights)),
        _chunk(shape),
    )
    return ops.reshape(result, ops.shape(x))


def far_gather(blocks, x, block):
    """The value of each far key: one number a token, `(B, N, S, 1)`, to `(B, N, S, K)`."""
    values = ops.take(_table(x, block), _table_rows(blocks, block), axis=0)
    return ops.reshape(values, (*ops.shape(blocks)[:3], blocks.shape[-1] * block))


def far_scatter(weights, blocks, x, block):
    """`sum_i weights_ik x_i` into the far keys of i, a feature at a time: `(B, N, S, F)`."""
    batch, heads, size, features = ops.shape(x)
    number = -(-size // block)
    segments = ops.reshape(_table_rows(blocks, block), (-1,))
    shares = ops.reshape(weights, (-1, blocks.shape[-1], block))  # (B N S, K / b, b)

    def receive(feature):  # (B N S,)
        sent = ops.reshape(shares * feature[:, None, None], (-1, block))
        return ops.segment_sum(sent, segments, num_segments=batch * heads * number)

    received = ops.map(receive, ops.transpose(ops.reshape(x, (-1, features))))
    received = ops.reshape(received, (features, batch, heads, number * block))
    return ops.transpose(received[..., :size], (1, 2, 3, 0))


def block_rows(blocks, x, block):
    """The tokens of chosen blocks: `(B, N, K / b)` and `(B, N, S, F)` to `(B, N, K, F)`."""
    batch, heads, size, features = ops.shape(x)
    number = -(-size // block)
    head = ops.reshape(ops.arange(batch * heads, dtype="int32"), (batch, heads, 1))
    rows = ops.take(_table(x, block), ops.maximum(blocks, 0) + head * number, axis=0)
    return ops.reshape(rows, (batch, heads, blocks.shape[-1] * block, features))


def to_blocks(x, block):
    """`(B, N, S, F)` to `(B, N, J, block, F)`, zeros behind the last position."""
    size = ops.shape(x)[2]
    number = -(-size // block)
    extra = number * block - size
    if not (isinstance(extra, int) and extra == 0):
        zeros = ops.zeros((*ops.shape(x)[:2], extra, x.shape[-1]), x.dtype)
        x = ops.concatenate([x, zeros], axis=2)
    return ops.reshape(x, (*ops.shape(x)[:2], number, block, x.shape[-1]))


def best_columns(scores, slots):
    """Columns of the `slots` largest scores in each row, ties to the left; -1 for no score.

    Args:
        scores: Tensor of shape `(..., J)`; `NEGATIVE` where there is no score.
        slots: Int >= 1.

    Returns:
        Int tensor of shape `(..., slots)`.
    """
    if slots > _FEW_SLOTS:
        return _top_columns(scores, slots)
    columns = ops.arange(ops.shape(scores)[-1], dtype="int32")
    chosen = []
    for slot in range(slots):
        best = ops.cast(ops.argmax(scores, axis=-1, keepdims=True), "int32")
        found = ops.take_along_axis(scores, best, axis=-1) > NEGATIVE
        chosen.append(ops.where(found, best, -1))
        if slot + 1 < slots:
            scores = ops.where(columns == best, NEGATIVE, scores)
    return ops.concatenate(chosen, axis=-1)


def _top_columns(scores, slots):
    columns = ops.shape(scores)[-1]
    if not isinstance(columns, int) or columns < slots:
        none = ops.full((*ops.shape(scores)[:-1], slots), NEGATIVE, dtype=scores.dtype)
        scores = ops.concatenate([scores, none], axis=-1)
        columns = columns + slots
    # `top_k` breaks ties as it likes on some backends: rank what lies above the last value and,
    # below it, what equals it, each from left to right.
    last = ops.top_k(scores, slots)[0][..., -1:]
    from_left = ops.cast(columns - ops.arange(columns, dtype="int32"), "float32")
    above = ops.cast(columns, "float32") * ops.cast(scores > last, "float32")
    rank = ops.where(scores >= last, from_left + above, 0.0)
    chosen = ops.cast(ops.top_k(rank, slots)[1], "int32")
    found = ops.take_along_axis(scores, chosen, axis=-1) > NEGATIVE
    return ops.where(found, chosen, -1)


def map_chunks(function, arrays, chunk):
    """Applies a function to chunks of arrays `(..., S, F)` along S, one chunk after another.

    Args:
        function: Takes a tuple of chunks `(..., chunk, F)` and returns one tensor of that kind.
        arrays: Tuple of tensors.
        chunk: Int. Positions in a chunk.

    Returns:
        Tensor of shape `(..., S, F)`.
    """
    size = ops.shape(arrays[0])[-2]
    if isinstance(size, int) and size <= chunk:
        return function(arrays)
    number = -(-size // chunk)

    def split(x):
        shape = ops.shape(x)
        missing = number * chunk - size
        if not (isinstance(missing, int) and missing == 0):
            extra = ops.zeros((*shape[:-2], missing, shape[-1]), x.dtype)
            x = ops.concatenate([x, extra], axis=-2)
        return ops.moveaxis(ops.reshape(x, (*shape[:-2], number, chunk, shape[-1])), -3, 0)

    result = ops.moveaxis(ops.map(function, tuple(split(x) for x in arrays)), 0, -3)
    shape = ops.shape(result)
    return ops.reshape(result, (*shape[:-3], number * chunk, shape[-1]))[..., :size, :]


def _chunk(shape):
    """Rows of a chunk that gathers `shape[1]` vectors of `shape[2]` for each."""
    return max(1, _GATHERED // (shape[1] * shape[2]))


def _rows(x):
    """`(B, N, S, ...)` to `(B N S, ...)`."""
    return ops.reshape(x, (-1, *x.shape[3:]))


def _table(x, block):
    """`(B, N, S, F)` to one row a block, `(B N J, block F)`."""
    return ops.reshape(to_blocks(x, block), (-1, block * x.shape[-1]))


def _table_rows(blocks, block):
    """Block numbers `(B, N, S, K / b)` as rows of `_table`, `(B N S, K / b)`; any row for none."""
    batch, heads, size = ops.shape(blocks)[:3]
    head = ops.reshape(ops.arange(batch * heads, dtype="int32"), (batch, heads, 1, 1))
    return _rows(ops.maximum(blocks, 0) + head * (-(-size // block)))


def _checkpoint(function):
    """Recomputes in the backward pass instead of keeping what was gathered."""
    return function if keras.backend.backend() == "numpy" else keras.remat(function)
