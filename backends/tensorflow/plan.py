"""What a call is about: its options, and shapes that may be known when XLA compiles only.

Letters, here and in the other modules: B batch, S positions, N heads, G = B N, H head size, V value
size, F features, C tiles, M positions in a tile.
"""

from typing import NamedTuple

import tensorflow as tf


class Options(NamedTuple):
    """The options of a call that are not tensors; see `keras_rwr.RWRConfig`."""

    alpha: float
    steps: int
    neighbor_block: int
    window: int
    cut: float | None
    exponential: bool
    reversible: bool
    reciprocal_beta: float
    causal: bool
    dropout: float
    block_size: int | None

    @property
    def reciprocal(self):
        """Whether the backward walk takes part."""
        return self.reversible and self.reciprocal_beta < 1.0

    @property
    def mutual(self):
        """Whether a far edge links both of its ends."""
        return self.reversible and not self.causal

    @property
    def mass(self):
        """Total weight of a walk."""
        return 1.0 - (1.0 - self.alpha) ** (self.steps + 1)


def sizes(x):
    """The shape of a tensor: an int where it is known, a scalar tensor elsewhere."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def first_order(*gradients):
    """The results of a backward pass, which refuse to be differentiated again.

    What the backward pass takes from loops of the forward pass has no gradient, see `in_chunks`:
    derivatives of the second order would be wrong.
    """

    @tf.custom_gradient
    def results(*gradients):
        def refuse(*upstream):
            raise NotImplementedError(
                '`implementation="xla"` has derivatives of the first order only. '
                f"Received: {len(upstream)} gradients to differentiate again"
            )

        return gradients, refuse

    return results(*gradients)


def ceil_div(a, b):
    return -(-a // b)
