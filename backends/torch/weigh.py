"""Weights of edges: from graph queries and keys to the transition matrix P, forward and backward.

The weights are those of `keras_rwr._weigh`, in logarithms. A program holds a tile of queries and
goes over its edges twice: for the sums of the rows, then for what the entries become.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_rwr import _weigh
from keras_rwr._sparse import SparseMatrix
from keras_rwr._tiling import Tiling
from keras_rwr.backends.torch import blocks
from keras_rwr.backends.torch.local import token_labels
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.product import (
    FarDot,
    far_dot,
    list_edges,
    multiply,
)
from keras_rwr.backends.torch.run import next_power_of_2, run
from keras_rwr.backends.torch.shape import shape_of
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
_TOGETHER = 8  # far edges of a row that are looked at together
_LARGEST_ISOLATED = tl.constexpr(math.log(_weigh.ISOLATED))
_LOG2 = tl.constexpr(math.log(2.0))
_NO_EDGE = tl.constexpr(0.5 * NEVER.value)
_NO_CUT = -2.0  # below any cosine


def weigh(
    graph_query, graph_key, neighbors, tokens, options, concentration, bias=None, block_size=None
):
    """See `keras_rwr._weigh.weigh`; the vectors are `UnitVectors`."""
    if block_size is None:
        block_size = _largest_tile(graph_query.rows, options.reversible)
    if not _serves(graph_query.rows, tokens, options):
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
    by_lists = torch.is_grad_enabled() or options.neighbor_block >= blocks.SMALLEST
    if neighbors is not None and by_lists:
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
        options.reversible,
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


def _largest_tile(query, reversible):
    """Tokens in a tile: long vectors, and those of both ways, leave less room."""
    size = query.shape[3] * query.itemsize * (2 if reversible else 1)
    return _TILE if size <= 512 else max(16, _TILE * 512 // next_power_of_2(size))


def _serves(query, tokens, options):
    """Whether a kernel makes P: it has no edges from key to query and no logarithms of weights."""
    if not options.reversible:
        return True
    if not tokens.is_causal:
        return False
    # The scales of exponential edges, and the range of float16, leave no 1 / pi of numbers.
    narrow = options.edge_weight == "exponential" or query.dtype == torch.float16
    return not (options.is_reciprocal and narrow)


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
        ctx.mark_non_differentiable(isolated)
        return local, far, log_degree, isolated

    @staticmethod
    def backward(ctx, *cotangents):
        refuse_second_derivative()
        tensors = ctx.saved_tensors
        cotangents = [x.contiguous() for x in cotangents[:3]]
        gradients = _weigh_gradients(*cotangents, *tensors, *ctx.options)
        query, key, bias, concentration = gradients
        return query, key, None if tensors[2] is None else bias, concentration, *[None] * 16


_TENSORS = (
    "Tensor query, Tensor key, Tensor? bias, Tensor concentration, Tensor query_scales, "
    "Tensor key_scales, Tensor? neighbors, Tensor? edges, Tensor? starts, Tensor? labels"
)
_OPTIONS = (
    "int tile, int before, int after, int window, int block, float cut, bool exponential, "
    "bool self_edges, bool is_causal, bool reversible"
)


def _run_weigh(query, key, bias, concentration, query_scales, key_scales, *others):
    neighbors, *lists, labels = others[:4]
    options = others[4:]
    tensors = (query, query_scales, key, key_scales, bias, concentration, labels, neighbors)
    outputs = _weigh_outputs(query, key, bias, concentration, query_scales, key_scales, *others)
    dots = None if neighbors is None else far_dot(query, key, neighbors, *lists, options[4], False)
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


def _run_weigh_gradients(local, far, degree, query, key, bias, concentration, *others):
    query_scales, key_scales, neighbors, *lists, labels, log_degree, isolated = others[:8]
    options = others[8:]
    tensors = (query, query_scales, key, key_scales, bias, concentration, labels, neighbors)
    before, block, reversible = options[1], options[4], options[9]
    dots = None if neighbors is None else far_dot(query, key, neighbors, *lists, block, False)
    grid, constants = _settings(query, neighbors, local, options)
    # What reaches cosines, times the scale of the query; and with a bias what reaches logits.
    slopes = [query.new_empty(x.shape) for x in (local, far)]
    passed = [
        None if bias is None else x.new_empty(x.shape, dtype=torch.float32) for x in (local, far)
    ]
    # Both ways: what reaches the cosines of keys and the queries near them.
    mirrored, own_gradient = None, None
    if reversible:
        mirrored, own_gradient = torch.empty_like(slopes[0]), torch.empty_like(key)
    # The same of far edges, times the scale of the key.
    far_slopes = torch.empty_like(slopes[1])
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
        degree,
        *slopes,
        far_slopes,
        mirrored,
        *passed,
        query_gradient,
        own_gradient,
        sharpness,
        query.shape[1],
        **constants,
    )

    def sums_of_columns(local, far, x):
        far = None if neighbors is None else far
        return multiply(local, None, far, x, neighbors, *lists, before, block, True)

    key_gradient = sums_of_columns(*slopes, query)
    if neighbors is not None:
        query_gradient += multiply(
            None, far_slopes, None, key, neighbors, *lists, before, block, False
        )
    if reversible:
        key_gradient += own_gradient
        query_gradient += multiply(mirrored, None, None, key, None, None, None, before, 1, True)
    bias_gradient = query.new_empty((0,))
    if bias is not None:
        ones = torch.ones((*query.shape[:3], 1), device=query.device)
        bias_gradient = sums_of_columns(*passed, ones)[..., 0].transpose(1, 2).contiguous()
    return query_gradient, key_gradient, bias_gradient, sharpness.sum((0, 2))


def _weigh_gradient_outputs(local, far, degree, query, key, bias, concentration, *others):
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
    f"weigh_gradients(Tensor local, Tensor far, Tensor degree, {_TENSORS}, Tensor log_degree, "
    f"Tensor isolated, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_weigh_gradients,
    _weigh_gradient_outputs,
)


class Kind(NamedTuple):
    """What is known of a graph's edges when kernels are compiled; see `Options`."""

    window: int
    cut: float
    exponential: bool
    self_edges: bool
    causal: bool
    reversible: bool


def _settings(query, neighbors, local, options):
    """The grid and the constants of both kernels."""
    _, before, _, window, block, *others = options
    batch, size, graphs, features = query.shape
    kind = Kind(window, *others)
    shape = shape_of(local, neighbors, before, block, size, features)
    shape = shape._replace(unrolled=math.gcd(shape.slots * block, _TOGETHER))
    warps = _WARPS if features * query.itemsize <= 128 and not kind.reversible else 2 * _WARPS
    return (local.shape[2], graphs, batch), {"SHAPE": shape, "KIND": kind, "num_warps": warps}


@triton.jit
def _log_weight(cosine, is_edge, sharpness, KIND: tl.constexpr):
    """The logarithm of f(c) on edges, NEVER elsewhere."""
    is_edge = is_edge & (cosine > KIND.cut)
    if KIND.exponential:
        logarithm = sharpness * (cosine - 1.0)
    else:
        logarithm = tl.log(tl.where(is_edge, cosine - (KIND.cut if KIND.cut < 0 else 0.0), 1.0))
    return tl.where(is_edge, logarithm, NEVER)


@triton.jit
def _slope(passed, cosine, sharpness, counted, KIND: tl.constexpr):
    """The gradient of cosines from that of `log f`, which is 0 where there is no edge."""
    if KIND.exponential:
        return passed * sharpness
    else:
        cosine -= KIND.cut if KIND.cut < 0 else 0.0
        return tl.where(passed != 0, passed * counted / tl.where(passed != 0, cosine, 1.0), 0.0)


@triton.jit
def _load_tile(vectors, place, rows, inside, SHAPE: tl.constexpr):
    """The graph's vectors of a tile of tokens, and their scales."""
    vector_ptr, scale_ptr = vectors
    entry, graph, graphs, size, _ = place
    vector_ptr = of_head(vector_ptr, entry, size, graphs, graph, SHAPE.features)
    scale_ptr = of_head(scale_ptr, entry, size, graphs, graph, 2)
    x = load_rows(vector_ptr, rows, graphs * SHAPE.features, inside, SHAPE.features, SHAPE.columns)
    return x, tl.load(scale_ptr + 2 * graphs * rows, mask=inside, other=0.0)


@triton.jit
def _sigmoid(x):
    """`1 / (1 + 2^-x)`."""
    return 1.0 / (1.0 + tl.exp2(tl.minimum(-x, 126.0)))


@triton.jit
def _band_edges(tile, tensors, place, other, sharpness, SHAPE: tl.constexpr, KIND: tl.constexpr):
    """A tile's edges to one tile of keys.

    Args:
        tile: Rows, their labels, queries, scales of these, keys and scales of those.
        tensors: The graph's queries, keys, their bias, labels, far edges and the products of these.
        place: Batch entry, graph, number of graphs, tokens, tokens in full tiles.
        other: The number of the tile of keys.

    Returns:
        Logits; cosines of queries and keys, keys and scales of these; both ways also the cosines of
        the tile's keys and the others' queries, these queries and their scales, and the shares of
        the two cosines in the weights.
    """
    rows, labels, query, query_scale, own_key, own_scale = tile
    queries, keys, bias_ptr, label_ptr, _, _ = tensors
    entry, graph, graphs, size, _ = place
    lanes = tl.arange(0, SHAPE.rows)
    columns = other * SHAPE.tile + lanes
    present = (lanes < SHAPE.tile) & (columns >= 0) & (columns < size)
    others = load_labels(label_ptr, entry, size, columns, size)
    key, key_scale = _load_tile(keys, place, columns, present, SHAPE)
    cosine = tl.dot(query, tl.trans(key), input_precision="ieee")
    cosine = cosine * query_scale[:, None] * key_scale[None, :]
    near = visible_pairs(
        rows, columns, labels, others, label_ptr is not None, KIND.window, KIND.causal, False
    )
    if not KIND.self_edges:
        near = near & (rows[:, None] != columns[None, :])
    near = near & present[None, :]
    logits = _log_weight(cosine, near, sharpness, KIND)
    mirror = cosine, key, key_scale, cosine, cosine  # which nobody looks at
    if KIND.reversible:
        other_query, other_scale = _load_tile(queries, place, columns, present, SHAPE)
        mirrored = tl.dot(own_key, tl.trans(other_query), input_precision="ieee")
        mirrored = mirrored * own_scale[:, None] * other_scale[None, :]
        back = _log_weight(mirrored, near, sharpness, KIND)
        ahead = (back - logits) * LOG2E
        # Shares may be tiny: neither is what the other leaves.
        share = tl.where(logits > _NO_EDGE, _sigmoid(-ahead), 0.0)
        back_share = tl.where(back > _NO_EDGE, _sigmoid(ahead), 0.0)
        # log (W_ij + W_ji) / 2
        logits = tl.maximum(logits, back) + tl.log(0.5 + 0.5 * tl.exp2(-tl.abs(ahead)))
        mirror = mirrored, other_query, other_scale, share, back_share
    if bias_ptr is not None:
        begin = (entry.to(tl.int64) * graphs + graph) * size
        bias = tl.load(bias_ptr + begin + columns, mask=present, other=0.0)
        logits = tl.where(logits > _NO_EDGE, logits + bias[None, :], NEVER)
    return logits, cosine, key, key_scale, mirror


@triton.jit
def _far_edges(tile, tensors, place, edges, sharpness, SHAPE: tl.constexpr, KIND: tl.constexpr):
    """Some far edges of each row of a tile: logits, cosines, and scales of the keys.

    The arguments are those of `_band_edges`, and the numbers of the edges within a row.
    """
    rows, _, _, query_scale, _, _ = tile
    _, keys, bias_ptr, label_ptr, neighbor_ptr, dot_ptr = tensors
    entry, graph, graphs, size, reach = place
    number = entry.to(tl.int64) * graphs + graph
    row = (number * reach + rows)[:, None]
    rows, edges = rows[:, None], edges[None, :]
    held = rows < tl.minimum(reach, size)
    chosen = tl.load(neighbor_ptr + row * SHAPE.slots + edges // SHAPE.block, mask=held, other=-1)
    key = chosen * SHAPE.block + edges % SHAPE.block
    outside = key < rows - KIND.window
    if not KIND.causal:
        outside = outside | (key > rows + KIND.window)
    is_edge = (chosen >= 0) & (key < size) & outside
    if label_ptr is not None:
        is_edge = is_edge & (load_labels(label_ptr, entry, size, key, size) != PADDING)
    key_scale_ptr = of_head(keys[1], entry, size, graphs, graph, 2)
    key_scale = tl.load(key_scale_ptr + 2 * graphs * key, mask=is_edge, other=0.0)
    cosine = tl.load(dot_ptr + row * (SHAPE.slots * SHAPE.block) + edges, mask=held, other=0.0)
    cosine = cosine * query_scale[:, None] * key_scale
    logits = _log_weight(cosine, is_edge, sharpness, KIND)
    if KIND.reversible:  # the edge from key to query lies ahead, or is none
        logits = tl.where(logits > _NO_EDGE, logits - _LOG2, NEVER)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + number * size + key, mask=is_edge, other=0.0)
        logits = tl.where(logits > _NO_EDGE, logits + bias, NEVER)
    return logits, cosine, key_scale


@triton.jit
def _tile_of(tensors, place, rows, inside, SHAPE: tl.constexpr, KIND: tl.constexpr):
    """A tile of tokens as `_band_edges` takes it."""
    queries, keys, _, label_ptr, _, _ = tensors
    entry, _, _, size, _ = place
    labels = load_labels(label_ptr, entry, size, rows, size)
    query, query_scale = _load_tile(queries, place, rows, inside, SHAPE)
    key, key_scale = query, query_scale  # which nobody looks at
    if KIND.reversible:
        key, key_scale = _load_tile(keys, place, rows, inside, SHAPE)
    return rows, labels, query, query_scale, key, key_scale


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
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
):
    number, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    graphs = tl.num_programs(1)
    reach = tl.num_programs(0) * SHAPE.tile
    lanes = tl.arange(0, SHAPE.rows)
    rows = number * SHAPE.tile + lanes
    held = lanes < SHAPE.tile
    queries, keys = (query_ptr, query_scale_ptr), (key_ptr, key_scale_ptr)
    tensors = (queries, keys, bias_ptr, label_ptr, neighbor_ptr, dot_ptr)
    place = (entry, graph, graphs, size, reach)
    tile = _tile_of(tensors, place, rows, held & (rows < size), SHAPE, KIND)
    sharpness = tl.load(concentration_ptr + graph)

    peak = tl.full((SHAPE.rows,), NEVER, tl.float32)
    total = tl.full((SHAPE.rows,), 0.0, tl.float32)
    for span in range(SHAPE.spans):
        other = number + span - SHAPE.before
        logits = _band_edges(tile, tensors, place, other, sharpness, SHAPE, KIND)[0]
        peak, total = _add_to_sums(peak, total, logits)
    if neighbor_ptr is not None:
        for first in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
            edges = first + tl.arange(0, SHAPE.unrolled)
            logits = _far_edges(tile, tensors, place, edges, sharpness, SHAPE, KIND)[0]
            peak, total = _add_to_sums(peak, total, logits)

    log_degree = peak + tl.log(tl.where(total > 0, total, 1.0))
    alone = log_degree <= (_NO_EDGE if KIND.exponential else _LARGEST_ISOLATED)
    log_degree = tl.where(alone, 0.0, log_degree)
    begin = (entry.to(tl.int64) * graphs + graph) * reach
    tl.store(degree_ptr + begin + rows, log_degree, mask=held)
    tl.store(isolated_ptr + begin + rows, alone, mask=held)

    local_ptr += (begin + number * SHAPE.tile) * (SHAPE.spans * SHAPE.tile)
    for span in range(SHAPE.spans):
        other = number + span - SHAPE.before
        logits = _band_edges(tile, tensors, place, other, sharpness, SHAPE, KIND)[0]
        weights = tl.exp2((logits - log_degree[:, None]) * LOG2E)
        itself = (lanes[:, None] == lanes[None, :]) & (span == SHAPE.before)
        weights = tl.where(alone[:, None], tl.where(itself, 1.0, 0.0), weights)
        pointers = (
            local_ptr
            + lanes[:, None] * (SHAPE.spans * SHAPE.tile)
            + (span * SHAPE.tile + lanes)[None, :]
        )
        tl.store(pointers, weights, mask=held[:, None] & held[None, :])
    if neighbor_ptr is not None:
        for first in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
            edges = first + tl.arange(0, SHAPE.unrolled)
            logits = _far_edges(tile, tensors, place, edges, sharpness, SHAPE, KIND)[0]
            weights = tl.exp2((logits - log_degree[:, None]) * LOG2E)
            weights = tl.where(alone[:, None], 0.0, weights)
            pointers = (
                far_ptr + (begin + rows)[:, None] * (SHAPE.slots * SHAPE.block) + edges[None, :]
            )
            tl.store(pointers, weights, mask=held[:, None])


@triton.jit
def _add_to_sums(peak, total, logits):
    """Sums of rows `exp(peak) total`, with those of further logits."""
    highest = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.where(logits > _NO_EDGE, tl.exp2((logits - highest[:, None]) * LOG2E), 0.0)
    return highest, total * tl.exp2((peak - highest) * LOG2E) + tl.sum(weights, 1)


@triton.jit
def _entries(logits, log_degree, alone):
    """Entries of P, 0 in rows of isolated tokens, whose entries are constant."""
    is_edge = (logits > _NO_EDGE) & ~alone[:, None]
    return tl.where(is_edge, tl.exp2((logits - log_degree[:, None]) * LOG2E), 0.0)


@triton.jit
def _weighted(entries, change):
    """Where there is no entry, a change of it may be anything."""
    return tl.where(entries > 0, entries * change, 0.0)


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
    degree_change_ptr,
    local_slope_ptr,
    far_slope_ptr,
    far_query_slope_ptr,
    mirror_slope_ptr,
    local_passed_ptr,
    far_passed_ptr,
    query_gradient_ptr,
    own_gradient_ptr,
    sharpness_gradient_ptr,
    size,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
):
    """With P_ij of the forward pass and the gradients of its entries and of log D_i:

    dlogit_ij = P_ij (dP_ij - sum_k P_ik dP_ik + dlog D_i)

    and dc_ij = dlogit_ij times the slope of log f; both ways, each of two cosines has its share.
    """
    number, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, graphs = tl.num_programs(0), tl.num_programs(1)
    reach = tiles * SHAPE.tile
    lanes = tl.arange(0, SHAPE.rows)
    rows = number * SHAPE.tile + lanes
    held = lanes < SHAPE.tile
    inside = held & (rows < size)
    square = held[:, None] & held[None, :]
    queries, keys = (query_ptr, query_scale_ptr), (key_ptr, key_scale_ptr)
    tensors = (queries, keys, bias_ptr, label_ptr, neighbor_ptr, dot_ptr)
    place = (entry, graph, graphs, size, reach)
    tile = _tile_of(tensors, place, rows, inside, SHAPE, KIND)
    _, _, _, query_scale, _, own_scale = tile
    sharpness = tl.load(concentration_ptr + graph)
    begin = (entry.to(tl.int64) * graphs + graph) * reach
    log_degree = tl.load(degree_ptr + begin + rows, mask=inside, other=0.0)
    alone = tl.load(isolated_ptr + begin + rows, mask=inside, other=1) != 0
    band = (begin + number * SHAPE.tile) * (SHAPE.spans * SHAPE.tile)
    band += lanes[:, None] * (SHAPE.spans * SHAPE.tile) + lanes[None, :]
    # Gradients count a sum of cosines below 1 as 1.
    counted = tl.exp(tl.minimum(log_degree, 0.0))[:, None]

    mean = -tl.load(degree_change_ptr + begin + rows, mask=inside, other=0.0)
    for span in range(SHAPE.spans):
        other = number + span - SHAPE.before
        logits = _band_edges(tile, tensors, place, other, sharpness, SHAPE, KIND)[0]
        change = tl.load(local_ptr + band + span * SHAPE.tile, mask=square, other=0.0).to(
            tl.float32
        )
        mean += tl.sum(_weighted(_entries(logits, log_degree, alone), change), 1)
    if neighbor_ptr is not None:
        for first in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
            edges = first + tl.arange(0, SHAPE.unrolled)
            logits = _far_edges(tile, tensors, place, edges, sharpness, SHAPE, KIND)[0]
            far = (begin + rows)[:, None] * (SHAPE.slots * SHAPE.block) + edges[None, :]
            change = tl.load(far_ptr + far, mask=held[:, None], other=0.0).to(tl.float32)
            mean += tl.sum(_weighted(_entries(logits, log_degree, alone), change), 1)

    gradient = tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32)
    own_gradient = tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32)
    sharpness_gradient = tl.full((SHAPE.rows,), 0.0, tl.float32)
    for span in range(SHAPE.spans):
        other = number + span - SHAPE.before
        logits, cosine, key, key_scale, mirror = _band_edges(
            tile, tensors, place, other, sharpness, SHAPE, KIND
        )
        mirrored, other_query, other_scale, share, back_share = mirror
        change = tl.load(local_ptr + band + span * SHAPE.tile, mask=square, other=0.0).to(
            tl.float32
        )
        passed = _weighted(_entries(logits, log_degree, alone), change - mean[:, None])
        if local_passed_ptr is not None:
            tl.store(local_passed_ptr + band + span * SHAPE.tile, passed, mask=square)
        if KIND.reversible:
            back = passed * back_share
            passed *= share
            slope = _slope(back, mirrored, sharpness, counted, KIND)
            sharpness_gradient += tl.sum(back * (mirrored - 1.0), 1)
            scaled = (slope * other_scale[None, :]).to(key.dtype)
            own_gradient += tl.dot(scaled, other_query, input_precision="ieee")
            pointers = mirror_slope_ptr + band + span * SHAPE.tile
            tl.store(pointers, slope * own_scale[:, None], mask=square)
        slope = _slope(passed, cosine, sharpness, counted, KIND)
        sharpness_gradient += tl.sum(passed * (cosine - 1.0), 1)
        gradient += tl.dot((slope * key_scale[None, :]).to(key.dtype), key, input_precision="ieee")
        tl.store(
            local_slope_ptr + band + span * SHAPE.tile, slope * query_scale[:, None], mask=square
        )
    if neighbor_ptr is not None:
        for first in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
            edges = first + tl.arange(0, SHAPE.unrolled)
            logits, cosine, key_scale = _far_edges(
                tile, tensors, place, edges, sharpness, SHAPE, KIND
            )
            far = (begin + rows)[:, None] * (SHAPE.slots * SHAPE.block) + edges[None, :]
            change = tl.load(far_ptr + far, mask=held[:, None], other=0.0).to(tl.float32)
            passed = _weighted(_entries(logits, log_degree, alone), change - mean[:, None])
            if far_passed_ptr is not None:
                tl.store(far_passed_ptr + far, passed, mask=held[:, None])
            slope = _slope(passed, cosine, sharpness, counted, KIND)
            sharpness_gradient += tl.sum(passed * (cosine - 1.0), 1)
            tl.store(far_slope_ptr + far, slope * query_scale[:, None], mask=held[:, None])
            tl.store(far_query_slope_ptr + far, slope * key_scale, mask=held[:, None])
    query_gradient_ptr = of_head(query_gradient_ptr, entry, size, graphs, graph, SHAPE.features)
    store_rows(
        query_gradient_ptr,
        rows,
        graphs * SHAPE.features,
        inside,
        gradient,
        SHAPE.features,
        SHAPE.columns,
    )
    if KIND.reversible:
        own_gradient_ptr = of_head(own_gradient_ptr, entry, size, graphs, graph, SHAPE.features)
        store_rows(
            own_gradient_ptr,
            rows,
            graphs * SHAPE.features,
            inside,
            own_gradient,
            SHAPE.features,
            SHAPE.columns,
        )
    program = (number * graphs + graph) * tl.num_programs(2) + entry
    if KIND.exponential:
        tl.store(sharpness_gradient_ptr + program, tl.sum(sharpness_gradient))
    else:  # cosines know no concentration
        tl.store(sharpness_gradient_ptr + program, 0.0)
