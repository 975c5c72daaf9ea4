"""A sparse matrix, of a band and far edges, times features, and what its edges' gradients are.

The matrix is `keras_rwr._sparse.SparseMatrix`. Features are tensors `(B, S, H, F)`, each token's
heads side by side; consecutive heads share one of the G graphs. What flows against far edges goes
by lists: the edges that lead to each key block, in one order, so that the same inputs give the same
bits.
"""

import math

import torch
import triton
import triton.language as tl

from keras_rwr.backends.torch import blocks
from keras_rwr.backends.torch.blocks import add_blocks
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.run import ceil_div, run
from keras_rwr.backends.torch.shape import shape_of, warps_of
from keras_rwr.backends.torch.tiles import PADDING, load_labels, load_rows, of_head, store_rows
from keras_rwr.backends.torch.vectors import token_major

_CHUNK = 8  # far edges of a row that are loaded at once
_EDGE_ROWS = 8
_LARGEST = 128  # features of a head, where they can be divided


def make_matmul():
    """`matmul(matrix, x)` for matrices of one graph's edges, as `SparseMatrix.matmul`."""
    lists = None

    def matmul(matrix, x):
        nonlocal lists
        neighbors = matrix.neighbors
        if neighbors is not None:
            neighbors = neighbors.contiguous()
            lists = list_edges(neighbors, matrix.block) if lists is None else lists
        # Wide features are divided among heads.
        size, features = x.shape[2:]
        piece = features
        if features > _LARGEST:
            piece = max(d for d in range(1, 257) if features % d == 0)
        heads = token_major(x).reshape(x.shape[0], size, -1, piece)
        tiling = matrix.tiling
        product = _Product.apply(
            matrix.local,
            matrix.far,
            matrix.back,
            heads,
            neighbors,
            lists,
            tiling.before,
            matrix.block,
        )
        return product.reshape(x.shape[0], size, -1, features).transpose(1, 2)

    return matmul


class _Product(torch.autograd.Function):
    """`band x + far x + back^T x`, see `SparseMatrix.matmul`."""

    @staticmethod
    def forward(ctx, local, far, back, x, neighbors, lists, before, block):
        local = local.contiguous()
        far, back = (None if y is None else y.contiguous() for y in (far, back))
        edges, starts = (None, None) if lists is None else lists
        ctx.save_for_backward(local, far, back, x, neighbors, edges, starts)
        ctx.options = before, block
        return multiply(local, far, back, x, neighbors, edges, starts, before, block, False)

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        local, far, back, x, neighbors, *lists = ctx.saved_tensors
        before, block = ctx.options
        cotangent = cotangent.contiguous()
        gradient = multiply(local, back, far, cotangent, neighbors, *lists, before, block, True)
        on_band = torch.empty_like(local)
        band_dot(on_band, cotangent, x, before, False, False)
        far, back = (
            None
            if weights is None
            else far_dot(*pair, neighbors, *lists, block, False).to(weights.dtype)
            for weights, pair in ((far, (cotangent, x)), (back, (x, cotangent)))
        )
        return (
            on_band,
            far,
            back,
            gradient,
            *[None] * 4,
        )


class FarDot(torch.autograd.Function):
    """`rows_i . columns_j` on far edges, differentiable."""

    @staticmethod
    def forward(ctx, rows, columns, neighbors, block):
        lists = list_edges(neighbors, block)
        ctx.save_for_backward(rows, columns, neighbors, *lists)
        ctx.block = block
        return far_dot(rows, columns, neighbors, *lists, block, False)

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        rows, columns, neighbors, *lists = ctx.saved_tensors
        others = (neighbors, *lists, 0, ctx.block)
        cotangent = cotangent.contiguous()
        return (
            multiply(None, cotangent, None, columns, *others, False),
            multiply(None, None, cotangent, rows, *others, False),
            None,
            None,
        )


def _run_multiply(local, gathered, listed, x, neighbors, edges, starts, before, block, transposed):
    output = torch.empty_like(x)
    batch, size, heads, features = x.shape
    graphs = next(y for y in (local, gathered, listed) if y is not None).shape[1]
    shape = shape_of(local, neighbors, before, block, size, features)
    brought = None
    if gathered is not None and edges is not None and block >= blocks.SMALLEST:
        brought = blocks.multiply_blocks(gathered, x, neighbors, edges, starts, block)
    run(
        _multiply,
        (ceil_div(size, shape.tile), heads, batch),
        local,
        gathered,
        brought,
        listed,
        neighbors,
        edges,
        starts,
        x,
        output,
        size,
        size if neighbors is None else neighbors.shape[2],
        heads,
        graphs,
        SHAPE=shape,
        TRANSPOSED=transposed,
        num_warps=warps_of(shape, x.itemsize),
    )
    return output


def _run_band_dot(total, rows, columns, before, centred, added):
    batch, graphs, tiles, _, _ = total.shape
    size, features = rows.shape[1], rows.shape[2] // graphs * rows.shape[3]
    shape = shape_of(total, None, before, 1, size, features)
    run(
        _band_dot,
        (tiles, shape.spans, graphs * batch),
        rows,
        columns,
        total,
        size,
        graphs,
        SHAPE=shape._replace(columns=min(shape.columns, 64)),
        CENTRED=centred,
        ADDED=added,
        num_warps=4,
    )


def _run_far_dot(rows, columns, neighbors, edges, starts, block, centred):
    if edges is not None and block >= blocks.SMALLEST:
        return blocks.dot_blocks(rows, columns, neighbors, edges, starts, block, centred)
    output = _far_dot_output(rows, columns, neighbors, edges, starts, block, centred)
    batch, graphs, reach, slots = neighbors.shape
    features = rows.shape[2] // graphs * rows.shape[3]
    shape = shape_of(None, neighbors, 0, block, rows.shape[1], features)
    unrolled = math.gcd(slots * block, _CHUNK)
    run(
        _far_dot,
        (ceil_div(reach, _EDGE_ROWS), graphs, batch),
        rows,
        columns,
        neighbors,
        output,
        rows.shape[1],
        reach,
        graphs,
        SHAPE=shape._replace(rows=_EDGE_ROWS, unrolled=unrolled, columns=min(shape.columns, 64)),
        CENTRED=centred,
        num_warps=4,
    )
    return output


def _far_dot_output(rows, columns, neighbors, edges, starts, block, centred):
    shape = (*neighbors.shape[:3], neighbors.shape[3] * block)
    return rows.new_empty(shape, dtype=torch.float32)


def _run_list_edges(neighbors, block):
    batch, graphs, reach, _ = neighbors.shape
    lists = batch * graphs * ceil_div(reach, block)
    first = torch.arange(0, lists, lists // (batch * graphs), device=neighbors.device)
    chosen = neighbors.reshape(batch * graphs, -1)
    targets = torch.where(chosen >= 0, chosen + first.to(torch.int32)[:, None], lists)
    kind, least = torch.int32, 0
    if lists < 2**16:  # a sort takes half as long
        kind, least = torch.int16, -(2**15)
    targets, edges = torch.sort((targets.flatten() + least).to(kind), stable=True)
    every = torch.arange(least, least + lists + 1, dtype=torch.int32, device=neighbors.device)
    starts = torch.searchsorted(targets.to(torch.int32), every, out_int32=True)
    return edges.to(torch.int32), starts


def _list_edges_outputs(neighbors, block):
    batch, graphs, reach, _ = neighbors.shape
    return (
        neighbors.new_empty((neighbors.numel(),)),
        neighbors.new_empty((batch * graphs * (-(-reach // block)) + 1,)),
    )


multiply = define(
    "multiply(Tensor? local, Tensor? gathered, Tensor? listed, Tensor x, Tensor? neighbors, "
    "Tensor? edges, Tensor? starts, int before, int block, bool transposed) -> Tensor",
    _run_multiply,
    lambda local, gathered, listed, x, *others: torch.empty_like(x),
)
band_dot = define(
    "band_dot(Tensor(a!) total, Tensor rows, Tensor columns, int before, bool centred, "
    "bool added) -> ()",
    _run_band_dot,
    lambda *tensors: None,
)
far_dot = define(
    "far_dot(Tensor rows, Tensor columns, Tensor neighbors, Tensor? edges, Tensor? starts, "
    "int block, bool centred) -> Tensor",
    _run_far_dot,
    _far_dot_output,
)
list_edges = define(
    "list_edges(Tensor neighbors, int block) -> (Tensor, Tensor)",
    _run_list_edges,
    _list_edges_outputs,
)


@triton.jit
def _load_band(local_ptr, tile, span, SHAPE: tl.constexpr):
    """A tile's entries in one span of its band, `(SHAPE.rows, SHAPE.rows)`; 0 behind SHAPE.tile."""
    lanes = tl.arange(0, SHAPE.rows)
    offset = tile.to(tl.int64) * (SHAPE.tile * SHAPE.spans * SHAPE.tile) + span * SHAPE.tile
    pointers = local_ptr + offset + lanes[:, None] * (SHAPE.spans * SHAPE.tile) + lanes[None, :]
    if SHAPE.tile == SHAPE.rows:
        return tl.load(pointers)
    else:
        held = (lanes < SHAPE.tile)[:, None] & (lanes < SHAPE.tile)[None, :]
        return tl.load(pointers, mask=held, other=0.0)


@triton.jit
def band_product(
    total,
    local_ptr,
    x_ptr,
    label_ptr,
    entry,
    tile,
    tiles,
    size,
    end,
    stride,
    SHAPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Adds the band, or its transpose, times x for the rows of a tile."""
    lanes = tl.arange(0, SHAPE.rows)
    if TRANSPOSED:
        low, high = tile + SHAPE.before + 1 - tiles, tile + SHAPE.before + 1
    else:
        low, high = SHAPE.before - tile, tiles - tile + SHAPE.before
    for span in range(tl.maximum(low, 0), tl.minimum(high, SHAPE.spans)):
        other = tile + (SHAPE.before - span if TRANSPOSED else span - SHAPE.before)
        rows = other * SHAPE.tile + lanes
        present = load_labels(label_ptr, entry, size, rows, end) != PADDING
        if SHAPE.tile != SHAPE.rows:
            present = present & (lanes < SHAPE.tile)
        x = load_rows(x_ptr, rows, stride, present, SHAPE.features, SHAPE.columns)
        if TRANSPOSED:
            weights = tl.trans(_load_band(local_ptr, other, span, SHAPE))
        else:
            weights = _load_band(local_ptr, tile, span, SHAPE)
        total += tl.dot(weights.to(x.dtype), x, input_precision="ieee")
    return total


@triton.jit
def _gather_product(
    total,
    far_ptr,
    neighbor_ptr,
    x_ptr,
    rows,
    held,
    end,
    stride,
    SHAPE: tl.constexpr,
):
    """Adds what far edges bring to rows from their keys."""
    UNROLLED: tl.constexpr = SHAPE.unrolled
    for first in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
        for edge in tl.static_range(UNROLLED):
            place = first + edge
            slot = rows.to(tl.int64) * SHAPE.slots + place // SHAPE.block
            chosen = tl.load(neighbor_ptr + slot, mask=held, other=-1)
            key = chosen * SHAPE.block + place % SHAPE.block
            weight = tl.load(
                far_ptr + slot * SHAPE.block + place % SHAPE.block, mask=held, other=0.0
            )
            # A key without an edge, of a chosen block, may hold anything.
            present = (chosen >= 0) & (key < end) & (weight != 0)
            x = load_rows(x_ptr, key, stride, present, SHAPE.features, SHAPE.columns)
            total += tl.where(present, weight.to(tl.float32), 0.0)[:, None] * x.to(tl.float32)
    return total


@triton.jit
def far_product(
    total,
    far_ptr,
    brought_ptr,
    neighbor_ptr,
    x_ptr,
    place,
    rows,
    held,
    end,
    stride,
    SHAPE: tl.constexpr,
):
    """Adds what far edges bring to rows, or what `blocks.multiply_blocks` made of it.

    `place` is the number of the graph among all, the head, heads of a graph, and rows of a graph.
    """
    graph, head, shared, reach = place
    neighbor_ptr += graph * reach * SHAPE.slots
    if brought_ptr is not None:
        width = shared * SHAPE.features
        brought_ptr += graph * reach * SHAPE.slots * width + head % shared * SHAPE.features
        return add_blocks(total, brought_ptr, neighbor_ptr, rows, held, width, SHAPE)
    else:
        far_ptr += graph * reach * (SHAPE.slots * SHAPE.block)
        return _gather_product(total, far_ptr, neighbor_ptr, x_ptr, rows, held, end, stride, SHAPE)


@triton.jit
def list_product(
    total,
    far_ptr,
    edge_ptr,
    start_ptr,
    x_ptr,
    keys,
    held,
    first_row,
    first_list,
    stride,
    SHAPE: tl.constexpr,
):
    """Adds what far edges bring to keys from the rows that chose them.

    The lists of a tile of keys lie one after the other: the product of a tile of their entries with
    the rows they come from is taken at once, whichever key each entry is for. `first_row` and
    `first_list` are the numbers of a graph's first row and list among all graphs'.
    """
    lanes = tl.arange(0, SHAPE.entries)
    block = first_list + keys // SHAPE.block
    begin = tl.load(start_ptr + block, mask=held, other=0)
    end = tl.load(start_ptr + block + 1, mask=held, other=0)
    low = tl.min(tl.where(held, begin, 2**31 - 1))
    high = tl.max(end)
    for first in range(low, high, SHAPE.entries):
        places = first + lanes
        listed = places < high
        edge = tl.load(edge_ptr + places, mask=listed, other=0).to(tl.int64)
        x = load_rows(
            x_ptr, edge // SHAPE.slots - first_row, stride, listed, SHAPE.features, SHAPE.columns
        )
        ours = (places[None, :] >= begin[:, None]) & (places[None, :] < end[:, None])
        if SHAPE.block == 1:
            weights = tl.load(far_ptr + edge, mask=listed, other=0.0)
            weights = tl.where(ours, weights[None, :], 0.0)
        else:
            pointers = far_ptr + edge[None, :] * SHAPE.block + (keys % SHAPE.block)[:, None]
            weights = tl.load(pointers, mask=ours, other=0.0)
        total += tl.dot(weights.to(x.dtype), x, input_precision="ieee")
    return total


@triton.jit
def _multiply(
    local_ptr,
    gathered_ptr,
    brought_ptr,
    listed_ptr,
    neighbor_ptr,
    edge_ptr,
    start_ptr,
    x_ptr,
    output_ptr,
    size,
    reach,
    heads,
    graphs,
    SHAPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    tile, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(0)
    graph = entry.to(tl.int64) * graphs + head // (heads // graphs)
    lanes = tl.arange(0, SHAPE.rows)
    rows = tile * SHAPE.tile + lanes
    held = (lanes < SHAPE.tile) & (rows < size)
    stride = heads * SHAPE.features
    x_ptr = of_head(x_ptr, entry, size, heads, head, SHAPE.features)
    total = tl.full((SHAPE.rows, SHAPE.columns), 0.0, tl.float32)
    if SHAPE.spans > 0:
        total = band_product(
            total,
            local_ptr + graph * tiles * (SHAPE.tile * SHAPE.spans * SHAPE.tile),
            x_ptr,
            None,
            entry,
            tile,
            tiles,
            size,
            size,
            stride,
            SHAPE,
            TRANSPOSED,
        )
    if gathered_ptr is not None:
        total = far_product(
            total,
            gathered_ptr,
            brought_ptr,
            neighbor_ptr,
            x_ptr,
            (graph, head, heads // graphs, reach),
            rows,
            held,
            size,
            stride,
            SHAPE,
        )
    if listed_ptr is not None:
        total = list_product(
            total,
            listed_ptr,
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
    output_ptr = of_head(output_ptr, entry, size, heads, head, SHAPE.features)
    store_rows(output_ptr, rows, stride, held, total, SHAPE.features, SHAPE.columns)


@triton.jit
def _own_dot(
    x, column_ptr, rows, stride, held, FEATURES: tl.constexpr, COLUMNS: tl.constexpr, first
):
    """`rows_i . columns_i` of some features."""
    y = load_rows(column_ptr, rows, stride, held, FEATURES, COLUMNS, first)
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _band_dot(
    row_ptr,
    column_ptr,
    total_ptr,
    size,
    graphs,
    SHAPE: tl.constexpr,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """`rows_i . columns_j` on the band, over all features of a graph's heads, added to `total`.

    With CENTRED it is `rows_i . (columns_j - columns_i)`; without ADDED `total` begins here.
    """
    tile, span = tl.program_id(0), tl.program_id(1)
    graph, entry = tl.program_id(2) % graphs, tl.program_id(2) // graphs
    tiles = tl.num_programs(0)
    lanes = tl.arange(0, SHAPE.rows)
    other = tile + span - SHAPE.before
    row_ptr = of_head(row_ptr, entry, size, graphs, graph, SHAPE.features)
    column_ptr = of_head(column_ptr, entry, size, graphs, graph, SHAPE.features)
    stride = graphs * SHAPE.features
    rows, keys = tile * SHAPE.tile + lanes, other * SHAPE.tile + lanes
    held, seen = (lanes < SHAPE.tile) & (rows < size), (lanes < SHAPE.tile) & (keys < size)
    product = tl.full((SHAPE.rows, SHAPE.rows), 0.0, tl.float32)
    if (other >= 0) & (other < tiles):
        own = tl.full((SHAPE.rows,), 0.0, tl.float32)
        for first in range(0, SHAPE.features, SHAPE.columns):
            x = load_rows(row_ptr, rows, stride, held, SHAPE.features, SHAPE.columns, first)
            y = load_rows(column_ptr, keys, stride, seen, SHAPE.features, SHAPE.columns, first)
            product += tl.dot(x, tl.trans(y), input_precision="ieee")
            if CENTRED:
                own += _own_dot(
                    x, column_ptr, rows, stride, held, SHAPE.features, SHAPE.columns, first
                )
        product -= own[:, None]
    offset = (tl.program_id(2).to(tl.int64) * tiles + tile) * (
        SHAPE.tile * SHAPE.spans * SHAPE.tile
    )
    pointers = total_ptr + offset + span * SHAPE.tile
    pointers += lanes[:, None] * (SHAPE.spans * SHAPE.tile) + lanes[None, :]
    mask = (lanes < SHAPE.tile)[:, None] & (lanes < SHAPE.tile)[None, :]
    if ADDED:
        product += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, product, mask=mask)


@triton.jit
def _far_dot(
    row_ptr,
    column_ptr,
    neighbor_ptr,
    output_ptr,
    size,
    reach,
    graphs,
    SHAPE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """As `_band_dot` on far edges, in place of adding."""
    graph, entry = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * SHAPE.rows + tl.arange(0, SHAPE.rows)
    inside = rows < size
    row_ptr = of_head(row_ptr, entry, size, graphs, graph, SHAPE.features)
    column_ptr = of_head(column_ptr, entry, size, graphs, graph, SHAPE.features)
    stride = graphs * SHAPE.features
    begin = (entry.to(tl.int64) * graphs + graph) * reach + rows
    lanes, features = tl.arange(0, SHAPE.unrolled), tl.arange(0, SHAPE.columns)
    for place in range(0, SHAPE.slots * SHAPE.block, SHAPE.unrolled):
        edges = place + lanes
        slots = begin[:, None] * SHAPE.slots + (edges // SHAPE.block)[None, :]
        chosen = tl.load(neighbor_ptr + slots, mask=inside[:, None], other=-1)
        keys = chosen * SHAPE.block + (edges % SHAPE.block)[None, :]
        present = (chosen >= 0) & (keys < size)
        product = tl.full((SHAPE.rows, SHAPE.unrolled), 0.0, tl.float32)
        own = tl.full((SHAPE.rows,), 0.0, tl.float32)
        for first in range(0, SHAPE.features, SHAPE.columns):
            x = load_rows(row_ptr, rows, stride, inside, SHAPE.features, SHAPE.columns, first)
            within = present[:, :, None] & (first + features < SHAPE.features)[None, None, :]
            pointers = column_ptr + keys.to(tl.int64)[:, :, None] * stride + first
            y = tl.load(pointers + features[None, None, :], mask=within, other=0.0)
            product += tl.sum(x.to(tl.float32)[:, None, :] * y.to(tl.float32), 2)
            if CENTRED:
                own += _own_dot(
                    x, column_ptr, rows, stride, inside, SHAPE.features, SHAPE.columns, first
                )
        product -= own[:, None]
        pointers = output_ptr + begin[:, None] * (SHAPE.slots * SHAPE.block) + edges[None, :]
        tl.store(pointers, product, mask=(rows < reach)[:, None])
