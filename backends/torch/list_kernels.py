"""Kernels over far edges, by key block.

Far edges are listed by key block: `entries[starts[J]:starts[J + 1]]` are the entries `(head * S +
query) * slots + slot` of the queries that chose block J, and `weights` holds the weights `S_ij` of
an entry with the keys of its block. A call may work on some of the heads that are listed: the
entries of its first one begin at `first_entry`.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.edge_products import edge_products, load_adjoints, load_states
from keras_rwr.backends.torch.tiles import (
    bounded,
    head_offset,
    load_gain,
    load_numbers,
    load_rows,
    outside_window,
    scale_of_gradients,
    share_of_gradients,
    slope,
    store_numbers,
    store_rows,
    weigh,
)


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
    value_ptr,
    spread_ptr,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    value_batch,
    value_row,
    value_head,
    size,
    heads,
    blocks,
    first_entry,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    REVERSIBLE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Weights of the far edges to one key block, their sum for each entry, and for each key.

    With `spread_ptr` it does what `spread` does for the walk's first step.
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
    key_ptr += head_offset(head, heads, key_batch, key_head)
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key = load_rows(key_ptr, keys, key_row, real, HEAD_SIZE, HEAD)
    if spread_ptr is not None:
        value_ptr += head_offset(head, heads, value_batch, value_head)
        value = load_rows(value_ptr, keys, value_row, real, VALUE_SIZE, VALUE)
    sharpness = tl.load(sharpness_ptr + head % heads)
    back_sums = tl.zeros((KEYS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        listed = first + tl.arange(0, ENTRIES) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0).to(tl.int64)
        entry -= first_entry
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
        if spread_ptr is not None:
            product = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            store_rows(spread_ptr, entry, VALUE_SIZE, listed, product, VALUE_SIZE, VALUE)
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
    first_entry,
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
            entry = entry.to(tl.int64) - first_entry
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
    first_entry,
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
        entry -= first_entry
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
    blocks,
    first_entry,
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
    head_start = head.to(tl.int64) * size
    step_stride = tl.cast(size, tl.int64) * WALKED
    query_ptr += head_offset(head, heads, query_batch, query_head)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    start_ptr += head_offset(head, heads, start_batch, start_head)
    adjoint_ptr += head_start * ((STEPS + 1) * WALKED)
    states_ptr += head_start * (STEPS * WALKED)
    key = load_rows(key_ptr, keys, key_row, real, HEAD_SIZE, HEAD)
    sharpness = tl.load(sharpness_ptr + head % heads)
    MUTUAL: tl.constexpr = REVERSIBLE and not CAUSAL
    key_gain = tl.full((KEYS,), 1.0, tl.float32)
    if bias_ptr is not None:
        key_gain = load_gain(bias_ptr, head, size, keys, inside)
    key_share = load_numbers(share_ptr, head, size, keys, inside, 0.0)
    key_delta = load_numbers(delta_ptr, head, size, keys, inside, 0.0)

    # Most often a tile holds the states of all steps.
    AT_ONCE: tl.constexpr = STEPS > 0 and STEPS <= GROUP and WALKED <= STATE
    if AT_ONCE:
        states = load_states(
            start_ptr,
            states_ptr,
            keys,
            real,
            start_row,
            step_stride,
            0,
            0,
            WALKED,
            STATE,
            STEPS,
            GROUP,
        )
    key_gradient = tl.zeros((KEYS, HEAD), tl.float32)
    key_radial = tl.zeros((KEYS,), tl.float32)
    key_bias = tl.zeros((KEYS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        listed = first + tl.arange(0, ENTRIES) < end
        entry = tl.load(entries_ptr + first + tl.arange(0, ENTRIES), listed, other=0).to(tl.int64)
        entry -= first_entry
        queries = (entry // SLOTS - head_start).to(tl.int32)
        query = load_rows(query_ptr, queries, query_row, listed, HEAD_SIZE, HEAD)
        query_scale = load_numbers(query_scale_ptr, head, size, queries, listed, 0.0)
        query_share = load_numbers(share_ptr, head, size, queries, listed, 0.0)
        query_delta = load_numbers(delta_ptr, head, size, queries, listed, 0.0)
        cosine = tl.dot(query, tl.trans(key), input_precision="ieee")
        cosine = cosine * query_scale[:, None] * key_scale[None, :]
        linked = outside_window(queries, keys, WINDOW, CAUSAL) & listed[:, None] & real[None, :]

        if AT_ONCE:
            adjoints = load_adjoints(
                adjoint_ptr, queries, listed, step_stride, 0, 0, WALKED, STATE, STEPS, GROUP
            )
            product = tl.dot(adjoints, tl.trans(states), input_precision="ieee")
        else:
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
        along = slack * key_gain[None, :]
        weight = tl.where(linked, weigh(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
        if REVERSIBLE:
            along = 0.5 * along
        if bias_ptr is not None:
            key_bias += tl.sum(weight * along * query_share[:, None], 0)
        along *= share_of_gradients(query_share, EXPONENTIAL)[:, None]
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
            back = 0.5 * slack * query_gain[:, None]
            along += back * share_of_gradients(key_share, EXPONENTIAL)[None, :]
            back *= key_share[None, :]
            if bias_ptr is not None:
                tl.store(entry_bias_ptr + entry, tl.sum(weight * back, 1), mask=listed)
        change = tl.where(linked, along * slope(cosine, sharpness, CUT, EXPONENTIAL), 0.0)
        tl.store(entry_radial_ptr + entry, tl.sum(change * cosine, 1), mask=listed)
        key_radial += tl.sum(change * cosine, 0)
        to_query = change * scale_of_gradients(query_scale)[:, None] * key_scale[None, :]
        part = tl.dot(bounded(to_query, LARGEST).to(key.dtype), key, input_precision="ieee")
        store_rows(entry_gradient_ptr, entry, HEAD_SIZE, listed, part, HEAD_SIZE, HEAD)
        to_key = change * query_scale[:, None] * scale_of_gradients(key_scale)[None, :]
        to_key = bounded(to_key, LARGEST).to(key.dtype)
        key_gradient = tl.dot(tl.trans(to_key), query, key_gradient, input_precision="ieee")
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
