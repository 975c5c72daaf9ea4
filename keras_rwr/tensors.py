"""Checks and small functions of query, key and value that every implementation shares."""

import keras
from keras import ops

_EPSILON = 1e-6


def check_shapes(query, key, value=None, padding_mask=None):
    """Checks that query, key and value are one sequence of `(B, S, N, H)`.

    Raises:
        ValueError: If a rank, a length, a number of heads or a head size does not fit.
    """
    named = {"query": query, "key": key}
    if value is not None:
        named["value"] = value
    for name, x in named.items():
        if len(x.shape) != 4:
            raise ValueError(
                f"`{name}` must have shape (B, S, N, H). Received: {name} of shape {tuple(x.shape)}"
            )
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
            raise TypeError(f"`{name}` must be of a float dtype. Received: {name} of {x.dtype}")
    if not compatible(query.shape, key.shape):
        raise ValueError(
            "`query` and `key` must have the same shape (B, S, N, H): RWR attention is "
            "self-attention. "
            f"Received: query of shape {tuple(query.shape)}, key of shape {tuple(key.shape)}"
        )
    if value is not None and not compatible(value.shape[:3], query.shape[:3]):
        raise ValueError(
            "`value` must have the batch size, length and heads of `query`. Received: "
            f"value of shape {tuple(value.shape)}, query of shape {tuple(query.shape)}"
        )
    if padding_mask is not None:
        shape = tuple(padding_mask.shape)
        if len(shape) != 2 or not compatible(shape, query.shape[:2]):
            raise ValueError(
                "`padding_mask` must have shape (B, S) = "
                f"{tuple(query.shape[:2])}. Received: padding_mask of shape {shape}"
            )


def compatible(shape, expected):
    """Whether two shapes agree wherever both are known."""
    pairs = zip(shape, expected, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def prepare(query, key, padding_mask):
    """Casts to the dtype of the arithmetic, puts heads first and zeros padding.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.

    Returns:
        Query and key of shape `(B, N, S, H)`, and a bool tensor `(B or 1, 1, S, 1)` of real tokens.
    """
    size = ops.shape(query)[1]
    if padding_mask is None:
        return head_major(query), head_major(key), ops.ones((1, 1, size, 1), dtype="bool")
    valid = ops.cast(padding_mask, "bool")[:, None, :, None]
    query = ops.where(valid, head_major(query), 0.0)
    key = ops.where(valid, head_major(key), 0.0)
    return query, key, valid


def head_major(x):
    """`(B, S, N, F)` to `(B, N, S, F)`, in float32, or float64 if it is that already."""
    dtype = "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32"
    return ops.transpose(ops.cast(x, dtype), (0, 2, 1, 3))


def unit(x):
    """`x / max(|x|, 1e-6)` along the last axis, with a finite gradient at 0."""
    squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x / ops.sqrt(ops.maximum(squares, _EPSILON**2))


def per_head(value, dtype):
    """A scalar, a sequence or a tensor of one value a head as a tensor `(N or 1, 1, 1)`."""
    return ops.reshape(ops.cast(ops.convert_to_tensor(value), dtype), (-1, 1, 1))


def key_bias(key, discoverability):
    """`b_j = clip(k_j u, -8, 8)`: `(B, S, N, H)` and `(N, H)` to `(B, S, N)`."""
    dtype = "float64" if keras.backend.standardize_dtype(key.dtype) == "float64" else "float32"
    bias = ops.einsum("bsnh,nh->bsn", ops.cast(key, dtype), ops.cast(discoverability, dtype))
    return ops.clip(bias, -8.0, 8.0)


def reciprocal(x):
    """`1 / x` whose gradient does not overflow where `1 / x**2` would."""
    scale = ops.stop_gradient(x)
    return (1.0 / scale) * (1.0 / (x / scale))
