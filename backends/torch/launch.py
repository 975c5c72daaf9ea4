"""Runs the kernels of a call, the forward pass and the backward pass."""

import functools

import torch

from keras_rwr.backends.torch import gradient_kernels, walk_kernels
from keras_rwr.backends.torch.plan import Plan
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.selection import reverse_lists

# Rows in a tile of a kernel that does no products.
_PLAIN_ROWS = 64


class Launcher(Plan):
    """A call's plan, and the launches that carry it out."""

    # --- forward

    def forward(self, keep):
        """The output, and with `keep` what the backward pass needs."""
        inputs, options = self.inputs, self.options
        lists = None
        if inputs.neighbors is not None:
            lists = reverse_lists(inputs.neighbors, self.blocks)
        saved = self.allocate(keep, lists)
        for x, scale in zip((inputs.query, inputs.key), saved.scales, strict=True):
            run(
                walk_kernels.measure_scales,
                self.grid(_PLAIN_ROWS),
                x,
                inputs.padding_mask,
                scale,
                *strides(x),
                self.size,
                self.heads,
                self.batch_heads,
                ROWS=_PLAIN_ROWS,
                **self.heads_of,
            )
        sums = back_sums = None
        if inputs.neighbors is not None:
            sums, back_sums = self.weigh_far_edges(saved)
        walks_at_once = (
            options.steps > 0 and not options.reciprocal and self.weight_dtype == self.dtype
        )
        self.attend_locally(saved, sums, back_sums, walks_at_once)
        if options.reciprocal:
            self.start_reciprocal(saved)
        done = 1 if walks_at_once else 0
        ends = not options.reciprocal and done < options.steps
        for step in range(done, options.steps):
            state = self.state(saved, step, keep)
            is_last = step == options.steps - 1
            self.step(
                saved,
                state,
                self.state(saved, step + 1, keep) if keep or not is_last or not ends else None,
                start=self.state(saved, 0, keep),
                output=saved.output if is_last and ends else None,
            )
        if not ends:
            self.combine(saved, self.state(saved, options.steps, keep))
        return saved

    def state(self, saved, step, keep=True):
        """Z^step as `(B, S, N, F)`."""
        if step == 0:
            if saved.start is None:
                return self.inputs.value
            return saved.start.transpose(1, 2)
        index = step - 1 if keep else (step - 1) % 2
        return saved.states[index].transpose(1, 2)

    def weigh_far_edges(self, saved):
        inputs, options = self.inputs, self.options
        sums = self.empty(inputs.neighbors.numel(), dtype=torch.float32)
        back_sums = self.numbers() if options.mutual else None
        run(
            walk_kernels.weigh_far_edges,
            (self.batch_heads * self.blocks,),
            inputs.query,
            inputs.key,
            *saved.scales,
            inputs.bias,
            inputs.concentration,
            saved.entries,
            saved.starts,
            saved.weights,
            sums,
            back_sums,
            *strides(inputs.query),
            *strides(inputs.key),
            self.size,
            self.heads,
            self.blocks,
            CAUSAL=options.causal,
            **self.lists,
            **self.heads_of,
            **self.edges,
            **self.listing("weigh"),
        )
        return sums, back_sums

    @functools.cached_property
    def gain(self):
        """exp(b_j), or None."""
        return None if self.inputs.bias is None else self.inputs.bias.exp()

    def spread(self, saved, state, entry_scale, key_scale):
        """A state from keys to entries, `(E, F)`."""
        output = self.empty(saved.weights.shape[0], self.walked)
        self.over_lists("spread", saved, state, entry_scale, key_scale, output)
        return output

    def collect(self, saved, state, entry_scale, key_scale):
        """A state from entries to keys, `(B, N, S, F)`."""
        output = self.empty(self.batch, self.heads, self.size, self.walked)
        self.over_lists("collect", saved, state, entry_scale, key_scale, output)
        return output

    def over_lists(self, name, saved, state, entry_scale, key_scale, output):
        run(
            getattr(walk_kernels, name),
            (self.batch_heads * self.blocks, self.state_parts),
            state,
            saved.weights,
            saved.entries,
            saved.starts,
            entry_scale,
            key_scale,
            output,
            *strides(state),
            self.size,
            self.heads,
            self.blocks,
            **self.lists,
            **self.state_of,
            **self.listing(name),
        )

    def attend_locally(self, saved, sums, back_sums, walks):
        inputs, options = self.inputs, self.options
        spread = collected = None
        if walks and inputs.neighbors is not None:
            spread = self.spread(saved, inputs.value, None, self.gain)
            if options.mutual:
                collected = self.collect(saved, inputs.value, self.gain, None)
        tile = self.tile("local")
        run(
            walk_kernels.attend_locally,
            self.grid(self.rows),
            inputs.query,
            inputs.key,
            inputs.value,
            *saved.scales,
            inputs.bias,
            inputs.concentration,
            inputs.seed,
            inputs.neighbors,
            sums,
            back_sums,
            spread,
            collected,
            saved.output,
            saved.band if options.steps > 0 else None,
            saved.lse,
            saved.share,
            saved.states[0] if walks else None,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(inputs.value),
            *strides(saved.output),
            self.size,
            self.heads,
            self.batch_heads,
            self.tiles,
            self.logit_scale,
            self.keep_walking,
            self.kept_scale,
            ROWS=self.rows,
            COLUMNS=tile.columns,
            SPAN=saved.band.shape[-1],
            STAGES=tile.stages,
            SLOTS=self.slots,
            CAUSAL=options.causal,
            DROPPED=self.dropped,
            **self.heads_of,
            **self.values_of,
            **self.edges,
            num_warps=tile.warps,
        )

    def start_reciprocal(self, saved):
        inputs = self.inputs
        run(
            walk_kernels.start_reciprocal,
            self.grid(_PLAIN_ROWS),
            inputs.value,
            saved.scales[0],
            saved.share,
            inputs.bias,
            saved.start,
            *strides(inputs.value),
            self.size,
            self.heads,
            self.batch_heads,
            ROWS=_PLAIN_ROWS,
            **self.values_of,
        )

    def step(self, saved, state, following, start=None, output=None, transposed=False):
        """`start + (1 - alpha) P state` into `following`, or with the transpose of P."""
        inputs, options = self.inputs, self.options
        spread = collected = None
        # P leads from a row to its keys; its transpose, and the back edges, from keys to rows.
        if inputs.neighbors is not None:
            if not transposed:
                spread = self.spread(saved, state, saved.share, self.gain)
                if options.mutual:
                    collected = self.collect(saved, state, self.gain, saved.share)
            else:
                collected = self.collect(saved, state, saved.share, self.gain)
                if options.mutual:
                    spread = self.spread(saved, state, self.gain, saved.share)
        tile = self.tile("step")
        run(
            walk_kernels.step_along_band,
            self.grid(self.rows, self.state_parts),
            saved.band,
            saved.scales[0],
            saved.share,
            inputs.lens_strength,
            state,
            start,
            spread,
            inputs.neighbors,
            collected,
            following,
            output,
            *strides(state),
            *strides(start),
            *strides(output),
            self.size,
            self.heads,
            self.batch_heads,
            self.tiles,
            self.keep_walking,
            options.alpha,
            ROWS=self.rows,
            COLUMNS=tile.columns,
            SPAN=saved.band.shape[-1],
            STAGES=tile.stages,
            SLOTS=self.slots,
            WINDOW=self.edges["WINDOW"],
            AHEAD=0 if options.causal else self.edges["WINDOW"],
            TRANSPOSED=transposed,
            PADDED=self.edges["PADDED"],
            **self.state_of,
            num_warps=tile.warps,
        )

    def combine(self, saved, state):
        run(
            walk_kernels.combine,
            self.grid(_PLAIN_ROWS),
            state,
            saved.scales[0],
            self.inputs.lens_strength,
            saved.output,
            *strides(state),
            *strides(saved.output),
            self.size,
            self.heads,
            self.batch_heads,
            *self.options.shares,
            ROWS=_PLAIN_ROWS,
            RECIPROCAL=self.options.reciprocal,
            **self.values_of,
        )

    # --- backward

    def backward(self, saved, cotangent):
        """Gradients of query, key, value, bias, concentration and lens strength."""
        inputs, options = self.inputs, self.options
        adjoint = self.empty(options.steps + 1, self.batch, self.heads, self.size, self.walked)
        local_delta, lens_gradient, delta = self.numbers(), self.numbers(), self.numbers()
        last, start = self.state(saved, options.steps), self.state(saved, 0)
        run(
            gradient_kernels.start_adjoint,
            self.grid(_PLAIN_ROWS),
            cotangent,
            saved.output,
            last,
            saved.scales[0],
            inputs.lens_strength,
            adjoint[-1],
            local_delta,
            lens_gradient,
            *strides(cotangent),
            *strides(saved.output),
            *strides(last),
            self.size,
            self.heads,
            self.batch_heads,
            *options.shares,
            ROWS=_PLAIN_ROWS,
            WALKED=self.walked,
            RECIPROCAL=options.reciprocal,
            **self.values_of,
        )
        for step in range(options.steps, 0, -1):
            self.step(saved, adjoint[step].transpose(1, 2), adjoint[step - 1], transposed=True)
        value_gradient = self.empty(self.batch, self.size, self.heads, self.value_size)
        bias_gradient = None if inputs.bias is None else torch.zeros_like(inputs.bias)
        run(
            gradient_kernels.finish_adjoint,
            self.grid(_PLAIN_ROWS),
            adjoint,
            saved.states,
            start,
            saved.scales[0],
            value_gradient,
            delta,
            bias_gradient,
            *strides(start),
            *strides(value_gradient),
            self.size,
            self.heads,
            self.batch_heads,
            ROWS=_PLAIN_ROWS,
            WALKED=self.walked,
            STEPS=options.steps,
            RECIPROCAL=options.reciprocal,
            **self.values_of,
        )
        far = {}
        if inputs.neighbors is not None:
            far = self.far_edge_gradients(saved, adjoint, start, delta)
        query_gradient, key_gradient, radial = self.edge_gradients(
            saved, cotangent, adjoint, start, local_delta, delta, far, value_gradient, bias_gradient
        )
        concentration_gradient = torch.zeros_like(inputs.concentration)
        if options.exponential:
            concentration_gradient = radial.sum((0, 2)) / inputs.concentration
        return (
            query_gradient,
            key_gradient,
            value_gradient,
            bias_gradient,
            concentration_gradient,
            lens_gradient.sum((0, 2)),
        )

    def far_edge_gradients(self, saved, adjoint, start, delta):
        inputs, options = self.inputs, self.options
        count = inputs.neighbors.numel()
        has_bias = inputs.bias is not None
        far = {
            "entry_gradient": self.empty(count, self.head_size),
            "entry_radial": self.empty(count, dtype=torch.float32),
            "entry_bias": (
                self.empty(count, dtype=torch.float32) if has_bias and options.mutual else None
            ),
            "key_gradient": self.empty(self.batch, self.heads, self.size, self.head_size),
            "key_radial": self.numbers(),
            "key_bias": self.numbers() if has_bias else None,
        }
        run(
            gradient_kernels.far_edge_gradients,
            (self.batch_heads * self.blocks,),
            inputs.query,
            inputs.key,
            *saved.scales,
            saved.share,
            inputs.bias,
            inputs.concentration,
            saved.entries,
            saved.starts,
            adjoint,
            start,
            saved.states,
            delta,
            *far.values(),
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(start),
            self.size,
            self.heads,
            self.batch_heads,
            self.blocks,
            self.keep_walking,
            WALKED=self.walked,
            STATE=self.values,
            STEPS=options.steps,
            GROUP=self.group,
            CAUSAL=options.causal,
            LARGEST=torch.finfo(self.dtype).max,
            **self.lists,
            **self.heads_of,
            **self.edges,
            **self.listing("gradients"),
        )
        return far

    def edge_gradients(
        self,
        saved,
        cotangent,
        adjoint,
        start,
        local_delta,
        delta,
        far,
        value_gradient,
        bias_gradient,
    ):
        """Gradients of query and key, and the sums of `dc_ij c_ij` over rows."""
        inputs, options = self.inputs, self.options
        both = options.reversible or not options.causal
        tile = self.tile("edges")
        edges = self.empty(*self.band(both))
        span = edges.shape[-1]
        span_radial = self.empty(self.batch_heads, self.tiles, span, dtype=torch.float32)
        has_bias = inputs.bias is not None
        span_bias = torch.empty_like(span_radial) if has_bias else None
        query_gradient = self.empty(self.batch, self.size, self.heads, self.head_size)
        key_gradient = torch.empty_like(query_gradient)
        radial = self.numbers()
        query_bias = self.numbers() if far.get("entry_bias") is not None else None
        run(
            gradient_kernels.band_edge_gradients,
            self.grid(self.rows),
            inputs.query,
            inputs.key,
            inputs.value,
            cotangent,
            *saved.scales,
            saved.share,
            inputs.bias,
            inputs.concentration,
            inputs.seed,
            saved.band,
            saved.lse,
            local_delta,
            delta,
            adjoint,
            start,
            saved.states,
            inputs.neighbors,
            far.get("entry_gradient"),
            far.get("entry_radial"),
            far.get("entry_bias"),
            edges,
            span_radial,
            span_bias,
            query_gradient,
            radial,
            query_bias,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(inputs.value),
            *strides(cotangent),
            *strides(start),
            *strides(query_gradient),
            self.size,
            self.heads,
            self.batch_heads,
            self.tiles,
            self.logit_scale,
            self.keep_walking,
            self.kept_scale,
            ROWS=self.rows,
            COLUMNS=tile.columns,
            SPAN=span,
            BAND_SPAN=saved.band.shape[-1],
            STAGES=tile.stages,
            WALKED=self.walked,
            STATE=self.values,
            STEPS=options.steps,
            GROUP=self.group,
            SLOTS=self.slots,
            CAUSAL=options.causal,
            DROPPED=self.dropped,
            LARGEST=torch.finfo(self.dtype).max,
            **self.heads_of,
            **self.values_of,
            **self.edges,
            num_warps=tile.warps,
        )
        keys = self.tile("keys")
        run(
            gradient_kernels.key_gradients,
            self.grid(self.rows),
            inputs.query,
            inputs.key,
            cotangent,
            *saved.scales,
            inputs.bias,
            inputs.seed,
            saved.lse,
            edges,
            span_radial,
            span_bias,
            far.get("key_gradient"),
            far.get("key_radial"),
            far.get("key_bias"),
            query_bias,
            bias_gradient,
            key_gradient,
            value_gradient,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(cotangent),
            *strides(key_gradient),
            *strides(value_gradient),
            self.size,
            self.heads,
            self.batch_heads,
            self.tiles,
            self.logit_scale,
            self.kept_scale,
            ROWS=self.rows,
            SPAN=span,
            STAGES=keys.stages,
            WINDOW=self.edges["WINDOW"],
            CAUSAL=options.causal,
            BOTH=both,
            PADDED=inputs.padding_mask is not None,
            DROPPED=self.dropped,
            **self.heads_of,
            **self.values_of,
            num_warps=keys.warps,
        )
        return query_gradient, key_gradient, radial


def strides(x):
    """Strides of batch entry, token and head of a tensor `(B, S, N, F)`."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))
