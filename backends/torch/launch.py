"""What forward and backward pass launch alike: far edges, and steps of the walk."""

import functools

from keras_rwr.backends.torch import band_kernels, list_kernels
from keras_rwr.backends.torch.plan import Plan
from keras_rwr.backends.torch.run import run

# Rows in a tile of a kernel that does no products.
PLAIN_ROWS = 64


class Walk(Plan):
    """A call's plan, and the launches of its walk."""

    def state(self, saved, step, keep=True):
        """Z^step as `(B, S, N, F)`."""
        if step == 0:
            if saved.start is None:
                return self.inputs.value
            return saved.start.transpose(1, 2)
        index = step - 1 if keep else (step - 1) % 2
        return saved.states[:, :, index].transpose(1, 2)

    @functools.cached_property
    def gain(self):
        """exp(b_j), or None."""
        return None if self.inputs.bias is None else self.inputs.bias.exp()

    def spread(self, saved, state, entry_scale, key_scale):
        """A state from keys to entries, `(B, N, S, slots, F)`."""
        output = self.empty(self.batch, self.heads, self.size, self.slots, self.walked)
        self.over_lists("spread", saved, state, entry_scale, key_scale, output)
        return output

    def collect(self, saved, state, entry_scale, key_scale):
        """A state from entries to keys, `(B, N, S, F)`."""
        output = self.empty(self.batch, self.heads, self.size, self.walked)
        self.over_lists("collect", saved, state, entry_scale, key_scale, output)
        return output

    def over_lists(self, name, saved, state, entry_scale, key_scale, output):
        run(
            getattr(list_kernels, name),
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
            self.first_entry,
            **self.lists,
            **self.state_of,
            **self.listing(name),
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
            band_kernels.step_along_band,
            self.grid(tile.rows, self.state_parts),
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
            head_stride(following),
            self.size,
            self.heads,
            self.batch_heads,
            self.keep_walking,
            options.alpha,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            BREADTH=saved.band.shape[-1],
            STAGES=tile.stages,
            SLOTS=self.slots,
            WINDOW=self.edges["WINDOW"],
            AHEAD=0 if options.causal else self.edges["WINDOW"],
            TRANSPOSED=transposed,
            PADDED=self.edges["PADDED"],
            **self.state_of,
            num_warps=tile.warps,
        )


def strides(x):
    """Strides of batch entry, token and head of a tensor `(B, S, N, F)`."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def head_stride(x):
    """Stride of a head of a tensor `(B, S, N, F)` that holds heads one after the other."""
    return 0 if x is None else x.stride(2)
