"""Small functions of tensors that all stages share."""

from typing import Any

import keras
from keras import ops

Tensor = Any

SMALLEST_NORM = 1e-6
# The backward pass counts shorter vectors as this long, so that no gradient exceeds 10 times that
# of the unit vector.
SMALLEST_NORM_OF_GRADIENTS = 0.1


def precision(*tensors: Tensor) -> str:
    """The dtype of the arithmetic: float64 if any tensor is, else float32."""
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in tensors if x is not None]
    return "float64" if "float64" in dtypes else "float32"


def autocast_dtype(x: Tensor) -> Any:
    """The dtype of `torch.autocast` where it is active for x, else `None`."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> Any:
    """A context without `torch.autocast` where x lives."""
    import torch

    return torch.autocast(x.device.type, enabled=False)


def head_major(x: Tensor, dtype: str) -> Tensor:
    """`(B, S, N, F)` to `(B, N, S, F)`, in the dtype of the arithmetic."""
    return ops.transpose(ops.cast(x, dtype), (0, 2, 1, 3))


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, M, S, F)` to `(B, heads, S, F)`: consecutive heads share one of x's."""
    shared = heads // x.shape[1]
    return x if shared == 1 else ops.repeat(x, shared, axis=1)


def per_head(value: Any, dtype: str) -> Tensor:
    """A scalar, a sequence or a tensor of one value a head as a tensor `(N or 1, 1, 1)`."""
    if isinstance(value, (int, float)):
        return ops.zeros((1, 1, 1), dtype=dtype) + value
    return ops.reshape(ops.convert_to_tensor(value, dtype=dtype), (-1, 1, 1))


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """`ops.where`. On torch, Keras would copy each number to the device, and wait for it."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.where(condition, x, y)
    return ops.where(condition, x, y)


# On torch, Keras's functions of two tensors cast float64 to float32; operators and these do not.


def maximum(x: Tensor, y: Any) -> Tensor:
    """The larger of two, element by element."""
    return where(x > y, x, y)


def minimum(x: Tensor, y: Any) -> Tensor:
    """The smaller of two, element by element."""
    return where(x < y, x, y)


def log_add(x: Tensor, y: Tensor) -> Tensor:
    """`log(exp(x) + exp(y))`."""
    peak = ops.stop_gradient(maximum(x, y))
    return peak + ops.log(ops.exp(x - peak) + ops.exp(y - peak))


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x`, whose gradient is multiplied by a constant factor."""
    constant = ops.stop_gradient(x)
    return constant + ops.stop_gradient(factor) * (x - constant)


def unit(x: Tensor) -> Tensor:
    """`x / max(|x|, 1e-6)` along the last axis, for any finite x.

    The gradient is that of `x / |x|`, where a norm below 0.1 counts as 0.1: it is bounded by
    definition, also at 0.
    """
    # The largest entry goes first, so that no square leaves the range of the dtype.
    largest = ops.stop_gradient(ops.amax(ops.abs(x), axis=-1, keepdims=True))
    largest = maximum(largest, 1e-30)
    scaled = x / largest
    squares = ops.sum(ops.square(scaled), axis=-1, keepdims=True)
    norm = ops.sqrt(where(squares > 0, squares, 1.0))  # of what is scaled
    is_long = norm * largest > SMALLEST_NORM
    direction = where(is_long, scaled / norm, scaled * (minimum(largest, 1.0) / SMALLEST_NORM))
    length = maximum(norm * largest, SMALLEST_NORM)
    return scale_gradient(direction, minimum(length / SMALLEST_NORM_OF_GRADIENTS, 1.0))


def softmax(logits: Tensor) -> Tensor:
    """Softmax of the last axis, which may have one entry."""
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def key_bias(key: Tensor, discoverability: Tensor) -> Tensor:
    """`b_j = clip(k_j u, -8, 8)`: `(B, N, S, H)` and `(N, H)` to `(B, N, S, 1)`."""
    discoverability = ops.cast(discoverability, key.dtype)
    bias = ops.einsum("bnsh,nh->bns", key, discoverability)[..., None]
    return maximum(minimum(bias, 8.0), -8.0)


def contain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Keeps NaN and infinity from spreading to earlier tokens, where they meet weights of 0.

    Args:
        *tensors: Tensors of shape `(B, *, S, F)`.

    Returns:
        The tensors with zeros in place of each token that is not finite, and a tensor `(B, 1, S,
        1)` to add to the output: 0 before the first such token, NaN from it on.
    """
    finite = [ops.all(ops.isfinite(x), axis=(1, 3), keepdims=True) for x in tensors]
    clean = [where(ok, x, 0.0) for ok, x in zip(finite, tensors, strict=True)]
    all_finite = finite[0]
    for ok in finite[1:]:
        all_finite = ops.logical_and(all_finite, ok)
    broken = ops.cumsum(ops.cast(ops.logical_not(all_finite), "int32"), axis=2) > 0
    return (*clean, ops.cast(where(broken, float("nan"), 0.0), tensors[0].dtype))
