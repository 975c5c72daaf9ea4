"""The forward pass along the band: LOCAL with the first step of the walk, and further steps.

A step of the walk multiplies a state, one vector of features a token, with the transition matrix P
or its transpose. Local edges are a band around the diagonal, stored by rows, see `locate_in_band`:
it holds `S_ij g_j`, which is divided by the degree in each step.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.tiles import (
    LOG2E,
    NEVER,
    head_offset,
    keep_pairs,
    load_numbers,
    load_rows,
    locate_in_band,
    store_numbers,
    store_rows,
    weigh,
    within_window,
)


@triton.jit
def add_far(
    total,
    spread_ptr,
    neighbors_ptr,
    collected_ptr,
    head,
    size,
    rows,
    inside,
    features,
    SLOTS: tl.constexpr,
    STATE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
):
    """Adds what `spread` and `collect` wrote for a tile of rows."""
    if spread_ptr is not None:
        for slot in range(SLOTS):
            entry = (head.to(tl.int64) * size + rows) * SLOTS + slot
            chosen = tl.load(neighbors_ptr + entry, mask=inside, other=-1) >= 0
            part = load_rows(spread_ptr, entry, STATE_SIZE, chosen, STATE_SIZE, STATE, features)
            total += part.to(tl.float32)
    if collected_ptr is not None:
        collected_ptr += head.to(tl.int64) * size * STATE_SIZE
        part = load_rows(collected_ptr, rows, STATE_SIZE, inside, STATE_SIZE, STATE, features)
        total += part.to(tl.float32)
    return total


@triton.jit
def attend_locally(
    query_ptr,
    key_ptr,
    value_ptr,
    query_scale_ptr,
    key_scale_ptr,
    bias_ptr,
    sharpness_ptr,
    seed_ptr,
    neighbors_ptr,
    sums_ptr,
    back_sums_ptr,
    spread_ptr,
    collected_ptr,
    output_ptr,
    band_ptr,
    lse_ptr,
    share_ptr,
    next_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    value_batch,
    value_row,
    value_head,
    output_batch,
    output_row,
    output_head,
    next_head,
    size,
    heads,
    batch_heads,
    logit_scale,
    keep_walking,
    kept_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BREADTH: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    REVERSIBLE: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """LOCAL with online softmax, weights and degrees, and with `next_ptr` the walk's first step."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    first_row = tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    query_scale = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0)
    real = inside
    if PADDED:
        real = query_scale > 0
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    value_ptr += head_offset(head, heads, value_batch, value_head)
    query = load_rows(query_ptr, rows, query_row, real, HEAD_SIZE, HEAD)
    if REVERSIBLE:
        own_key = load_rows(key_ptr, rows, key_row, real, HEAD_SIZE, HEAD)
        own_key_scale = load_numbers(key_scale_ptr, head, size, rows, inside, -1.0)
    sharpness = tl.load(sharpness_ptr + head % heads)

    peak = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    local = tl.zeros((ROWS, VALUE), tl.float32)
    degree = tl.zeros((ROWS,), tl.float32)
    walked = tl.zeros((ROWS, VALUE), tl.float32)
    low = tl.maximum(first_row - WINDOW, 0) // COLUMNS * COLUMNS
    high = tl.minimum(first_row + ROWS + (0 if CAUSAL else WINDOW), size)
    for column in tl.range(low, high, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        present = columns < size
        key_scale = load_numbers(key_scale_ptr, head, size, columns, present, -1.0)
        if PADDED:
            present = key_scale > 0
        key = load_rows(key_ptr, columns, key_row, present, HEAD_SIZE, HEAD)
        value = load_rows(value_ptr, columns, value_row, present, VALUE_SIZE, VALUE)
        near = within_window(rows, columns, WINDOW, True, not CAUSAL) & present[None, :]
        if PADDED:
            near = near & real[:, None]
        product = tl.dot(query, tl.trans(key), input_precision="ieee")

        weight = weigh(
            product * query_scale[:, None] * key_scale[None, :], sharpness, CUT, EXPONENTIAL
        )
        if REVERSIBLE:
            other = load_rows(query_ptr, columns, query_row, present, HEAD_SIZE, HEAD)
            other_scale = load_numbers(query_scale_ptr, head, size, columns, present, -1.0)
            cosine = tl.dot(own_key, tl.trans(other), input_precision="ieee")
            cosine = cosine * own_key_scale[:, None] * other_scale[None, :]
            weight = 0.5 * (weight + weigh(cosine, sharpness, CUT, EXPONENTIAL))
        weight = tl.where(near, weight, 0.0)
        logits = product * logit_scale
        if bias_ptr is not None:
            bias = load_numbers(bias_ptr, head, size, columns, present, 0.0) * LOG2E
            logits += bias[None, :]
            weight *= tl.exp2(bias)[None, :]
        degree += tl.sum(weight, 1)
        if band_ptr is not None:
            pointers, held = locate_in_band(
                band_ptr, head, size, rows[:, None], columns[None, :], WINDOW, BREADTH
            )
            tl.store(pointers, weight.to(band_ptr.dtype.element_ty), mask=held)
        if next_ptr is not None:
            walked = tl.dot(weight.to(value.dtype), value, walked, input_precision="ieee")

        logits = tl.where(near, logits, NEVER)
        highest = tl.maximum(peak, tl.max(logits, 1))
        correction = tl.exp2(peak - highest)
        probability = tl.where(near, tl.exp2(logits - highest[:, None]), 0.0)
        total = total * correction + tl.sum(probability, 1)
        if DROPPED > 0:
            keep = keep_pairs(seed_ptr, head, heads, rows[:, None], columns[None, :], DROPPED)
            probability = tl.where(keep, probability * kept_scale, 0.0)
        local = tl.dot(
            probability.to(value.dtype),
            value,
            local * correction[:, None],
            input_precision="ieee",
        )
        peak = highest

    some = total > 0
    local = tl.where(some[:, None], local / tl.where(some, total, 1.0)[:, None], 0.0)
    output_ptr += head_offset(head, heads, output_batch, output_head)
    store_rows(output_ptr, rows, output_row, inside, local, VALUE_SIZE, VALUE)
    lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), 0.0)
    store_numbers(lse_ptr, head, size, rows, inside, lse)

    if sums_ptr is not None:
        for slot in range(SLOTS):
            entry = (head.to(tl.int64) * size + rows) * SLOTS + slot
            chosen = tl.load(neighbors_ptr + entry, mask=inside, other=-1) >= 0
            degree += tl.load(sums_ptr + entry, mask=chosen, other=0.0)
    if back_sums_ptr is not None:
        degree += load_numbers(back_sums_ptr, head, size, rows, inside, 0.0)
    ISOLATED: tl.constexpr = 0.0 if EXPONENTIAL else 1e-6
    linked = degree > ISOLATED
    share = tl.where(linked, 1.0 / tl.where(linked, degree, 1.0), 0.0)
    store_numbers(share_ptr, head, size, rows, inside, share)

    if next_ptr is not None:
        walked = add_far(
            walked,
            spread_ptr,
            neighbors_ptr,
            collected_ptr,
            head,
            size,
            rows,
            inside,
            0,
            SLOTS,
            VALUE,
            VALUE_SIZE,
        )
        start = load_rows(value_ptr, rows, value_row, real, VALUE_SIZE, VALUE).to(tl.float32)
        walked = tl.where(linked[:, None], walked * share[:, None], start)
        next_ptr += head.to(tl.int64) * next_head
        store_rows(
            next_ptr, rows, VALUE_SIZE, inside, start + keep_walking * walked, VALUE_SIZE, VALUE
        )


@triton.jit
def step_along_band(
    band_ptr,
    query_scale_ptr,
    share_ptr,
    lens_ptr,
    state_ptr,
    start_ptr,
    spread_ptr,
    neighbors_ptr,
    collected_ptr,
    next_ptr,
    output_ptr,
    state_batch,
    state_row,
    state_head,
    start_batch,
    start_row,
    start_head,
    output_batch,
    output_row,
    output_head,
    next_head,
    size,
    heads,
    batch_heads,
    keep_walking,
    restart,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BREADTH: tl.constexpr,
    STAGES: tl.constexpr,
    STATE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    AHEAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """`start + (1 - alpha) P state`, or with the transpose of P.

    `start` may be left out. With `output_ptr`, which holds LOCAL, the walk ends here: gamma alpha
    times the new state is added to it. Edges lead at most AHEAD tokens ahead.
    """
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    features = tl.program_id(1) * STATE
    first_row = tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    real = inside
    if PADDED:
        real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    share = load_numbers(share_ptr, head, size, rows, inside, 1.0)
    state_ptr += head_offset(head, heads, state_batch, state_head)
    # Weights that only float32 holds become half precision as parts of P, which is at most 1.
    WIDE: tl.constexpr = band_ptr.dtype.element_ty == tl.float32

    total = tl.zeros((ROWS, STATE), tl.float32)
    low = tl.maximum(first_row - (AHEAD if TRANSPOSED else WINDOW), 0) // COLUMNS * COLUMNS
    high = tl.minimum(first_row + ROWS + (WINDOW if TRANSPOSED else AHEAD), size)
    for column in tl.range(low, high, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        present = columns < size
        state = load_rows(state_ptr, columns, state_row, present, STATE_SIZE, STATE, features)
        if TRANSPOSED:
            pointers, held = locate_in_band(
                band_ptr, head, size, columns[None, :], rows[:, None], WINDOW, BREADTH
            )
            weight = tl.load(pointers, mask=held, other=0.0)
            scale = load_numbers(share_ptr, head, size, columns, present, 0.0)
            weight = weight.to(tl.float32) * scale[None, :]
        else:
            pointers, held = locate_in_band(
                band_ptr, head, size, rows[:, None], columns[None, :], WINDOW, BREADTH
            )
            weight = tl.load(pointers, mask=held & present[None, :], other=0.0)
            if WIDE:
                weight *= share[:, None]
        total = tl.dot(weight.to(state.dtype), state, total, input_precision="ieee")
    if not (WIDE or TRANSPOSED):
        total *= share[:, None]

    total = add_far(
        total,
        spread_ptr,
        neighbors_ptr,
        collected_ptr,
        head,
        size,
        rows,
        inside,
        features,
        SLOTS,
        STATE,
        STATE_SIZE,
    )
    isolated = (share == 0.0) & real
    if tl.sum(isolated.to(tl.int32), 0) > 0:
        own = load_rows(state_ptr, rows, state_row, isolated, STATE_SIZE, STATE, features)
        total += own.to(tl.float32)
    total *= keep_walking
    if start_ptr is not None:
        start_ptr += head_offset(head, heads, start_batch, start_head)
        start = load_rows(start_ptr, rows, start_row, real, STATE_SIZE, STATE, features)
        total += start.to(tl.float32)
    if next_ptr is not None:
        next_ptr += head.to(tl.int64) * next_head
        store_rows(next_ptr, rows, STATE_SIZE, inside, total, STATE_SIZE, STATE, features)
    if output_ptr is not None:
        output_ptr += head_offset(head, heads, output_batch, output_head)
        local = load_rows(output_ptr, rows, output_row, inside, STATE_SIZE, STATE, features)
        lens = tl.load(lens_ptr + head % heads) * restart
        result = local.to(tl.float32) + lens * total
        store_rows(output_ptr, rows, output_row, inside, result, STATE_SIZE, STATE, features)
