"""The walk, forward and backward: a sparse product a step, its last one with the sum at its end.

    Z^t = P Z^(t-1),    y = LOCAL + sum_t theta_t Z^t
    G^T = theta_T dy,    G^(t-1) = theta_(t-1) dy + P^T G^t
    dP_ij = sum_t G^t_i . Z^(t-1)_j,    dtheta_t = dy . Z^t,    dV = G^0

Each row of P has the sum 1, so that a number added to a row of dP changes no gradient: from dP_ij
the kernels take away that of i itself, which leaves more digits to half precision.

Values and states are `(B, S, M, V)`, outputs `(B, S, N, V)`; N / M query heads share a state.
"""

import math

import torch
import triton
import triton.language as tl

from keras_rwr import _walk
from keras_rwr._tensors import repeat_heads
from keras_rwr.backends.torch import blocks
from keras_rwr.backends.torch.local import token_labels
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.product import (
    band_dot,
    band_product,
    far_dot,
    far_product,
    list_edges,
    list_product,
    make_matmul,
)
from keras_rwr.backends.torch.run import ceil_div, next_power_of_2, run
from keras_rwr.backends.torch.shape import shape_of, warps_of
from keras_rwr.backends.torch.tiles import (
    PADDING,
    load_end,
    load_labels,
    load_rows,
    of_head,
    store_rows,
)
from keras_rwr.backends.torch.vectors import blank, token_major

# Bytes of a row that a program works on, forward and backward.
_STEP, _ADJOINT_STEP = 128, 256


def walk(graph, value, hop_weights, options, local):
    """See `keras_rwr._walk.walk`."""
    has_logarithms = graph.log_weights is not None
    if graph.transition.back is not None or (options.is_reciprocal and has_logarithms):
        value = blank(value, graph.tokens)
        output = _walk.walk(graph, value, hop_weights, options, local, make_matmul())
        return torch.where(graph.tokens.real, output, 0.0)
    if not options.is_reciprocal:
        return _walk_forward(graph, value, hop_weights, local)
    beta = options.reciprocal_beta
    forward = _walk_forward(graph, value, beta * hop_weights, local)
    # B^t is P^t with its rows times pi and its columns divided by it. Rows are divided by their
    # sums, so that pi of the row itself does not matter.
    mass, shares = _walk.shares_of_hops(hop_weights, options)
    log_stationary = blank(graph.tiling.cut(graph.log_stationary()), graph.tokens)
    inverse = torch.exp(-log_stationary).to(value.dtype)
    scaled = value * repeat_heads(inverse, value.shape[1])
    shares = shares.expand(1, local.shape[1], -1, -1)
    # These values differ by orders of magnitude: a token's own is no centre.
    total = _walk_forward(graph, scaled, shares, centred=False)
    sums = _walk_forward(graph, inverse, shares, centred=False)
    sums = torch.where(graph.tokens.real, sums, 1.0) if graph.tokens.has_padding else sums
    return forward + (1.0 - beta) * mass * total / sums


def _walk_forward(graph, value, hop_weights, local=None, centred=True):
    """`local + sum_t theta_t P^t V`."""
    matrix, batch = graph.transition, value.shape[0]
    heads = hop_weights.shape[1] if local is None else local.shape[1]
    far, neighbors = matrix.far, matrix.neighbors
    output = _Walk.apply(
        token_major(value),
        matrix.local.contiguous(),
        None if far is None else far.contiguous(),
        _every_row(hop_weights, batch, heads, value.shape[2]),
        None if local is None else token_major(local),
        None if neighbors is None else neighbors.contiguous(),
        *(matrix.lists or (None, None)),
        token_labels(graph.tokens, batch),
        graph.tokens.ends,
        matrix.tiling.before,
        matrix.block,
        centred,
    )
    return output.transpose(1, 2)


def _every_row(hop_weights, batch, heads, size):
    """theta as a float32 view `(B, S, N, T + 1)`, the numbers of a token and head side by side."""
    weights, steps = hop_weights.float(), hop_weights.shape[-1]
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    return weights.expand(batch, heads, size, steps).transpose(1, 2)


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        value,
        band,
        far,
        theta,
        local,
        neighbors,
        edges,
        starts,
        labels,
        ends,
        before,
        block,
        centred,
    ):
        output, states = _steps(
            value, band, far, theta, local, neighbors, edges, starts, labels, ends, before, block
        )
        ctx.save_for_backward(value, band, far, theta, neighbors, edges, starts, labels, states)
        ctx.options, ctx.adds = (before, block, centred), local is not None
        return output

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        tensors = ctx.saved_tensors
        cotangent = cotangent.contiguous()
        value_gradient, band_gradient, far_gradient, theta_gradient = _adjoint_steps(
            cotangent, *tensors, *ctx.options
        )
        return (
            value_gradient,
            band_gradient,
            None if tensors[2] is None else far_gradient,
            theta_gradient,
            cotangent if ctx.adds else None,
            *[None] * 8,
        )


def _run_steps(
    value, band, far, theta, local, neighbors, edges, starts, labels, ends, before, block
):
    output, states = _steps_outputs(value, band, far, theta, local)
    query_heads, steps = theta.shape[2], theta.shape[3] - 1
    batch, size, heads, _ = value.shape
    wide, constants = _constants(_STEP, value, band, neighbors, query_heads, before, block)
    x = value
    for t in range(1, steps + 1):
        last = t == steps
        brought = None
        if edges is not None and block >= blocks.SMALLEST:
            lists = neighbors, edges, starts
            brought = blocks.multiply_blocks(far, x, *lists, block, labels, ends)
        run(
            _step,
            (band.shape[2], heads // wide, batch),
            band,
            far,
            brought,
            neighbors,
            x,
            labels,
            ends,
            states[t - 1],
            value if last else None,
            states if last else None,
            local if last else None,
            theta if last else None,
            output if last else None,
            size,
            heads // wide,
            band.shape[1],
            query_heads // wide,
            *theta.stride()[:3],
            STEPS=steps,
            **constants,
        )
        x = states[t - 1]
    return output, states


def _constants(width, value, band, neighbors, query_heads, before, block):
    """How many heads a program works on side by side, and the constants of a step."""
    _, size, heads, features = value.shape
    wide = 1
    if query_heads == heads and features & (features - 1) == 0:
        wide = math.gcd(max(1, width // (features * value.itemsize)), heads // band.shape[1])
    shape = shape_of(band, neighbors, before, block, size, wide * features)
    warps = warps_of(shape, value.itemsize)
    return wide, {"SHAPE": shape, "WIDE": wide, "num_warps": warps}


def _steps_outputs(value, band, far, theta, local, *others):
    states = value.new_empty((theta.shape[3] - 1, *value.shape))
    return value.new_empty((*theta.shape[:3], value.shape[3])), states


def _run_adjoint_steps(
    cotangent,
    value,
    band,
    far,
    theta,
    neighbors,
    edges,
    starts,
    labels,
    states,
    before,
    block,
    centred,
):
    outputs = _adjoint_outputs(cotangent, value, band, far, theta)
    value_gradient, band_gradient, far_gradient, theta_gradient = outputs
    steps, heads, graphs = theta.shape[3] - 1, cotangent.shape[2], band.shape[1]
    batch, size, state_heads, features = value.shape
    adjoint = torch.empty_like(value)
    run(
        _start,
        (ceil_div(size, 64), state_heads, batch),
        cotangent,
        value,
        states,
        theta,
        labels,
        adjoint,
        theta_gradient,
        size,
        state_heads,
        heads,
        *theta.stride()[:3],
        STEPS=steps,
        ROWS=64,
        FEATURES=features,
        COLUMNS=max(next_power_of_2(features), 16),
        num_warps=4 if features * value.itemsize <= 256 else 8,
    )
    if neighbors is not None and edges is None:
        edges, starts = list_edges(neighbors, block)
    wide, constants = _constants(_ADJOINT_STEP, value, band, neighbors, heads, before, block)
    for t in range(steps, 0, -1):
        x = value if t == 1 else states[t - 2]
        band_dot(band_gradient, adjoint, x, before, centred, t < steps)
        if far is not None:
            dots = far_dot(adjoint, x, neighbors, edges, starts, block, centred)
            far_gradient = dots if t == steps else far_gradient + dots
        moved = value_gradient if t == 1 else torch.empty_like(value)
        run(
            _adjoint_step,
            (band.shape[2], state_heads // wide, batch),
            band,
            far,
            edges,
            starts,
            adjoint,
            cotangent,
            theta,
            labels,
            moved,
            size,
            state_heads // wide,
            graphs,
            heads // wide,
            *theta.stride()[:3],
            t - 1,
            **constants,
        )
        adjoint = moved
    return value_gradient, band_gradient, far_gradient, theta_gradient


def _adjoint_outputs(cotangent, value, band, far, theta, *others):
    return (
        torch.empty_like(value),
        # The sum of several steps is made in float32.
        torch.empty_like(band, dtype=band.dtype if theta.shape[3] == 2 else torch.float32),
        value.new_empty((0,) if far is None else far.shape, dtype=torch.float32),
        value.new_empty(theta.shape, dtype=torch.float32),
    )


_steps = define(
    "walk(Tensor value, Tensor band, Tensor? far, Tensor theta, Tensor? local, Tensor? neighbors, "
    "Tensor? edges, Tensor? starts, Tensor? labels, Tensor? ends, int before, int block) "
    "-> (Tensor, Tensor)",
    _run_steps,
    _steps_outputs,
)
_adjoint_steps = define(
    "walk_gradients(Tensor cotangent, Tensor value, Tensor band, Tensor? far, Tensor theta, "
    "Tensor? neighbors, Tensor? edges, Tensor? starts, Tensor? labels, Tensor states, int before, "
    "int block, bool centred) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_adjoint_steps,
    _adjoint_outputs,
)


@triton.jit
def _times_theta(
    x,
    theta_ptr,
    entry,
    head,
    rows,
    inside,
    batch_stride,
    row_stride,
    head_stride,
    t,
    WIDE: tl.constexpr,
):
    """`theta_t x` of rows of WIDE heads side by side."""
    heads = head * WIDE + tl.arange(0, WIDE)
    pointers = theta_ptr + entry.to(tl.int64) * batch_stride + t
    pointers += rows.to(tl.int64)[:, None] * row_stride + heads[None, :] * head_stride
    theta = tl.load(pointers, mask=inside[:, None], other=0.0)
    apart = tl.reshape(x.to(tl.float32), (x.shape[0], WIDE, x.shape[1] // WIDE))
    return tl.reshape(theta[:, :, None] * apart, x.shape)


@triton.jit
def _step(
    band_ptr,
    far_ptr,
    brought_ptr,
    neighbor_ptr,
    x_ptr,
    label_ptr,
    end_ptr,
    state_ptr,
    value_ptr,
    states_ptr,
    local_ptr,
    theta_ptr,
    output_ptr,
    size,
    heads,
    graphs,
    query_heads,
    theta_batch,
    theta_row,
    theta_head,
    SHAPE: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A tile of the next state; with `output_ptr` also of the output."""
    tile, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(0)
    graph = entry.to(tl.int64) * graphs + head // (heads // graphs)
    lanes = tl.arange(0, SHAPE.rows)
    rows = tile * SHAPE.tile + lanes
    held = (lanes < SHAPE.tile) & (rows < size)
    stride = heads * SHAPE.features
    end = load_end(end_ptr, entry, size)
    x_ptr = of_head(x_ptr, entry, size, heads, head, SHAPE.features)
    total = band_product(
        tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32),
        band_ptr + graph * tiles * (SHAPE.tile * SHAPE.spans * SHAPE.tile),
        x_ptr,
        label_ptr,
        entry,
        tile,
        tiles,
        size,
        end,
        stride,
        SHAPE,
        False,
    )
    if far_ptr is not None:
        total = far_product(
            total,
            far_ptr,
            brought_ptr,
            neighbor_ptr,
            x_ptr,
            (graph, head, heads // graphs, tiles * SHAPE.tile),
            rows,
            held,
            end,
            stride,
            SHAPE,
        )
    state_ptr = of_head(state_ptr, entry, size, heads, head, SHAPE.features)
    store_rows(state_ptr, rows, stride, held, total, SHAPE.features, SHAPE.columns)
    if output_ptr is not None:
        real = load_labels(label_ptr, entry, size, rows, size) != PADDING
        present = held & real & (rows < end)
        value_ptr = of_head(value_ptr, entry, size, heads, head, SHAPE.features)
        states_ptr = of_head(states_ptr, entry, size, heads, head, SHAPE.features)
        states_stride = tl.num_programs(2).to(tl.int64) * size * stride
        shared = query_heads // heads
        for member in range(shared):
            query_head = head * shared + member
            row_of_head = query_heads * SHAPE.features
            output = tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32)
            if local_ptr is not None:
                local_of_head = of_head(
                    local_ptr, entry, size, query_heads, query_head, SHAPE.features
                )
                local = load_rows(
                    local_of_head, rows, row_of_head, held, SHAPE.features, SHAPE.columns
                )
                output += local.to(tl.float32)
            for t in tl.static_range(STEPS + 1):
                if t == 0:
                    state = load_rows(
                        value_ptr, rows, stride, present, SHAPE.features, SHAPE.columns
                    )
                elif t < STEPS:
                    state = load_rows(
                        states_ptr + (t - 1) * states_stride,
                        rows,
                        stride,
                        present,
                        SHAPE.features,
                        SHAPE.columns,
                    )
                else:
                    state = total
                output += _times_theta(
                    state,
                    theta_ptr,
                    entry,
                    query_head,
                    rows,
                    held & real,
                    theta_batch,
                    theta_row,
                    theta_head,
                    t,
                    WIDE,
                )
            output_of_head = of_head(
                output_ptr, entry, size, query_heads, query_head, SHAPE.features
            )
            store_rows(
                output_of_head, rows, row_of_head, held, output, SHAPE.features, SHAPE.columns
            )


@triton.jit
def _start(
    cotangent_ptr,
    value_ptr,
    states_ptr,
    theta_ptr,
    label_ptr,
    adjoint_ptr,
    gradient_ptr,
    size,
    heads,
    query_heads,
    theta_batch,
    theta_row,
    theta_head,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """G^T, and the gradient of theta."""
    tile, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_labels(label_ptr, entry, size, rows, size) != PADDING
    stride = heads * FEATURES
    value_ptr = of_head(value_ptr, entry, size, heads, head, FEATURES)
    states_ptr = of_head(states_ptr, entry, size, heads, head, FEATURES)
    states_stride = tl.num_programs(2).to(tl.int64) * size * stride
    shared = query_heads // heads
    adjoint = tl.zeros((ROWS, COLUMNS), tl.float32)
    for member in range(shared):
        query_head = head * shared + member
        cotangent_of_head = of_head(cotangent_ptr, entry, size, query_heads, query_head, FEATURES)
        cotangent = load_rows(
            cotangent_of_head, rows, query_heads * FEATURES, real, FEATURES, COLUMNS
        ).to(tl.float32)
        for t in tl.static_range(STEPS + 1):
            if t == 0:
                state = load_rows(value_ptr, rows, stride, real, FEATURES, COLUMNS)
            else:
                state = load_rows(
                    states_ptr + (t - 1) * states_stride, rows, stride, real, FEATURES, COLUMNS
                )
            slope = tl.sum(cotangent * state.to(tl.float32), 1)
            place = (entry.to(tl.int64) * size + rows) * query_heads + query_head
            tl.store(gradient_ptr + place * (STEPS + 1) + t, slope, mask=inside)
        adjoint += _times_theta(
            cotangent,
            theta_ptr,
            entry,
            query_head,
            rows,
            real,
            theta_batch,
            theta_row,
            theta_head,
            STEPS,
            1,
        )
    adjoint_ptr = of_head(adjoint_ptr, entry, size, heads, head, FEATURES)
    store_rows(adjoint_ptr, rows, stride, inside, adjoint, FEATURES, COLUMNS)


@triton.jit
def _adjoint_step(
    band_ptr,
    far_ptr,
    edge_ptr,
    start_ptr,
    x_ptr,
    cotangent_ptr,
    theta_ptr,
    label_ptr,
    output_ptr,
    size,
    heads,
    graphs,
    query_heads,
    theta_batch,
    theta_row,
    theta_head,
    t,
    SHAPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """G^t of a tile from G^(t+1)."""
    tile, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(0)
    graph = entry.to(tl.int64) * graphs + head // (heads // graphs)
    lanes = tl.arange(0, SHAPE.rows)
    rows = tile * SHAPE.tile + lanes
    held = (lanes < SHAPE.tile) & (rows < size)
    real = held & (load_labels(label_ptr, entry, size, rows, size) != PADDING)
    stride = heads * SHAPE.features
    x_ptr = of_head(x_ptr, entry, size, heads, head, SHAPE.features)
    total = band_product(
        tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32),
        band_ptr + graph * tiles * (SHAPE.tile * SHAPE.spans * SHAPE.tile),
        x_ptr,
        label_ptr,
        entry,
        tile,
        tiles,
        size,
        size,
        stride,
        SHAPE,
        True,
    )
    if far_ptr is not None:
        reach = tiles * SHAPE.tile
        total = list_product(
            total,
            far_ptr,
            edge_ptr,
            start_ptr,
            x_ptr,
            rows,
            held,
            graph * reach,
            graph * tl.cdiv(reach, SHAPE.block),
            stride,
            SHAPE,
        )
    shared = query_heads // heads
    for member in range(shared):
        query_head = head * shared + member
        cotangent_of_head = of_head(
            cotangent_ptr, entry, size, query_heads, query_head, SHAPE.features
        )
        cotangent = load_rows(
            cotangent_of_head,
            rows,
            query_heads * SHAPE.features,
            real,
            SHAPE.features,
            SHAPE.columns,
        )
        total += _times_theta(
            cotangent,
            theta_ptr,
            entry,
            query_head,
            rows,
            real,
            theta_batch,
            theta_row,
            theta_head,
            t,
            WIDE,
        )
    total = tl.where(real[:, None], total, 0.0)
    output_ptr = of_head(output_ptr, entry, size, heads, head, SHAPE.features)
    store_rows(output_ptr, rows, stride, held, total, SHAPE.features, SHAPE.columns)
