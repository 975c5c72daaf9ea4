"""Dividing a call into pieces of some heads, whose tensors are views of the whole call's.

What only one piece needs at a time takes a piece's memory.
"""

import itertools
from typing import NamedTuple

from keras_rwr.backends.torch.plan import Inputs, Saved, ceil_div


class Piece(NamedTuple):
    """All heads of some batch entries, or some heads of one entry.

    Either lies together in a tensor `(B, N, ...)`.
    """

    entries: slice
    heads: slice
    first_head: int  # of all heads of all batch entries
    head_count: int

    def of_tokens(self, x):
        """The piece of a tensor `(B, S, N, F)`."""
        return None if x is None else x[self.entries, :, self.heads]

    def of_heads(self, x):
        """The piece of a tensor `(B, N, ...)`."""
        return None if x is None else x[self.entries, self.heads]

    def inputs(self, inputs):
        """The piece of `Inputs`."""
        mask, seed = inputs.padding_mask, inputs.seed
        if seed is not None and self.first_head > 0:
            # Dropout counts from the whole call's first batch entry and head.
            seed = seed.clone()
            seed[2] += self.entries.start
            seed[3] += self.heads.start
        return Inputs(
            query=self.of_tokens(inputs.query),
            key=self.of_tokens(inputs.key),
            value=self.of_tokens(inputs.value),
            bias=self.of_heads(inputs.bias),
            concentration=inputs.concentration[self.heads],
            lens_strength=inputs.lens_strength[self.heads],
            padding_mask=None if mask is None else mask[self.entries],
            neighbors=self.of_heads(inputs.neighbors),
            seed=seed,
        )

    def saved(self, saved, blocks):
        """The piece of `Saved`; `blocks` is the number of a head's key blocks."""
        starts = saved.starts
        if starts is not None:
            first, count = self.first_head * blocks, self.head_count * blocks
            starts = starts[first : first + count + 1]
        return Saved(
            output=self.of_tokens(saved.output),
            states=self.of_heads(saved.states),
            start=self.of_heads(saved.start),
            scales=saved.scales[:, self.entries, self.heads],
            band=self.of_heads(saved.band),
            lse=self.of_heads(saved.lse),
            share=self.of_heads(saved.share),
            entries=saved.entries,
            starts=starts,
            weights=self.of_heads(saved.weights),
        )


def divide(plan, tokens):
    """Pieces of a call, of about as many tokens, counted once a head.

    Args:
        plan: `Plan` of the whole call.
        tokens: Int >= 1.

    Returns:
        List of `Piece`.
    """
    at_once = max(1, tokens // plan.size)
    if at_once >= plan.heads:
        entries, heads = _parts(plan.batch, at_once // plan.heads), [slice(0, plan.heads)]
    else:
        entries, heads = _parts(plan.batch, 1), _parts(plan.heads, at_once)
    return [
        Piece(
            entries=entry,
            heads=head,
            first_head=entry.start * plan.heads + head.start,
            head_count=(entry.stop - entry.start) * (head.stop - head.start),
        )
        for entry in entries
        for head in heads
    ]


def _parts(size, most):
    """Slices of an axis, as equal as they can be, of at most so many."""
    count = ceil_div(size, most)
    borders = [size * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(borders)]
