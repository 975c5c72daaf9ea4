"""Vectors as the kernels take them: unit vectors, and where a sequence stops being finite.

All of these kernels read tensors `(B, S, N, F)`, each token's heads side by side.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from keras_rwr import _tensors
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.run import ceil_div, next_power_of_2, run
from keras_rwr.backends.torch.tiles import (
    LONGEST_SCALE,
    PADDING,
    load_labels,
    load_rows,
    scale_of_gradients,
    store_rows,
)

_ROWS, _WARPS = 32, 4
_LARGEST = 512  # features that a program loads at once


class UnitVectors(NamedTuple):
    """Unit vectors `rows * scales`.

    A row is the vector times a power of two, which loses nothing in any dtype. Gradients of `rows`
    are those of the unit vectors.

    Attributes:
        vectors: Tensor of shape `(B, G, S, F)`, of any length.
        rows: Tensor of shape `(B, S, G, F)`, in their dtype.
        scales: Tensor of shape `(B, S, G, 2)`, float32: what makes unit vectors of the rows, and of
            the vectors.
    """

    vectors: Any
    rows: Any
    scales: Any

    def dense(self, tokens):
        """The unit vectors, `(B, G, S, F)` in float32, of what kernels load."""
        return _tensors.unit(blank(self.vectors, tokens).float())


def token_major(x):
    """`(B, N, S, F)` to `(B, S, N, F)`, side by side in memory."""
    return x.transpose(1, 2).contiguous()


def blank(x, tokens):
    """`(B, N, S, F)` with zeros at padding, and from a sequence's end on."""
    loaded = tokens.real if tokens.has_padding else None
    if tokens.ends is not None:
        positions = torch.arange(x.shape[2], device=x.device)[:, None]
        before = positions < tokens.ends[:, None, None, None]
        loaded = before if loaded is None else before & loaded
    return x if loaded is None else torch.where(loaded, x, 0.0)


def unit(vectors):
    """See `keras_rwr._tensors.unit`: `UnitVectors` of `(B, G, S, F)`."""
    return UnitVectors(vectors, *_Unit.apply(token_major(vectors)))


def contain(vectors, tokens, options):
    """See `keras_rwr._heads.contain_vectors`.

    Padding becomes zeros, so that products of what stands there are 0 in gradients too. What is not
    finite stays: kernels load zeros from a sequence's end on, and no output behind the end is a
    number. The end is at the first value, or vector of the graph, that is not finite; LOCAL itself
    looks at its queries and keys.
    """
    kinds = {x.dtype for x in vectors[:3]}
    if len(kinds) > 1:
        vectors = [None if x is None else x.float() for x in vectors]
    if tokens.has_padding:
        vectors = [None if x is None else torch.where(tokens.real, x, 0.0) for x in vectors]
    if not tokens.is_causal:
        return vectors, tokens, None
    query, key, value, *graph = vectors
    if options.steps > 0 and graph[0] is None:  # the graph's are these
        graph = query, key
    checked = [token_major(x.detach()) for x in (value, *graph) if x is not None]
    ends = _find_ends(checked, tokens.labels if tokens.has_padding else None)
    return vectors, tokens.end_at(ends), None


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors):
        rows, scales = _unit(vectors)
        ctx.save_for_backward(rows, scales)
        ctx.mark_non_differentiable(scales)
        return rows, scales

    @staticmethod
    def backward(ctx, cotangent, _):
        refuse_second_derivative()
        return _unit_gradients(cotangent.contiguous(), *ctx.saved_tensors)


def _run_unit(vectors):
    rows, scales = _unit_outputs(vectors)
    features, count = vectors.shape[-1], vectors[..., 0].numel()
    grid = (ceil_div(count, _ROWS),)
    run(_unit_kernel, grid, vectors, rows, scales, count, **_constants(features))
    return rows, scales


def _unit_outputs(vectors):
    return torch.empty_like(vectors), vectors.new_empty(
        (*vectors.shape[:3], 2), dtype=torch.float32
    )


def _run_unit_gradients(cotangent, rows, scales):
    gradient = torch.empty_like(rows)
    features, count = rows.shape[-1], rows[..., 0].numel()
    grid = (ceil_div(count, _ROWS),)
    tensors = (cotangent, rows, scales, gradient)
    run(_unit_gradient_kernel, grid, *tensors, count, **_constants(features))
    return gradient


def _run_find_ends(tensors, labels):
    batch, size = tensors[0].shape[:2]
    ends = torch.full((batch,), size, dtype=torch.int32, device=tensors[0].device)
    if labels is not None:
        labels = labels.expand(batch, 1, size, 1).contiguous()
    constants = {"ROWS": 16, "VECTOR": _LARGEST, "num_warps": _WARPS}
    features = [x.shape[2] * x.shape[3] for x in tensors]
    missing = [None] * (3 - len(tensors))
    for i, count in enumerate(features + [0] * (3 - len(features))):
        constants[f"FEATURES{i}"] = count
    grid = (ceil_div(size, 16), batch)
    run(_find_ends_kernel, grid, *tensors, *missing, labels, ends, size, **constants)
    return ends


def _constants(features):
    vector = min(max(next_power_of_2(features), 16), _LARGEST)
    return {"FEATURES": features, "VECTOR": vector, "ROWS": _ROWS, "num_warps": _WARPS}


_unit = define("unit(Tensor vectors) -> (Tensor, Tensor)", _run_unit, _unit_outputs)
_unit_gradients = define(
    "unit_gradients(Tensor cotangent, Tensor rows, Tensor scales) -> Tensor",
    _run_unit_gradients,
    lambda cotangent, rows, scales: torch.empty_like(rows),
)
_find_ends = define(
    "find_ends(Tensor[] tensors, Tensor? labels) -> Tensor",
    _run_find_ends,
    lambda tensors, labels: tensors[0].new_empty(tensors[0].shape[:1], dtype=torch.int32),
)


@triton.jit
def _unit_kernel(
    x_ptr,
    row_ptr,
    scale_ptr,
    count,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    x = load_rows(x_ptr, rows, FEATURES, inside, FEATURES, VECTOR).to(tl.float32)
    # The power of two at or below the largest entry, from 2^-126 to 2^125, and its reciprocal.
    exponent = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 252)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = x * reciprocal[:, None]
    norm = tl.sqrt(tl.sum(scaled * scaled, 1))
    # A vector counts as 1e-6 long at least.
    is_long = norm > 1e-6 * reciprocal
    scale = tl.where(is_long, 1.0 / tl.where(is_long, norm, 1.0), tl.minimum(power, 1.0) * 1e6)
    store_rows(row_ptr, rows, FEATURES, inside, scaled, FEATURES, VECTOR)
    tl.store(scale_ptr + 2 * rows, scale, mask=inside)
    whole = tl.where(is_long, scale * reciprocal, 1e6)
    tl.store(scale_ptr + 2 * rows + 1, whole, mask=inside)


@triton.jit
def _unit_gradient_kernel(
    cotangent_ptr,
    row_ptr,
    scale_ptr,
    gradient_ptr,
    count,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    cotangent = load_rows(cotangent_ptr, rows, FEATURES, inside, FEATURES, VECTOR).to(tl.float32)
    unit = load_rows(row_ptr, rows, FEATURES, inside, FEATURES, VECTOR).to(tl.float32)
    unit *= tl.load(scale_ptr + 2 * rows, mask=inside, other=0.0)[:, None]
    scale = tl.load(scale_ptr + 2 * rows + 1, mask=inside, other=0.0)
    along = tl.where(scale < LONGEST_SCALE, tl.sum(cotangent * unit, 1), 0.0)
    gradient = (cotangent - unit * along[:, None]) * scale_of_gradients(scale)[:, None]
    store_rows(gradient_ptr, rows, FEATURES, inside, gradient, FEATURES, VECTOR)


@triton.jit
def _is_broken(x_ptr, entry, size, rows, inside, FEATURES: tl.constexpr, VECTOR: tl.constexpr):
    """Rows with a number that is not finite."""
    broken = tl.zeros(rows.shape, tl.int32)
    if x_ptr is not None:
        x_ptr += entry.to(tl.int64) * size * FEATURES
        for first in range(0, FEATURES, VECTOR):
            x = load_rows(x_ptr, rows, FEATURES, inside, FEATURES, VECTOR, first).to(tl.float32)
            broken |= tl.max((x - x != 0).to(tl.int32), 1)
    return broken


@triton.jit
def _find_ends_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    label_ptr,
    end_ptr,
    size,
    FEATURES0: tl.constexpr,
    FEATURES1: tl.constexpr,
    FEATURES2: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    entry = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = load_labels(label_ptr, entry, size, rows, size) != PADDING
    broken = _is_broken(x_ptr, entry, size, rows, inside, FEATURES0, VECTOR)
    broken |= _is_broken(y_ptr, entry, size, rows, inside, FEATURES1, 64)
    broken |= _is_broken(z_ptr, entry, size, rows, inside, FEATURES2, 64)
    end = tl.min(tl.where(broken > 0, rows, size))
    if end < size:
        tl.atomic_min(end_ptr + entry, end)
