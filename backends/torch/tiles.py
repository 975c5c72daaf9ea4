"""What the kernels share: loading and storing rows, who may see whom, dropout's hash."""

import triton
import triton.language as tl

from keras_rwr._tokens import PADDING as _PADDING

PADDING = tl.constexpr(_PADDING)
LOG2E = tl.constexpr(1.4426950408889634)
# A logit that no real one reaches.
NEVER = tl.constexpr(-1e30)
# Scales from here on belong to vectors shorter than 1e-6, whose length has no gradient.
LONGEST_SCALE = tl.constexpr(0.999e6)


@triton.jit
def of_head(pointer, entry, size, heads, head, FEATURES: tl.constexpr):
    """Where a head's rows begin in `(B, S, N, F)`; they are `heads * FEATURES` apart."""
    return pointer + (entry.to(tl.int64) * size * heads + head) * FEATURES


@triton.jit
def load_labels(label_ptr, entry, size, positions, end):
    """Labels of positions, PADDING from `end` on; 0 where no token has a label."""
    if label_ptr is None:
        return tl.where((positions >= 0) & (positions < end), 0, PADDING)
    else:
        inside = (positions >= 0) & (positions < end)
        return tl.load(
            label_ptr + entry.to(tl.int64) * size + positions, mask=inside, other=PADDING
        )


@triton.jit
def load_end(end_ptr, entry, size):
    """Where a sequence ends: at its first token that is not finite, if there are `ends`."""
    if end_ptr is None:
        return size
    else:
        return tl.minimum(tl.load(end_ptr + entry), size)


@triton.jit
def row_pointers(pointer, rows, stride, first, FEATURES: tl.constexpr):
    features = first + tl.arange(0, FEATURES)
    return pointer + rows.to(tl.int64)[:, None] * stride + features[None, :]


@triton.jit
def row_mask(inside, first, SIZE: tl.constexpr, FEATURES: tl.constexpr):
    if SIZE % FEATURES == 0:
        return inside[:, None]
    else:
        return inside[:, None] & (first + tl.arange(0, FEATURES) < SIZE)[None, :]


@triton.jit
def load_rows(pointer, rows, stride, inside, SIZE: tl.constexpr, FEATURES: tl.constexpr, first=0):
    """Rows of features, 0 where `inside` is false and behind the last of SIZE features."""
    pointers = row_pointers(pointer, rows, stride, first, FEATURES)
    return tl.load(pointers, mask=row_mask(inside, first, SIZE, FEATURES), other=0.0)


@triton.jit
def store_rows(
    pointer, rows, stride, inside, x, SIZE: tl.constexpr, FEATURES: tl.constexpr, first=0
):
    pointers = row_pointers(pointer, rows, stride, first, FEATURES)
    x = x.to(pointer.dtype.element_ty)
    tl.store(pointers, x, mask=row_mask(inside, first, SIZE, FEATURES))


@triton.jit
def visible_pairs(
    rows,
    columns,
    row_labels,
    column_labels,
    LABELLED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Pairs within the window that may see each other; queries are rows, or keys are.

    Without LABELLED labels only tell what is PADDING.
    """
    ahead = columns[None, :] - rows[:, None]
    if KEYS_FIRST:
        ahead = -ahead
    near = (ahead >= -WINDOW) & (ahead <= (0 if CAUSAL else WINDOW))
    if LABELLED:
        near = near & (row_labels[:, None] == column_labels[None, :])
    return near & (row_labels != PADDING)[:, None] & (column_labels != PADDING)[None, :]


@triton.jit
def scale_of_gradients(scale):
    """`1 / |x|` as gradients of x have it: they count a norm below 0.1 as 0.1."""
    return tl.minimum(scale, 10.0)


@triton.jit
def mix(x):
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep_pairs(seed_ptr, head, heads, queries, keys, DROPPED: tl.constexpr):
    """Which pairs dropout keeps; one of `queries` and `keys` is a column, the other a row.

    Heads are counted through batch entries, `head = batch_entry * heads + head_in_entry`.
    """
    first = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    second = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    entry = (head // heads + tl.load(seed_ptr + 2)).to(tl.uint32)
    head_in_entry = (head % heads + tl.load(seed_ptr + 3)).to(tl.uint32)
    word = mix(mix(mix(mix(first) ^ second) ^ entry) ^ head_in_entry)
    pairs = mix(mix(word ^ queries.to(tl.uint32)) + keys.to(tl.uint32) * 0x9E3779B9)
    return (pairs & 0x7FFFFFFF) >= DROPPED
