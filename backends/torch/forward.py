"""The forward pass: the order of its kernels."""

import torch

from keras_rwr.backends.torch import band_kernels, list_kernels, row_kernels
from keras_rwr.backends.torch.launch import PLAIN_ROWS, Walk, head_stride, strides
from keras_rwr.backends.torch.run import run
from keras_rwr.backends.torch.selection import reverse_lists


def forward(inputs, options, keep):
    """The forward pass.

    Args:
        inputs: `Inputs`.
        options: `Options`.
        keep: Bool. Whether a backward pass follows.

    Returns:
        `Saved`, of use to the backward pass only with `keep`.
    """
    walk = Forward(inputs, options)
    lists = None
    if inputs.neighbors is not None:
        lists = reverse_lists(inputs.neighbors, walk.blocks)
    saved = walk.allocate(keep, lists)
    walk.launch(saved, keep)
    return saved


class Forward(Walk):
    """A call's plan, and the launches of its forward pass."""

    def launch(self, saved, keep):
        """Fills `saved`."""
        inputs, options = self.inputs, self.options
        for x, scale in zip((inputs.query, inputs.key), saved.scales, strict=True):
            run(
                row_kernels.measure_scales,
                self.grid(PLAIN_ROWS),
                x,
                inputs.padding_mask,
                scale,
                *strides(x),
                self.size,
                self.heads,
                self.batch_heads,
                ROWS=PLAIN_ROWS,
                **self.heads_of,
            )
        walks_at_once = (
            options.steps > 0 and not options.reciprocal and self.weight_dtype == self.dtype
        )
        far = {}
        if inputs.neighbors is not None:
            far = self.weigh_far_edges(saved, walks_at_once)
        self.attend_locally(saved, walks_at_once, **far)
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

    def weigh_far_edges(self, saved, walks):
        """Weighs far edges; with `walks` they carry the values, for the walk's first step."""
        inputs, options = self.inputs, self.options
        entries = inputs.neighbors.shape
        far = {
            "sums": self.empty(*entries, dtype=torch.float32),
            "back_sums": self.numbers() if options.mutual else None,
            "spread": self.empty(*entries, self.value_size) if walks else None,
        }
        run(
            list_kernels.weigh_far_edges,
            (self.batch_heads * self.blocks,),
            inputs.query,
            inputs.key,
            *saved.scales,
            inputs.bias,
            inputs.concentration,
            saved.entries,
            saved.starts,
            saved.weights,
            far["sums"],
            far["back_sums"],
            inputs.value,
            far["spread"],
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(inputs.value),
            self.size,
            self.heads,
            self.blocks,
            self.first_entry,
            CAUSAL=options.causal,
            **self.lists,
            **self.heads_of,
            **self.values_of,
            **self.edges,
            **self.listing("weigh"),
        )
        if walks and options.mutual:
            far["collected"] = self.collect(saved, inputs.value, self.gain, None)
        return far

    def attend_locally(self, saved, walks, sums=None, back_sums=None, spread=None, collected=None):
        inputs, options = self.inputs, self.options
        following = self.state(saved, 1) if walks else None
        tile = self.tile("local")
        run(
            band_kernels.attend_locally,
            self.grid(tile.rows),
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
            following,
            *strides(inputs.query),
            *strides(inputs.key),
            *strides(inputs.value),
            *strides(saved.output),
            head_stride(following),
            self.size,
            self.heads,
            self.batch_heads,
            self.logit_scale,
            self.keep_walking,
            self.kept_scale,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            BREADTH=saved.band.shape[-1],
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
            row_kernels.start_reciprocal,
            self.grid(PLAIN_ROWS),
            inputs.value,
            saved.scales[0],
            saved.share,
            inputs.bias,
            saved.start,
            *strides(inputs.value),
            self.size,
            self.heads,
            self.batch_heads,
            ROWS=PLAIN_ROWS,
            **self.values_of,
        )

    def combine(self, saved, state):
        run(
            row_kernels.combine,
            self.grid(PLAIN_ROWS),
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
            ROWS=PLAIN_ROWS,
            RECIPROCAL=self.options.reciprocal,
            **self.values_of,
        )
