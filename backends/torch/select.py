"""Selection: each query's best key blocks, exact, without storing scores.

A first kernel streams tiles of key blocks past a tile of queries and keeps, for each query, the
groups of a few neighbouring blocks with the largest best scores: no block outside of them can be
among the query's best. A second one computes the scores of these groups again and takes the best.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_rwr._select import block_ends, has_candidates
from keras_rwr.backends.torch.operators import define
from keras_rwr.backends.torch.run import ceil_div, next_power_of_2, run
from keras_rwr.backends.torch.tiles import (
    NEVER,
    PADDING,
    load_end,
    load_labels,
    load_rows,
    of_head,
)

_ROWS, _COLUMNS, _WARPS = 64, 128, 4
_GROUP = 8  # blocks in a group
_CHOOSING_ROWS = 16
# Three products of tensor cores, as exact as float32; AMD has none such.
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_NO_BLOCK = tl.constexpr(2**30)


def select(graph_query, graph_key, tokens, options):
    """See `keras_rwr._select.select`; the vectors are `UnitVectors`."""
    if not has_candidates(tokens, options):
        return None
    labels = tokens.labels if tokens.has_padding or tokens.has_segments else None
    key, scales, ends = graph_key.rows.detach(), graph_key.scales, (None, None)
    if options.neighbor_block > 1:
        key = _average_blocks(key, scales, labels, tokens.ends, options.neighbor_block)
        scales = None
        ends = block_ends(tokens, options.neighbor_block)
    return _select(
        graph_query.rows.detach(),
        graph_query.scales,
        key,
        scales,
        *ends,
        labels,
        options.slots,
        options.window,
        tokens.is_causal,
        tokens.has_segments,
    )


def _run_average_blocks(key, scales, labels, ends, block):
    means = _means(key, scales, labels, ends, block)
    batch, size, graphs, features = key.shape
    run(
        _average_blocks_kernel,
        (means.shape[1], graphs, batch),
        key,
        scales,
        _expand(labels, batch),
        ends,
        means,
        size,
        BLOCK=block,
        KEYS=next_power_of_2(block),
        FEATURES=features,
        VECTOR=next_power_of_2(features),
        num_warps=1,
    )
    return means


def _means(key, scales, labels, ends, block):
    batch, size, graphs, features = key.shape
    return scales.new_empty((batch, ceil_div(size, block), graphs, features))


class Kind(NamedTuple):
    """What is known of a selection when kernels are compiled.

    Attributes:
        rows: Queries of a tile.
        columns: Blocks of a tile.
        group: Blocks in a group.
        kept: A power of two, groups that a query keeps.
        slots: Blocks that a query chooses.
        features: Features of a vector.
        vector: A power of two, of at least as many features.
        window, causal, segments: See `keras_rwr._select`.
        precision: Triton's name for how float32 is multiplied.
    """

    rows: int
    columns: int
    group: int
    kept: int
    slots: int
    features: int
    vector: int
    window: int
    causal: bool
    segments: bool
    precision: str


def _run_select(
    query, query_scales, key, key_scales, first, last, labels, slots, window, is_causal, segments
):
    batch, size, graphs, features = query.shape
    chosen = query.new_empty((batch, graphs, size, slots), dtype=torch.int32)
    labels, first, last = (_expand(x, batch) for x in (labels, first, last))
    if key.dtype != query.dtype:
        query = query.float() * query_scales[..., :1]
    kept = max(next_power_of_2(slots), 2)
    groups = query.new_empty((batch, graphs, size, kept), dtype=torch.int32)
    tensors = (query, key, key_scales, first, last, labels)
    numbers = (size, key.shape[1], graphs)
    vector = max(next_power_of_2(features), 16)
    # Few blocks need no large tile, and long vectors have no room for one.
    is_large = key.shape[1] > 4 * _COLUMNS and vector * key.itemsize <= 512
    kind = Kind(
        rows=_ROWS if kept <= 16 else 32,
        columns=_COLUMNS if is_large else _COLUMNS // 4,
        group=_GROUP,
        kept=kept,
        slots=slots,
        features=features,
        vector=vector,
        window=window,
        causal=is_causal,
        segments=segments,
        precision=_PRECISION,
    )
    for kernel, rows, outputs in (
        (_keep_groups, kind.rows, (groups,)),
        (_choose, _CHOOSING_ROWS if kept <= 16 else 4, (groups, chosen)),
    ):
        grid = (ceil_div(size, rows), graphs, batch)
        shape = kind._replace(rows=rows)
        run(kernel, grid, *tensors, *outputs, *numbers, KIND=shape, num_warps=_WARPS)
    return chosen


def _expand(x, batch):
    return None if x is None else x.expand(batch, *x.shape[1:]).contiguous()


_average_blocks = define(
    "average_blocks(Tensor key, Tensor scales, Tensor? labels, Tensor? ends, int block) -> Tensor",
    _run_average_blocks,
    _means,
)
_select = define(
    "select(Tensor query, Tensor query_scales, Tensor key, Tensor? key_scales, Tensor? first, "
    "Tensor? last, Tensor? labels, int slots, int window, bool is_causal, bool segments) -> Tensor",
    _run_select,
    lambda query, *others: query.new_empty(
        (query.shape[0], query.shape[2], query.shape[1], others[6]), dtype=torch.int32
    ),
)


@triton.jit
def _average_blocks_kernel(
    key_ptr,
    scale_ptr,
    label_ptr,
    end_ptr,
    mean_ptr,
    size,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The mean of a block's unit vectors, as `keras_rwr._select.block_means`."""
    block, graph, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, graphs = tl.num_programs(0), tl.num_programs(1)
    lanes = tl.arange(0, KEYS)
    keys = block * BLOCK + lanes
    real = load_labels(label_ptr, entry, size, keys, size) != PADDING
    real = real & (lanes < BLOCK)
    loaded = real & (keys < load_end(end_ptr, entry, size))
    key_ptr = of_head(key_ptr, entry, size, graphs, graph, FEATURES)
    scale_ptr = of_head(scale_ptr, entry, size, graphs, graph, 2)
    x = load_rows(key_ptr, keys, graphs * FEATURES, loaded, FEATURES, VECTOR).to(tl.float32)
    scales = tl.load(scale_ptr + 2 * graphs * keys, mask=loaded, other=0.0)
    count = tl.maximum(tl.sum(real.to(tl.int32)), 1)
    features = tl.arange(0, VECTOR)
    mean_ptr = of_head(mean_ptr, entry, blocks, graphs, graph, FEATURES)
    mean_ptr += block * graphs * FEATURES + features
    tl.store(mean_ptr, tl.sum(x * scales[:, None], 0) / count, mask=features < FEATURES)


@triton.jit
def _load_blocks(first_ptr, last_ptr, label_ptr, entry, columns, size, blocks):
    """The first and the last real position of blocks, and the labels of single tokens."""
    present = (columns >= 0) & (columns < blocks)
    if first_ptr is None:  # blocks are single tokens
        labels = load_labels(label_ptr, entry, size, columns, size)
        return columns, columns, labels
    else:
        places = entry.to(tl.int64) * blocks + columns
        first = tl.load(first_ptr + places, mask=present, other=_NO_BLOCK)
        last = tl.load(last_ptr + places, mask=present, other=-_NO_BLOCK)
        return first, last, tl.where(present, 0, PADDING)


@triton.jit
def _candidates(
    rows,
    labels,
    first,
    last,
    others,
    KIND: tl.constexpr,
):
    """Blocks with a real token outside the window that a row may see; shapes broadcast."""
    candidate = first < rows - KIND.window
    if not KIND.causal:
        candidate = candidate | (last > rows + KIND.window)
    if KIND.segments:
        candidate = candidate & (others == labels)
    return candidate & (others != PADDING) & (labels != PADDING)


@triton.jit
def _load_keys(key_ptr, columns, blocks, stride, KIND: tl.constexpr):
    """Rows of keys; behind the last block that one's, which is no candidate there."""
    columns = tl.minimum(columns, blocks - 1)
    return load_rows(key_ptr, columns, stride, columns >= 0, KIND.features, KIND.vector)


@triton.jit
def _score_groups(
    queries,
    key,
    table,
    column,
    entry,
    graphs,
    KIND: tl.constexpr,
):
    """The best score of each group of a tile of keys, and the keys of the next tile.

    `queries` and `table` are what `_keep_groups` makes.
    """
    query, rows, labels, first_row = queries
    key_ptr, key_scale_ptr, first_ptr, last_ptr, label_ptr, order, size, blocks = table
    columns = column + order
    scores = tl.dot(query, tl.trans(key), input_precision=KIND.precision)
    # They are on their way while these are looked at.
    key = _load_keys(key_ptr, columns + KIND.columns, blocks, graphs * KIND.features, KIND)
    if key_scale_ptr is not None:
        places = tl.minimum(columns, blocks - 1)
        scores *= tl.load(key_scale_ptr + places * graphs * 2)[None, :]
    whole = KIND.causal and label_ptr is None and first_ptr is None
    if not (whole and column + KIND.columns <= first_row - KIND.window):
        first, last, others = _load_blocks(
            first_ptr, last_ptr, label_ptr, entry, columns, size, blocks
        )
        candidate = _candidates(
            rows[:, None], labels[:, None], first[None, :], last[None, :], others[None, :], KIND
        )
        scores = tl.where(candidate, scores, NEVER)
    SETS: tl.constexpr = KIND.columns // (4 * KIND.group)
    scores = tl.reshape(scores, (KIND.rows, SETS, KIND.group // 2, 4, 2))
    return tl.reshape(tl.max(tl.max(scores, 4), 2), (KIND.rows, KIND.columns // KIND.group)), key


@triton.jit
def _insert(best, kept, worst, scores, largest, places, first_group, PLACES: tl.constexpr):
    """Takes the group of the largest score into each row where it exceeds the worst kept one."""
    place = tl.min(tl.where(scores == largest[:, None], places[None, :], PLACES), 1)
    # Of the worst that a row keeps, the last group goes.
    is_worst = best == worst[:, None]
    last = tl.max(tl.where(is_worst, kept, -_NO_BLOCK), 1)
    enters = is_worst & (kept == last[:, None]) & (largest > worst)[:, None]
    best = tl.where(enters, largest[:, None], best)
    kept = tl.where(enters, (first_group + place)[:, None], kept)
    scores = tl.where(places[None, :] == place[:, None], NEVER, scores)
    return best, kept, tl.min(best, 1), scores


@triton.jit
def _keep_groups(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    first_ptr,
    last_ptr,
    label_ptr,
    group_ptr,
    size,
    blocks,
    graphs,
    KIND: tl.constexpr,
):
    # The last queries have the most keys before them: they begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * KIND.rows
    graph, entry = tl.program_id(1), tl.program_id(2)
    rows = first_row + tl.arange(0, KIND.rows)
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, graphs, graph, KIND.features)
    key_ptr = of_head(key_ptr, entry, blocks, graphs, graph, KIND.features)
    stride = graphs * KIND.features
    query = load_rows(query_ptr, rows, stride, rows < size, KIND.features, KIND.vector)
    if key_scale_ptr is not None:
        key_scale_ptr = of_head(key_scale_ptr, entry, blocks, graphs, graph, 2)

    # A row of scores of 8 columns lies in 4 threads of 2 columns each, as tensor cores leave it.
    # Columns stand for keys in such an order that a thread's scores are those of neighbours.
    lanes = tl.arange(0, KIND.columns)
    within = lanes % (4 * KIND.group)
    order = lanes // (4 * KIND.group) * (4 * KIND.group)
    order += within % 8 // 2 * KIND.group + within // 8 * 2 + within % 2
    PLACES: tl.constexpr = 4 * KIND.columns // KIND.group
    places = tl.arange(0, PLACES)

    slots = tl.arange(0, KIND.kept)
    best = tl.full((KIND.rows, KIND.kept), NEVER, tl.float32)
    kept = -1 - slots[None, :] + tl.full((KIND.rows, KIND.kept), 0, tl.int32)
    worst = tl.full((KIND.rows,), NEVER, tl.float32)
    high = blocks
    if KIND.causal and first_ptr is None:
        high = tl.minimum(tl.maximum(first_row + KIND.rows - KIND.window, 0), blocks)
    queries = (query, rows, labels, first_row)
    table = (key_ptr, key_scale_ptr, first_ptr, last_ptr, label_ptr, order, size, blocks)
    key = _load_keys(key_ptr, order, blocks, stride, KIND)
    for column in range(0, high, 4 * KIND.columns):
        # Four tiles of keys before their best groups are looked at.
        a, key = _score_groups(queries, key, table, column, entry, graphs, KIND)
        b, key = _score_groups(queries, key, table, column + KIND.columns, entry, graphs, KIND)
        c, key = _score_groups(queries, key, table, column + 2 * KIND.columns, entry, graphs, KIND)
        d, key = _score_groups(queries, key, table, column + 3 * KIND.columns, entry, graphs, KIND)
        scores = tl.join(tl.join(a, b), tl.join(c, d))  # (rows, places of a tile, 2, 2)
        scores = tl.reshape(tl.permute(scores, (0, 3, 2, 1)), (KIND.rows, PLACES))
        first_group = column // KIND.group
        largest = tl.max(scores, 1)
        # Some row takes a group almost always: the first one goes without asking.
        best, kept, worst, scores = _insert(
            best, kept, worst, scores, largest, places, first_group, PLACES
        )
        largest = tl.max(scores, 1)
        while tl.max((largest > worst).to(tl.int32)) > 0:
            best, kept, worst, scores = _insert(
                best, kept, worst, scores, largest, places, first_group, PLACES
            )
            largest = tl.max(scores, 1)
    # Groups by their place, so that equal scores meet the lower block first.
    group_ptr += ((entry.to(tl.int64) * graphs + graph) * size + rows)[:, None] * KIND.kept
    tl.store(group_ptr + slots[None, :], tl.where(kept < 0, -1, kept), mask=(rows < size)[:, None])


@triton.jit
def _choose(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    first_ptr,
    last_ptr,
    label_ptr,
    group_ptr,
    chosen_ptr,
    size,
    blocks,
    graphs,
    KIND: tl.constexpr,
):
    graph, entry = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * KIND.rows + tl.arange(0, KIND.rows)
    inside = rows < size
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, graphs, graph, KIND.features)
    key_ptr = of_head(key_ptr, entry, blocks, graphs, graph, KIND.features)
    stride = graphs * KIND.features
    query = load_rows(query_ptr, rows, stride, inside, KIND.features, KIND.vector).to(tl.float32)
    if key_scale_ptr is not None:
        key_scale_ptr = of_head(key_scale_ptr, entry, blocks, graphs, graph, 2)
    features = tl.arange(0, KIND.vector)
    begin = (entry.to(tl.int64) * graphs + graph) * size + rows
    members = tl.arange(0, KIND.group)
    scores = tl.full((KIND.rows, KIND.kept, KIND.group), NEVER, tl.float32)
    columns = tl.full((KIND.rows, KIND.kept, KIND.group), _NO_BLOCK, tl.int32)
    for slot in range(KIND.kept):
        group = tl.load(group_ptr + begin * KIND.kept + slot, mask=inside, other=-1)
        column = group[:, None] * KIND.group + members[None, :]  # (rows, group)
        first, last, others = _load_blocks(
            first_ptr, last_ptr, label_ptr, entry, column, size, blocks
        )
        candidate = _candidates(rows[:, None], labels[:, None], first, last, others, KIND)
        pointers = key_ptr + column.to(tl.int64)[:, :, None] * stride + features[None, None, :]
        mask = candidate[:, :, None] & (features < KIND.features)[None, None, :]
        key = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(key * query[:, None, :], 2)
        if key_scale_ptr is not None:
            score *= tl.load(key_scale_ptr + column * graphs * 2, mask=candidate, other=0.0)
        here = (tl.arange(0, KIND.kept) == slot)[None, :, None]
        scores = tl.where(here, tl.where(candidate, score, NEVER)[:, None, :], scores)
        columns = tl.where(here, tl.where(candidate, column, _NO_BLOCK)[:, None, :], columns)
    scores = tl.reshape(scores, (KIND.rows, KIND.kept * KIND.group))
    columns = tl.reshape(columns, (KIND.rows, KIND.kept * KIND.group))
    for slot in range(KIND.slots):
        largest = tl.max(scores, 1)
        block = tl.min(tl.where(scores == largest[:, None], columns, _NO_BLOCK), 1)
        found = tl.where(block < _NO_BLOCK, block, -1)
        tl.store(chosen_ptr + begin * KIND.slots + slot, found, mask=inside)
        taken = columns == block[:, None]
        scores = tl.where(taken, NEVER, scores)
        columns = tl.where(taken, _NO_BLOCK, columns)
