"""The backward pass: where the adjoint walk starts and ends, and the gradients of the edges.

The adjoint walk `G^(m-1) = (1 - alpha) P^T G^m` itself runs on the kernels of the forward pass.
With its states and those of the walk, the gradient of an edge is one product of concatenated
factors, `dP_ij = (1 - alpha) sum_m G^m_i Z^(m-1)_j`, and is needed on edges only. What the band's
tiles hand from queries to keys, `edges`, is stored as the band itself is.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.tiles import (
    LOG2E,
    LONGEST_SCALE,
    head_offset,
    keep_pairs,
    load_gain,
    load_numbers,
    load_rows,
    load_transposed_band,
    outside_window,
    row_pointers,
    slope,
    store_numbers,
    store_rows,
    weigh,
    within_window,
)
from keras_rwr.backends.torch.walk_kernels import load_walk


@triton.jit
def start_adjoint(
    cotangent_ptr,
    output_ptr,
    state_ptr,
    query_scale_ptr,
    lens_ptr,
    adjoint_ptr,
    local_delta_ptr,
    lens_gradient_ptr,
    cotangent_batch,
    cotangent_row,
    cotangent_head,
    output_batch,
    output_row,
    output_head,
    state_batch,
    state_row,
    state_head,
    size,
    heads,
    batch_heads,
    forward_share,
    backward_share,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """`G^T`, `sum_f dO_if LOCAL_if` and `sum_f dO_if RWR_if` from the output's gradient dO."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    cotangent_ptr += head_offset(head, heads, cotangent_batch, cotangent_head)
    output_ptr += head_offset(head, heads, output_batch, output_head)
    state_ptr += head_offset(head, heads, state_batch, state_head)
    cotangent = load_rows(cotangent_ptr, rows, cotangent_row, real, VALUE_SIZE, VALUE)
    cotangent = cotangent.to(tl.float32)
    output = load_rows(output_ptr, rows, output_row, real, VALUE_SIZE, VALUE).to(tl.float32)
    walk, numerator, denominator = load_walk(
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
    lens = tl.load(lens_ptr + head % heads)
    lens_gradient = tl.sum(cotangent * walk, 1)
    local_delta = tl.sum(cotangent * output, 1) - lens * lens_gradient
    store_numbers(lens_gradient_ptr, head, size, rows, inside, lens_gradient)
    store_numbers(local_delta_ptr, head, size, rows, inside, local_delta)
    adjoint_ptr += head.to(tl.int64) * size * WALKED
    adjoint = lens * forward_share * cotangent
    store_rows(adjoint_ptr, rows, WALKED, inside, adjoint, VALUE_SIZE, VALUE)
    if RECIPROCAL:
        part = lens * backward_share * cotangent / denominator[:, None]
        adjoint_ptr += VALUE_SIZE
        store_rows(adjoint_ptr, rows, WALKED, inside, part, VALUE_SIZE, VALUE)
        last = -tl.sum(part * numerator, 1) / denominator
        end_ptr = adjoint_ptr + VALUE_SIZE + rows.to(tl.int64) * WALKED
        tl.store(end_ptr, last.to(adjoint_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_adjoint(
    adjoint_ptr,
    states_ptr,
    start_ptr,
    query_scale_ptr,
    value_gradient_ptr,
    delta_ptr,
    bias_gradient_ptr,
    start_batch,
    start_row,
    start_head,
    gradient_batch,
    gradient_row,
    gradient_head,
    size,
    heads,
    batch_heads,
    ROWS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    STEPS: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """The values' gradient through the walk, and delta, the sum of `P_ij dP_ij` over a row.

    For the reciprocal walk, which starts from `[V, V / pi, 1 / pi]`, delta is lessened and the
    bias gradient begins with the gradient of log pi.
    """
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < size
    real = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0) > 0
    start_ptr += head_offset(head, heads, start_batch, start_head)
    step_stride = tl.cast(batch_heads, tl.int64) * size * WALKED
    adjoint_ptr += head.to(tl.int64) * size * WALKED
    states_ptr += head.to(tl.int64) * size * WALKED
    delta = tl.zeros((ROWS,), tl.float32)
    log_stationary = tl.zeros((ROWS,), tl.float32)
    gradient = tl.zeros((ROWS, VALUE), tl.float32)
    PARTS: tl.constexpr = 2 if RECIPROCAL else 1
    for part in tl.static_range(PARTS):
        offset = part * VALUE_SIZE
        start = load_rows(start_ptr + offset, rows, start_row, real, VALUE_SIZE, VALUE)
        start = start.to(tl.float32)
        total = load_rows(adjoint_ptr + offset, rows, WALKED, real, VALUE_SIZE, VALUE).to(
            tl.float32
        )
        for step in range(1, STEPS + 1):
            adjoint = load_rows(
                adjoint_ptr + step * step_stride + offset, rows, WALKED, real, VALUE_SIZE, VALUE
            ).to(tl.float32)
            state = load_rows(
                states_ptr + (step - 1) * step_stride + offset,
                rows,
                WALKED,
                real,
                VALUE_SIZE,
                VALUE,
            ).to(tl.float32)
            total += adjoint
            delta += tl.sum(adjoint * (state - start), 1)
        if part == 0:
            gradient += total
        else:
            inverse_ptr = start_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * start_row
            inverse = tl.load(inverse_ptr, mask=real, other=0.0).to(tl.float32)
            gradient += total * inverse[:, None]
            log_stationary -= tl.sum(total * start, 1)
    if RECIPROCAL:
        end = 2 * VALUE_SIZE + rows.to(tl.int64) * WALKED
        start = tl.load(
            start_ptr + 2 * VALUE_SIZE + rows.to(tl.int64) * start_row, mask=real, other=0.0
        ).to(tl.float32)
        total = tl.load(adjoint_ptr + end, mask=real, other=0.0).to(tl.float32)
        for step in range(1, STEPS + 1):
            adjoint = tl.load(adjoint_ptr + step * step_stride + end, mask=real, other=0.0)
            state = tl.load(states_ptr + (step - 1) * step_stride + end, mask=real, other=0.0)
            total += adjoint.to(tl.float32)
            delta += adjoint.to(tl.float32) * (state.to(tl.float32) - start)
        log_stationary -= total * start
        delta -= log_stationary
        if bias_gradient_ptr is not None:
            store_numbers(bias_gradient_ptr, head, size, rows, inside, log_stationary)
    store_numbers(delta_ptr, head, size, rows, inside, delta)
    value_gradient_ptr += head_offset(head, heads, gradient_batch, gradient_head)
    store_rows(value_gradient_ptr, rows, gradient_row, inside, gradient, VALUE_SIZE, VALUE)


@triton.jit
def load_adjoints(
    adjoint_ptr,
    rows,
    inside,
    step_stride,
    first_step,
    features,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`[G^(m+1), G^(m+2), ...]` of some rows for a group of steps from m = first_step on."""
    column = tl.arange(0, GROUP * STATE)
    step, feature = first_step + column // STATE, features + column % STATE
    pointers = rows.to(tl.int64)[:, None] * WALKED + ((step + 1) * step_stride + feature)[None, :]
    wanted = (step < STEPS) & (feature < WALKED)
    return tl.load(adjoint_ptr + pointers, mask=inside[:, None] & wanted[None, :], other=0.0)


@triton.jit
def load_states(
    start_ptr,
    states_ptr,
    rows,
    inside,
    start_row,
    step_stride,
    first_step,
    features,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`[Z^m, Z^(m+1), ...]` of some rows; states_ptr is at Z^1, start_ptr at Z^0."""
    column = tl.arange(0, GROUP * STATE)
    step, feature = first_step + column // STATE, features + column % STATE
    rows = rows.to(tl.int64)[:, None]
    later = states_ptr + rows * WALKED + ((step - 1) * step_stride + feature)[None, :]
    pointers = tl.where(
        (step == 0)[None, :], start_ptr + rows * start_row + feature[None, :], later
    )
    wanted = (step < STEPS) & (feature < WALKED)
    return tl.load(pointers, mask=inside[:, None] & wanted[None, :], other=0.0)


@triton.jit
def edge_products(
    total,
    adjoint_ptr,
    adjoint_rows,
    adjoint_inside,
    start_ptr,
    states_ptr,
    state_rows,
    state_inside,
    start_row,
    step_stride,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Adds `sum_m G^m_i Z^(m-1)_j`."""
    for first_step in tl.static_range(0, STEPS, GROUP):
        for features in tl.static_range(0, WALKED, STATE):
            adjoints = load_adjoints(
                adjoint_ptr,
                adjoint_rows,
                adjoint_inside,
                step_stride,
                first_step,
                features,
                WALKED,
                STATE,
                STEPS,
                GROUP,
            )
            states = load_states(
                start_ptr,
                states_ptr,
                state_rows,
                state_inside,
                start_row,
                step_stride,
                first_step,
                features,
                WALKED,
                STATE,
                STEPS,
                GROUP,
            )
            total = tl.dot(adjoints, tl.trans(states), total, input_precision="ieee")
    return total


@triton.jit
def far_edge_gradients(
    query_ptr,
    key_ptr,
    query_scale_ptr,
    key_scale_ptr,
    share_ptr,
    bias_ptr,
    sharpness_ptr,
    entries_ptr,
    starts_ptr,
    adjoint_ptr,
    start_ptr,
    states_ptr,
    delta_ptr,
    entry_gradient_ptr,
    entry_radial_ptr,
    entry_bias_ptr,
    key_gradient_ptr,
    key_radial_ptr,
    key_bias_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    start_batch,
    start_row,
    start_head,
    size,
    heads,
    batch_heads,
    blocks,
    keep_walking,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    REVERSIBLE: tl.constexpr,
    PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Gradients of the far edges to one key block, for their queries by entry and for the keys.

    "Radial" is the sum of `dc_ij c_ij`, by which a vector's gradient along itself is taken away.
    """
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
    step_stride = tl.cast(batch_heads, tl.int64) * size * WALKED
    head_start = head.to(tl.int64) * size
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    start_ptr += head_offset(head, heads, start_batch, start_head)
    adjoint_ptr += head_start * WALKED
    states_ptr += head_start * WALKED
    key = load_rows(key_ptr, keys, key_row, real, HEAD_SIZE, HEAD)
    sharpness = tl.load(sharpness_ptr + head % heads)
    MUTUAL: tl.constexpr = REVERSIBLE and not CAUSAL
    key_gain = tl.full((KEYS,), 1.0, tl.float32)
    if bias_ptr is not None:
        key_gain = load_gain(bias_ptr, head, size, keys, inside)
    key_share = load_numbers(share_ptr, head, size, keys, inside, 0.0)
    key_delta = load_numbers(delta_ptr, head, size, keys, inside, 0.0)

    key_gradient = tl.zeros((KEYS, HEAD), tl.float32)
    key_radial = tl.zeros((KEYS,), tl.float32)
    key_bias = tl.zeros((KEYS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        listed = first + tl.arange(0, ENTRIES) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0).to(tl.int64)
        queries = (entry // SLOTS - head_start).to(tl.int32)
        query = load_rows(query_ptr, queries, query_row, listed, HEAD_SIZE, HEAD)
        query_scale = load_numbers(query_scale_ptr, head, size, queries, listed, 0.0)
        query_share = load_numbers(share_ptr, head, size, queries, listed, 0.0)
        query_delta = load_numbers(delta_ptr, head, size, queries, listed, 0.0)
        scales = query_scale[:, None] * key_scale[None, :]
        cosine = tl.dot(query, tl.trans(key), input_precision="ieee") * scales
        linked = outside_window(queries, keys, WINDOW, CAUSAL) & listed[:, None] & real[None, :]

        product = edge_products(
            tl.zeros((ENTRIES, KEYS), tl.float32),
            adjoint_ptr,
            queries,
            listed,
            start_ptr,
            states_ptr,
            keys,
            real,
            start_row,
            step_stride,
            WALKED,
            STATE,
            STEPS,
            GROUP,
        )
        slack = keep_walking * product - query_delta[:, None]
        along = slack * query_share[:, None] * key_gain[None, :]
        weight = tl.where(linked, weigh(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
        if REVERSIBLE:
            along = 0.5 * along
        if bias_ptr is not None:
            key_bias += tl.sum(weight * along, 0)
        if MUTUAL:
            query_gain = tl.full((ENTRIES,), 1.0, tl.float32)
            if bias_ptr is not None:
                query_gain = load_gain(bias_ptr, head, size, queries, listed)
            product = edge_products(
                tl.zeros((KEYS, ENTRIES), tl.float32),
                adjoint_ptr,
                keys,
                real,
                start_ptr,
                states_ptr,
                queries,
                listed,
                start_row,
                step_stride,
                WALKED,
                STATE,
                STEPS,
                GROUP,
            )
            slack = keep_walking * tl.trans(product) - key_delta[None, :]
            back = 0.5 * slack * key_share[None, :] * query_gain[:, None]
            along += back
            if bias_ptr is not None:
                tl.store(entry_bias_ptr + entry, tl.sum(weight * back, 1), mask=listed)
        change = tl.where(linked, along * slope(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
        tl.store(entry_radial_ptr + entry, tl.sum(change * cosine, 1), mask=listed)
        key_radial += tl.sum(change * cosine, 0)
        change = tl.minimum(tl.maximum(change * scales, -LARGEST), LARGEST).to(key.dtype)
        part = tl.dot(change, key, input_precision="ieee")
        store_rows(entry_gradient_ptr, entry, HEAD_SIZE, listed, part, HEAD_SIZE, HEAD)
        key_gradient = tl.dot(tl.trans(change), query, key_gradient, input_precision="ieee")
    store_rows(
        key_gradient_ptr + head_start * HEAD_SIZE,
        keys,
        HEAD_SIZE,
        inside,
        key_gradient,
        HEAD_SIZE,
        HEAD,
    )
    store_numbers(key_radial_ptr, head, size, keys, inside, key_radial)
    if bias_ptr is not None:
        store_numbers(key_bias_ptr, head, size, keys, inside, key_bias)


@triton.jit
def band_edge_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    cotangent_ptr,
    query_scale_ptr,
    key_scale_ptr,
    share_ptr,
    bias_ptr,
    sharpness_ptr,
    seed_ptr,
    band_ptr,
    lse_ptr,
    local_delta_ptr,
    delta_ptr,
    adjoint_ptr,
    start_ptr,
    states_ptr,
    neighbors_ptr,
    entry_gradient_ptr,
    entry_radial_ptr,
    entry_bias_ptr,
    edges_ptr,
    span_radial_ptr,
    span_bias_ptr,
    query_gradient_ptr,
    radial_ptr,
    query_bias_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    value_batch,
    value_row,
    value_head,
    cotangent_batch,
    cotangent_row,
    cotangent_head,
    start_batch,
    start_row,
    start_head,
    gradient_batch,
    gradient_row,
    gradient_head,
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
    BAND_SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    REVERSIBLE: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """The queries' gradient, and the edges of LOCAL and of the walk that hand on to the keys."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    first_row = tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    query_scale = load_numbers(query_scale_ptr, head, size, rows, inside, -1.0)
    real = inside
    if PADDED:
        real = query_scale > 0
    step_stride = tl.cast(batch_heads, tl.int64) * size * WALKED
    head_start = head.to(tl.int64) * size
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    value_ptr += head_offset(head, heads, value_batch, value_head)
    cotangent_ptr += head_offset(head, heads, cotangent_batch, cotangent_head)
    start_ptr += head_offset(head, heads, start_batch, start_head)
    adjoint_ptr += head_start * WALKED
    states_ptr += head_start * WALKED
    tile_number = head.to(tl.int64) * tiles + tile
    edges_ptr += tile_number * ROWS * SPAN
    band_ptr += tile_number * ROWS * BAND_SPAN
    lanes = tl.arange(0, ROWS)
    query = load_rows(query_ptr, rows, query_row, real, HEAD_SIZE, HEAD)
    cotangent = load_rows(cotangent_ptr, rows, cotangent_row, real, VALUE_SIZE, VALUE)
    sharpness = tl.load(sharpness_ptr + head % heads)
    lse = load_numbers(lse_ptr, head, size, rows, inside, 0.0)
    local_delta = load_numbers(local_delta_ptr, head, size, rows, inside, 0.0)
    share = load_numbers(share_ptr, head, size, rows, inside, 0.0)
    delta = load_numbers(delta_ptr, head, size, rows, inside, 0.0)
    MUTUAL: tl.constexpr = REVERSIBLE and not CAUSAL
    if REVERSIBLE:
        gain = tl.full((ROWS,), 1.0, tl.float32)
        if bias_ptr is not None:
            gain = load_gain(bias_ptr, head, size, rows, inside)

    # Most often a tile holds the adjoint states of all steps.
    AT_ONCE: tl.constexpr = STEPS > 0 and STEPS <= GROUP and WALKED <= STATE
    if AT_ONCE:
        adjoints = load_adjoints(
            adjoint_ptr, rows, real, step_stride, 0, 0, WALKED, STATE, STEPS, GROUP
        )
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    radial = tl.zeros((ROWS,), tl.float32)
    for column in tl.range(0, SPAN, COLUMNS, num_stages=STAGES):
        columns = first_row - WINDOW + column + tl.arange(0, COLUMNS)
        present = (columns >= 0) & (columns < size)
        key_scale = load_numbers(key_scale_ptr, head, size, columns, present, -1.0)
        if PADDED:
            present = key_scale > 0
        key = load_rows(key_ptr, columns, key_row, present, HEAD_SIZE, HEAD)
        value = load_rows(value_ptr, columns, value_row, present, VALUE_SIZE, VALUE)
        pairs = present[None, :] & real[:, None]
        near = within_window(rows, columns, WINDOW, True, not CAUSAL) & pairs
        product = tl.dot(query, tl.trans(key), input_precision="ieee")

        logits = product * logit_scale
        column_gain = tl.full((COLUMNS,), 1.0, tl.float32)
        if bias_ptr is not None:
            bias = load_numbers(bias_ptr, head, size, columns, present, 0.0) * LOG2E
            logits += bias[None, :]
            column_gain = tl.exp2(bias)
        probability = tl.where(near, tl.exp2(logits - lse[:, None]), 0.0)
        change = tl.dot(cotangent, tl.trans(value), input_precision="ieee")
        if DROPPED > 0:
            keep = keep_pairs(seed_ptr, head, heads, rows[:, None], columns[None, :], DROPPED)
            change = tl.where(keep, change * kept_scale, 0.0)
        edge = probability * (change - local_delta[:, None])
        span_bias = tl.sum(edge, 0)
        edge = edge * (logit_scale / LOG2E)
        span_radial = tl.zeros((COLUMNS,), tl.float32)

        if STEPS > 0:
            scales = query_scale[:, None] * key_scale[None, :]
            cosine = product * scales
            if AT_ONCE:
                states = load_states(
                    start_ptr,
                    states_ptr,
                    columns,
                    present,
                    start_row,
                    step_stride,
                    0,
                    0,
                    WALKED,
                    STATE,
                    STEPS,
                    GROUP,
                )
                product = tl.dot(adjoints, tl.trans(states), input_precision="ieee")
            else:
                product = edge_products(
                    tl.zeros((ROWS, COLUMNS), tl.float32),
                    adjoint_ptr,
                    rows,
                    real,
                    start_ptr,
                    states_ptr,
                    columns,
                    present,
                    start_row,
                    step_stride,
                    WALKED,
                    STATE,
                    STEPS,
                    GROUP,
                )
            slack = keep_walking * product - delta[:, None]
            along = tl.where(near, slack * share[:, None] * column_gain[None, :], 0.0)
            reach = near
            if bias_ptr is not None:
                pointers = row_pointers(band_ptr, lanes, BAND_SPAN, column, COLUMNS)
                weight = tl.load(pointers, mask=near, other=0.0).to(tl.float32)
                span_bias += tl.sum(weight * slack * share[:, None], 0)
            if REVERSIBLE:
                product = edge_products(
                    tl.zeros((COLUMNS, ROWS), tl.float32),
                    adjoint_ptr,
                    columns,
                    present,
                    start_ptr,
                    states_ptr,
                    rows,
                    real,
                    start_row,
                    step_stride,
                    WALKED,
                    STATE,
                    STEPS,
                    GROUP,
                )
                column_share = load_numbers(share_ptr, head, size, columns, present, 0.0)
                column_delta = load_numbers(delta_ptr, head, size, columns, present, 0.0)
                slack = keep_walking * tl.trans(product) - column_delta[None, :]
                back = slack * column_share[None, :] * gain[:, None]
                linked_back = within_window(rows, columns, WINDOW, not CAUSAL, True) & pairs
                along = 0.5 * (along + tl.where(linked_back, back, 0.0))
                reach = within_window(rows, columns, WINDOW, True, True) & pairs
            along = tl.where(reach, along * slope(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
            radial += tl.sum(along * cosine, 1)
            span_radial = tl.sum(along * cosine, 0)
            edge += tl.minimum(tl.maximum(along * scales, -LARGEST), LARGEST)

        edge = edge.to(query.dtype)
        gradient = tl.dot(edge, key, gradient, input_precision="ieee")
        store_rows(edges_ptr, lanes, SPAN, lanes >= 0, edge, SPAN, COLUMNS, column)
        lane = tile_number * SPAN + column + tl.arange(0, COLUMNS)
        tl.store(span_radial_ptr + lane, span_radial)
        if bias_ptr is not None:
            tl.store(span_bias_ptr + lane, span_bias)

    if entry_gradient_ptr is not None:
        bias_total = tl.zeros((ROWS,), tl.float32)
        for slot in range(SLOTS):
            entry = (head_start + rows) * SLOTS + slot
            chosen = tl.load(neighbors_ptr + entry, mask=inside, other=-1) >= 0
            part = load_rows(entry_gradient_ptr, entry, HEAD_SIZE, chosen, HEAD_SIZE, HEAD)
            gradient += part.to(tl.float32)
            radial += tl.load(entry_radial_ptr + entry, mask=chosen, other=0.0)
            if MUTUAL and bias_ptr is not None:
                bias_total += tl.load(entry_bias_ptr + entry, mask=chosen, other=0.0)
        if MUTUAL and bias_ptr is not None:
            store_numbers(query_bias_ptr, head, size, rows, inside, bias_total)
    along_itself = tl.where(query_scale < LONGEST_SCALE, query_scale * query_scale * radial, 0.0)
    gradient -= query.to(tl.float32) * along_itself[:, None]
    query_gradient_ptr += head_offset(head, heads, gradient_batch, gradient_head)
    store_rows(query_gradient_ptr, rows, gradient_row, inside, gradient, HEAD_SIZE, HEAD)
    store_numbers(radial_ptr, head, size, rows, inside, radial)


@triton.jit
def key_gradients(
    query_ptr,
    key_ptr,
    cotangent_ptr,
    query_scale_ptr,
    key_scale_ptr,
    bias_ptr,
    seed_ptr,
    lse_ptr,
    edges_ptr,
    span_radial_ptr,
    span_bias_ptr,
    far_gradient_ptr,
    far_radial_ptr,
    far_bias_ptr,
    query_bias_ptr,
    bias_gradient_ptr,
    key_gradient_ptr,
    value_gradient_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    cotangent_batch,
    cotangent_row,
    cotangent_head,
    gradient_batch,
    gradient_row,
    gradient_head,
    value_gradient_batch,
    value_gradient_row,
    value_gradient_head,
    size,
    heads,
    batch_heads,
    tiles,
    logit_scale,
    kept_scale,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOTH: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Gradients of keys and of their bias, and LOCAL's part of the values'."""
    tile = tl.program_id(0) // batch_heads
    head = tl.program_id(0) % batch_heads
    first_key = tile * ROWS
    keys = first_key + tl.arange(0, ROWS)
    inside = keys < size
    key_scale = load_numbers(key_scale_ptr, head, size, keys, inside, -1.0)
    real = inside
    if PADDED:
        real = key_scale > 0
    head_start = head.to(tl.int64) * size
    edges_ptr += head.to(tl.int64) * tiles * ROWS * SPAN
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    cotangent_ptr += head_offset(head, heads, cotangent_batch, cotangent_head)
    value_gradient_ptr += head_offset(head, heads, value_gradient_batch, value_gradient_head)
    key = load_rows(key_ptr, keys, key_row, real, HEAD_SIZE, HEAD)
    bias = tl.zeros((ROWS,), tl.float32)
    if bias_ptr is not None:
        bias = load_numbers(bias_ptr, head, size, keys, inside, 0.0) * LOG2E

    value_gradient = load_rows(
        value_gradient_ptr, keys, value_gradient_row, inside, VALUE_SIZE, VALUE
    ).to(tl.float32)
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    radial = tl.zeros((ROWS,), tl.float32)
    bias_gradient = tl.zeros((ROWS,), tl.float32)
    low = tile
    if BOTH:
        low = tl.maximum(first_key - WINDOW, 0) // ROWS
    high = tl.minimum((first_key + ROWS - 1 + WINDOW) // ROWS + 1, tiles)
    for query_tile in tl.range(low, high, num_stages=STAGES):
        first_row = query_tile * ROWS
        rows = first_row + tl.arange(0, ROWS)
        present = rows < size
        if PADDED:
            present = load_numbers(query_scale_ptr, head, size, rows, present, -1.0) > 0
        query = load_rows(query_ptr, rows, query_row, present, HEAD_SIZE, HEAD)
        tile_number = head.to(tl.int64) * tiles + query_tile
        edge = load_transposed_band(edges_ptr, query_tile, keys, ROWS, SPAN, WINDOW)
        gradient = tl.dot(edge, query, gradient, input_precision="ieee")
        lanes = keys - first_row + WINDOW
        stored = (lanes >= 0) & (lanes < SPAN)
        lanes = tile_number * SPAN + lanes
        radial += tl.load(span_radial_ptr + lanes, mask=stored, other=0.0)
        if bias_ptr is not None:
            bias_gradient += tl.load(span_bias_ptr + lanes, mask=stored, other=0.0)

        near = within_window(keys, rows, WINDOW, not CAUSAL, True)
        near = near & present[None, :] & real[:, None]
        cotangent = load_rows(cotangent_ptr, rows, cotangent_row, present, VALUE_SIZE, VALUE)
        lse = load_numbers(lse_ptr, head, size, rows, present, 0.0)
        logits = tl.dot(key, tl.trans(query), input_precision="ieee") * logit_scale
        logits += bias[:, None] - lse[None, :]
        probability = tl.where(near, tl.exp2(logits), 0.0)
        if DROPPED > 0:
            keep = keep_pairs(seed_ptr, head, heads, rows[None, :], keys[:, None], DROPPED)
            probability = tl.where(keep, probability * kept_scale, 0.0)
        value_gradient = tl.dot(
            probability.to(cotangent.dtype), cotangent, value_gradient, input_precision="ieee"
        )

    if far_gradient_ptr is not None:
        far = load_rows(
            far_gradient_ptr + head_start * HEAD_SIZE, keys, HEAD_SIZE, inside, HEAD_SIZE, HEAD
        )
        gradient += far.to(tl.float32)
        radial += load_numbers(far_radial_ptr, head, size, keys, inside, 0.0)
    along_itself = tl.where(key_scale < LONGEST_SCALE, key_scale * key_scale * radial, 0.0)
    gradient -= key.to(tl.float32) * along_itself[:, None]
    key_gradient_ptr += head_offset(head, heads, gradient_batch, gradient_head)
    store_rows(key_gradient_ptr, keys, gradient_row, inside, gradient, HEAD_SIZE, HEAD)
    store_rows(
        value_gradient_ptr, keys, value_gradient_row, inside, value_gradient, VALUE_SIZE, VALUE
    )
    if bias_ptr is not None:
        if far_bias_ptr is not None:
            bias_gradient += load_numbers(far_bias_ptr, head, size, keys, inside, 0.0)
        if query_bias_ptr is not None:
            bias_gradient += load_numbers(query_bias_ptr, head, size, keys, inside, 0.0)
        bias_gradient += load_numbers(bias_gradient_ptr, head, size, keys, inside, 0.0)
        store_numbers(bias_gradient_ptr, head, size, keys, inside, bias_gradient)
