"""A call's arrays, and what a program of a kernel sees of them.

Arrays are padded, positions to tiles, features as `Plan` says. Those of tokens that come from
outside or go there are as `layout.arrange` makes them, `(B, S, N, F)`, all others head-major,
`(B N, S, F)`. Letters: B batch, S positions, N heads, F features, J key blocks, L places of a
head's lists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax import launch
from keras_rwr.backends.jax.layout import by_head, tokens_shape
from keras_rwr.backends.jax.lists import Lists


class Inputs(NamedTuple):
    """The arrays of a call."""

    query: jax.Array  # (B, S, N, F), 0 at padding
    key: jax.Array  # (B, S, N, F), 0 at padding
    value: jax.Array  # (B, S, N, F), 0 at padding
    bias: jax.Array | None  # (B N, S, 1) float32, the logarithm of the discoverability
    sharpness: jax.Array  # (B N, 1, 1) float32, kappa
    real: jax.Array  # (B N, S, 1) bool
    neighbors: jax.Array | None  # (B N, S, slots) int32, not padded
    word: jax.Array | None  # (B N, 1, 1) uint32, dropout's


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    inputs: Inputs
    local: jax.Array  # (B, S, N, F)
    states: tuple  # Z^0 to Z^steps; the first and the last one (B, S, N, F)
    scales: tuple  # of query and key, each (B N, S, 1)
    lse: jax.Array  # (B N, S, 1), log2 of LOCAL's sum
    share: jax.Array | None  # (B N, S, 1), 1 / D, 0 where isolated
    band: jax.Array | None  # (B N, tiles, spans, tile, tile)
    lists: Lists | None
    weights: jax.Array | None  # (B N, L, keys), of far edges


class Call:
    """A call's arrays, and how kernels take and return them.

    Args:
        plan: `Plan`.
        inputs: `Inputs`.
        scales: Scales of query and key, `(B N, S, 1)` each; see `tiles`.
        lists: `None` or `Lists`.
    """

    def __init__(self, plan, inputs, scales, lists):
        self.plan, self.inputs, self.lists = plan, inputs, lists
        self.query_scale, self.key_scale = scales
        self.gain = None if inputs.bias is None else jnp.exp(inputs.bias)  # (B N, S, 1)

    # --- shapes of results

    def outer(self, features):
        """Tokens as `layout.arrange` arranges them."""
        return jax.ShapeDtypeStruct(tokens_shape(self.plan, features), self.plan.dtype)

    def tokens(self, features):
        plan = self.plan
        return jax.ShapeDtypeStruct((plan.batch_heads, plan.padded_size, features), plan.dtype)

    @property
    def numbers(self):
        plan = self.plan
        return jax.ShapeDtypeStruct((plan.batch_heads, plan.padded_size, 1), jnp.float32)

    def places(self, features, dtype):
        plan = self.plan
        return jax.ShapeDtypeStruct((plan.batch_heads, plan.listed, features), dtype)

    def blocks(self, *sizes, dtype=None):
        plan = self.plan
        return jax.ShapeDtypeStruct((plan.batch_heads, plan.blocks, *sizes), dtype or plan.dtype)

    def band(self, spans, dtype):
        plan = self.plan
        shape = (plan.batch_heads, plan.tiles, spans, plan.tile, plan.tile)
        return jax.ShapeDtypeStruct(shape, dtype)

    # --- arrays, or shapes of results, with what a program sees of them; None stays None

    def rows(self, x):
        """A tile's rows of an array of tokens."""
        return None if x is None else (x, launch.rows(x, self.plan.tile))

    def whole(self, x):
        """All of a head's array."""
        return None if x is None else (x, launch.whole(x))

    def one(self, x):
        """The part of a program's tile, or key block."""
        return None if x is None else (x, launch.one(x))

    def part(self, x):
        """A tile's rows of one part of a state."""
        plan = self.plan
        return None if x is None else (x, launch.rows_of_part(x, plan.tile, plan.values))

    def whole_part(self, x):
        """One part of all of a head's state."""
        return x, launch.part_of(x, self.plan.values)

    def across(self, x):
        """All of a head's numbers `(B N, S, 1)` as a row, `(B N, 1, S)`."""
        return None if x is None else self.whole(x.swapaxes(1, 2))

    def states_by_name(self, adjoints, states):
        """The states that edges have their gradients from; see `tiles.rows_of_step`."""
        named = {"adjoint": adjoints, "state": states}
        if self.plan.is_long:
            joined = {name: map(by_head, arrays) for name, arrays in named.items()}
            return {name: self.whole(jnp.concatenate([*x], 1)) for name, x in joined.items()}
        return {
            f"{name}{step}": self.whole(x)
            for name, arrays in named.items()
            for step, x in enumerate(arrays)
        }

    def listed_states(self, adjoints, states):
        """The same in the order of the lists."""
        places = jnp.maximum(self.lists.positions, 0)
        named = self.states_by_name(
            *([jnp.take_along_axis(x, places, 1) for x in arrays] for arrays in (adjoints, states))
        )
        return {f"listed_{name}": x for name, x in named.items()}

    @property
    def starts(self):
        return self.lists.starts, launch.everything(self.lists.starts)

    @property
    def tile_places(self):
        """The places of a tile's entries."""
        plan = self.plan
        if not plan.slots or plan.target == "tpu":
            return None
        beyond = ((0, 0), (0, plan.padded_size - plan.size), (0, 0))
        return self.rows(jnp.pad(self.lists.places, beyond, constant_values=-1))

    def far(self, x, is_part=False):
        """What a kernel of lists left for entries, `(B N, L, F)`; see `tiles.far_sum`."""
        plan = self.plan
        if x is None:
            return None
        if plan.target != "tpu":
            return self.whole_part(x) if is_part else self.whole(x)
        places = self.lists.places.reshape(plan.batch_heads, -1, 1)
        entries = jnp.take_along_axis(x, jnp.maximum(places, 0), 1)
        entries = jnp.where(places >= 0, entries.astype(jnp.float32), 0.0)
        total = entries.reshape(plan.batch_heads, plan.size, plan.slots, -1).sum(2)
        total = jnp.pad(total, ((0, 0), (0, plan.padded_size - plan.size), (0, 0)))
        return self.part(total) if is_part else self.rows(total)

    def listed(self, x):
        """A head's tokens, of which `tiles.listed_rows` takes a chunk's rows."""
        if x is not None and self.plan.target == "tpu":
            x = jnp.take_along_axis(x, jnp.maximum(self.lists.positions, 0), 1)
        return self.whole(x)

    def by_block(self, x, default=0.0):
        """Numbers `(B N, S, 1)` by key block, `(B N, J, 1, keys)`."""
        plan = self.plan
        if x is None:
            return None
        needed = plan.blocks * plan.width
        x = x[:, : plan.size, 0]
        x = jnp.pad(x, ((0, 0), (0, needed - plan.size)), constant_values=default)
        x = x.reshape(plan.batch_heads, plan.blocks, 1, plan.width)
        beyond = ((0, 0), (0, 0), (0, 0), (0, plan.keys - plan.width))
        return self.one(jnp.pad(x, beyond, constant_values=default))

    def by_position(self, x):
        """An array `(B N, J, keys, F)` by position, `(B N, S, F)`, 0 where there is no key."""
        plan = self.plan
        x = x[:, :, : plan.width].reshape(plan.batch_heads, plan.blocks * plan.width, -1)
        x = x[:, : plan.size]
        return jnp.pad(x, ((0, 0), (0, plan.padded_size - plan.size), (0, 0)))
