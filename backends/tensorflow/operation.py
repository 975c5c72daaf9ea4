"""The operation as one function that XLA compiles, with its gradient inside."""

import functools
import os

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_rwr.backends.tensorflow.band import Band
from keras_rwr.backends.tensorflow.dropout import row_hashes
from keras_rwr.backends.tensorflow.lists import Lists
from keras_rwr.backends.tensorflow.local import NEGATIVE, windowed_attention
from keras_rwr.backends.tensorflow.plan import sizes
from keras_rwr.backends.tensorflow.walk import walk

# Whether XLA compiles the function. Without it TensorFlow runs the same operations one by one.
IS_COMPILED = os.environ.get("KERAS_RWR_XLA") != "0"

_SMALLEST_NORM = 1e-6


def attention(options):
    """The function of tensors that attends with some `Options`.

    Where XLA compiles the caller, that is the bare function: a compiled function inside another has
    its gradient in a third, and constants that go from one to the other take all of their
    neighbours along, so that XLA would compile with the query's numbers as constants.
    """
    attend = compiled_attention(options)
    if IS_COMPILED and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return attend.python_function
    return attend


@functools.cache
def compiled_attention(options):
    """`attention` as XLA compiles it, anew for new shapes only."""

    @tf.function(jit_compile=IS_COMPILED, autograph=False)
    def attend(
        query,
        key,
        value,
        concentration,
        lens_strength,
        discoverability,
        padding_mask,
        neighbors,
        seed,
    ):
        """RWR attention in the dtype of its tensors.

        Args:
            query: Tensor of shape `(B, S, N, H)`.
            key: Tensor of shape `(B, S, N, H)`.
            value: Tensor of shape `(B, S, N, V)`.
            concentration: Tensor of shape `(N,)`, κ.
            lens_strength: Tensor of shape `(N,)`, γ.
            discoverability: `None` or tensor of shape `(N, H)`, u.
            padding_mask: `None` or bool tensor of shape `(B, S)`.
            neighbors: `None` or int32 tensor of shape `(B, N, S, slots)`.
            seed: `None` or int32 tensor of shape `(4,)`.

        Returns:
            Tensor of shape `(B, S, N, V)`.
        """
        batch, size, heads, _ = sizes(query)
        if padding_mask is None:
            real = tf.ones((batch, size), tf.bool)
        else:
            real = padding_mask
            query, key, value = (
                tf.where(real[..., None, None], x, tf.zeros_like(x)) for x in (query, key, value)
            )
        real = tf.reshape(tf.repeat(real[:, None], heads, 1), (-1, size, 1))  # (G, S, 1)
        query, key, value = (head_major(x) for x in (query, key, value))  # (G, S, F)
        band = Band(query, options)

        bias = tf.zeros_like(query[..., :1])  # b, (G, S, 1)
        if discoverability is not None:
            # Positions times features, as the products of the walk: G = B N.
            by_head = tf.tile(discoverability, (batch, 1))[..., None]  # (G, H, 1)
            bias = tf.clip_by_value(tf.matmul(key, by_head), -8.0, 8.0)
        hashes = None if seed is None else row_hashes(seed, batch, heads, size)
        local = windowed_attention(
            query, key, value, tf.where(real, bias, NEGATIVE), band, hashes
        )  # (G, S, V)

        walked = options.alpha * value
        if options.steps > 0:
            lists = None
            if neighbors is not None:
                lists = Lists(
                    tf.reshape(neighbors, (-1, size, neighbors.shape[-1])), options.neighbor_block
                )
            sharpness = tf.tile(concentration, (batch,))[:, None, None]
            kind = tf.cast(real, query.dtype)
            last = walk(unit(query), unit(key), value, bias, sharpness, kind, band, lists)
            walked = options.alpha * last
            if options.reciprocal:
                walked = reciprocal_mix(walked, value.shape[-1])
        strength = tf.tile(lens_strength, (batch,))[:, None, None]
        output = local + strength * walked
        output = tf.where(real, output, tf.zeros_like(output))
        output = tf.reshape(output, (batch, heads, size, value.shape[-1]))
        return tf.transpose(output, (0, 2, 1, 3))

    def reciprocal_mix(walked, features):
        """β r + (1 − β) r_back of walked [V, V / π, 1 / π]: `(G, S, 2 V + 1)` to `(G, S, V)`."""
        forward, backward, total = tf.split(walked, [features, features, 1], -1)
        beta = options.reciprocal_beta
        return beta * forward + (1.0 - beta) * options.mass * (backward / total)

    return attend


def head_major(x):
    """`(B, S, N, F)` to `(G, S, F)`."""
    _, size, _, features = sizes(x)
    return tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (-1, size, features))


def unit(x):
    """`x / max(|x|, 1e-6)` along the last axis, with a finite gradient at 0."""
    squares = tf.reduce_sum(tf.square(x), -1, keepdims=True)
    return x / tf.sqrt(tf.maximum(squares, _SMALLEST_NORM**2))
