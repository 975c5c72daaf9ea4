"""Selection: each query's best key blocks, exact, without storing scores.

A first kernel streams tiles of key blocks past a tile of queries and keeps, for each query, the
groups of a few neighbouring blocks with the largest best scores: no block outside of them can be
among the query's best. A second one computes the scores of these groups again and takes the best.
"""

import torch
import triton
import triton.language as tl

from keras_rwr._select import block_ends, block_means, has_candidates
from keras_rwr.backends.torch.operators import define
from keras_rwr.backends.torch.plan import ceil_div, next_power_of_2
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import (
    NEVER,
    PADDING,
    load_labels,
    load_rows,
    of_head,
)
from keras_rwr.backends.torch.vectors import token_major

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
    key, scales, ends = graph_key.rows, graph_key.scales, (None, None)
    if options.neighbor_block > 1:
        dense, real = graph_key.dense(tokens).detach(), tokens.real.float()
        key = token_major(block_means(dense, real, options.neighbor_block))
        scales = None
        ends = block_ends(tokens, options.neighbor_block)
    return _select(
        graph_query.rows.detach(),
        graph_query.scales,
        key.detach(),
        scales,
        *ends,
        labels,
        options.slots,
        options.window,
        tokens.is_causal,
        tokens.has_segments,
    )


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
    constants = {
        "WINDOW": window,
        "CAUSAL": is_causal,
        "SEGMENTS": segments,
        "KEPT": kept,
        "GROUP": _GROUP,
        "FEATURES": features,
        "VECTOR": max(next_power_of_2(features), 16),
        "num_warps": _WARPS,
    }
    rows = _ROWS if kept <= 16 else 32
    run(
        _keep_groups,
        (ceil_div(size, rows), graphs, batch),
        *tensors,
        groups,
        *numbers,
        ROWS=rows,
        COLUMNS=_COLUMNS,
        PRECISION=_PRECISION,
        **constants,
    )
    rows = _CHOOSING_ROWS if kept <= 16 else 4
    run(
        _choose,
        (ceil_div(size, rows), graphs, batch),
        *tensors,
        groups,
        chosen,
        *numbers,
        SLOTS=slots,
        ROWS=rows,
        **constants,
    )
    return chosen


def _expand(x, batch):
    return None if x is None else x.expand(batch, *x.shape[1:]).contiguous()


_select = define(
    "select(Tensor query, Tensor query_scales, Tensor key, Tensor? key_scales, Tensor? first, "
    "Tensor? last, Tensor? labels, int slots, int window, bool is_causal, bool segments) -> Tensor",
    _run_select,
    lambda query, *others: query.new_empty(
        (query.shape[0], query.shape[2], query.shape[1], others[6]), dtype=torch.int32
    ),
)


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
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Blocks with a real token outside the window that a row may see; shapes broadcast."""
    candidate = first < rows - WINDOW
    if not CAUSAL:
        candidate = candidate | (last > rows + WINDOW)
    if SEGMENTS:
        candidate = candidate & (others == labels)
    return candidate & (others != PADDING) & (labels != PADDING)


@triton.jit
def _load_keys(key_ptr, columns, blocks, stride, FEATURES: tl.constexpr, VECTOR: tl.constexpr):
    """Rows of keys; behind the last block that one's, which is no candidate there."""
    columns = tl.minimum(columns, blocks - 1)
    return load_rows(key_ptr, columns, stride, columns >= 0, FEATURES, VECTOR)


@triton.jit
def _score_groups(
    queries,
    key,
    table,
    column,
    entry,
    graphs,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The best score of each group of a tile of keys, and the keys of the next tile.

    `queries` and `table` are what `_keep_groups` makes.
    """
    query, rows, labels, first_row = queries
    key_ptr, key_scale_ptr, first_ptr, last_ptr, label_ptr, order, size, blocks = table
    columns = column + order
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    # They are on their way while these are looked at.
    key = _load_keys(key_ptr, columns + COLUMNS, blocks, graphs * FEATURES, FEATURES, VECTOR)
    if key_scale_ptr is not None:
        places = tl.minimum(columns, blocks - 1)
        scores *= tl.load(key_scale_ptr + places * graphs * 2)[None, :]
    whole = CAUSAL and label_ptr is None and first_ptr is None
    if not (whole and column + COLUMNS <= first_row - WINDOW):
        first, last, others = _load_blocks(
            first_ptr, last_ptr, label_ptr, entry, columns, size, blocks
        )
        candidate = _candidates(
            rows[:, None],
            labels[:, None],
            first[None, :],
            last[None, :],
            others[None, :],
            WINDOW,
            CAUSAL,
            SEGMENTS,
        )
        scores = tl.where(candidate, scores, NEVER)
    SETS: tl.constexpr = COLUMNS // (4 * GROUP)
    scores = tl.reshape(scores, (ROWS, SETS, GROUP // 2, 4, 2))
    return tl.reshape(tl.max(tl.max(scores, 4), 2), (ROWS, COLUMNS // GROUP)), key


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
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last queries have the most keys before them: they begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    graph, entry = tl.program_id(1), tl.program_id(2)
    rows = first_row + tl.arange(0, ROWS)
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, graphs, graph, FEATURES)
    key_ptr = of_head(key_ptr, entry, blocks, graphs, graph, FEATURES)
    stride = graphs * FEATURES
    query = load_rows(query_ptr, rows, stride, rows < size, FEATURES, VECTOR)
    if key_scale_ptr is not None:
        key_scale_ptr = of_head(key_scale_ptr, entry, blocks, graphs, graph, 2)

    # A row of scores of 8 columns lies in 4 threads of 2 columns each, as tensor cores leave it.
    # Columns stand for keys in such an order that a thread's scores are those of neighbours.
    lanes = tl.arange(0, COLUMNS)
    within = lanes % (4 * GROUP)
    order = lanes // (4 * GROUP) * (4 * GROUP)
    order += within % 8 // 2 * GROUP + within // 8 * 2 + within % 2
    PLACES: tl.constexpr = 4 * COLUMNS // GROUP
    places = tl.arange(0, PLACES)

    slots = tl.arange(0, KEPT)
    best = tl.full((ROWS, KEPT), NEVER, tl.float32)
    kept = -1 - slots[None, :] + tl.zeros((ROWS, KEPT), tl.int32)
    worst = tl.full((ROWS,), NEVER, tl.float32)
    high = blocks
    if CAUSAL and first_ptr is None:
        high = tl.minimum(tl.maximum(first_row + ROWS - WINDOW, 0), blocks)
    queries = (query, rows, labels, first_row)
    table = (key_ptr, key_scale_ptr, first_ptr, last_ptr, label_ptr, order, size, blocks)
    key = _load_keys(key_ptr, order, blocks, stride, FEATURES, VECTOR)
    for column in range(0, high, 4 * COLUMNS):
        # Four tiles of keys before their best groups are looked at.
        a, key = _score_groups(
            queries,
            key,
            table,
            column,
            entry,
            graphs,
            WINDOW,
            CAUSAL,
            SEGMENTS,
            GROUP,
            FEATURES,
            VECTOR,
            ROWS,
            COLUMNS,
            PRECISION,
        )
        b, key = _score_groups(
            queries,
            key,
            table,
            column + COLUMNS,
            entry,
            graphs,
            WINDOW,
            CAUSAL,
            SEGMENTS,
            GROUP,
            FEATURES,
            VECTOR,
            ROWS,
            COLUMNS,
            PRECISION,
        )
        c, key = _score_groups(
            queries,
            key,
            table,
            column + 2 * COLUMNS,
            entry,
            graphs,
            WINDOW,
            CAUSAL,
            SEGMENTS,
            GROUP,
            FEATURES,
            VECTOR,
            ROWS,
            COLUMNS,
            PRECISION,
        )
        d, key = _score_groups(
            queries,
            key,
            table,
            column + 3 * COLUMNS,
            entry,
            graphs,
            WINDOW,
            CAUSAL,
            SEGMENTS,
            GROUP,
            FEATURES,
            VECTOR,
            ROWS,
            COLUMNS,
            PRECISION,
        )
        scores = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS, places of a tile, 2, 2)
        scores = tl.reshape(tl.permute(scores, (0, 3, 2, 1)), (ROWS, PLACES))
        first_group = column // GROUP
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
    group_ptr += ((entry.to(tl.int64) * graphs + graph) * size + rows)[:, None] * KEPT
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
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    graph, entry = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, graphs, graph, FEATURES)
    key_ptr = of_head(key_ptr, entry, blocks, graphs, graph, FEATURES)
    stride = graphs * FEATURES
    query = load_rows(query_ptr, rows, stride, inside, FEATURES, VECTOR).to(tl.float32)
    if key_scale_ptr is not None:
        key_scale_ptr = of_head(key_scale_ptr, entry, blocks, graphs, graph, 2)
    features = tl.arange(0, VECTOR)
    begin = (entry.to(tl.int64) * graphs + graph) * size + rows
    members = tl.arange(0, GROUP)
    scores = tl.full((ROWS, KEPT, GROUP), NEVER, tl.float32)
    columns = tl.full((ROWS, KEPT, GROUP), _NO_BLOCK, tl.int32)
    for slot in range(KEPT):
        group = tl.load(group_ptr + begin * KEPT + slot, mask=inside, other=-1)
        column = group[:, None] * GROUP + members[None, :]  # (ROWS, GROUP)
        first, last, others = _load_blocks(
            first_ptr, last_ptr, label_ptr, entry, column, size, blocks
        )
        candidate = _candidates(
            rows[:, None],
            labels[:, None],
            first,
            last,
            others,
            WINDOW,
            CAUSAL,
            SEGMENTS,
        )
        pointers = key_ptr + column.to(tl.int64)[:, :, None] * stride + features[None, None, :]
        mask = candidate[:, :, None] & (features < FEATURES)[None, None, :]
        key = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(key * query[:, None, :], 2)
        if key_scale_ptr is not None:
            score *= tl.load(key_scale_ptr + column * graphs * 2, mask=candidate, other=0.0)
        here = (tl.arange(0, KEPT) == slot)[None, :, None]
        scores = tl.where(here, tl.where(candidate, score, NEVER)[:, None, :], scores)
        columns = tl.where(here, tl.where(candidate, column, _NO_BLOCK)[:, None, :], columns)
    scores = tl.reshape(scores, (ROWS, KEPT * GROUP))
    columns = tl.reshape(columns, (ROWS, KEPT * GROUP))
    for slot in range(SLOTS):
        largest = tl.max(scores, 1)
        block = tl.min(tl.where(scores == largest[:, None], columns, _NO_BLOCK), 1)
        found = tl.where(block < _NO_BLOCK, block, -1)
        tl.store(chosen_ptr + begin * SLOTS + slot, found, mask=inside)
        taken = columns == block[:, None]
        scores = tl.where(taken, NEVER, scores)
        columns = tl.where(taken, _NO_BLOCK, columns)
