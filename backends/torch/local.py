"""LOCAL: softmax attention within the window, forward and backward.

The online softmax and the backward pass are FlashAttention's (Dao et al.,
https://arxiv.org/abs/2205.14135).
"""

import torch
import triton
import triton.language as tl

from keras_rwr._tensors import repeat_heads
from keras_rwr.backends.torch.operators import define, refuse_second_derivative
from keras_rwr.backends.torch.run import ceil_div, next_power_of_2, run
from keras_rwr.backends.torch.tiles import (
    LOG2E,
    NEVER,
    PADDING,
    keep_pairs,
    load_end,
    load_labels,
    load_rows,
    of_head,
    store_rows,
    visible_pairs,
)
from keras_rwr.backends.torch.vectors import token_major

_WARPS = 4


def attend_locally(
    query, key, value, tokens, window, bias=None, dropout=0.0, seed=None, block_size=None
):
    """See `keras_rwr._local.attend_locally`; `block_size` is not of these kernels."""
    query, key, value = (token_major(x) for x in (query, key, value))
    if bias is not None:
        bias = repeat_heads(bias, query.shape[2])[..., 0].contiguous()
    dropout = 0.0 if seed is None else dropout
    output = _Local.apply(
        query,
        key,
        value,
        bias,
        token_labels(tokens, query.shape[0]),
        tokens.ends,
        _seed_words(seed, query.device) if dropout > 0.0 else None,
        window,
        tokens.is_causal,
        dropout,
    )
    return output.transpose(1, 2)


def token_labels(tokens, batch):
    """Labels as an int32 tensor `(B, S)`, `None` where all are the same."""
    if not (tokens.has_padding or tokens.has_segments):
        return None
    return tokens.labels[:, 0, :, 0].expand(batch, -1).contiguous()


def _seed_words(seed, device):
    """A seed as four int32 words, see `keras_rwr._dropout`."""
    if isinstance(seed, int):
        seed = torch.full((1,), (seed + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    seed = seed.to(device=device, dtype=torch.int32)
    return torch.nn.functional.pad(seed, (0, 4 - seed.shape[0]))


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, labels, ends, seed, *options):
        output, lse = _local(query, key, value, bias, labels, ends, seed, *options)
        ctx.save_for_backward(query, key, value, bias, labels, ends, seed, output, lse)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        query, key, value, bias, *others = ctx.saved_tensors
        gradients = _local_gradients(
            cotangent.contiguous(), query, key, value, bias, *others, *ctx.options
        )
        bias_gradient = None if bias is None else gradients[3]
        return (*gradients[:3], bias_gradient, *[None] * 6)


def _run_local(query, key, value, bias, labels, ends, seed, window, is_causal, dropout):
    output, lse = _local_outputs(query, key, value)
    numbers, constants = _settings(query, key, value, window, is_causal, dropout)
    tensors = (query, key, value, bias, labels, ends, seed, output, lse)
    run(_forward, _grid(query, constants["ROWS"]), *tensors, *numbers, **constants)
    return output, lse


def _local_outputs(query, key, value, *others):
    batch, size, heads, _ = query.shape
    output = query.new_empty((batch, size, heads, value.shape[-1]))
    return output, query.new_empty((batch, heads, size), dtype=torch.float32)


def _run_local_gradients(
    cotangent,
    query,
    key,
    value,
    bias,
    labels,
    ends,
    seed,
    output,
    lse,
    window,
    is_causal,
    dropout,
):
    gradients = _local_gradient_outputs(cotangent, query, key, value, bias)
    delta = torch.empty_like(lse)
    numbers, constants = _settings(query, key, value, window, is_causal, dropout)
    tensors = (query, key, value, bias, labels, ends, seed, cotangent, lse, delta)
    rows = constants["ROWS"]
    grid = _grid(query, rows)
    run(_query_gradients, grid, *tensors, output, gradients[0], *numbers, **constants)
    outputs = (*gradients[1:3], None if bias is None else gradients[3])
    run(_key_gradients, _grid(key, rows), *tensors, *outputs, *numbers, **constants)
    return gradients


def _local_gradient_outputs(cotangent, query, key, value, bias, *others):
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    return (*gradients, query.new_empty((0,)) if bias is None else torch.empty_like(bias))


_local = define(
    "local(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? labels, Tensor? ends, "
    "Tensor? seed, int window, bool is_causal, float dropout) -> (Tensor, Tensor)",
    _run_local,
    _local_outputs,
)
_local_gradients = define(
    "local_gradients(Tensor cotangent, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor? labels, Tensor? ends, Tensor? seed, Tensor output, Tensor lse, int window, "
    "bool is_causal, float dropout) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_local_gradients,
    _local_gradient_outputs,
)


def _grid(x, rows):
    return ceil_div(x.shape[1], rows), x.shape[2], x.shape[0]


def _settings(query, key, value, window, is_causal, dropout):
    """What all kernels take behind their tensors: numbers, and constants by name."""
    head_size, value_size = query.shape[-1], value.shape[-1]
    largest = max(head_size, value_size) * query.itemsize  # bytes of a row
    numbers = (
        query.shape[1],
        query.shape[2],
        key.shape[2],
        head_size**-0.5 * LOG2E.value,
        1.0 / (1.0 - dropout),
    )
    return numbers, {
        "WINDOW": window,
        "CAUSAL": is_causal,
        "DROPPED": int(dropout * 2**31),
        "HEAD_SIZE": head_size,
        "HEAD": max(next_power_of_2(head_size), 16),
        "VALUE_SIZE": value_size,
        "VALUE": max(next_power_of_2(value_size), 16),
        # Long rows have no room for a large tile.
        "ROWS": 64 if largest <= 256 else 32 if largest <= 512 else 16,
        "num_warps": _WARPS if largest <= 128 or largest > 512 else 2 * _WARPS,
    }


@triton.jit
def _logits(query, key, bias_ptr, begin, keys, inside, logit_scale, near):
    """Logits of base 2 of a tile of pairs, NEVER where they do not see each other."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * logit_scale
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + begin + keys, mask=inside, other=0.0).to(tl.float32)
        logits += bias[None, :] * LOG2E
    return tl.where(near, logits, NEVER)


@triton.jit
def _probabilities(logits, lse):
    """The softmax again; 0 in rows without a key, whose `lse` is NEVER."""
    return tl.where(logits > NEVER, tl.exp2(logits - lse[:, None]), 0.0)


@triton.jit
def _forward(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    label_ptr,
    end_ptr,
    seed_ptr,
    output_ptr,
    lse_ptr,
    size,
    heads,
    key_heads,
    logit_scale,
    kept_scale,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head, entry = tl.program_id(1), tl.program_id(2)
    group = head // (heads // key_heads)
    begin = (entry.to(tl.int64) * heads + head) * size
    end = load_end(end_ptr, entry, size)
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, heads, head, HEAD_SIZE)
    key_ptr = of_head(key_ptr, entry, size, key_heads, group, HEAD_SIZE)
    value_ptr = of_head(value_ptr, entry, size, key_heads, group, VALUE_SIZE)
    query = load_rows(query_ptr, rows, heads * HEAD_SIZE, inside, HEAD_SIZE, HEAD)
    peak = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, VALUE), tl.float32)
    low = tl.maximum(first_row - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_row + ROWS + (0 if CAUSAL else WINDOW), size)
    for column in range(low, high, ROWS):
        columns = column + tl.arange(0, ROWS)
        others = load_labels(label_ptr, entry, size, columns, end)
        near = visible_pairs(
            rows, columns, labels, others, label_ptr is not None, WINDOW, CAUSAL, False
        )
        present = others != PADDING
        key = load_rows(key_ptr, columns, key_heads * HEAD_SIZE, present, HEAD_SIZE, HEAD)
        value = load_rows(value_ptr, columns, key_heads * VALUE_SIZE, present, VALUE_SIZE, VALUE)
        logits = _logits(query, key, bias_ptr, begin, columns, present, logit_scale, near)
        highest = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(near, tl.exp2(logits - highest[:, None]), 0.0)
        shrink = tl.exp2(peak - highest)
        total = total * shrink + tl.sum(weights, 1)
        if DROPPED > 0:
            keep = keep_pairs(
                seed_ptr, entry * heads + head, heads, rows[:, None], columns[None, :], DROPPED
            )
            weights = tl.where(keep, weights * kept_scale, 0.0)
        product = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        output = output * shrink[:, None] + product
        peak = highest
    total = tl.where(total > 0, total, 1.0)
    output /= total[:, None]
    if end_ptr is not None:
        # Rows are loaded once more, some features at a time: registers are scarce here.
        broken = rows >= end
        for first in range(0, HEAD_SIZE, 16):
            own_query = load_rows(query_ptr, rows, heads * HEAD_SIZE, inside, HEAD_SIZE, 16, first)
            own_key = load_rows(key_ptr, rows, key_heads * HEAD_SIZE, inside, HEAD_SIZE, 16, first)
            nothing = (own_query - own_query) + (own_key - own_key)
            broken = broken | (tl.max((nothing != 0).to(tl.int32), 1) > 0)
        broken = broken & (labels != PADDING)
        output = tl.where(broken[:, None], float("nan"), output)
    output_ptr = of_head(output_ptr, entry, size, heads, head, VALUE_SIZE)
    store_rows(output_ptr, rows, heads * VALUE_SIZE, inside, output, VALUE_SIZE, VALUE)
    tl.store(lse_ptr + begin + rows, peak + tl.log2(total), mask=inside)


@triton.jit
def _query_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    label_ptr,
    end_ptr,
    seed_ptr,
    cotangent_ptr,
    lse_ptr,
    delta_ptr,
    output_ptr,
    gradient_ptr,
    size,
    heads,
    key_heads,
    logit_scale,
    kept_scale,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of queries, and `delta_i = cotangent_i . output_i` for those of keys."""
    head, entry = tl.program_id(1), tl.program_id(2)
    group = head // (heads // key_heads)
    begin = (entry.to(tl.int64) * heads + head) * size
    end = load_end(end_ptr, entry, size)
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    labels = load_labels(label_ptr, entry, size, rows, size)
    query_ptr = of_head(query_ptr, entry, size, heads, head, HEAD_SIZE)
    key_ptr = of_head(key_ptr, entry, size, key_heads, group, HEAD_SIZE)
    value_ptr = of_head(value_ptr, entry, size, key_heads, group, VALUE_SIZE)
    cotangent_ptr = of_head(cotangent_ptr, entry, size, heads, head, VALUE_SIZE)
    output_ptr = of_head(output_ptr, entry, size, heads, head, VALUE_SIZE)
    query = load_rows(query_ptr, rows, heads * HEAD_SIZE, inside, HEAD_SIZE, HEAD)
    cotangent = load_rows(cotangent_ptr, rows, heads * VALUE_SIZE, inside, VALUE_SIZE, VALUE)
    output = load_rows(output_ptr, rows, heads * VALUE_SIZE, inside, VALUE_SIZE, VALUE)
    delta = tl.sum(cotangent.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta_ptr + begin + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + begin + rows, mask=inside, other=0.0)
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    low = tl.maximum(first_row - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_row + ROWS + (0 if CAUSAL else WINDOW), size)
    for column in range(low, high, ROWS):
        columns = column + tl.arange(0, ROWS)
        others = load_labels(label_ptr, entry, size, columns, end)
        near = visible_pairs(
            rows, columns, labels, others, label_ptr is not None, WINDOW, CAUSAL, False
        )
        present = others != PADDING
        key = load_rows(key_ptr, columns, key_heads * HEAD_SIZE, present, HEAD_SIZE, HEAD)
        value = load_rows(value_ptr, columns, key_heads * VALUE_SIZE, present, VALUE_SIZE, VALUE)
        logits = _logits(query, key, bias_ptr, begin, columns, present, logit_scale, near)
        weights = _probabilities(logits, lse)
        change = tl.dot(cotangent, tl.trans(value), input_precision="ieee")
        if DROPPED > 0:
            keep = keep_pairs(
                seed_ptr, entry * heads + head, heads, rows[:, None], columns[None, :], DROPPED
            )
            change = tl.where(keep, change * kept_scale, 0.0)
        edge = weights * (change - delta[:, None]) * (logit_scale / LOG2E)
        gradient += tl.dot(edge.to(key.dtype), key, input_precision="ieee")
    gradient_ptr = of_head(gradient_ptr, entry, size, heads, head, HEAD_SIZE)
    store_rows(gradient_ptr, rows, heads * HEAD_SIZE, inside, gradient, HEAD_SIZE, HEAD)


@triton.jit
def _key_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    label_ptr,
    end_ptr,
    seed_ptr,
    cotangent_ptr,
    lse_ptr,
    delta_ptr,
    key_gradient_ptr,
    value_gradient_ptr,
    bias_gradient_ptr,
    size,
    heads,
    key_heads,
    logit_scale,
    kept_scale,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of keys, values and their bias: a tile of keys, and the queries that see it."""
    group, entry = tl.program_id(1), tl.program_id(2)
    shared = heads // key_heads
    end = load_end(end_ptr, entry, size)
    first_key = tl.program_id(0) * ROWS
    keys = first_key + tl.arange(0, ROWS)
    inside = keys < size
    labels = load_labels(label_ptr, entry, size, keys, end)
    key_ptr = of_head(key_ptr, entry, size, key_heads, group, HEAD_SIZE)
    value_ptr = of_head(value_ptr, entry, size, key_heads, group, VALUE_SIZE)
    seen = labels != PADDING
    key = load_rows(key_ptr, keys, key_heads * HEAD_SIZE, seen, HEAD_SIZE, HEAD)
    value = load_rows(value_ptr, keys, key_heads * VALUE_SIZE, seen, VALUE_SIZE, VALUE)
    key_gradient = tl.zeros((ROWS, HEAD), tl.float32)
    value_gradient = tl.zeros((ROWS, VALUE), tl.float32)
    low = first_key
    if not CAUSAL:
        low = tl.maximum(first_key - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_key + ROWS + WINDOW, size)
    for member in range(shared):
        head = group * shared + member
        begin = (entry.to(tl.int64) * heads + head) * size
        query_of_head = of_head(query_ptr, entry, size, heads, head, HEAD_SIZE)
        cotangent_of_head = of_head(cotangent_ptr, entry, size, heads, head, VALUE_SIZE)
        bias = tl.zeros((ROWS,), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + begin + keys, mask=inside, other=0.0).to(tl.float32) * LOG2E
        bias_gradient = tl.zeros((ROWS,), tl.float32)
        for row in range(low, high, ROWS):
            rows = row + tl.arange(0, ROWS)
            others = load_labels(label_ptr, entry, size, rows, size)
            present = rows < size
            query = load_rows(query_of_head, rows, heads * HEAD_SIZE, present, HEAD_SIZE, HEAD)
            cotangent = load_rows(
                cotangent_of_head, rows, heads * VALUE_SIZE, present, VALUE_SIZE, VALUE
            )
            lse = tl.load(lse_ptr + begin + rows, mask=present, other=0.0)
            delta = tl.load(delta_ptr + begin + rows, mask=present, other=0.0)
            # Keys are rows here, queries columns.
            near = visible_pairs(
                keys, rows, labels, others, label_ptr is not None, WINDOW, CAUSAL, True
            )
            logits = tl.dot(key, tl.trans(query), input_precision="ieee") * logit_scale
            logits += bias[:, None] - lse[None, :]
            weights = tl.exp2(tl.where(near, logits, NEVER))
            change = tl.dot(value, tl.trans(cotangent), input_precision="ieee")
            passed = weights
            if DROPPED > 0:
                keep = keep_pairs(
                    seed_ptr, entry * heads + head, heads, rows[None, :], keys[:, None], DROPPED
                )
                change = tl.where(keep, change * kept_scale, 0.0)
                passed = tl.where(keep, weights * kept_scale, 0.0)
            value_gradient += tl.dot(passed.to(cotangent.dtype), cotangent, input_precision="ieee")
            edge = weights * (change - delta[None, :])
            bias_gradient += tl.sum(edge, 1)
            edge = (edge * (logit_scale / LOG2E)).to(query.dtype)
            key_gradient += tl.dot(edge, query, input_precision="ieee")
        if bias_ptr is not None:
            tl.store(bias_gradient_ptr + begin + keys, bias_gradient, mask=inside)
    key_gradient_ptr = of_head(key_gradient_ptr, entry, size, key_heads, group, HEAD_SIZE)
    value_gradient_ptr = of_head(value_gradient_ptr, entry, size, key_heads, group, VALUE_SIZE)
    store_rows(key_gradient_ptr, keys, key_heads * HEAD_SIZE, inside, key_gradient, HEAD_SIZE, HEAD)
    store_rows(
        value_gradient_ptr, keys, key_heads * VALUE_SIZE, inside, value_gradient, VALUE_SIZE, VALUE
    )
