"""Kernels over tokens by themselves: scales, and where walks start and end.

The adjoint walk, `G^(m-1) = (1 - alpha) P^T G^m`, begins with `start_adjoint` and runs on the
kernels of the walk.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.tiles import (
    head_offset,
    load_gain,
    load_numbers,
    load_rows,
    store_numbers,
    store_rows,
)


@triton.jit
def measure_scales(
    x_ptr,
    mask_ptr,
    scale_ptr,
    x_batch,
    x_row,
    x_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """`1 / max(|x|, 1e-6)` of each token, -1 at padding."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    x_ptr += head_offset(head, heads, x_batch, x_head)
    x = load_rows(x_ptr, rows, x_row, inside, HEAD_SIZE, HEAD).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), 1e-12))
    if mask_ptr is not None:
        real = tl.load(mask_ptr + (head // heads).to(tl.int64) * size + rows, inside, other=0)
        scale = tl.where(real != 0, scale, -1.0)
    store_numbers(scale_ptr, head, size, rows, inside, scale)


@triton.jit
def start_reciprocal(
    value_ptr,
    query_scale_ptr,
    share_ptr,
    bias_ptr,
    start_ptr,
    value_batch,
    value_row,
    value_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):
    """What the reciprocal walk starts from, `[V, V / pi, 1 / pi]`; zeros at padding."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    value_ptr += head_offset(head, heads, value_batch, value_head)
    value = load_rows(value_ptr, rows, value_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    share = load_numbers(share_ptr, head, size, rows, inside, 0.0)
    inverse = tl.where(share > 0, share, 1.0)
    if bias_ptr is not None:
        inverse /= load_gain(bias_ptr, head, size, rows, inside)
    inverse = tl.where(real, inverse, 0.0).to(start_ptr.dtype.element_ty).to(tl.float32)
    WALKED: tl.constexpr = 2 * VALUE_SIZE + 1
    start_ptr += head.to(tl.int64) * size * WALKED
    store_rows(start_ptr, rows, WALKED, inside, value, VALUE_SIZE, VALUE)
    start_ptr += VALUE_SIZE
    store_rows(start_ptr, rows, WALKED, inside, value * inverse[:, None], VALUE_SIZE, VALUE)
    end_ptr = start_ptr + VALUE_SIZE + rows.to(tl.int64) * WALKED
    tl.store(end_ptr, inverse.to(start_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_walk(
    state_ptr,
    rows,
    state_row,
    real,
    forward_share,
    backward_share,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """RWR of the walk's last state, and for the reciprocal one its parts Z2 and Z3."""
    forward = load_rows(state_ptr, rows, state_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    if RECIPROCAL:
        numerator = load_rows(state_ptr + VALUE_SIZE, rows, state_row, real, VALUE_SIZE, VALUE)
        numerator = numerator.to(tl.float32)
        end_ptr = state_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * state_row
        denominator = tl.load(end_ptr, mask=real, other=1.0).to(tl.float32)
        walk = forward_share * forward + backward_share * numerator / denominator[:, None]
        return walk, numerator, denominator
    else:
        return forward_share * forward, forward, forward_share


@triton.jit
def combine(
    state_ptr,
    query_scale_ptr,
    lens_ptr,
    output_ptr,
    state_batch,
    state_row,
    state_head,
    output_batch,
    output_row,
    output_head,
    size,
    heads,
    batch_heads,
    forward_share,
    backward_share,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """Adds gamma RWR to LOCAL, where no step of the walk did so."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    state_ptr += head_offset(head, heads, state_batch, state_head)
    walk, _, _ = load_walk(
        state_ptr,
        rows,
        state_row,
        real,
        forward_share,
        backward_share,
        VALUE,
        VALUE_SIZE,
        RECIPROCAL,
    )
    output_ptr += head_offset(head, heads, output_batch, output_head)
    local = load_rows(output_ptr, rows, output_row, inside, VALUE_SIZE, VALUE).to(tl.float32)
    result = local + tl.load(lens_ptr + head % heads) * walk
    store_rows(output_ptr, rows, output_row, inside, result, VALUE_SIZE, VALUE)


@triton.jit
def start_adjoint(
    cotangent_ptr,
    output_ptr,
    state_ptr,
    query_scale_ptr,
    lens_ptr,
    adjoint_ptr,
    local_delta_ptr,
    lens_gradient_ptr,
    cotangent_batch,
    cotangent_row,
    cotangent_head,
    output_batch,
    output_row,
    output_head,
    state_batch,
    state_row,
    state_head,
    adjoint_head,
    size,
    heads,
    batch_heads,
    forward_share,
    backward_share,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """`G^T`, `sum_f dO_if LOCAL_if` and `sum_f dO_if RWR_if` from the output's gradient dO."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    cotangent_ptr += head_offset(head, heads, cotangent_batch, cotangent_head)
    output_ptr += head_offset(head, heads, output_batch, output_head)
    state_ptr += head_offset(head, heads, state_batch, state_head)
    cotangent = load_rows(cotangent_ptr, rows, cotangent_row, real, VALUE_SIZE, VALUE)
    cotangent = cotangent.to(tl.float32)
    output = load_rows(output_ptr, rows, output_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    walk, numerator, denominator = load_walk(
        state_ptr,
        rows,
        state_row,
        real,
        forward_share,
        backward_share,
        VALUE,
        VALUE_SIZE,
        RECIPROCAL,
    )
    lens = tl.load(lens_ptr + head % heads)
    lens_gradient = tl.sum(cotangent * walk, 1)
    local_delta = tl.sum(cotangent * output, 1) - lens * lens_gradient
    store_numbers(lens_gradient_ptr, head, size, rows, inside, lens_gradient)
    store_numbers(local_delta_ptr, head, size, rows, inside, local_delta)
    adjoint_ptr += head.to(tl.int64) * adjoint_head
    adjoint = lens * forward_share * cotangent
    store_rows(adjoint_ptr, rows, WALKED, inside, adjoint, VALUE_SIZE, VALUE)
    if RECIPROCAL:
        part = lens * backward_share * cotangent / denominator[:, None]
        adjoint_ptr += VALUE_SIZE
        store_rows(adjoint_ptr, rows, WALKED, inside, part, VALUE_SIZE, VALUE)
        last = -tl.sum(part * numerator, 1) / denominator
        end_ptr = adjoint_ptr + VALUE_SIZE + rows.to(tl.int64) * WALKED
        tl.store(end_ptr, last.to(adjoint_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_adjoint(
    adjoint_ptr,
    states_ptr,
    start_ptr,
    query_scale_ptr,
    value_gradient_ptr,
    delta_ptr,
    bias_gradient_ptr,
    start_batch,
    start_row,
    start_head,
    gradient_batch,
    gradient_row,
    gradient_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    STEPS: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """The values' gradient through the walk, and delta, the sum of `P_ij dP_ij` over a row.

    For the reciprocal walk, which starts from `[V, V / pi, 1 / pi]`, delta is lessened and the
    bias gradient begins with the gradient of log pi.
    """
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    start_ptr += head_offset(head, heads, start_batch, start_head)
    head_start = head.to(tl.int64) * size
    step_stride = tl.cast(size, tl.int64) * WALKED
    adjoint_ptr += head_start * ((STEPS + 1) * WALKED)
    states_ptr += head_start * (STEPS * WALKED)
    delta = tl.zeros((ROWS,), tl.float32)
    log_stationary = tl.zeros((ROWS,), tl.float32)
    gradient = tl.zeros((ROWS, VALUE), tl.float32)
    PARTS: tl.constexpr = 2 if RECIPROCAL else 1
    for part in tl.static_range(PARTS):
        offset = part * VALUE_SIZE
        start = load_rows(start_ptr + offset, rows, start_row, real, VALUE_SIZE, VALUE)
        start = start.to(tl.float32)
        total = load_rows(adjoint_ptr + offset, rows, WALKED, real, VALUE_SIZE, VALUE).to(
            tl.float32
        )
        for step in range(1, STEPS + 1):
            adjoint = load_rows(
                adjoint_ptr + step * step_stride + offset, rows, WALKED, real, VALUE_SIZE, VALUE
            ).to(tl.float32)
            state = load_rows(
                states_ptr + (step - 1) * step_stride + offset,
                rows,
                WALKED,
                real,
                VALUE_SIZE,
                VALUE,
            ).to(tl.float32)
            total += adjoint
            delta += tl.sum(adjoint * (state - start), 1)
        if part == 0:
            gradient += total
        else:
            inverse_ptr = start_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * start_row
            inverse = tl.load(inverse_ptr, mask=real, other=0.0).to(tl.float32)
            gradient += total * inverse[:, None]
            log_stationary -= tl.sum(total * start, 1)
    if RECIPROCAL:
        end = 2 * VALUE_SIZE + rows.to(tl.int64) * WALKED
        start = tl.load(
            start_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * start_row, mask=real, other=0.0
        ).to(tl.float32)
        total = tl.load(adjoint_ptr + end, mask=real, other=0.0).to(tl.float32)
        for step in range(1, STEPS + 1):
            adjoint = tl.load(adjoint_ptr + step * step_stride + end, mask=real, other=0.0)
            state = tl.load(states_ptr + (step - 1) * step_stride + end, mask=real, other=0.0)
            total += adjoint.to(tl.float32)
            delta += adjoint.to(tl.float32) * (state.to(tl.float32) - start)
        log_stationary -= total * start
        delta -= log_stationary
        if bias_gradient_ptr is not None:
            store_numbers(bias_gradient_ptr, head, size, rows, inside, log_stationary)
    store_numbers(delta_ptr, head, size, rows, inside, delta)
    value_gradient_ptr += head_offset(head, heads, gradient_batch, gradient_head)
    store_rows(value_gradient_ptr, rows, gradient_row, inside, gradient, VALUE_SIZE, VALUE)
