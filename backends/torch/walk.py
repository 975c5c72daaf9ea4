"""A step of the walk: a sparse matrix, of a band and far edges, times the states of all heads.

The matrix is `keras_rwr._sparse.SparseMatrix`; the heads that share a graph stand side by side in
the columns of a state. What flows against far edges goes by lists: the far edges that lead to each
key block, in one order, so that the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl

from keras_rwr.backends.torch.operators import refuse_second_derivative
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import load_rows, store_rows

_ENTRIES = 16
_LARGEST = 128  # features that a program works on
_WARPS = 4


def make_matmul(graph):
    """`matmul(matrix, x)` for matrices with the edges of a `SparseGraph`, differentiable."""
    neighbors, block = graph.log_weights.neighbors, graph.log_weights.block
    lists = None if neighbors is None else _reverse_lists(neighbors, block)

    def matmul(matrix, x):
        tiling = matrix.tiling
        return _Product.apply(
            matrix.local, matrix.far, matrix.back, x, lists, tiling.tile, tiling.before, block
        )

    return matmul


def _reverse_lists(neighbors, block):
    """Far edges by key block: edges `(graph * S + query) * slots + slot`, and where lists begin."""
    batch, graphs, size = neighbors.shape[:3]
    blocks = -(-size // block)
    graph = torch.arange(batch * graphs, device=neighbors.device).reshape(batch, graphs, 1, 1)
    lists = batch * graphs * blocks
    target = torch.where(neighbors >= 0, neighbors + graph * blocks, lists).flatten()
    target, edges = torch.sort(target, stable=True)
    numbers = torch.arange(lists + 1, device=neighbors.device)
    starts = torch.searchsorted(target, numbers)
    return neighbors.contiguous(), edges.to(torch.int32), starts.to(torch.int32)


class _Product(torch.autograd.Function):
    """`band x + far x + back^T x`, see `SparseMatrix.matmul`."""

    @staticmethod
    def forward(ctx, local, far, back, x, lists, tile, before, block):
        local, x = local.contiguous(), x.contiguous()
        far, back = (None if y is None else y.contiguous() for y in (far, back))
        matrix = _Matrix(local, lists, tile, before, block)
        output = matrix.multiply(x, far, transposed=False)
        if back is not None:
            matrix.collect(x, back, output)
        ctx.save_for_backward(local, far, back, x)
        ctx.rest = lists, tile, before, block
        return output

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        local, far, back, x = ctx.saved_tensors
        cotangent = cotangent.contiguous()
        matrix = _Matrix(local, *ctx.rest)
        gradient = matrix.multiply(cotangent, back, transposed=True)
        if far is not None:
            matrix.collect(cotangent, far, gradient)
        return (
            matrix.band_products(cotangent, x),
            None if far is None else matrix.far_products(cotangent, x, far),
            None if back is None else matrix.far_products(x, cotangent, back),
            gradient,
            *[None] * 4,
        )


class _Matrix:
    """The launches of one matrix."""

    def __init__(self, local, lists, tile, before, block):
        self.local, self.block = local, block
        self.neighbors, self.edges, self.starts = (None, None, None) if lists is None else lists
        batch, graphs, self.tiles, _, band = local.shape
        self.graphs = batch * graphs
        self.size = self.tiles * tile
        self.settings = {
            "TILE": tile,
            "SPANS": band // tile,
            "BEFORE": before,
            "ROWS": max(triton.next_power_of_2(tile), 16),
        }

    def multiply(self, x, far, transposed):
        """The band, or its transpose, and far edges from row to column, times x."""
        output, features = torch.empty_like(x), x.shape[-1]
        slots = 0 if far is None else self.neighbors.shape[-1]
        columns = _columns(features)
        run(
            _multiply,
            (self.tiles, triton.cdiv(features, columns), self.graphs),
            self.local,
            far,
            self.neighbors,
            x,
            output,
            self.size,
            **self.settings,
            SLOTS=slots,
            BLOCK=self.block,
            FEATURES=features,
            COLUMNS=columns,
            TRANSPOSED=transposed,
            num_warps=_WARPS,
        )
        return output

    def collect(self, x, far, output):
        """Adds to each key what far edges bring from their rows of x."""
        features, columns = x.shape[-1], _columns(x.shape[-1])
        blocks = triton.cdiv(self.size, self.block)
        run(
            _collect,
            (blocks, triton.cdiv(features, columns), self.graphs),
            far,
            self.edges,
            self.starts,
            x,
            output,
            self.size,
            SLOTS=self.neighbors.shape[-1],
            BLOCK=self.block,
            KEYS=max(triton.next_power_of_2(self.block), 16),
            FEATURES=features,
            COLUMNS=columns,
            ENTRIES=_ENTRIES,
            num_warps=2,
        )

    def band_products(self, rows, columns):
        """`rows_i . columns_j` on the band."""
        output, features = torch.empty_like(self.local), rows.shape[-1]
        run(
            _band_products,
            (self.tiles, self.settings["SPANS"], self.graphs),
            rows,
            columns,
            output,
            self.size,
            **self.settings,
            FEATURES=features,
            COLUMNS=min(_columns(features), 64),
            num_warps=4,
        )
        return output

    def far_products(self, rows, columns, far):
        """`rows_i . columns_j` on the far edges from i to j."""
        output, features = torch.empty_like(far), rows.shape[-1]
        run(
            _far_products,
            (triton.cdiv(self.size, 16), self.graphs),
            rows,
            columns,
            self.neighbors,
            output,
            self.size,
            SLOTS=self.neighbors.shape[-1],
            BLOCK=self.block,
            FEATURES=features,
            COLUMNS=_columns(features),
            ROWS=16,
            num_warps=4,
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
    local_ptr += graph.to(tl.int64) * tiles * (TILE * SPANS * TILE)
    x_ptr += graph.to(tl.int64) * size * FEATURES
    output_ptr += graph.to(tl.int64) * size * FEATURES
    rows = tile * TILE + lanes
    held = lanes < TILE
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
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
