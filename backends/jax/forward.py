"""The forward pass: which kernels run, in which order, on what."""

import jax.numpy as jnp

from keras_rwr.backends.jax import band_kernels, launch, list_kernels
from keras_rwr.backends.jax.call import Call, Saved
from keras_rwr.backends.jax.layout import by_head


class Forward(Call):
    """A call's forward pass, and the steps that the backward pass takes too."""

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
