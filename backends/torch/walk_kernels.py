"""The forward pass: LOCAL with the first step of the walk, further steps, far edges.

A step of the walk multiplies a state, one vector of features a token, with the transition matrix P
or its transpose. Weights are kept as `S_ij` for far edges and `S_ij g_j` for local ones, and
divided by the degree in each step.

Local edges are a band around the diagonal, stored by tile of rows: ROWS x SPAN weights, with the
columns from `first row - WINDOW` on. Far edges are listed by key block: `entries[starts[J]:starts[J
+ 1]]` are the entries `(head * S + query) * slots + slot` of the queries that chose block J, and
`weights` holds the weights of an entry with the keys of its block.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.tiles import (
    LOG2E,
    NEVER,
    head_offset,
    keep_pairs,
    load_gain,
    load_numbers,
    load_rows,
    load_transposed_band,
    outside_window,
    row_pointers,
    store_numbers,
    store_rows,
    weigh,
    within_window,
)


@triton.jit
def measure_scales(
    x_ptr,
    mask_ptr,
    scale_ptr,
    x_batch,
    x_row,
    x_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """`1 / max(|x|, 1e-6)` of each token, -1 at padding."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    x_ptr += head_offset(head, heads, x_batch, x_head)
    x = load_rows(x_ptr, rows, x_row, inside, HEAD_SIZE, HEAD).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), 1e-12))
    if mask_ptr is not None:
        real = tl.load(mask_ptr + (head // heads).to(tl.int64) * size + rows, inside, other=0)
        scale = tl.where(real != 0, scale, -1.0)
    store_numbers(scale_ptr, head, size, rows, inside, scale)


@triton.jit
def weigh_far_edges(
    query_ptr,
    key_ptr,
    query_scale_ptr,
    key_scale_ptr,
    bias_ptr,
    sharpness_ptr,
    entries_ptr,
    starts_ptr,
    weights_ptr,
    sums_ptr,
    back_sums_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    size,
    heads,
    blocks,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    REVERSIBLE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Weights of the far edges to one key block, their sum for each entry, and for each key."""
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    begin = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    lane = tl.arange(0, KEYS)
    keys = block * WIDTH + lane
    inside = (lane < WIDTH) & (keys < size)
    key_scale = load_numbers(key_scale_ptr, head, size, keys, inside, -1.0)
    real = inside
    if PADDED:
        real = key_scale > 0
    key_ptr += head_offset(head, heads, key_batch, key_head)
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key = load_rows(key_ptr, keys, key_row, real, HEAD_SIZE, HEAD)
    sharpness = tl.load(sharpness_ptr + head % heads)
    back_sums = tl.zeros((KEYS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        listed = first + tl.arange(0, ENTRIES) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0).to(tl.int64)
        queries = (entry // SLOTS - head.to(tl.int64) * size).to(tl.int32)
        query = load_rows(query_ptr, queries, query_row, listed, HEAD_SIZE, HEAD)
        query_scale = load_numbers(query_scale_ptr, head, size, queries, listed, 0.0)
        cosine = tl.dot(query, tl.trans(key), input_precision="ieee")
        cosine = cosine * query_scale[:, None] * key_scale[None, :]
        linked = outside_window(queries, keys, WINDOW, CAUSAL) & listed[:, None] & real[None, :]
        weight = tl.where(linked, weigh(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
        if REVERSIBLE:
            weight = 0.5 * weight
        store_rows(weights_ptr, entry, WIDTH, listed, weight, WIDTH, KEYS)
        if back_sums_ptr is not None:
            if bias_ptr is not None:
                gain = load_gain(bias_ptr, head, size, queries, listed)
                back_sums += tl.sum(weight * gain[:, None], 0)
            else:
                back_sums += tl.sum(weight, 0)
        if bias_ptr is not None:
            weight = weight * load_gain(bias_ptr, head, size, keys, inside)[None, :]
        tl.store(sums_ptr + entry, tl.sum(weight, 1), mask=listed)
    if back_sums_ptr is not None:
        store_numbers(back_sums_ptr, head, size, keys, inside, back_sums)


@triton.jit
def spread(
    state_ptr,
    weights_ptr,
    entries_ptr,
    starts_ptr,
    entry_scale_ptr,
    key_scale_ptr,
    output_ptr,
    state_batch,
    state_row,
    state_head,
    size,
    heads,
    blocks,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STATE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
):
    """From keys to entries: `sum_j weight_ej state_j` over the keys j of the entry's block.

    The weight is multiplied with `entry_scale` of the entry's query and with `key_scale` of the
    key, where they are given.
    """
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    features = tl.program_id(1) * STATE
    begin = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    lane = tl.arange(0, KEYS)
    keys = block * WIDTH + lane
    inside = (lane < WIDTH) & (keys < size)
    if begin < end:
        state_ptr += head_offset(head, heads, state_batch, state_head)
        state = load_rows(state_ptr, keys, state_row, inside, STATE_SIZE, STATE, features)
        for first in range(begin, end, ENTRIES):
            listed = first + tl.arange(0, ENTRIES) < end
            entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0)
            entry = entry.to(tl.int64)
            weight = load_rows(weights_ptr, entry, WIDTH, listed, WIDTH, KEYS)
            if entry_scale_ptr is not None:
                queries = entry // SLOTS
                scale = tl.load(entry_scale_ptr + queries, mask=listed, other=0.0)
                weight = weight.to(tl.float32) * scale[:, None]
            if key_scale_ptr is not None:
                scale = load_numbers(key_scale_ptr, head, size, keys, inside, 0.0)
                weight = weight.to(tl.float32) * scale[None, :]
            product = tl.dot(weight.to(state.dtype), state, input_precision="ieee")
            store_rows(output_ptr, entry, STATE_SIZE, listed, product, STATE_SIZE, STATE, features)


@triton.jit
def collect(
    state_ptr,
    weights_ptr,
    entries_ptr,
    starts_ptr,
    entry_scale_ptr,
    key_scale_ptr,
    output_ptr,
    state_batch,
    state_row,
    state_head,
    size,
    heads,
    blocks,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STATE: tl.constexpr,
    STATE_SIZE: tl.constexpr,
):
    """From entries to keys: `sum_e weight_ej state_i(e)` over the entries that chose j's block."""
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    features = tl.program_id(1) * STATE
    begin = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    lane = tl.arange(0, KEYS)
    keys = block * WIDTH + lane
    inside = (lane < WIDTH) & (keys < size)
    state_ptr += head_offset(head, heads, state_batch, state_head)
    total = tl.zeros((KEYS, STATE), tl.float32)
    for first in range(begin, end, ENTRIES):
        listed = first + tl.arange(0, ENTRIES) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0).to(tl.int64)
        queries = entry // SLOTS
        weight = load_rows(weights_ptr, entry, WIDTH, listed, WIDTH, KEYS)
        if entry_scale_ptr is not None:
            scale = tl.load(entry_scale_ptr + queries, mask=listed, other=0.0)
            weight = weight.to(tl.float32) * scale[:, None]
        if key_scale_ptr is not None:
            scale = load_numbers(key_scale_ptr, head, size, keys, inside, 0.0)
            weight = weight.to(tl.float32) * scale[None, :]
        rows = queries - head.to(tl.int64) * size
        state = load_rows(state_ptr, rows, state_row, listed, STATE_SIZE, STATE, features)
        weight = tl.trans(weight.to(state.dtype))
        total = tl.dot(weight, state, total, input_precision="ieee")
    output_ptr += head.to(tl.int64) * size * STATE_SIZE
    store_rows(output_ptr, keys, STATE_SIZE, inside, total, STATE_SIZE, STATE, features)


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
    size,
    heads,
    batch_heads,
    tiles,
    logit_scale,
    keep_walking,
    kept_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
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
    if band_ptr is not None:
        band_ptr += (head.to(tl.int64) * tiles + tile) * ROWS * SPAN
    skipped = tl.maximum(WINDOW - first_row, 0) // COLUMNS * COLUMNS
    for column in tl.range(skipped, SPAN, COLUMNS, num_stages=STAGES):
        columns = first_row - WINDOW + column + tl.arange(0, COLUMNS)
        present = (columns >= 0) & (columns < size)
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
            lanes = tl.arange(0, ROWS)
            store_rows(band_ptr, lanes, SPAN, lanes >= 0, weight, SPAN, COLUMNS, column)
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
        next_ptr += head.to(tl.int64) * size * VALUE_SIZE
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
    size,
    heads,
    batch_heads,
    tiles,
    keep_walking,
    restart,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
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
    band_ptr += head.to(tl.int64) * tiles * ROWS * SPAN
    if TRANSPOSED:
        low = tl.maximum(first_row - AHEAD, 0) // ROWS
        high = tl.minimum((first_row + ROWS - 1 + WINDOW) // ROWS + 1, tiles)
        for other in tl.range(low, high, num_stages=STAGES):
            columns = other * ROWS + tl.arange(0, ROWS)
            present = columns < size
            state = load_rows(state_ptr, columns, state_row, present, STATE_SIZE, STATE, features)
            weight = load_transposed_band(band_ptr, other, rows, ROWS, SPAN, WINDOW)
            scale = load_numbers(share_ptr, head, size, columns, present, 0.0)
            weight = weight.to(tl.float32) * scale[None, :]
            total = tl.dot(weight.to(state.dtype), state, total, input_precision="ieee")
    else:
        band_ptr += tile.to(tl.int64) * ROWS * SPAN
        skipped = tl.maximum(WINDOW - first_row, 0) // COLUMNS * COLUMNS
        for column in tl.range(skipped, SPAN, COLUMNS, num_stages=STAGES):
            columns = first_row - WINDOW + column + tl.arange(0, COLUMNS)
            present = (columns >= 0) & (columns < size)
            state = load_rows(state_ptr, columns, state_row, present, STATE_SIZE, STATE, features)
            pointers = row_pointers(band_ptr, tl.arange(0, ROWS), SPAN, column, COLUMNS)
            weight = tl.load(pointers, mask=inside[:, None] & present[None, :], other=0.0)
            if WIDE:
                weight *= share[:, None]
            total = tl.dot(weight.to(state.dtype), state, total, input_precision="ieee")
        if not WIDE:
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
        next_ptr += head.to(tl.int64) * size * STATE_SIZE
        store_rows(next_ptr, rows, STATE_SIZE, inside, total, STATE_SIZE, STATE, features)
    if output_ptr is not None:
        output_ptr += head_offset(head, heads, output_batch, output_head)
        local = load_rows(output_ptr, rows, output_row, inside, STATE_SIZE, STATE, features)
        lens = tl.load(lens_ptr + head % heads) * restart
        result = local.to(tl.float32) + lens * total
        store_rows(output_ptr, rows, output_row, inside, result, STATE_SIZE, STATE, features)


@triton.jit
def start_reciprocal(
    value_ptr,
    query_scale_ptr,
    share_ptr,
    bias_ptr,
    start_ptr,
    value_batch,
    value_row,
    value_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):
    """What the reciprocal walk starts from, `[V, V / pi, 1 / pi]`; zeros at padding."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    value_ptr += head_offset(head, heads, value_batch, value_head)
    value = load_rows(value_ptr, rows, value_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    share = load_numbers(share_ptr, head, size, rows, inside, 0.0)
    inverse = tl.where(share > 0, share, 1.0)
    if bias_ptr is not None:
        inverse /= load_gain(bias_ptr, head, size, rows, inside)
    inverse = tl.where(real, inverse, 0.0).to(start_ptr.dtype.element_ty).to(tl.float32)
    WALKED: tl.constexpr = 2 * VALUE_SIZE + 1
    start_ptr += head.to(tl.int64) * size * WALKED
    store_rows(start_ptr, rows, WALKED, inside, value, VALUE_SIZE, VALUE)
    start_ptr += VALUE_SIZE
    store_rows(start_ptr, rows, WALKED, inside, value * inverse[:, None], VALUE_SIZE, VALUE)
    end_ptr = start_ptr + VALUE_SIZE + rows.to(tl.int64) * WALKED
    tl.store(end_ptr, inverse.to(start_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_walk(
    state_ptr,
    rows,
    state_row,
    real,
    forward_share,
    backward_share,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """RWR of the walk's last state, and for the reciprocal one its parts Z2 and Z3."""
    forward = load_rows(state_ptr, rows, state_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    if RECIPROCAL:
        numerator = load_rows(state_ptr + VALUE_SIZE, rows, state_row, real, VALUE_SIZE, VALUE)
        numerator = numerator.to(tl.float32)
        end_ptr = state_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * state_row
        denominator = tl.load(end_ptr, mask=real, other=1.0).to(tl.float32)
        walk = forward_share * forward + backward_share * numerator / denominator[:, None]
        return walk, numerator, denominator
    else:
        return forward_share * forward, forward, forward_share


@triton.jit
def combine(
    state_ptr,
    query_scale_ptr,
    lens_ptr,
    output_ptr,
    state_batch,
    state_row,
    state_head,
    output_batch,
    output_row,
    output_head,
    size,
    heads,
    batch_heads,
    forward_share,
    backward_share,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """Adds gamma RWR to LOCAL, where no step of the walk did so."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    state_ptr += head_offset(head, heads, state_batch, state_head)
    walk, _, _ = load_walk(
        state_ptr,
        rows,
        state_row,
        real,
        forward_share,
        backward_share,
        VALUE,
        VALUE_SIZE,
        RECIPROCAL,
    )
    output_ptr += head_offset(head, heads, output_batch, output_head)
    local = load_rows(output_ptr, rows, output_row, inside, VALUE_SIZE, VALUE).to(tl.float32)
    result = local + tl.load(lens_ptr + head % heads) * walk
    store_rows(output_ptr, rows, output_row, inside, result, VALUE_SIZE, VALUE)
