"""Products with the key blocks that each query chose, a chunk of queries at a time.

Letters: B batch, S positions, G graphs, F features, J blocks, b tokens in a block, K = `topk`.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rwr._tensors import maximum, where

Tensor = Any

# Numbers gathered at once: a buffer that stays in a core's cache, whatever the length.
_GATHERED = 2**20
NEGATIVE = -1e30  # the logarithm of a weight that is 0, and the score of what cannot be chosen
_NO_COLUMN = 2**30


def far_dot(query: Tensor, blocks: Tensor, key: Tensor, block: int) -> Tensor:
    """`query_i · key_j` for the far keys j of i: `(B, G, S, F)` to `(B, G, S, K)`."""
    table = _table(key, block)
    shape = (-1, blocks.shape[-1] * block, key.shape[-1])

    @_checkpoint
    def dot(table: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
        keys = ops.reshape(ops.take(table, rows, axis=0), shape)
        return ops.einsum("rf,rkf->rk", queries, keys)

    result = map_chunks(
        lambda chunk: dot(table, *chunk), (_table_rows(blocks, block), _rows(query)), _chunk(shape)
    )
    return ops.reshape(result, (*ops.shape(blocks)[:3], shape[1]))


def far_sum(weights: Tensor, blocks: Tensor, x: Tensor, block: int) -> Tensor:
    """`sum_k weights_ik x_key(i, k)` over the far keys: `(B, G, S, F)` to the same shape."""
    table = _table(x, block)
    shape = (-1, blocks.shape[-1] * block, x.shape[-1])

    @_checkpoint
    def weighted_sum(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        values = ops.reshape(ops.take(table, rows, axis=0), shape)
        return ops.einsum("rk,rkf->rf", weights, values)

    result = map_chunks(
        lambda chunk: weighted_sum(table, *chunk),
        (_table_rows(blocks, block), _rows(weights)),
        _chunk(shape),
    )
    return ops.reshape(result, ops.shape(x))


def far_gather(blocks: Tensor, x: Tensor, block: int) -> Tensor:
    """The value of each far key: one number a token, `(B, G, S, 1)`, to `(B, G, S, K)`.

    Positions behind the last get the last one's value, by which one can divide if by all others.
    """
    extra = -ops.shape(x)[2] % block
    if not (isinstance(extra, int) and extra == 0):
        last = ops.broadcast_to(x[:, :, -1:], (*ops.shape(x)[:2], extra, 1))
        x = ops.concatenate([x, last], axis=2)
    values = ops.take(_table(x, block), _table_rows(blocks, block), axis=0)
    return ops.reshape(values, (*ops.shape(blocks)[:3], blocks.shape[-1] * block))


def far_scatter(weights: Tensor, blocks: Tensor, x: Tensor, block: int) -> Tensor:
    """`sum_i weights_ik x_i` into the far keys of i, a feature at a time: `(B, G, S, F)`."""
    batch, graphs, size, features = ops.shape(x)
    number = -(-size // block)
    segments = ops.reshape(_table_rows(blocks, block), (-1,))
    shares = ops.reshape(weights, (-1, blocks.shape[-1], block))  # (B G S, K / b, b)

    def receive(feature: Tensor) -> Tensor:  # (B G S,)
        sent = ops.reshape(shares * feature[:, None, None], (-1, block))
        return ops.segment_sum(sent, segments, num_segments=batch * graphs * number)

    received = ops.map(receive, ops.transpose(ops.reshape(x, (-1, features))))
    received = ops.reshape(received, (features, batch, graphs, number * block))
    return ops.transpose(received[..., :size], (1, 2, 3, 0))


def far_max(values: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The largest `values_ik` that a far key gets, `NEGATIVE` at least: `(B, G, S, 1)`."""
    batch, graphs, size = ops.shape(values)[:3]
    number = -(-size // block)
    received = ops.segment_max(
        ops.reshape(values, (-1, block)),
        ops.reshape(_table_rows(blocks, block), (-1,)),
        num_segments=batch * graphs * number,
    )
    received = ops.reshape(received, (batch, graphs, number * block, 1))
    return maximum(received[:, :, :size], NEGATIVE)


def block_rows(blocks: Tensor, x: Tensor, block: int) -> Tensor:
    """The tokens of chosen blocks: `(B, G, K / b)` and `(B, G, S, F)` to `(B, G, K, F)`."""
    batch, graphs, size, features = ops.shape(x)
    number = -(-size // block)
    graph = ops.reshape(ops.arange(batch * graphs, dtype="int32"), (batch, graphs, 1))
    rows = ops.take(_table(x, block), maximum(blocks, 0) + graph * number, axis=0)
    return ops.reshape(rows, (batch, graphs, blocks.shape[-1] * block, features))


def to_blocks(x: Tensor, block: int) -> Tensor:
    """`(B, G, S, F)` to `(B, G, J, block, F)`, zeros behind the last position."""
    size = ops.shape(x)[2]
    number = -(-size // block)
    extra = number * block - size
    if not (isinstance(extra, int) and extra == 0):
        zeros = ops.zeros((*ops.shape(x)[:2], extra, x.shape[-1]), x.dtype)
        x = ops.concatenate([x, zeros], axis=2)
    return ops.reshape(x, (*ops.shape(x)[:2], number, block, x.shape[-1]))


def best_columns(scores: Tensor, slots: int) -> Tensor:
    """Columns of the `slots` largest scores in each row, ties to the left; -1 for no score.

    Args:
        scores: Tensor of shape `(..., J)`; `NEGATIVE` where there is no score.
        slots: Int >= 1.

    Returns:
        Int tensor of shape `(..., slots)`.
    """
    columns = ops.arange(ops.shape(scores)[-1], dtype="int32")
    chosen = []
    for slot in range(slots):
        # Two plain reductions: compilers make them much faster than `argmax` or `top_k`, whose
        # order among equal scores is not the same everywhere.
        best = ops.amax(scores, axis=-1, keepdims=True)
        is_best = scores == best
        column = ops.amin(where(is_best, columns, _NO_COLUMN), axis=-1, keepdims=True)
        chosen.append(where(best > NEGATIVE, column, -1))
        if slot + 1 < slots:
            scores = where(columns == column, NEGATIVE, scores)
    return ops.concatenate(chosen, axis=-1)


def map_chunks(function: Callable, arrays: tuple[Tensor, ...], chunk: int) -> Tensor:
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

    def split(x: Tensor) -> Tensor:
        shape = ops.shape(x)
        missing = number * chunk - size
        if not (isinstance(missing, int) and missing == 0):
            extra = ops.zeros((*shape[:-2], missing, shape[-1]), x.dtype)
            x = ops.concatenate([x, extra], axis=-2)
        return ops.moveaxis(ops.reshape(x, (*shape[:-2], number, chunk, shape[-1])), -3, 0)

    result = ops.moveaxis(ops.map(function, tuple(split(x) for x in arrays)), 0, -3)
    shape = ops.shape(result)
    return ops.reshape(result, (*shape[:-3], number * chunk, shape[-1]))[..., :size, :]


def _chunk(shape: tuple[int, ...]) -> int:
    """Rows of a chunk that gathers `shape[1]` vectors of `shape[2]` for each."""
    return max(1, _GATHERED // (shape[1] * shape[2]))


def _rows(x: Tensor) -> Tensor:
    """`(B, G, S, ...)` to `(B G S, ...)`."""
    return ops.reshape(x, (-1, *x.shape[3:]))


def _table(x: Tensor, block: int) -> Tensor:
    """`(B, G, S, F)` to one row a block, `(B G J, block F)`."""
    return ops.reshape(to_blocks(x, block), (-1, block * x.shape[-1]))


def _table_rows(blocks: Tensor, block: int) -> Tensor:
    """Block numbers `(B, G, S, K / b)` as rows of `_table`, `(B G S, K / b)`; any row for none."""
    batch, graphs, size = ops.shape(blocks)[:3]
    graph = ops.reshape(ops.arange(batch * graphs, dtype="int32"), (batch, graphs, 1, 1))
    return _rows(maximum(blocks, 0) + graph * (-(-size // block)))


def _checkpoint(function: Callable) -> Callable:
    """Recomputes in the backward pass instead of keeping what was gathered."""
    return function if keras.backend.backend() == "numpy" else keras.remat(function)
