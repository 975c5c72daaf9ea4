"""Selection: each query's best key blocks, exact, without storing scores.

A program holds a tile of queries and streams tiles of block means past it. Of each row it keeps the
best scores with their blocks; a tile is searched only as long as some row's largest score exceeds
the worst that this row keeps.
"""

import torch
import triton
import triton.language as tl

from keras_rwr._tokens import PADDING
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import load_rows

# Queries and blocks in a tile.
_ROWS, _COLUMNS, _WARPS = 64, 64, 4
# Three products of tensor cores, as exact as float32; AMD has none such.
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_NO_SCORE = tl.constexpr(-1e30)
_NO_BLOCK = tl.constexpr(2**30)
_PADDING = tl.constexpr(PADDING)


@torch.compiler.disable
def best_blocks(query, means, first, last, tokens, options):
    """See `keras_rwr._select.best_blocks`."""
    batch, graphs, size, features = query.shape
    blocks, labels, slots = means.shape[2], tokens.labels, options.slots
    chosen = torch.empty((batch, graphs, size, slots), dtype=torch.int32, device=query.device)
    kept = max(triton.next_power_of_2(slots), 2)
    rows = _ROWS if kept <= 16 else 32
    run(
        _best_blocks,
        (triton.cdiv(size, rows), batch * graphs),
        query.contiguous(),
        means.contiguous(),
        first.contiguous(),
        last.contiguous(),
        labels.contiguous(),
        chosen,
        size,
        blocks,
        graphs,
        blocks if first.shape[0] > 1 else 0,
        size if labels.shape[0] > 1 else 0,
        WINDOW=options.window,
        CAUSAL=tokens.is_causal,
        SEGMENTS=tokens.has_segments,
        SLOTS=slots,
        KEPT=kept,
        FEATURES=features,
        VECTOR=max(triton.next_power_of_2(features), 16),
        ROWS=rows,
        COLUMNS=_COLUMNS,
        PRECISION=_PRECISION,
        num_warps=_WARPS,
    )
    return chosen


@triton.jit
def _best_blocks(
    query_ptr,
    mean_ptr,
    first_ptr,
    last_ptr,
    label_ptr,
    chosen_ptr,
    size,
    blocks,
    graphs,
    block_stride,
    label_stride,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    graph = tl.program_id(1)
    entry = graph // graphs
    # The last queries have the most keys before them: they begin first.
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    query_ptr += graph.to(tl.int64) * size * FEATURES
    mean_ptr += graph.to(tl.int64) * blocks * FEATURES
    query = load_rows(query_ptr, rows, FEATURES, inside, FEATURES, VECTOR)
    label = tl.load(label_ptr + entry * label_stride + rows, mask=inside, other=_PADDING)

    slots = tl.arange(0, KEPT)
    # Places beyond the slots hold what nothing exceeds.
    best = tl.where(slots < SLOTS, _NO_SCORE, -_NO_SCORE)[None, :] + tl.zeros(
        (ROWS, KEPT), tl.float32
    )
    chosen = -1 - slots[None, :] + tl.zeros((ROWS, KEPT), tl.int32)
    worst = tl.full((ROWS,), _NO_SCORE, tl.float32)
    for column in range(0, blocks, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        present = columns < blocks
        first = tl.load(first_ptr + entry * block_stride + columns, mask=present, other=_NO_BLOCK)
        candidate = first[None, :] < rows[:, None] - WINDOW
        if not CAUSAL:
            last = tl.load(
                last_ptr + entry * block_stride + columns, mask=present, other=-_NO_BLOCK
            )
            candidate = candidate | (last[None, :] > rows[:, None] + WINDOW)
        if SEGMENTS:
            other = tl.load(
                label_ptr + entry * label_stride + columns, mask=present, other=_PADDING
            )
            candidate = candidate & (label[:, None] == other[None, :])
        candidate = candidate & (label != _PADDING)[:, None]
        if tl.max(candidate.to(tl.int32)) > 0:
            mean = load_rows(mean_ptr, columns, FEATURES, present, FEATURES, VECTOR)
            scores = tl.dot(query, tl.trans(mean), input_precision=PRECISION)
            scores = tl.where(candidate, scores, _NO_SCORE)
            largest = tl.max(scores, 1)
            while tl.max((largest > worst).to(tl.int32)) > 0:
                block = tl.min(tl.where(scores == largest[:, None], columns[None, :], _NO_BLOCK), 1)
                # Of the worst that a row keeps, the last block goes.
                is_worst = best == worst[:, None]
                place = tl.max(tl.where(is_worst, chosen, -_NO_BLOCK), 1)
                enters = is_worst & (chosen == place[:, None]) & (largest > worst)[:, None]
                best = tl.where(enters, largest[:, None], best)
                chosen = tl.where(enters, block[:, None], chosen)
                worst = tl.min(best, 1)
                scores = tl.where(columns[None, :] == block[:, None], _NO_SCORE, scores)
                largest = tl.max(scores, 1)

    best = tl.where((slots < SLOTS)[None, :], best, _NO_SCORE)
    chosen_ptr += (graph.to(tl.int64) * size + rows) * SLOTS
    for slot in range(SLOTS):
        largest = tl.max(best, 1)
        block = tl.min(
            tl.where(best == largest[:, None], tl.where(chosen < 0, _NO_BLOCK, chosen), _NO_BLOCK),
            1,
        )
        found = block < _NO_BLOCK
        tl.store(chosen_ptr + slot, tl.where(found, block, -1), mask=inside)
        best = tl.where(chosen == block[:, None], _NO_SCORE, best)
        chosen = tl.where(chosen == block[:, None], -1, chosen)
