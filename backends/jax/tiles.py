"""What the kernels share: products, positions, masks, weights of edges, dropout's hash.

Tiles are two-dimensional throughout. One number a token is a column `(M, 1)` where the tokens are
rows, and a row `(1, M)` where they are columns. Scales are `1 / max(|x|, 1e-6)`, -1 at padding.

A kernel is a function `kernel(plan, refs, out)` of dicts of references; what a call lacks is None.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOG2E = 1.4426950408889634
# A logit that no real one reaches.
NEVER = -1e30
# Scales from here on belong to vectors shorter than 1e-6, whose length has no gradient.
LONGEST_SCALE = 0.999e6

# Up to so many slots are worked on one after the other without a loop.
_FEW_SLOTS = 4

_MIX_1 = 0x85EBCA6B
_MIX_2 = 0xC2B2AE35
_GOLDEN = 0x9E3779B9


def dot(x, y):
    """A product of two tiles of one dtype, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def features(plan, part):
    """The features of one of a state's parts."""
    return aligned(part * plan.values, plan.values)


# --- positions -----------------------------------------------------------------------------------


def column_positions(first, count):
    return first + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)


def row_positions(first, count):
    return first + jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)


def rows_of(plan, tile):
    """Where a tile's positions are in a head's."""
    return aligned(tile * plan.tile, plan.tile)


def facing(plan, tile, spans, columns):
    """The range of the pieces, of `columns` tokens, that a tile faces within the sequence."""
    low = jnp.maximum(plan.before - tile, 0)
    high = jnp.minimum(plan.tiles + plan.before - tile, spans)
    pieces = plan.tile // columns
    return low * pieces, high * pieces


def locate(plan, tile, piece, columns):
    """The span of a piece that a tile faces, where it is in that, and where in a head's rows."""
    pieces = plan.tile // columns
    span = jax.lax.div(piece, pieces) if pieces > 1 else piece
    first = jax.lax.rem(piece, pieces) * columns if pieces > 1 else 0
    there = (tile + span - plan.before) * plan.tile + first
    return span, aligned(first, columns), there


def aligned(first, count):
    """A range that begins at a multiple of its length."""
    if isinstance(first, int):
        return pl.ds(first, count)
    return pl.ds(pl.multiple_of(first, count), count)


def faced_by(plan, tile, spans):
    """The range of the spans in which other tiles face this one."""
    low = jnp.maximum(tile + plan.before + 1 - plan.tiles, 0)
    high = jnp.minimum(tile + plan.before + 1, spans)
    return low, high


def within_window(queries, keys, window, past, future):
    """Pairs at most `window` apart; past: keys up to the query, future: keys from it on."""
    ahead = keys - queries
    near = ahead >= (-window if past else 0)
    return near & (ahead <= (window if future else 0))


def outside_window(queries, keys, plan):
    """Pairs that only a far edge can link."""
    ahead = keys - queries
    far = ahead < -plan.window
    return far if plan.causal else far | (ahead > plan.window)


# --- lists ---------------------------------------------------------------------------------------


def chunks_of(plan, refs):
    """The range of the chunks of this program's list; see `lists.reverse_lists`."""
    head, block = pl.program_id(0), pl.program_id(1)
    begin, end = refs["starts"][head, block], refs["starts"][head, block + 1]
    first = begin // plan.entries + block
    return first, first + (end - begin + plan.entries - 1) // plan.entries


def block_rows(plan, block):
    """Where the keys of a block are in a head's."""
    return pl.ds(block * plan.width, plan.keys)


def places_of(plan, chunk):
    """Where a chunk is in a head's lists."""
    return aligned(chunk * plan.entries, plan.entries)


def listed_rows(plan, refs, name, places, columns=slice(None)):
    """The rows of a tensor that belong to a chunk's entries."""
    if plan.target == "tpu":  # which gets them in the order of the lists
        return refs[name][places, columns]
    return refs[name][jnp.maximum(refs["positions"][places, 0], 0), columns]


def far_sum(plan, refs, name):
    """What the kernels of lists left for the entries of a tile of queries, summed over slots."""
    if plan.target == "tpu":  # which gets the sum
        return refs[name][...].astype(jnp.float32)

    def add(slot, total):
        place = refs["places"][:, slot]
        part = refs[name][jnp.maximum(place, 0), :].astype(jnp.float32)
        return total + jnp.where((place >= 0)[:, None], part, 0.0)

    total = jnp.zeros((plan.tile, refs[name].shape[-1]), jnp.float32)
    if plan.slots <= _FEW_SLOTS:
        for slot in range(plan.slots):
            total = add(slot, total)
        return total
    return jax.lax.fori_loop(0, plan.slots, add, total)


# --- states of all steps -------------------------------------------------------------------------


def rows_of_step(plan, refs, name, step, part, rows):
    """Rows of one part of one step's state; those of a long walk stand one behind the other."""
    columns = features(plan, part)
    if not plan.is_long:
        return refs[f"{name}{step}"][rows, columns]
    first = step * plan.padded_size
    if isinstance(rows, jax.Array):
        return refs[name][first + rows, columns]
    return refs[name][pl.ds(first + rows.start, rows.size), columns]


def listed_rows_of_step(plan, refs, name, step, part, places):
    """The rows of one part of one step's state that belong to a chunk's entries."""
    if plan.target != "tpu":
        positions = jnp.maximum(refs["positions"][places, 0], 0)
        return rows_of_step(plan, refs, name, step, part, positions)
    name = f"listed_{name}"  # in the order of the lists
    if not plan.is_long:
        return refs[f"{name}{step}"][places, features(plan, part)]
    places = pl.ds(step * plan.listed + places.start, places.size)
    return refs[name][places, features(plan, part)]


def load_states(plan, refs, name, rows):
    """A function of step and part that gives these rows; those of few steps are loaded once."""
    load = functools.partial(rows_of_step, plan, refs, name, rows=rows)
    if not plan.is_short:
        return load
    loaded = [[load(step, part) for part in range(plan.state_parts)] for step in range(plan.steps)]
    return lambda step, part: loaded[step][part]


def sum_over_steps(plan, left, right, shape):
    """Sums `left(step, part) right(step, part)^T` over the steps and the parts of a state."""
    total = jnp.zeros(shape, jnp.float32)
    if plan.is_long:

        def add(index, total):
            step = jax.lax.div(index, plan.state_parts)
            part = jax.lax.rem(index, plan.state_parts)
            return total + dot(left(step, part), right(step, part).T)

        return jax.lax.fori_loop(0, plan.steps * plan.state_parts, add, total)
    for step in range(plan.steps):
        for part in range(plan.state_parts):
            total += dot(left(step, part), right(step, part).T)
    return total


# --- edges ---------------------------------------------------------------------------------------


def weigh(cosine, sharpness, plan):
    """The weight f(c) of an edge; exponential ones are `exp(concentration * c)`."""
    if plan.exponential:
        weight = jnp.exp2(cosine * (sharpness * LOG2E))
    elif plan.cut == 0.0:
        return jnp.maximum(cosine, 0.0)
    else:
        weight = cosine - min(plan.cut, 0.0)
    return jnp.where(cosine > plan.cut, weight, 0.0)


def slope(cosine, sharpness, plan):
    """The derivative f'(c)."""
    if plan.exponential:
        return sharpness * weigh(cosine, sharpness, plan)
    return jnp.where(cosine > plan.cut, 1.0, 0.0)


def share_of_gradients(share, plan):
    """`1 / D` as gradients of weights have it: they count a sum of cosines below 1 as 1."""
    return share if plan.exponential else jnp.minimum(share, 1.0)


def scale_of_gradients(scale):
    """`1 / |x|` as gradients of x have it: they count a norm below 0.1 as 0.1."""
    return jnp.minimum(scale, 10.0)


def bounded(x, dtype):
    """The cast of finite numbers to finite numbers."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.minimum(jnp.maximum(x, -largest), largest).astype(dtype)


# --- dropout -------------------------------------------------------------------------------------


def mix(x):
    """MurmurHash3's 32-bit finaliser, of uint32."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(_MIX_1)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(_MIX_2)
    return x ^ (x >> jnp.uint32(16))


def keep_pairs(word, queries, keys, rate):
    """Which pairs dropout keeps; `word` is the hash of seed, batch entry and head."""
    pairs = mix(word ^ queries.astype(jnp.uint32))
    pairs = mix(pairs + keys.astype(jnp.uint32) * jnp.uint32(_GOLDEN))
    return (pairs & jnp.uint32(0x7FFFFFFF)) >= jnp.uint32(int(rate * 2**31))
