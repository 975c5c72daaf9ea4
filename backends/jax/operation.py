"""The order of the kernels, forward and backward, and how JAX differentiates them.

Arrays are padded, positions to tiles, features as `Plan` says. Those of tokens that come from
outside or go there are as `layout.arrange` makes them, `(B, S, N, F)`, all others head-major,
`(B N, S, F)`. Letters: B batch, S positions, N heads, F features, J key blocks, L places of a
head's lists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax import band_kernels, gradient_kernels, launch, list_kernels
from keras_rwr.backends.jax.layout import by_head, tokens_shape
from keras_rwr.backends.jax.lists import Lists, reverse_lists


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, inputs):
    """LOCAL and the walk's last state.

    Args:
        plan: `Plan`.
        inputs: `Inputs`.

    Returns:
        Arrays of shape `(B, S, N, F)`: LOCAL, and Z^steps, whose features are those of
        `Plan.state_parts`.
    """
    saved = _forward(plan, inputs)
    return saved.local, saved.states[-1]


def _attend_forward(plan, inputs):
    saved = _forward(plan, inputs)
    return (saved.local, saved.states[-1]), saved


def _attend_backward(plan, saved, cotangents):
    return (_Call(plan, saved.inputs, saved.scales, saved.lists).backward(saved, *cotangents),)


attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan, inputs):
    scales = tuple(_scale(x, inputs.real) for x in (inputs.query, inputs.key))
    lists = reverse_lists(plan, inputs.neighbors) if plan.slots else None
    return _Call(plan, inputs, scales, lists).forward()


def _scale(x, real):
    """`1 / max(|x|, 1e-6)`, -1 at padding: `(B, S, N, F)` to `(B N, S, 1)`."""
    squares = by_head(jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
    return jnp.where(real, jax.lax.rsqrt(jnp.maximum(squares, 1e-12)), -1.0)


class _Call:
    """A call's arrays, and the kernels that work on them."""

    def __init__(self, plan, inputs, scales, lists):
        self.plan, self.inputs, self.lists = plan, inputs, lists
        self.query_scale, self.key_scale = scales
        self.gain = None if inputs.bias is None else jnp.exp(inputs.bias)  # (B N, S, 1)

    # --- forward

    def forward(self):
        plan, inputs = self.plan, self.inputs
        far, collected = {}, None
        if plan.slots:
            far = self.weigh_far_edges()
            if plan.mutual and plan.walks_at_once:
                collected = self.collect(far["weights"], inputs.value, self.gain, None)
        found = self.attend_locally(far, collected)
        saved = Saved(
            inputs=inputs,
            local=found["local"],
            states=(),
            scales=(self.query_scale, self.key_scale),
            lse=found["lse"],
            share=found.get("share"),
            band=found.get("band"),
            lists=self.lists,
            weights=far.get("weights"),
        )
        states = [inputs.value]
        if plan.reciprocal:
            states = [self.start_reciprocal(saved.share)]
        if plan.walks_at_once:
            states.append(found["state"])
        for _ in range(len(states) - 1, plan.steps):
            is_last = len(states) == plan.steps
            states.append(self.step(saved, states[-1], states[0], is_last))
        return saved._replace(states=tuple(states))

    def weigh_far_edges(self):
        plan, inputs = self.plan, self.inputs
        sums = self.places(1, jnp.float32)
        weights = self.places(plan.keys, plan.weight_dtype)
        back_sums = self.blocks(1, plan.keys, dtype=jnp.float32)
        spread = self.places(plan.values, plan.dtype)
        found = launch.run(
            list_kernels.weigh_far_edges,
            plan,
            (plan.blocks,),
            {
                "starts": self.starts,
                "positions": self.whole(self.lists.positions),
                "query": self.listed(inputs.query),
                "query_scale": self.listed(self.query_scale),
                "gain": self.listed(self.gain),
                "keys": self.whole(inputs.key),
                "values": self.whole(inputs.value),
                "block_scales": self.by_block(self.key_scale, -1.0),
                "block_gains": self.by_block(self.gain),
                "sharpness": self.whole(inputs.sharpness),
            },
            {
                "weights": self.whole(weights),
                "sums": self.whole(sums),
                "back_sums": self.one(back_sums) if plan.mutual else None,
                "spread": self.whole(spread) if plan.walks_at_once else None,
            },
            **plan.tuning("weigh"),
        )
        if plan.mutual:
            found["back_sums"] = self.by_position(found["back_sums"].swapaxes(-1, -2))
        return found

    def attend_locally(self, far, collected):
        plan, inputs = self.plan, self.inputs
        walks = plan.steps > 0
        state = (self.outer if plan.steps == 1 else self.tokens)(plan.values)
        return launch.run(
            band_kernels.attend_locally,
            plan,
            (plan.tiles,),
            {
                "query": self.rows(inputs.query),
                "key": self.rows(inputs.key) if plan.reversible else None,
                "value": self.rows(inputs.value) if plan.walks_at_once else None,
                "queries": self.whole(inputs.query) if plan.reversible else None,
                "keys": self.whole(inputs.key),
                "values": self.whole(inputs.value),
                "query_scale": self.rows(self.query_scale),
                "key_scale": self.rows(self.key_scale) if plan.reversible else None,
                "query_scales": self.across(self.query_scale) if plan.reversible else None,
                "key_scales": self.across(self.key_scale),
                "biases": self.across(inputs.bias),
                "sharpness": self.whole(inputs.sharpness),
                "word": self.whole(inputs.word),
                "places": self.tile_places,
                "sums": self.far(far.get("sums")),
                "back_sums": self.rows(far.get("back_sums")),
                "spread": self.far(far.get("spread")),
                "collected": self.rows(collected),
            },
            {
                "local": self.rows(self.outer(plan.values)),
                "lse": self.rows(self.numbers),
                "share": self.rows(self.numbers) if walks else None,
                "band": self.one(self.band(plan.spans, plan.weight_dtype)) if walks else None,
                "state": self.rows(state) if plan.walks_at_once else None,
            },
            **plan.tuning("local"),
        )

    def start_reciprocal(self, share):
        """What the reciprocal walk starts from, `[V, V / pi, 1 / pi]`."""
        inverse = jnp.where(share > 0, share, 1.0)
        if self.gain is not None:
            inverse /= self.gain
        inverse = jnp.where(self.inputs.real, inverse, 0.0).astype(self.plan.dtype)
        value = by_head(self.inputs.value)
        end = jnp.pad(inverse, ((0, 0), (0, 0), (0, self.plan.values - 1)))
        return jnp.concatenate([value, value * inverse, end], -1)

    def step(self, saved, state, start, is_last):
        """`start + (1 - alpha) P state`, which goes outside if it is the last one."""
        plan = self.plan
        spread = collected = None
        # P leads from a row to its keys, the back edges from keys to rows.
        if plan.slots:
            spread = self.spread(saved.weights, state, saved.share, self.gain)
        if plan.mutual:
            collected = self.collect(saved.weights, state, self.gain, saved.share)
        return self.along_band(
            band_kernels.step_along_band,
            saved,
            {
                "states": self.whole_part(state),
                "state": self.part(state),
                "start": self.part(start),
                "spread": self.far(spread, is_part=True),
                "collected": self.part(collected),
                "band": self.one(saved.band),
            },
            (self.outer if is_last else self.tokens)(plan.state),
            plan.tuning("step"),
        )

    def step_back(self, saved, state):
        """`(1 - alpha) P^T state`."""
        plan = self.plan
        spread = collected = None
        if plan.slots:
            collected = self.collect(saved.weights, state, saved.share, self.gain)
        if plan.mutual:
            spread = self.spread(saved.weights, state, self.gain, saved.share)
        return self.along_band(
            band_kernels.step_back_along_band,
            saved,
            {
                "states": self.whole_part(state),
                "state": self.part(state),
                "shares": self.whole(saved.share),
                "spread": self.far(spread, is_part=True),
                "collected": self.part(collected),
                "band": self.whole(saved.band),
            },
            self.tokens(plan.state),
            plan.tuning("step_back"),
        )

    def along_band(self, kernel, saved, inputs, output, tuning):
        plan = self.plan
        inputs["query_scale"] = self.rows(self.query_scale)
        inputs["share"] = self.rows(saved.share)
        inputs["places"] = self.tile_places
        grid = (plan.tiles, plan.state_parts)
        return launch.run(kernel, plan, grid, inputs, {"state": self.part(output)}, **tuning)[
            "state"
        ]

    def spread(self, weights, state, entry_scale, key_scale):
        """A state from keys to entries, `(B N, L, F)`."""
        output = self.places(self.plan.state, self.plan.dtype)
        inputs = {"states": self.whole(state)}
        outputs = {"entries": self.whole(output)}
        kernel = list_kernels.spread
        return self.over_lists(kernel, weights, entry_scale, key_scale, inputs, outputs)["entries"]

    def collect(self, weights, state, entry_scale, key_scale):
        """A state from entries to keys, `(B N, S, F)`."""
        output = self.blocks(self.plan.keys, self.plan.state)
        inputs = {"states": self.listed(state)}
        outputs = {"keys": self.one(output)}
        kernel = list_kernels.collect
        found = self.over_lists(kernel, weights, entry_scale, key_scale, inputs, outputs)
        return self.by_position(found["keys"])

    def over_lists(self, kernel, weights, entry_scale, key_scale, inputs, outputs):
        plan = self.plan
        inputs = {
            "starts": self.starts,
            "positions": self.whole(self.lists.positions),
            "weights": self.whole(weights),
            "entry_scale": self.listed(entry_scale),
            "key_scale": self.by_block(key_scale),
            **inputs,
        }
        tuning = plan.tuning(kernel.__name__)
        return launch.run(kernel, plan, (plan.blocks,), inputs, outputs, **tuning)

    # --- backward

    def backward(self, saved, local_gradient, walked_gradient):
        """The gradients of `Inputs`, from those of LOCAL and of the walk's last state."""
        plan, inputs = self.plan, self.inputs
        local_delta = by_head(
            jnp.sum(
                local_gradient.astype(jnp.float32) * saved.local.astype(jnp.float32),
                -1,
                keepdims=True,
            )
        )
        if plan.steps == 0:
            walk = {"value": walked_gradient}
            far, adjoints = {}, ()
        else:
            adjoints = [walked_gradient]
            for _ in range(plan.steps):
                adjoints.append(self.step_back(saved, adjoints[-1]))
            adjoints = tuple(reversed(adjoints))  # G^0 to G^steps
            walk = self.finish_adjoint(saved, adjoints)
            far = self.far_edge_gradients(saved, adjoints, walk["delta"]) if plan.slots else {}
        to_keys = self.query_gradients(saved, adjoints, local_gradient, local_delta, walk, far)
        found = self.key_gradients(saved, local_gradient, walk, far, to_keys)

        bias_gradient = sharpness_gradient = None
        if plan.biased:
            parts = [found["bias"], walk.get("bias"), far.get("key_bias"), to_keys.get("bias")]
            bias_gradient = sum(part for part in parts if part is not None)
        sharpness_gradient = jnp.zeros_like(inputs.sharpness)
        if plan.steps and plan.exponential:
            sharpness_gradient = jnp.sum(to_keys["radial"], 1, keepdims=True) / inputs.sharpness
        value_gradient = found["value"]
        if plan.steps == 0:
            value_gradient += walked_gradient
        return Inputs(
            query=to_keys["query"],
            key=found["key"],
            value=value_gradient,
            bias=bias_gradient,
            sharpness=sharpness_gradient,
            real=None,
            neighbors=None,
            word=None,
        )

    def finish_adjoint(self, saved, adjoints):
        plan = self.plan
        has_bias = plan.biased and plan.reciprocal
        return launch.run(
            gradient_kernels.finish_adjoint,
            plan,
            (plan.tiles,),
            self.steps_of("adjoint", adjoints, self.rows)
            | self.steps_of("state", saved.states, self.rows),
            {
                "value": self.rows(self.tokens(plan.values)),
                "delta": self.rows(self.numbers),
                "bias": self.rows(self.numbers) if has_bias else None,
            },
            **plan.tuning("finish"),
        )

    def far_edge_gradients(self, saved, adjoints, delta):
        plan, inputs = self.plan, self.inputs
        adjoints, states = adjoints[1:], saved.states[:-1]
        from_states = self.steps_of("listed_state", states, self.listed) | self.steps_of(
            "adjoint", adjoints, self.whole
        )
        key_numbers = self.blocks(1, plan.keys, dtype=jnp.float32)
        found = launch.run(
            list_kernels.far_edge_gradients,
            plan,
            (plan.blocks,),
            {
                "starts": self.starts,
                "positions": self.whole(self.lists.positions),
                "query": self.listed(inputs.query),
                "query_scale": self.listed(self.query_scale),
                "share": self.listed(saved.share),
                "delta": self.listed(delta),
                "gain": self.listed(self.gain),
                "keys": self.whole(inputs.key),
                "block_scales": self.by_block(self.key_scale, -1.0),
                "block_gains": self.by_block(self.gain),
                "block_shares": self.by_block(saved.share) if plan.mutual else None,
                "block_deltas": self.by_block(delta) if plan.mutual else None,
                "sharpness": self.whole(inputs.sharpness),
            }
            | self.steps_of("listed_adjoint", adjoints, self.listed)
            | self.steps_of("state", states, self.whole)
            | (from_states if plan.mutual else {}),
            {
                "entry_gradient": self.whole(self.places(plan.head, plan.dtype)),
                "entry_radial": self.whole(self.places(1, jnp.float32)),
                "entry_bias": (
                    self.whole(self.places(1, jnp.float32)) if plan.biased and plan.mutual else None
                ),
                "key_gradient": self.one(self.blocks(plan.keys, plan.head)),
                "key_radial": self.one(key_numbers),
                "key_bias": self.one(key_numbers) if plan.biased else None,
            },
            **plan.tuning("far_gradients"),
        )
        for name in ("key_radial", "key_bias"):
            if name in found:
                found[name] = found[name].swapaxes(-1, -2)
        return {
            name: self.by_position(x) if name.startswith("key") else x for name, x in found.items()
        }

    def query_gradients(self, saved, adjoints, cotangent, local_delta, walk, far):
        plan, inputs = self.plan, self.inputs
        states = {}
        if plan.steps:
            adjoints, kept = adjoints[1:], saved.states[:-1]
            states = self.steps_of("own_adjoint", adjoints, self.rows)
            states |= self.steps_of("state", kept, self.whole)
            if plan.reversible:
                states |= self.steps_of("own_state", kept, self.rows)
                states |= self.steps_of("adjoint", adjoints, self.whole)
        spans = jax.ShapeDtypeStruct(
            (plan.batch_heads, plan.tiles, plan.edge_spans, 1, plan.tile), jnp.float32
        )
        edges = self.band(plan.edge_spans, plan.dtype)
        delta = walk.get("delta")
        return launch.run(
            gradient_kernels.query_gradients,
            plan,
            (plan.tiles,),
            {
                "query": self.rows(inputs.query),
                "cotangent": self.rows(cotangent),
                "keys": self.whole(inputs.key),
                "values": self.whole(inputs.value),
                "query_scale": self.rows(self.query_scale),
                "key_scales": self.across(self.key_scale),
                "bias": self.rows(inputs.bias),
                "biases": self.across(inputs.bias),
                "sharpness": self.whole(inputs.sharpness),
                "word": self.whole(inputs.word),
                "lse": self.rows(saved.lse),
                "local_delta": self.rows(local_delta),
                "delta": self.rows(delta),
                "deltas": self.across(delta) if plan.reversible else None,
                "share": self.rows(saved.share),
                "shares": self.across(saved.share) if plan.reversible else None,
                "band": self.one(saved.band) if plan.biased and plan.steps else None,
                "places": self.tile_places,
                "entry_gradient": self.far(far.get("entry_gradient")),
                "entry_radial": self.far(far.get("entry_radial")),
                "entry_bias": self.far(far.get("entry_bias")),
                **states,
            },
            {
                "query": self.rows(self.outer(plan.head)),
                "radial": self.rows(self.numbers),
                "edges": self.one(edges),
                "key_radial": self.one(spans) if plan.steps else None,
                "key_bias": self.one(spans) if plan.biased else None,
                "bias": self.rows(self.numbers) if "entry_bias" in far else None,
            },
            **plan.tuning("query_gradients"),
        )

    def key_gradients(self, saved, cotangent, walk, far, to_keys):
        plan, inputs = self.plan, self.inputs
        return launch.run(
            gradient_kernels.key_gradients,
            plan,
            (plan.tiles,),
            {
                "key": self.rows(inputs.key),
                "queries": self.whole(inputs.query),
                "cotangents": self.whole(cotangent),
                "key_scale": self.rows(self.key_scale),
                "query_scales": self.across(self.query_scale),
                "bias": self.rows(inputs.bias),
                "word": self.whole(inputs.word),
                "lses": self.across(saved.lse),
                "edges": self.whole(to_keys["edges"]),
                "key_radials": self.whole(to_keys.get("key_radial")),
                "key_biases": self.whole(to_keys.get("key_bias")),
                "walk_gradient": self.rows(walk["value"]),
                "far_gradient": self.rows(far.get("key_gradient")),
                "far_radial": self.rows(far.get("key_radial")),
            },
            {
                "key": self.rows(self.outer(plan.head)),
                "value": self.rows(self.outer(plan.values)),
                "bias": self.rows(self.numbers) if plan.biased else None,
            },
            **plan.tuning("key_gradients"),
        )

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

    def steps_of(self, name, arrays, see):
        return {f"{name}{step}": see(x) for step, x in enumerate(arrays)}

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
