"""What the kernels share: loading rows, masks, weights of edges, dropout's hash.

Heads are counted through batch entries, `head = batch_entry * heads + head_in_entry`. Vectors of
one number a token are float32 of shape `(B * N, S)`. `query_scale` and `key_scale` hold `1 /
max(|x|, 1e-6)`, and -1 at padding.
"""

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
def head_offset(head, heads, batch_stride, head_stride):
    """Where a head's rows begin in a tensor `(B, S, N, H)`."""
    return (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride


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
def locate_in_band(
    band_ptr, head, size, rows, columns, WINDOW: tl.constexpr, BREADTH: tl.constexpr
):
    """Where a head's band holds the pairs of rows and columns, and which of them it holds.

    It holds BREADTH columns of each row, from `row // 8 * 8 - WINDOW` on, so that eight rows begin
    at the same column: pieces of eight columns are held as a whole or not at all. One of `rows` and
    `columns` is a column, the other a row.
    """
    lanes = columns - (rows // 8 * 8 - (WINDOW + 7) // 8 * 8)
    pointers = band_ptr + head.to(tl.int64) * size * BREADTH + rows.to(tl.int64) * BREADTH + lanes
    return pointers, (lanes >= 0) & (lanes < BREADTH) & (rows < size)


@triton.jit
def load_numbers(pointer, head, size, positions, inside, default):
    """One number a token of a head."""
    return tl.load(pointer + head.to(tl.int64) * size + positions, mask=inside, other=default)


@triton.jit
def store_numbers(pointer, head, size, positions, inside, x):
    tl.store(pointer + head.to(tl.int64) * size + positions, x, mask=inside)


@triton.jit
def load_gain(bias_ptr, head, size, positions, inside):
    """`g_j = exp(b_j)`."""
    return tl.exp2(load_numbers(bias_ptr, head, size, positions, inside, 0.0) * LOG2E)


@triton.jit
def within_window(rows, columns, WINDOW: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr):
    """Pairs at most WINDOW apart; PAST: columns up to the row, FUTURE: columns from the row on."""
    ahead = columns[None, :] - rows[:, None]
    if PAST and FUTURE:
        return (ahead <= WINDOW) & (ahead >= -WINDOW)
    elif PAST:
        return (ahead <= 0) & (ahead >= -WINDOW)
    else:
        return (ahead >= 0) & (ahead <= WINDOW)


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
def outside_window(queries, keys, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Pairs that only a far edge can link."""
    ahead = keys[None, :] - queries[:, None]
    if CAUSAL:
        return ahead < -WINDOW
    else:
        return (ahead < -WINDOW) | (ahead > WINDOW)


@triton.jit
def weigh(cosine, sharpness, CUT: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """The weight f(c) of an edge; exponential ones are `exp(concentration * c)`."""
    if EXPONENTIAL:
        weight = tl.exp2(cosine * (sharpness * LOG2E))
        return tl.where(cosine > CUT, weight, 0.0)
    elif CUT == 0.0:
        return tl.maximum(cosine, 0.0)
    elif CUT > 0.0:
        return tl.where(cosine > CUT, cosine, 0.0)
    else:
        return tl.where(cosine > CUT, cosine - CUT, 0.0)


@triton.jit
def slope(cosine, sharpness, CUT: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """The derivative f'(c)."""
    if EXPONENTIAL:
        return sharpness * weigh(cosine, sharpness, CUT, EXPONENTIAL)
    else:
        return tl.where(cosine > CUT, 1.0, 0.0)


@triton.jit
def share_of_gradients(share, EXPONENTIAL: tl.constexpr):
    """`1 / D` as gradients of weights have it: they count a sum of cosines below 1 as 1."""
    if EXPONENTIAL:
        return share
    else:
        return tl.minimum(share, 1.0)


@triton.jit
def scale_of_gradients(scale):
    """`1 / |x|` as gradients of x have it: they count a norm below 0.1 as 0.1."""
    return tl.minimum(scale, 10.0)


@triton.jit
def along_itself(scale, radial):
    """What a vector's gradient along itself is taken away with, as a multiple of the vector."""
    return tl.where(scale < LONGEST_SCALE, scale * scale_of_gradients(scale) * radial, 0.0)


@triton.jit
def bounded(x, LARGEST: tl.constexpr):
    """Finite numbers of a dtype whose largest is LARGEST."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def mix(x):
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep_pairs(seed_ptr, head, heads, queries, keys, DROPPED: tl.constexpr):
    """Which pairs dropout keeps; one of `queries` and `keys` is a column, the other a row."""
    first = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    second = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    entry = (head // heads + tl.load(seed_ptr + 2)).to(tl.uint32)
    head_in_entry = (head % heads + tl.load(seed_ptr + 3)).to(tl.uint32)
    word = mix(mix(mix(mix(first) ^ second) ^ entry) ^ head_in_entry)
    pairs = mix(mix(word ^ queries.to(tl.uint32)) + keys.to(tl.uint32) * 0x9E3779B9)
    return (pairs & 0x7FFFFFFF) >= DROPPED
