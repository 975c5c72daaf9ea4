"""The backward pass: which kernels run, in which order, on what."""

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax import band_kernels, gradient_kernels, launch, list_kernels
from keras_rwr.backends.jax.call import Inputs
from keras_rwr.backends.jax.forward import Forward
from keras_rwr.backends.jax.layout import by_head


class Backward(Forward):
    """A call's backward pass."""

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

    def finish_adjoint(self, saved, adjoints):
        plan = self.plan
        has_bias = plan.biased and plan.reciprocal
        return launch.run(
            gradient_kernels.finish_adjoint,
            plan,
            (plan.tiles,),
            {f"adjoint{step}": self.rows(x) for step, x in enumerate(adjoints)}
            | {f"state{step}": self.rows(x) for step, x in enumerate(saved.states)},
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
            | self.states_by_name(adjoints, states)
            | (self.listed_states(adjoints, states) if plan.target == "tpu" else {}),
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
        states = self.states_by_name(adjoints[1:], saved.states[:-1]) if plan.steps else {}
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
