"""LOCAL: softmax attention within the window."""

from typing import Any

from keras import ops

from keras_rwr._dropout import keep_mask
from keras_rwr._tensors import maximum, repeat_heads, where
from keras_rwr._tiling import Tiling
from keras_rwr._tokens import Tokens

Tensor = Any


def attend_locally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    window: int,
    bias: Tensor = None,
    dropout: float = 0.0,
    seed: Tensor = None,
    block_size: int | None = None,
) -> Tensor:
    """Softmax of `q_i k_j / sqrt(H) + b_j` over the window, times v; 0 for a query without a key.

    Args:
        query: Tensor of shape `(B, N, S, H)`.
        key: Tensor of shape `(B, M, S, H)`; M divides N.
        value: Tensor of shape `(B, M, S, V)`.
        tokens: `Tokens`.
        window: Int >= 0. Half-width of the window.
        bias: `None` or tensor of shape `(B, M or N, S, 1)`, added to the logits of key j.
        dropout: Float in [0, 1). Dropout rate of the probabilities.
        seed: `None`, int or int tensor of shape `(2,)` or `(4,)`: dropout's.
        block_size: `None` or int. Queries in a tile.

    Returns:
        Tensor of shape `(B, N, S, V)`.
    """
    tiling = Tiling.create(tokens, window, block_size)
    near = tiling.local_mask(tokens, window)
    batch, heads = ops.shape(query)[:2]

    def band(x: Tensor) -> Tensor:
        return tiling.band(tiling.pad(repeat_heads(x, heads)))

    scaled = tiling.split(tiling.pad(query * query.shape[-1] ** -0.5))
    logits = scaled @ ops.swapaxes(band(key), -1, -2)  # (B, N, C, M, L)
    if bias is not None:
        logits = logits + ops.swapaxes(band(bias), -1, -2)
    logits = where(near, logits, -1e30)
    # A row without a key has no logit near its peak, so that all of its weights are 0.
    peak = maximum(ops.stop_gradient(ops.amax(logits, -1, keepdims=True)), -1e20)
    weights = ops.exp(logits - peak)
    total = ops.sum(weights, -1, keepdims=True)
    if seed is not None and dropout > 0.0:
        rows = ops.reshape(ops.arange(tiling.padded_size, dtype="int32"), (-1, tiling.tile, 1))
        keep = keep_mask(seed, dropout, batch, heads, rows, rows + tiling.offsets())
        weights = where(keep, weights / (1.0 - dropout), 0.0)
    output = (weights @ band(value)) / where(total > 0, total, 1.0)
    return tiling.cut(tiling.join(output))
