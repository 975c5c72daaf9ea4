"""A step of the walk: a sparse matrix, of a band and far edges, times the states of all heads.

The matrix is `keras_rwr._sparse.SparseMatrix`; the heads that share a graph stand side by side in
the columns of a state. What flows against far edges goes by lists: the far edges that lead to each
key block, in one order, so that the same inputs give the same bits.
"""

import functools

import torch
import triton
import triton.language as tl

from keras_rwr.backends.torch.operators import refuse_second_derivative
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import load_rows, store_rows

_ENTRIES = 16
_LARGEST = 128  # features that a program works on
_WARPS = 4


@torch.compiler.disable
def far_dot(query, neighbors, key, block):
    """See `keras_rwr._far.far_dot`."""
    return _FarDot.apply(query, key, _FarEdges(neighbors, block))


def make_matmul(graph):
    """`matmul(matrix, x)` for matrices with the edges of a `SparseGraph`, differentiable."""
    neighbors, edges = graph.log_weights.neighbors, None
    if neighbors is not None:
        edges = _FarEdges(neighbors, graph.log_weights.block)

    @torch.compiler.disable
    def matmul(matrix, x):
        tiling = matrix.tiling
        return _Product.apply(
            matrix.local, matrix.far, matrix.back, x, edges, tiling.tile, tiling.before
        )

    return matmul


class _FarDot(torch.autograd.Function):
    """`query_i . key_j` on far edges."""

    @staticmethod
    def forward(ctx, query, key, edges):
        query, key = query.contiguous(), key.contiguous()
        ctx.save_for_backward(query, key)
        ctx.edges = edges
        return edges.products(query, key)

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        query, key = ctx.saved_tensors
        cotangent = cotangent.contiguous()
        key_gradient = torch.zeros_like(key)
        ctx.edges.collect(cotangent, query, key_gradient)
        return ctx.edges.spread(cotangent, key), key_gradient, None


class _Product(torch.autograd.Function):
    """`band x + far x + back^T x`, see `SparseMatrix.matmul`."""

    @staticmethod
    def forward(ctx, local, far, back, x, edges, tile, before):
        local, x = local.contiguous(), x.contiguous()
        far, back = (None if y is None else y.contiguous() for y in (far, back))
        band = _Band(local, tile, before)
        output = band.multiply(x, edges, far)
        if back is not None:
            edges.collect(back, x, output)
        ctx.save_for_backward(far, back, x)
        ctx.band, ctx.edges = band, edges
        return output

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        far, back, x = ctx.saved_tensors
        cotangent, edges = cotangent.contiguous(), ctx.edges
        gradient = ctx.band.multiply(cotangent, edges, back, transposed=True)
        if far is not None:
            edges.collect(far, cotangent, gradient)
        return (
            ctx.band.products(cotangent, x),
            None if far is None else edges.products(cotangent, x),
            None if back is None else edges.products(x, cotangent),
            gradient,
            *[None] * 3,
        )


class _FarEdges:
    """Each query's edges to the tokens of its key blocks, and what kernels do along them.

    Their weights have the shape `(B, G, S, slots * block)`, and features `(B, G, S, F)`.
    """

    def __init__(self, neighbors, block):
        self.neighbors, self.block = neighbors.contiguous(), block
        self.graphs, self.size = neighbors.shape[0] * neighbors.shape[1], neighbors.shape[2]
        self.constants = {"SLOTS": neighbors.shape[3], "BLOCK": block}

    @functools.cached_property
    def lists(self):
        """The edges to each key block, `(graph * S + query) * slots + slot`; where lists begin."""
        blocks = triton.cdiv(self.size, self.block)
        lists = self.graphs * blocks
        first = torch.arange(0, lists, blocks, device=self.neighbors.device)
        targets = self.neighbors.reshape(self.graphs, -1) + first[:, None]
        targets = torch.where(self.neighbors.reshape(targets.shape) >= 0, targets, lists)
        targets, edges = torch.sort(targets.flatten(), stable=True)
        starts = torch.searchsorted(targets, torch.arange(lists + 1, device=targets.device))
        return edges.to(torch.int32), starts.to(torch.int32)

    def spread(self, far, x):
        """`sum_k far_ik x_key(i, k)`."""
        output, features = torch.empty_like(x), x.shape[-1]
        columns, rows = _columns(features), 16
        grid = (triton.cdiv(self.size, rows), triton.cdiv(features, columns), self.graphs)
        run(
            _multiply,
            grid,
            None,
            far,
            self.neighbors,
            x,
            output,
            self.size,
            TILE=rows,
            SPANS=0,
            BEFORE=0,
            ROWS=rows,
            **self.constants,
            FEATURES=features,
            COLUMNS=columns,
            TRANSPOSED=False,
            num_warps=_WARPS,
        )
        return output

    def collect(self, far, x, output):
        """Adds `far_ik x_i` to key(i, k) in `output`."""
        features, columns = x.shape[-1], _columns(x.shape[-1])
        blocks = triton.cdiv(self.size, self.block)
        run(
            _collect,
            (blocks, triton.cdiv(features, columns), self.graphs),
            far,
            *self.lists,
            x,
            output,
            self.size,
            **self.constants,
            KEYS=max(triton.next_power_of_2(self.block), 16),
            FEATURES=features,
            COLUMNS=columns,
            ENTRIES=_ENTRIES,
            num_warps=2,
        )

    def products(self, rows, columns):
        """`rows_i . columns_key(i, k)`, in float32."""
        shape = (*self.neighbors.shape[:3], self.neighbors.shape[3] * self.block)
        output = torch.empty(shape, dtype=torch.float32, device=rows.device)
        features, tile = rows.shape[-1], 16
        run(
            _far_products,
            (triton.cdiv(self.size, tile), self.graphs),
            rows,
            columns,
            self.neighbors,
            output,
            self.size,
            **self.constants,
            FEATURES=features,
            COLUMNS=_columns(features),
            ROWS=tile,
            num_warps=_WARPS,
        )
        return output


class _Band:
    """Entries within the window, by tiles, `(B, G, tiles, tile, spans * tile)`."""

    def __init__(self, local, tile, before):
        self.local = local
        batch, graphs, self.tiles, _, band = local.shape
        self.graphs, self.size, self.spans = batch * graphs, self.tiles * tile, band // tile
        self.constants = {
            "TILE": tile,
            "SPANS": self.spans,
            "BEFORE": before,
            "ROWS": max(triton.next_power_of_2(tile), 16),
        }

    def multiply(self, x, edges, far, transposed=False):
        """The band, or its transpose, and far edges with weights `far`, if any, times x."""
        output, features = torch.empty_like(x), x.shape[-1]
        columns = _columns(features)
        constants = {"SLOTS": 0, "BLOCK": 1} if far is None else edges.constants
        run(
            _multiply,
            (self.tiles, triton.cdiv(features, columns), self.graphs),
            self.local,
            far,
            None if far is None else edges.neighbors,
            x,
            output,
            self.size,
            **self.constants,
            **constants,
            FEATURES=features,
            COLUMNS=columns,
            TRANSPOSED=transposed,
            num_warps=_WARPS,
        )
        return output

    def products(self, rows, columns):
        """`rows_i . columns_j` on the band."""
        output, features = torch.empty_like(self.local), rows.shape[-1]
        run(
            _band_products,
            (self.tiles, self.spans, self.graphs),
            rows,
            columns,
            output,
            self.size,
            **self.constants,
            FEATURES=features,
            COLUMNS=min(_columns(features), 64),
            num_warps=_WARPS,
        )
        return output


def _columns(features):
    """Features that a program works on."""
    return min(max(triton.next_power_of_2(features), 16), _LARGEST)


@triton.jit
def _load_band(local_ptr, tile, span, TILE: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr):
    """A tile's entries in one span of its band, `(ROWS, ROWS)`; 0 behind TILE."""
    lanes = tl.arange(0, ROWS)
    offset = tile.to(tl.int64) * (TILE * SPANS * TILE) + span * TILE
    held = (lanes < TILE)[:, None] & (lanes < TILE)[None, :]
    pointers = local_ptr + offset + lanes[:, None] * (SPANS * TILE) + lanes[None, :]
    return tl.load(pointers, mask=held, other=0.0)


@triton.jit
def _multiply(
    local_ptr,
    far_ptr,
    neighbor_ptr,
    x_ptr,
    output_ptr,
    size,
    TILE: tl.constexpr,
    SPANS: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    first_feature = tl.program_id(1) * COLUMNS
    graph = tl.program_id(2)
    lanes = tl.arange(0, ROWS)
    x_ptr += graph.to(tl.int64) * size * FEATURES
    output_ptr += graph.to(tl.int64) * size * FEATURES
    rows = tile * TILE + lanes
    held = (lanes < TILE) & (rows < size)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if SPANS > 0:
        local_ptr += graph.to(tl.int64) * tiles * (TILE * SPANS * TILE)
        for span in range(SPANS):
            shift = BEFORE - span if TRANSPOSED else span - BEFORE
            other = tile + shift
            if (other >= 0) & (other < tiles):
                if TRANSPOSED:
                    weights = tl.trans(_load_band(local_ptr, other, span, TILE, SPANS, ROWS))
                else:
                    weights = _load_band(local_ptr, tile, span, TILE, SPANS, ROWS)
                x = load_rows(
                    x_ptr, other * TILE + lanes, FEATURES, held, FEATURES, COLUMNS, first_feature
                )
                total += tl.dot(weights.to(x.dtype), x, input_precision="ieee")
    if far_ptr is not None:
        for slot in range(SLOTS):
            edge = (graph.to(tl.int64) * size + rows) * SLOTS + slot
            chosen = tl.load(neighbor_ptr + edge, mask=held, other=-1)
            for token in range(BLOCK):
                key = chosen * BLOCK + token
                present = (chosen >= 0) & (key < size)
                weight = tl.load(far_ptr + edge * BLOCK + token, mask=held, other=0.0).to(
                    tl.float32
                )
                x = load_rows(x_ptr, key, FEATURES, present, FEATURES, COLUMNS, first_feature)
                total += weight[:, None] * x.to(tl.float32)
    store_rows(output_ptr, rows, FEATURES, held, total, FEATURES, COLUMNS, first_feature)


@triton.jit
def _collect(
    far_ptr,
    edge_ptr,
    start_ptr,
    x_ptr,
    output_ptr,
    size,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    first_feature = tl.program_id(1) * COLUMNS
    graph = tl.program_id(2)
    begin = tl.load(start_ptr + graph * blocks + block)
    end = tl.load(start_ptr + graph * blocks + block + 1)
    tokens = tl.arange(0, KEYS)
    total = tl.zeros((KEYS, COLUMNS), tl.float32)
    for first in range(begin, end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        listed = places < end
        edges = tl.load(edge_ptr + places, mask=listed, other=0).to(tl.int64)
        x = load_rows(x_ptr, edges // SLOTS, FEATURES, listed, FEATURES, COLUMNS, first_feature)
        pointers = far_ptr + edges[None, :] * BLOCK + tokens[:, None]
        within = listed[None, :] & (tokens < BLOCK)[:, None]
        weights = tl.load(pointers, mask=within, other=0.0)
        total += tl.dot(weights.to(x.dtype), x, input_precision="ieee")
    if end > begin:
        keys = block * BLOCK + tokens
        inside = (tokens < BLOCK) & (keys < size)
        output_ptr += graph.to(tl.int64) * size * FEATURES
        before = load_rows(output_ptr, keys, FEATURES, inside, FEATURES, COLUMNS, first_feature)
        total += before.to(tl.float32)
        store_rows(output_ptr, keys, FEATURES, inside, total, FEATURES, COLUMNS, first_feature)


@triton.jit
def _band_products(
    row_ptr,
    column_ptr,
    output_ptr,
    size,
    TILE: tl.constexpr,
    SPANS: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    span = tl.program_id(1)
    graph = tl.program_id(2)
    lanes = tl.arange(0, ROWS)
    held = lanes < TILE
    other = tile + span - BEFORE
    row_ptr += graph.to(tl.int64) * size * FEATURES
    column_ptr += graph.to(tl.int64) * size * FEATURES
    product = tl.zeros((ROWS, ROWS), tl.float32)
    if (other >= 0) & (other < tiles):
        for first in range(0, FEATURES, COLUMNS):
            rows = load_rows(row_ptr, tile * TILE + lanes, FEATURES, held, FEATURES, COLUMNS, first)
            columns = load_rows(
                column_ptr, other * TILE + lanes, FEATURES, held, FEATURES, COLUMNS, first
            )
            product += tl.dot(rows, tl.trans(columns), input_precision="ieee")
    offset = (graph.to(tl.int64) * tiles + tile) * (TILE * SPANS * TILE) + span * TILE
    pointers = output_ptr + offset + lanes[:, None] * (SPANS * TILE) + lanes[None, :]
    tl.store(pointers, product, mask=held[:, None] & held[None, :])


@triton.jit
def _far_products(
    row_ptr,
    column_ptr,
    neighbor_ptr,
    output_ptr,
    size,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    graph = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    row_ptr += graph.to(tl.int64) * size * FEATURES
    column_ptr += graph.to(tl.int64) * size * FEATURES
    for slot in range(SLOTS):
        edge = (graph.to(tl.int64) * size + rows) * SLOTS + slot
        chosen = tl.load(neighbor_ptr + edge, mask=inside, other=-1)
        for token in range(BLOCK):
            key = chosen * BLOCK + token
            present = (chosen >= 0) & (key < size)
            product = tl.zeros((ROWS,), tl.float32)
            for first in range(0, FEATURES, COLUMNS):
                row = load_rows(row_ptr, rows, FEATURES, present, FEATURES, COLUMNS, first)
                column = load_rows(column_ptr, key, FEATURES, present, FEATURES, COLUMNS, first)
                product += tl.sum(row.to(tl.float32) * column.to(tl.float32), 1)
            tl.store(output_ptr + edge * BLOCK + token, product, mask=inside)
