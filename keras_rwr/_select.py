"""Selection: the key blocks outside its window that each query links to. No gradient."""

from typing import Any

from keras import ops

from keras_rwr._far import NEGATIVE, best_columns, map_chunks, to_blocks
from keras_rwr._tensors import maximum, where
from keras_rwr._tokens import PADDING, Tokens
from keras_rwr.options import Options

Tensor = Any

# Queries whose scores are made at once: it bounds the largest buffer, whatever the length.
_ROWS = 256


def select(
    graph_query: Tensor,
    graph_key: Tensor,
    tokens: Tokens,
    options: Options,
) -> Tensor:
    """Chooses each query's best key blocks with a valid token outside its window.

    A block's score is the product of the unit query with the mean of the block's unit keys. Ties
    go to the lower block.

    Args:
        graph_query: Tensor of shape `(B, G, S, F)`, unit vectors.
        graph_key: Tensor of shape `(B, G, S, F)`, unit vectors.
        tokens: `Tokens`.
        options: `Options`.

    Returns:
        Int32 tensor of shape `(B, G, S, topk / neighbor_block)` of block numbers, -1 for none, or
        `None` when no token lies outside any window.
    """
    if not has_candidates(tokens, options):
        return None
    query, key = ops.stop_gradient(graph_query), ops.stop_gradient(graph_key)
    means = block_means(key, ops.cast(tokens.real, key.dtype), options.neighbor_block)
    first, last = block_ends(tokens, options.neighbor_block)
    return ops.stop_gradient(best_blocks(query, means, first, last, tokens, options))


def has_candidates(tokens: Tokens, options: Options) -> bool:
    """Whether a query can have neighbours: tokens outside its window."""
    size = tokens.size
    return options.slots > 0 and not (isinstance(size, int) and size <= options.window + 1)


def block_ends(tokens: Tokens, block: int) -> tuple[Tensor, Tensor]:
    """The first and the last real position of each block, int32 tensors `(B or 1, 1, 1, J)`."""
    positions = ops.arange(tokens.size, dtype="int32")[:, None]
    far_away = 2 * tokens.size + block
    first = to_blocks(where(tokens.real, positions - far_away, 0), block)
    last = to_blocks(where(tokens.real, positions + far_away, 0), block)
    return (
        ops.amin(first, (-1, -2))[:, :, None] + far_away,
        ops.amax(last, (-1, -2))[:, :, None] - far_away,
    )


def best_blocks(
    query: Tensor, means: Tensor, first: Tensor, last: Tensor, tokens: Tokens, options: Options
) -> Tensor:
    """Blocks of the largest `query_i . mean_J` with a token outside the window, ties to the left.

    Args:
        query: Tensor of shape `(B, G, S, F)`.
        means: Tensor of shape `(B, G, J, F)`.
        first: Int32 tensor of shape `(B or 1, 1, 1, J)`, each block's first real position.
        last: Int32 tensor of shape `(B or 1, 1, 1, J)`, each block's last real position.
        tokens: `Tokens`.
        options: `Options`.

    Returns:
        Int32 tensor of shape `(B, G, S, slots)`, the best first, -1 for none.
    """
    window = options.window
    positions = ops.arange(tokens.size, dtype="int32")[:, None]  # (S, 1)

    def choose(chunk: tuple[Tensor, ...]) -> Tensor:
        rows, position, label = chunk  # (B, G, R, F), (R, 1), (B or 1, 1, R, 1)
        scores = rows @ ops.swapaxes(means, -1, -2)  # (B, G, R, J)
        candidate = first < position - window
        if not tokens.is_causal:
            candidate = ops.logical_or(candidate, last > position + window)
        if tokens.has_segments:  # blocks are single tokens here
            columns = ops.swapaxes(tokens.labels, -1, -2)
            candidate = ops.logical_and(candidate, label == columns)
        candidate = ops.logical_and(candidate, label != PADDING)
        return best_columns(where(candidate, scores, NEGATIVE), options.slots)

    return map_chunks(choose, (query, positions, tokens.labels), _ROWS)


def block_means(key: Tensor, real: Tensor, block: int) -> Tensor:
    """The mean key of each block: `(B, G, S, F)` and 1 at real tokens to `(B, G, J, F)`."""
    if block == 1:
        return key * real
    count = ops.sum(to_blocks(real, block), -2)
    return ops.sum(to_blocks(key * real, block), -2) / maximum(count, 1.0)
