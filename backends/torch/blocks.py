"""Products along far edges to blocks of keys, by lists: a block is loaded once for all its queries.

A list holds the edges that lead to one key block. A program goes over a list, and what it computes
for an edge lies where the edge's query looks for it.
"""

import torch
import triton
import triton.language as tl

from keras_rwr.backends.torch.run import ceil_div, next_power_of_2, run
from keras_rwr.backends.torch.shape import shape_of
from keras_rwr.backends.torch.tiles import PADDING, load_end, load_labels, load_rows, of_head

SMALLEST = 8  # keys in a block from which lists are faster than each query's own loads
_ENTRIES = 32


def dot_blocks(rows, columns, neighbors, edges, starts, block, centred):
    """`product.far_dot` by lists."""
    batch, graphs, reach, slots = neighbors.shape
    output = torch.zeros((batch, graphs, reach, slots * block), device=rows.device)
    features = rows.shape[2] // graphs * rows.shape[3]
    shape = _shape(neighbors, block, rows.shape[1], features)
    run(
        _dot_blocks,
        (ceil_div(reach, block), graphs, batch),
        rows,
        columns,
        edges,
        starts,
        output,
        rows.shape[1],
        reach,
        SHAPE=shape._replace(columns=min(shape.columns, 64)),
        CENTRED=centred,
        num_warps=4,
    )
    return output


def multiply_blocks(far, x, neighbors, edges, starts, block, labels=None, ends=None):
    """What each chosen block brings to each query, `(B, G, reach, slots, H / G, F)`.

    Args:
        far: Tensor of shape `(B, G, reach, slots * block)`: entries of far edges.
        x: Tensor of shape `(B, S, H, F)`; zeros count in place of padding, and from the ends on.
        neighbors: Int tensor of shape `(B, G, reach, slots)`; where it has no block, the result is
            undefined.
        edges, starts: What `product.list_edges` returned.
        block: Int. Keys in a block.
        labels, ends: `None` or int tensors, see `tiles`.
    """
    batch, graphs, reach, slots = neighbors.shape
    _, size, heads, features = x.shape
    output = x.new_empty((batch, graphs, reach, slots, heads // graphs, features))
    run(
        _multiply_blocks,
        (ceil_div(reach, block), heads, batch),
        far,
        x,
        edges,
        starts,
        labels,
        ends,
        output,
        size,
        reach,
        graphs,
        SHAPE=_shape(neighbors, block, size, features),
        num_warps=4,
    )
    return output


def _shape(neighbors, block, size, features):
    """A tile is a block of keys, whose edges are taken a few at a time."""
    shape = shape_of(None, neighbors, 0, block, size, features)
    return shape._replace(tile=block, rows=max(next_power_of_2(block), 16), entries=_ENTRIES)


@triton.jit
def _load_entries(edge_ptr, first, end, SHAPE: tl.constexpr):
    """Some edges of a list, and which of them there are."""
    places = first + tl.arange(0, SHAPE.entries)
    return tl.load(edge_ptr + places, mask=places < end, other=0).to(tl.int64), places < end


@triton.jit
def _dot_blocks(
    row_ptr,
    column_ptr,
    edge_ptr,
    start_ptr,
    output_ptr,
    size,
    reach,
    SHAPE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    block, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    graphs = tl.num_programs(1)
    number = entry.to(tl.int64) * graphs + graph
    start_ptr += number * tl.num_programs(0) + block
    row_ptr = of_head(row_ptr, entry, size, graphs, graph, SHAPE.features)
    column_ptr = of_head(column_ptr, entry, size, graphs, graph, SHAPE.features)
    stride = graphs * SHAPE.features
    lanes = tl.arange(0, SHAPE.rows)
    keys = block * SHAPE.block + lanes
    present = (lanes < SHAPE.block) & (keys < size)
    end = tl.load(start_ptr + 1)
    for first in range(tl.load(start_ptr), end, SHAPE.entries):
        edge, listed = _load_entries(edge_ptr, first, end, SHAPE)
        rows = edge // SHAPE.slots - number * reach
        inside = listed & (rows < size)
        product = tl.full((SHAPE.entries, SHAPE.rows), 0.0, tl.float32)
        own = tl.full((SHAPE.entries,), 0.0, tl.float32)
        for feature in range(0, SHAPE.features, SHAPE.columns):
            x = load_rows(row_ptr, rows, stride, inside, SHAPE.features, SHAPE.columns, feature)
            y = load_rows(column_ptr, keys, stride, present, SHAPE.features, SHAPE.columns, feature)
            product += tl.dot(x, tl.trans(y), input_precision="ieee")
            if CENTRED:
                y = load_rows(
                    column_ptr, rows, stride, inside, SHAPE.features, SHAPE.columns, feature
                )
                own += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
        pointers = output_ptr + edge[:, None] * SHAPE.block + lanes[None, :]
        mask = listed[:, None] & (lanes < SHAPE.block)[None, :]
        tl.store(pointers, product - own[:, None], mask=mask)


@triton.jit
def _multiply_blocks(
    far_ptr,
    x_ptr,
    edge_ptr,
    start_ptr,
    label_ptr,
    end_ptr,
    output_ptr,
    size,
    reach,
    graphs,
    SHAPE: tl.constexpr,
):
    block, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    shared = heads // graphs
    start_ptr += (entry.to(tl.int64) * graphs + head // shared) * tl.num_programs(0) + block
    lanes = tl.arange(0, SHAPE.rows)
    keys = block * SHAPE.block + lanes
    present = load_labels(label_ptr, entry, size, keys, load_end(end_ptr, entry, size)) != PADDING
    present = present & (lanes < SHAPE.block)
    x_ptr = of_head(x_ptr, entry, size, heads, head, SHAPE.features)
    x = load_rows(x_ptr, keys, heads * SHAPE.features, present, SHAPE.features, SHAPE.columns)
    features = tl.arange(0, SHAPE.columns)
    end = tl.load(start_ptr + 1)
    for first in range(tl.load(start_ptr), end, SHAPE.entries):
        edge, listed = _load_entries(edge_ptr, first, end, SHAPE)
        mask = listed[:, None] & (lanes < SHAPE.block)[None, :]
        weights = tl.load(
            far_ptr + edge[:, None] * SHAPE.block + lanes[None, :], mask=mask, other=0.0
        )
        product = tl.dot(weights.to(x.dtype), x, input_precision="ieee")
        pointers = output_ptr + (edge * shared + head % shared)[:, None] * SHAPE.features
        mask = listed[:, None] & (features < SHAPE.features)[None, :]
        tl.store(pointers + features[None, :], product, mask=mask)


@triton.jit
def add_blocks(
    total,
    brought_ptr,
    neighbor_ptr,
    rows,
    held,
    stride,
    SHAPE: tl.constexpr,
):
    """Adds what `multiply_blocks` made for rows, from one slot to the next `stride` numbers on."""
    for slot in range(SHAPE.slots):
        pointers = neighbor_ptr + rows.to(tl.int64) * SHAPE.slots + slot
        chosen = tl.load(pointers, mask=held, other=-1) >= 0
        pointer, step = brought_ptr + slot * stride, SHAPE.slots * stride
        x = load_rows(pointer, rows, step, chosen, SHAPE.features, SHAPE.columns)
        total += x.to(tl.float32)
    return total
