"""LOCAL: softmax attention within the window, forward and backward.

The online softmax and the backward pass are FlashAttention's (Dao et al.,
https://arxiv.org/abs/2205.14135).
"""

import torch
import triton
import triton.language as tl

from keras_rwr._tensors import repeat_heads
from keras_rwr._tokens import PADDING
from keras_rwr.backends.torch.operators import refuse_second_derivative
from keras_rwr.backends.torch.plan import seed_words
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.tiles import LOG2E, NEVER, keep_pairs, load_rows, store_rows

_PADDING = tl.constexpr(PADDING)
_ROWS, _WARPS = 64, 4


@torch.compiler.disable
def attend_locally(
    query, key, value, tokens, window, bias=None, dropout=0.0, seed=None, block_size=None
):
    """See `keras_rwr._local.attend_locally`; `block_size` is not of these kernels."""
    query, key, value = (x.contiguous() for x in (query, key, value))
    bias = None if bias is None else repeat_heads(bias, query.shape[1]).contiguous()
    dropout = 0.0 if seed is None else dropout
    words = seed_words(seed, query.device) if dropout > 0.0 else None
    labels = tokens.labels.contiguous()
    return _Local.apply(query, key, value, bias, labels, words, window, tokens.is_causal, dropout)


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, labels, seed, window, is_causal, dropout):
        batch, heads, size, _ = query.shape
        output = query.new_empty((batch, heads, size, value.shape[-1]))
        lse = torch.empty((batch, heads, size), dtype=torch.float32, device=query.device)
        numbers, constants = _settings(query, key, value, labels, window, is_causal, dropout)
        tensors = (query, key, value, bias, labels, seed, output, lse)
        grid = (triton.cdiv(size, _ROWS), batch * heads)
        run(_forward, grid, *tensors, *numbers, **constants)
        ctx.save_for_backward(query, key, value, bias, labels, seed, output, lse)
        ctx.settings = numbers, constants
        return output

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        query, key, value, bias, labels, seed, output, lse = ctx.saved_tensors
        cotangent = cotangent.contiguous()
        delta = (cotangent.float() * output.float()).sum(-1)  # (B, N, S)
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        bias_gradient = None if bias is None else torch.empty_like(bias)
        tiles = triton.cdiv(query.shape[2], _ROWS)
        tensors = (query, key, value, bias, labels, seed, cotangent, lse, delta)
        numbers, constants = ctx.settings
        grid = (tiles, query.shape[0] * query.shape[1])
        run(_query_gradients, grid, *tensors, gradients[0], *numbers, **constants)
        grid = (tiles, key.shape[0] * key.shape[1])
        outputs = (*gradients[1:], bias_gradient)
        run(_key_gradients, grid, *tensors, *outputs, *numbers, **constants)
        return (*gradients, bias_gradient, *[None] * 5)


def _settings(query, key, value, labels, window, is_causal, dropout):
    """What all kernels take behind their tensors: numbers, and constants by name."""
    head_size, value_size = query.shape[-1], value.shape[-1]
    numbers = (
        query.shape[2],
        query.shape[1],
        key.shape[1],
        query.shape[2] if labels.shape[0] > 1 else 0,
        head_size**-0.5 * LOG2E.value,
        1.0 / (1.0 - dropout),
    )
    return numbers, {
        "WINDOW": window,
        "CAUSAL": is_causal,
        "DROPPED": int(dropout * 2**31),
        "HEAD_SIZE": head_size,
        "HEAD": max(triton.next_power_of_2(head_size), 16),
        "VALUE_SIZE": value_size,
        "VALUE": max(triton.next_power_of_2(value_size), 16),
        "ROWS": _ROWS,
        "num_warps": _WARPS if max(head_size, value_size) <= 64 else 2 * _WARPS,
    }


@triton.jit
def _visible(rows, columns, row_labels, column_labels, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Pairs within the window that may see each other."""
    ahead = columns[None, :] - rows[:, None]
    near = ahead >= -WINDOW
    near = near & (ahead <= (0 if CAUSAL else WINDOW))
    return (
        near & (row_labels[:, None] == column_labels[None, :]) & (row_labels != _PADDING)[:, None]
    )


@triton.jit
def _load_labels(label_ptr, entry, label_stride, positions, size):
    inside = (positions >= 0) & (positions < size)
    return tl.load(label_ptr + entry * label_stride + positions, mask=inside, other=_PADDING)


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
    seed_ptr,
    output_ptr,
    lse_ptr,
    size,
    heads,
    key_heads,
    label_stride,
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
    head = tl.program_id(1)
    entry = head // heads
    group = (entry * key_heads + head % heads // (heads // key_heads)).to(tl.int64) * size
    begin = head.to(tl.int64) * size
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    labels = _load_labels(label_ptr, entry, label_stride, rows, size)
    query = load_rows(query_ptr + begin * HEAD_SIZE, rows, HEAD_SIZE, inside, HEAD_SIZE, HEAD)
    peak = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, VALUE), tl.float32)
    low = tl.maximum(first_row - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_row + ROWS + (0 if CAUSAL else WINDOW), size)
    for column in range(low, high, ROWS):
        columns = column + tl.arange(0, ROWS)
        present = columns < size
        others = _load_labels(label_ptr, entry, label_stride, columns, size)
        near = _visible(rows, columns, labels, others, WINDOW, CAUSAL)
        key = load_rows(key_ptr + group * HEAD_SIZE, columns, HEAD_SIZE, present, HEAD_SIZE, HEAD)
        value = load_rows(
            value_ptr + group * VALUE_SIZE, columns, VALUE_SIZE, present, VALUE_SIZE, VALUE
        )
        logits = _logits(query, key, bias_ptr, begin, columns, present, logit_scale, near)
        highest = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(near, tl.exp2(logits - highest[:, None]), 0.0)
        shrink = tl.exp2(peak - highest)
        total = total * shrink + tl.sum(weights, 1)
        if DROPPED > 0:
            keep = keep_pairs(seed_ptr, head, heads, rows[:, None], columns[None, :], DROPPED)
            weights = tl.where(keep, weights * kept_scale, 0.0)
        product = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        output = output * shrink[:, None] + product
        peak = highest
    total = tl.where(total > 0, total, 1.0)
    output /= total[:, None]
    store_rows(output_ptr + begin * VALUE_SIZE, rows, VALUE_SIZE, inside, output, VALUE_SIZE, VALUE)
    tl.store(lse_ptr + begin + rows, peak + tl.log2(total), mask=inside)


@triton.jit
def _query_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    label_ptr,
    seed_ptr,
    cotangent_ptr,
    lse_ptr,
    delta_ptr,
    gradient_ptr,
    size,
    heads,
    key_heads,
    label_stride,
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
    head = tl.program_id(1)
    entry = head // heads
    group = (entry * key_heads + head % heads // (heads // key_heads)).to(tl.int64) * size
    begin = head.to(tl.int64) * size
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < size
    labels = _load_labels(label_ptr, entry, label_stride, rows, size)
    query = load_rows(query_ptr + begin * HEAD_SIZE, rows, HEAD_SIZE, inside, HEAD_SIZE, HEAD)
    cotangent = load_rows(
        cotangent_ptr + begin * VALUE_SIZE, rows, VALUE_SIZE, inside, VALUE_SIZE, VALUE
    )
    lse = tl.load(lse_ptr + begin + rows, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + begin + rows, mask=inside, other=0.0)
    gradient = tl.zeros((ROWS, HEAD), tl.float32)
    low = tl.maximum(first_row - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_row + ROWS + (0 if CAUSAL else WINDOW), size)
    for column in range(low, high, ROWS):
        columns = column + tl.arange(0, ROWS)
        present = columns < size
        others = _load_labels(label_ptr, entry, label_stride, columns, size)
        near = _visible(rows, columns, labels, others, WINDOW, CAUSAL)
        key = load_rows(key_ptr + group * HEAD_SIZE, columns, HEAD_SIZE, present, HEAD_SIZE, HEAD)
        value = load_rows(
            value_ptr + group * VALUE_SIZE, columns, VALUE_SIZE, present, VALUE_SIZE, VALUE
        )
        logits = _logits(query, key, bias_ptr, begin, columns, present, logit_scale, near)
        weights = _probabilities(logits, lse)
        change = tl.dot(cotangent, tl.trans(value), input_precision="ieee")
        if DROPPED > 0:
            keep = keep_pairs(seed_ptr, head, heads, rows[:, None], columns[None, :], DROPPED)
            change = tl.where(keep, change * kept_scale, 0.0)
        edge = weights * (change - delta[:, None]) * (logit_scale / LOG2E)
        gradient += tl.dot(edge.to(key.dtype), key, input_precision="ieee")
    store_rows(gradient_ptr + begin * HEAD_SIZE, rows, HEAD_SIZE, inside, gradient, HEAD_SIZE, HEAD)


@triton.jit
def _key_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    label_ptr,
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
    label_stride,
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
    key_head = tl.program_id(1)
    entry = key_head // key_heads
    shared = heads // key_heads
    group = key_head.to(tl.int64) * size
    first_key = tl.program_id(0) * ROWS
    keys = first_key + tl.arange(0, ROWS)
    inside = keys < size
    labels = _load_labels(label_ptr, entry, label_stride, keys, size)
    key = load_rows(key_ptr + group * HEAD_SIZE, keys, HEAD_SIZE, inside, HEAD_SIZE, HEAD)
    value = load_rows(value_ptr + group * VALUE_SIZE, keys, VALUE_SIZE, inside, VALUE_SIZE, VALUE)
    key_gradient = tl.zeros((ROWS, HEAD), tl.float32)
    value_gradient = tl.zeros((ROWS, VALUE), tl.float32)
    low = first_key
    if not CAUSAL:
        low = tl.maximum(first_key - WINDOW, 0) // ROWS * ROWS
    high = tl.minimum(first_key + ROWS + WINDOW, size)
    for member in range(shared):
        head = entry * heads + key_head % key_heads * shared + member
        begin = head.to(tl.int64) * size
        bias_gradient = tl.zeros((ROWS,), tl.float32)
        for row in range(low, high, ROWS):
            rows = row + tl.arange(0, ROWS)
            present = rows < size
            others = _load_labels(label_ptr, entry, label_stride, rows, size)
            near = _visible(rows, keys, others, labels, WINDOW, CAUSAL)
            query = load_rows(
                query_ptr + begin * HEAD_SIZE, rows, HEAD_SIZE, present, HEAD_SIZE, HEAD
            )
            cotangent = load_rows(
                cotangent_ptr + begin * VALUE_SIZE, rows, VALUE_SIZE, present, VALUE_SIZE, VALUE
            )
            lse = tl.load(lse_ptr + begin + rows, mask=present, other=0.0)
            delta = tl.load(delta_ptr + begin + rows, mask=present, other=0.0)
            logits = _logits(query, key, bias_ptr, begin, keys, inside, logit_scale, near)
            weights = _probabilities(logits, lse)
            change = tl.dot(cotangent, tl.trans(value), input_precision="ieee")
            passed = weights
            if DROPPED > 0:
                keep = keep_pairs(seed_ptr, head, heads, rows[:, None], keys[None, :], DROPPED)
                change = tl.where(keep, change * kept_scale, 0.0)
                passed = tl.where(keep, weights * kept_scale, 0.0)
            passed = tl.trans(passed).to(cotangent.dtype)
            value_gradient += tl.dot(passed, cotangent, input_precision="ieee")
            edge = weights * (change - delta[:, None])
            bias_gradient += tl.sum(edge, 0)
            edge = tl.trans(edge * (logit_scale / LOG2E)).to(query.dtype)
            key_gradient += tl.dot(edge, query, input_precision="ieee")
        if bias_ptr is not None:
            tl.store(bias_gradient_ptr + begin + keys, bias_gradient, mask=inside)
    store_rows(
        key_gradient_ptr + group * HEAD_SIZE, keys, HEAD_SIZE, inside, key_gradient, HEAD_SIZE, HEAD
    )
    store_rows(
        value_gradient_ptr + group * VALUE_SIZE,
        keys,
        VALUE_SIZE,
        inside,
        value_gradient,
        VALUE_SIZE,
        VALUE,
    )
