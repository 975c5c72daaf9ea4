"""Weights of edges: from graph queries and keys to the transition matrix P, forward and backward.

The weights are those of `keras_rwr._weigh`, in logarithms. A program holds a tile of queries and
goes over its edges twice: for the sums of the rows, then for what the entries become.
"""

import math

import torch
import triton
import triton.language as tl

from keras_rwr import _weigh
from keras_rwr._sparse import SparseMatrix
from keras_rwr._tiling import Tiling
from keras_rwr.backends.torch.local import token_labels
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.plan import next_power_of_2
from keras_rwr.backends.torch.product import (
    FarDot,
    band_constants,
    far_constants,
    far_dot,
    list_edges,
    multiply,
)
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import (
    LOG2E,
    NEVER,
    PADDING,
    load_labels,
    load_rows,
    of_head,
    store_rows,
    visible_pairs,
)
from keras_rwr.backends.torch.vectors import blank, token_major

_TILE, _WARPS = 64, 4
_LARGEST_ISOLATED = tl.constexpr(math.log(_weigh.ISOLATED))
_NO_EDGE = tl.constexpr(0.5 * NEVER.value)
_NO_CUT = -2.0  # below any cosine


def weigh(
    graph_query, graph_key, neighbors, tokens, options, concentration, bias=None, block_size=None
):
    """See `keras_rwr._weigh.weigh`; the vectors are `UnitVectors`."""
    block_size = _TILE if block_size is None else block_size
    if options.reversible:  # the sums of its rows are of the portable stage
        return _weigh.weigh(
            graph_query.dense(tokens),
            graph_key.dense(tokens),
            neighbors,
            tokens,
            options,
            concentration,
            None if bias is None else blank(bias, tokens),
            block_size,
            _dot,
        )
    query, key = graph_query.rows, graph_key.rows
    tiling = Tiling.create(tokens, options.window, block_size)
    if neighbors is not None:
        neighbors = tiling.pad(neighbors, -1).contiguous()
    lists = None
    if neighbors is not None and torch.is_grad_enabled():  # for the backward pass
        lists = list_edges(neighbors, options.neighbor_block)
    tensors = (neighbors, *(lists or (None, None)), token_labels(tokens, len(query)))
    local, far, log_degree, isolated = _Weigh.apply(
        query,
        key,
        None if bias is None else bias[..., 0].contiguous(),
        concentration.expand(query.shape[2], 1, 1).flatten().contiguous(),
        graph_query.scales,
        graph_key.scales,
        *tensors,
        tiling.tile,
        tiling.before,
        tiling.after,
        options.window,
        options.neighbor_block,
        _NO_CUT if options.cut is None else options.cut,
        options.edge_weight == "exponential",
        options.self_edges,
        tokens.is_causal,
    )
    far = None if neighbors is None else far
    return _weigh.SparseGraph(
        options=options,
        tokens=tokens,
        log_weights=None,
        transition=SparseMatrix(tiling, neighbors, options.neighbor_block, local, far, lists=lists),
        log_degree=log_degree[..., None],
        bias=None if bias is None else tiling.pad(bias),
        isolated=isolated[..., None],
    )


def _dot(query, blocks, key, block):
    """See `keras_rwr._far.far_dot`."""
    return FarDot.apply(token_major(query), token_major(key), blocks.contiguous(), block)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, bias, concentration, *others):
        tensors, options = (query, key, bias, concentration, *others[:6]), others[6:]
        local, far, log_degree, isolated = _weigh_edges(*tensors, *options)
        ctx.save_for_backward(*tensors, log_degree, isolated)
        ctx.options = options
        ctx.mark_non_differentiable(log_degree, isolated)
        return local, far, log_degree, isolated

    @staticmethod
    def backward(ctx, local, far, *_):
        refuse_second_derivative()
        tensors = ctx.saved_tensors
        gradients = _weigh_gradients(local.contiguous(), far.contiguous(), *tensors, *ctx.options)
        query, key, bias, concentration = gradients
        return query, key, None if tensors[2] is None else bias, concentration, *[None] * 15


_TENSORS = (
    "Tensor query, Tensor key, Tensor? bias, Tensor concentration, Tensor query_scales, "
    "Tensor key_scales, Tensor? neighbors, Tensor? edges, Tensor? starts, Tensor? labels"
)
_OPTIONS = (
    "int tile, int before, int after, int window, int block, float cut, bool exponential, "
    "bool self_edges, bool is_causal"
)


def _run_weigh(query, key, bias, concentration, query_scales, key_scales, *others):
    neighbors, _, _, labels, *options = others
    tensors = (query, query_scales, key, key_scales, bias, concentration, labels, neighbors)
    outputs = _weigh_outputs(query, key, bias, concentration, query_scales, key_scales, *others)
    dots = None if neighbors is None else far_dot(query, key, neighbors, options[4], False)
    grid, constants = _settings(query, neighbors, outputs[0], options)
    run(_weigh_kernel, grid, *tensors, dots, *outputs, query.shape[1], **constants)
    return outputs


def _weigh_outputs(query, key, bias, concentration, query_scales, key_scales, *others):
    neighbors, _, _, _, tile, before, after, _, block, *_ = others
    batch, size, graphs, _ = query.shape
    tiles = -(-size // tile)
    edges = 0 if neighbors is None else neighbors.shape[3] * block
    rows = (batch, graphs, tiles * tile)
    return (
        query.new_empty((batch, graphs, tiles, tile, (before + 1 + after) * tile)),
        query.new_empty((*rows, edges)),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.bool),
    )


def _run_weigh_gradients(local, far, query, key, bias, concentration, *others):
    query_scales, key_scales, neighbors, *lists, labels, log_degree, isolated = others[:8]
    options = others[8:]
    tensors = (query, query_scales, key, key_scales, bias, concentration, labels, neighbors)
    before, block = options[1], options[4]
    dots = None if neighbors is None else far_dot(query, key, neighbors, block, False)
    grid, constants = _settings(query, neighbors, local, options)
    # What reaches cosines, times the scale of the query; and with a bias what reaches logits.
    slopes = [query.new_empty(x.shape) for x in (local, far)]
    passed = [
        None if bias is None else x.new_empty(x.shape, dtype=torch.float32) for x in (local, far)
    ]
    query_gradient = torch.empty_like(query)
    sharpness = query.new_empty(grid, dtype=torch.float32)
    run(
        _weigh_gradient_kernel,
        grid,
        *tensors,
        dots,
        log_degree,
        isolated,
        local,
        far,
        *slopes,
        *passed,
        query_gradient,
        sharpness,
        query.shape[1],
        **constants,
    )

    def sums_of_columns(local, far, x):
        far = None if neighbors is None else far
        return multiply(local, None, far, x, neighbors, *lists, before, block, True)

    key_gradient = sums_of_columns(*slopes, query)
    bias_gradient = query.new_empty((0,))
    if bias is not None:
        ones = torch.ones((*query.shape[:3], 1), device=query.device)
        bias_gradient = sums_of_columns(*passed, ones)[..., 0].transpose(1, 2).contiguous()
    return query_gradient, key_gradient, bias_gradient, sharpness.sum((0, 2))


def _weigh_gradient_outputs(local, far, query, key, bias, concentration, *others):
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        query.new_empty((0,)) if bias is None else torch.empty_like(bias),
        torch.empty_like(concentration),
    )


_weigh_edges = define(
    f"weigh({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_weigh,
    _weigh_outputs,
)
_weigh_gradients = define(
    f"weigh_gradients(Tensor local, Tensor far, {_TENSORS}, Tensor log_degree, Tensor isolated, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_weigh_gradients,
    _weigh_gradient_outputs,
)


def _settings(query, neighbors, local, options):
    """The grid and the constants of both kernels."""
    _, before, _, window, block, cut, exponential, self_edges, is_causal = options
    batch, size, graphs, features = query.shape
    return (local.shape[2], graphs, batch), {
        **band_constants(local, before, size),
        **far_constants(neighbors, block),
        "FEATURES": features,
        "VECTOR": max(next_power_of_2(features), 16),
        "WINDOW": window,
        "CUT": cut,
        "EXPONENTIAL": exponential,
        "SELF_EDGES": self_edges,
        "CAUSAL": is_causal,
        "num_warps": _WARPS if features * query.itemsize <= 128 else 2 * _WARPS,
    }


@triton.jit
def _log_weight(cosine, is_edge, sharpness, CUT: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """The logarithm of f(c) on edges, NEVER elsewhere."""
    is_edge = is_edge & (cosine > CUT)
    if EXPONENTIAL:
        logarithm = sharpness * (cosine - 1.0)
    else:
        logarithm = tl.log(tl.where(is_edge, cosine - (CUT if CUT < 0 else 0.0), 1.0))
    return tl.where(is_edge, logarithm, NEVER)


@triton.jit
def _slope(
    passed, cosine, is_edge, sharpness, counted, CUT: tl.constexpr, EXPONENTIAL: tl.constexpr
):
    """The gradient of cosines from that of logits, by the derivative of `log f`."""
    if EXPONENTIAL:
        return passed * sharpness
    else:
        return passed * counted / tl.where(is_edge, cosine - (CUT if CUT < 0 else 0.0), 1.0)


@triton.jit
def _band_edges(
    queries,
    keys,
    place,
    other,
    sharpness,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    SELF_EDGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Of a tile's edges to one tile of keys: logits, cosines, the keys and their scales.

    `queries`, `keys` and `place` are what `_weigh_kernel` makes.
    """
    query, query_scale, rows, labels = queries
    key_ptr, key_scale_ptr, bias_ptr, label_ptr, _, _ = keys
    entry, graph, graphs, size, _ = place
    lanes = tl.arange(0, ROWS)
    columns = other * TILE + lanes
    present = (lanes < TILE) & (columns >= 0) & (columns < size)
    others = load_labels(label_ptr, entry, size, columns, size)
    key = load_rows(key_ptr, columns, graphs * FEATURES, present, FEATURES, VECTOR)
    key_scale = tl.load(key_scale_ptr + 2 * graphs * columns, mask=present, other=0.0)
    cosine = tl.dot(query, tl.trans(key), input_precision="ieee")
    cosine = cosine * query_scale[:, None] * key_scale[None, :]
    near = visible_pairs(
        rows, columns, labels, others, label_ptr is not None, WINDOW, CAUSAL, False
    )
    if not SELF_EDGES:
        near = near & (rows[:, None] != columns[None, :])
    logits = _log_weight(cosine, near & present[None, :], sharpness, CUT, EXPONENTIAL)
    if bias_ptr is not None:
        begin = (entry.to(tl.int64) * graphs + graph) * size
        bias = tl.load(bias_ptr + begin + columns, mask=present, other=0.0)
        logits = tl.where(logits > _NO_EDGE, logits + bias[None, :], NEVER)
    return logits, cosine, key, key_scale


@triton.jit
def _far_edges(
    queries,
    keys,
    place,
    edge,
    held,
    sharpness,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Of one far edge a row: logits, cosines, the keys' positions and scales."""
    _, query_scale, rows, _ = queries
    _, key_scale_ptr, bias_ptr, label_ptr, neighbor_ptr, dot_ptr = keys
    entry, graph, graphs, size, reach = place
    number = entry.to(tl.int64) * graphs + graph
    row = number * reach + rows
    chosen = tl.load(neighbor_ptr + row * SLOTS + edge // BLOCK, mask=held, other=-1)
    key = chosen * BLOCK + edge % BLOCK
    outside = key < rows - WINDOW
    if not CAUSAL:
        outside = outside | (key > rows + WINDOW)
    is_edge = (chosen >= 0) & (key < size) & outside
    if label_ptr is not None:
        is_edge = is_edge & (load_labels(label_ptr, entry, size, key, size) != PADDING)
    key_scale = tl.load(key_scale_ptr + 2 * graphs * key, mask=is_edge, other=0.0)
    cosine = tl.load(dot_ptr + row * (SLOTS * BLOCK) + edge, mask=held, other=0.0)
    cosine = cosine * query_scale * key_scale
    logits = _log_weight(cosine, is_edge, sharpness, CUT, EXPONENTIAL)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + number * size + key, mask=is_edge, other=0.0)
        logits = tl.where(logits > _NO_EDGE, logits + bias, NEVER)
    return logits, cosine, key, key_scale


@triton.jit
def _queries_of_tile(
    query_ptr,
    query_scale_ptr,
    label_ptr,
    place,
    rows,
    inside,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile's queries with their scales, positions and labels."""
    entry, graph, graphs, size, _ = place
    query_ptr = of_head(query_ptr, entry, size, graphs, graph, FEATURES)
    query_scale_ptr = of_head(query_scale_ptr, entry, size, graphs, graph, 2)
    query = load_rows(query_ptr, rows, graphs * FEATURES, inside, FEATURES, VECTOR)
    query_scale = tl.load(query_scale_ptr + 2 * graphs * rows, mask=inside, other=0.0)
    return query, query_scale, rows, load_labels(label_ptr, entry, size, rows, size)


@triton.jit
def _weigh_kernel(
    query_ptr,
    query_scale_ptr,
    key_ptr,
    key_scale_ptr,
    bias_ptr,
    concentration_ptr,
    label_ptr,
    neighbor_ptr,
    dot_ptr,
    local_ptr,
    far_ptr,
    degree_ptr,
    isolated_ptr,
    size,
    TILE: tl.constexpr,
    SPANS: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    SELF_EDGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    tile, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    graphs = tl.num_programs(1)
    reach = tl.num_programs(0) * TILE
    lanes = tl.arange(0, ROWS)
    rows = tile * TILE + lanes
    held = lanes < TILE
    inside = held & (rows < size)
    place = (entry, graph, graphs, size, reach)
    keys = (
        of_head(key_ptr, entry, size, graphs, graph, FEATURES),
        of_head(key_scale_ptr, entry, size, graphs, graph, 2),
        bias_ptr,
        label_ptr,
        neighbor_ptr,
        dot_ptr,
    )
    queries = _queries_of_tile(
        query_ptr, query_scale_ptr, label_ptr, place, rows, inside, FEATURES, VECTOR
    )
    sharpness = tl.load(concentration_ptr + graph)

    peak = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for span in range(SPANS):
        logits, _, _, _ = _band_edges(
            queries,
            keys,
            place,
            tile + span - BEFORE,
            sharpness,
            TILE,
            ROWS,
            FEATURES,
            VECTOR,
            WINDOW,
            CUT,
            EXPONENTIAL,
            SELF_EDGES,
            CAUSAL,
        )
        highest = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(logits > _NO_EDGE, tl.exp2((logits - highest[:, None]) * LOG2E), 0.0)
        total = total * tl.exp2((peak - highest) * LOG2E) + tl.sum(weights, 1)
        peak = highest
    if neighbor_ptr is not None:
        for edge in range(SLOTS * BLOCK):
            logit, _, _, _ = _far_edges(
                queries,
                keys,
                place,
                edge,
                inside,
                sharpness,
                SLOTS,
                BLOCK,
                WINDOW,
                CUT,
                EXPONENTIAL,
                CAUSAL,
            )
            highest = tl.maximum(peak, logit)
            weight = tl.where(logit > _NO_EDGE, tl.exp2((logit - highest) * LOG2E), 0.0)
            total = total * tl.exp2((peak - highest) * LOG2E) + weight
            peak = highest

    log_degree = peak + tl.log(tl.where(total > 0, total, 1.0))
    alone = log_degree <= (_NO_EDGE if EXPONENTIAL else _LARGEST_ISOLATED)
    log_degree = tl.where(alone, 0.0, log_degree)
    begin = (entry.to(tl.int64) * graphs + graph) * reach
    tl.store(degree_ptr + begin + rows, log_degree, mask=held)
    tl.store(isolated_ptr + begin + rows, alone, mask=held)

    local_ptr += (begin + tile * TILE) * (SPANS * TILE)
    for span in range(SPANS):
        logits, _, _, _ = _band_edges(
            queries,
            keys,
            place,
            tile + span - BEFORE,
            sharpness,
            TILE,
            ROWS,
            FEATURES,
            VECTOR,
            WINDOW,
            CUT,
            EXPONENTIAL,
            SELF_EDGES,
            CAUSAL,
        )
        weights = tl.exp2((logits - log_degree[:, None]) * LOG2E)
        itself = (lanes[:, None] == lanes[None, :]) & (span == BEFORE)
        weights = tl.where(alone[:, None], tl.where(itself, 1.0, 0.0), weights)
        pointers = local_ptr + lanes[:, None] * (SPANS * TILE) + (span * TILE + lanes)[None, :]
        tl.store(pointers, weights, mask=held[:, None] & held[None, :])
    if neighbor_ptr is not None:
        for edge in range(SLOTS * BLOCK):
            logit, _, _, _ = _far_edges(
                queries,
                keys,
                place,
                edge,
                inside,
                sharpness,
                SLOTS,
                BLOCK,
                WINDOW,
                CUT,
                EXPONENTIAL,
                CAUSAL,
            )
            weight = tl.where(alone, 0.0, tl.exp2((logit - log_degree) * LOG2E))
            tl.store(far_ptr + (begin + rows) * (SLOTS * BLOCK) + edge, weight, mask=held)


@triton.jit
def _weigh_gradient_kernel(
    query_ptr,
    query_scale_ptr,
    key_ptr,
    key_scale_ptr,
    bias_ptr,
    concentration_ptr,
    label_ptr,
    neighbor_ptr,
    dot_ptr,
    degree_ptr,
    isolated_ptr,
    local_ptr,
    far_ptr,
    local_slope_ptr,
    far_slope_ptr,
    local_passed_ptr,
    far_passed_ptr,
    gradient_ptr,
    sharpness_gradient_ptr,
    size,
    TILE: tl.constexpr,
    SPANS: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    SELF_EDGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """With P_ij of the forward pass and the gradient dP_ij of its entries:

    dlogit_ij = P_ij (dP_ij - sum_k P_ik dP_ik),    dc_ij = dlogit_ij times the slope of log f
    """
    tile, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, graphs = tl.num_programs(0), tl.num_programs(1)
    reach = tiles * TILE
    lanes = tl.arange(0, ROWS)
    rows = tile * TILE + lanes
    held = lanes < TILE
    inside = held & (rows < size)
    square = held[:, None] & held[None, :]
    place = (entry, graph, graphs, size, reach)
    keys = (
        of_head(key_ptr, entry, size, graphs, graph, FEATURES),
        of_head(key_scale_ptr, entry, size, graphs, graph, 2),
        bias_ptr,
        label_ptr,
        neighbor_ptr,
        dot_ptr,
    )
    queries = _queries_of_tile(
        query_ptr, query_scale_ptr, label_ptr, place, rows, inside, FEATURES, VECTOR
    )
    query_scale = queries[1]
    sharpness = tl.load(concentration_ptr + graph)
    begin = (entry.to(tl.int64) * graphs + graph) * reach
    log_degree = tl.load(degree_ptr + begin + rows, mask=inside, other=0.0)
    alone = tl.load(isolated_ptr + begin + rows, mask=inside, other=1) != 0
    band = (begin + tile * TILE) * (SPANS * TILE)
    band += lanes[:, None] * (SPANS * TILE) + lanes[None, :]
    # Gradients count a sum of cosines below 1 as 1.
    counted = tl.exp(tl.minimum(log_degree, 0.0))

    mean = tl.zeros((ROWS,), tl.float32)
    for span in range(SPANS):
        logits, _, _, _ = _band_edges(
            queries,
            keys,
            place,
            tile + span - BEFORE,
            sharpness,
            TILE,
            ROWS,
            FEATURES,
            VECTOR,
            WINDOW,
            CUT,
            EXPONENTIAL,
            SELF_EDGES,
            CAUSAL,
        )
        is_edge = (logits > _NO_EDGE) & ~alone[:, None]
        weights = tl.exp2((logits - log_degree[:, None]) * LOG2E)
        change = tl.load(local_ptr + band + span * TILE, mask=square, other=0.0).to(tl.float32)
        mean += tl.sum(tl.where(is_edge, weights * change, 0.0), 1)
    if neighbor_ptr is not None:
        for edge in range(SLOTS * BLOCK):
            logit, _, _, _ = _far_edges(
                queries,
                keys,
                place,
                edge,
                inside,
                sharpness,
                SLOTS,
                BLOCK,
                WINDOW,
                CUT,
                EXPONENTIAL,
                CAUSAL,
            )
            is_edge = (logit > _NO_EDGE) & ~alone
            far = (begin + rows) * (SLOTS * BLOCK) + edge
            change = tl.load(far_ptr + far, mask=held, other=0.0).to(tl.float32)
            weight = tl.exp2((logit - log_degree) * LOG2E)
            mean += tl.where(is_edge, weight * change, 0.0)

    gradient = tl.zeros((ROWS, VECTOR), tl.float32)
    sharpness_gradient = tl.zeros((ROWS,), tl.float32)
    for span in range(SPANS):
        logits, cosine, key, key_scale = _band_edges(
            queries,
            keys,
            place,
            tile + span - BEFORE,
            sharpness,
            TILE,
            ROWS,
            FEATURES,
            VECTOR,
            WINDOW,
            CUT,
            EXPONENTIAL,
            SELF_EDGES,
            CAUSAL,
        )
        is_edge = (logits > _NO_EDGE) & ~alone[:, None]
        weights = tl.exp2((logits - log_degree[:, None]) * LOG2E)
        change = tl.load(local_ptr + band + span * TILE, mask=square, other=0.0).to(tl.float32)
        passed = tl.where(is_edge, weights * (change - mean[:, None]), 0.0)
        slope = _slope(passed, cosine, is_edge, sharpness, counted[:, None], CUT, EXPONENTIAL)
        sharpness_gradient += tl.sum(passed * (cosine - 1.0), 1)
        gradient += tl.dot((slope * key_scale[None, :]).to(key.dtype), key, input_precision="ieee")
        tl.store(local_slope_ptr + band + span * TILE, slope * query_scale[:, None], mask=square)
        if local_passed_ptr is not None:
            tl.store(local_passed_ptr + band + span * TILE, passed, mask=square)
    if neighbor_ptr is not None:
        for edge in range(SLOTS * BLOCK):
            logit, cosine, position, key_scale = _far_edges(
                queries,
                keys,
                place,
                edge,
                inside,
                sharpness,
                SLOTS,
                BLOCK,
                WINDOW,
                CUT,
                EXPONENTIAL,
                CAUSAL,
            )
            is_edge = (logit > _NO_EDGE) & ~alone
            weight = tl.exp2((logit - log_degree) * LOG2E)
            far = (begin + rows) * (SLOTS * BLOCK) + edge
            change = tl.load(far_ptr + far, mask=held, other=0.0).to(tl.float32)
            passed = tl.where(is_edge, weight * (change - mean), 0.0)
            slope = _slope(passed, cosine, is_edge, sharpness, counted, CUT, EXPONENTIAL)
            sharpness_gradient += passed * (cosine - 1.0)
            key = load_rows(keys[0], position, graphs * FEATURES, is_edge, FEATURES, VECTOR)
            gradient += (slope * key_scale)[:, None] * key.to(tl.float32)
            tl.store(far_slope_ptr + far, slope * query_scale, mask=held)
            if far_passed_ptr is not None:
                tl.store(far_passed_ptr + far, passed, mask=held)
    gradient_ptr = of_head(gradient_ptr, entry, size, graphs, graph, FEATURES)
    store_rows(gradient_ptr, rows, graphs * FEATURES, inside, gradient, FEATURES, VECTOR)
    program = (tile * graphs + graph) * tl.num_programs(2) + entry
    if EXPONENTIAL:
        tl.store(sharpness_gradient_ptr + program, tl.sum(sharpness_gradient))
    else:  # cosines know no concentration
        tl.store(sharpness_gradient_ptr + program, 0.0)
