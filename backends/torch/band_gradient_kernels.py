"""The backward pass along the band: gradients of queries, keys and values.

What tiles of queries hand to the keys around them, `edges`, is stored as the band itself is.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.edge_products import edge_products, load_adjoints, load_states
from keras_rwr.backends.torch.tiles import (
    LOG2E,
    along_itself,
    bounded,
    head_offset,
    keep_pairs,
    load_gain,
    load_numbers,
    load_rows,
    locate_in_band,
    scale_of_gradients,
    share_of_gradients,
    slope,
    store_numbers,
    store_rows,
    within_window,
)


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
    BREADTH: tl.constexpr,
    EDGE_BREADTH: tl.constexpr,
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
    head_start = head.to(tl.int64) * size
    step_stride = tl.cast(size, tl.int64) * WALKED
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    value_ptr += head_offset(head, heads, value_batch, value_head)
    cotangent_ptr += head_offset(head, heads, cotangent_batch, cotangent_head)
    start_ptr += head_offset(head, heads, start_batch, start_head)
    adjoint_ptr += head_start * ((STEPS + 1) * WALKED)
    states_ptr += head_start * (STEPS * WALKED)
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
    low = tl.maximum(first_row - WINDOW, 0) // COLUMNS * COLUMNS
    high = tl.minimum(first_row + ROWS + (WINDOW if REVERSIBLE or not CAUSAL else 0), size)
    for column in tl.range(low, high, COLUMNS, num_stages=STAGES):
        columns = column + tl.arange(0, COLUMNS)
        present = columns < size
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
        query_edge = edge
        span_radial = tl.zeros((COLUMNS,), tl.float32)

        if STEPS > 0:
            cosine = product * query_scale[:, None] * key_scale[None, :]
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
            own_share = share_of_gradients(share, EXPONENTIAL)
            along = tl.where(near, slack * own_share[:, None] * column_gain[None, :], 0.0)
            reach = near
            if bias_ptr is not None:
                pointers, _ = locate_in_band(
                    band_ptr, head, size, rows[:, None], columns[None, :], WINDOW, BREADTH
                )
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
                column_share = share_of_gradients(column_share, EXPONENTIAL)
                column_delta = load_numbers(delta_ptr, head, size, columns, present, 0.0)
                slack = keep_walking * tl.trans(product) - column_delta[None, :]
                back = slack * column_share[None, :] * gain[:, None]
                linked_back = within_window(rows, columns, WINDOW, not CAUSAL, True) & pairs
                along = 0.5 * (along + tl.where(linked_back, back, 0.0))
                reach = within_window(rows, columns, WINDOW, True, True) & pairs
            along = tl.where(reach, along * slope(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
            radial += tl.sum(along * cosine, 1)
            span_radial = tl.sum(along * cosine, 0)
            query_edge += bounded(
                along * scale_of_gradients(query_scale)[:, None] * key_scale[None, :], LARGEST
            )
            edge += bounded(
                along * query_scale[:, None] * scale_of_gradients(key_scale)[None, :], LARGEST
            )

        edge = edge.to(query.dtype)
        query_edge = query_edge.to(query.dtype)
        gradient = tl.dot(query_edge, key, gradient, input_precision="ieee")
        pointers, held = locate_in_band(
            edges_ptr, head, size, rows[:, None], columns[None, :], WINDOW, EDGE_BREADTH
        )
        tl.store(pointers, edge, mask=held)
        lane = (head.to(tl.int64) * tiles + tile) * SPAN + columns - low
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
    gradient -= query.to(tl.float32) * along_itself(query_scale, radial)[:, None]
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
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    EDGE_BREADTH: tl.constexpr,
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
        pointers, held = locate_in_band(
            edges_ptr, head, size, rows[None, :], keys[:, None], WINDOW, EDGE_BREADTH
        )
        edge = tl.load(pointers, mask=held, other=0.0)
        gradient = tl.dot(edge, query, gradient, input_precision="ieee")
        # Where `band_edge_gradients` began, for this tile of queries.
        lanes = keys - tl.maximum(first_row - WINDOW, 0) // COLUMNS * COLUMNS
        stored = (lanes >= 0) & (keys < first_row + ROWS + (WINDOW if BOTH else 0)) & inside
        lanes += (head.to(tl.int64) * tiles + query_tile) * SPAN
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
    gradient -= key.to(tl.float32) * along_itself(key_scale, radial)[:, None]
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
