"""RWR attention in TensorFlow that XLA compiles, on any device.

Forward and backward pass work in tiles, in memory linear in the number of tokens: see `local` and
`walk` for the formulas, `band` and `lists` for how edges are stored, `operation` for what is
compiled.

Where the environment variable KERAS_RWR_XLA is 0, TensorFlow runs the same operations without XLA.
"""

import tensorflow as tf

from keras_rwr.backends.tensorflow.plan import Options

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def supports(spec):
    """Why a call cannot run, or `None`."""
    config = spec.config
    if spec.dtype not in _DTYPES:
        return f"it computes in {', '.join(_DTYPES)}"
    if config.fusion != "sum":
        return f'fusion "{config.fusion}" needs the dense rows of the walk'
    if spec.has_graph:
        return "it weighs edges as it goes and cannot walk on a graph built earlier"
    if None in (*spec.query_shape[2:], spec.value_size):
        return "it needs to know the number of heads and the size of their vectors"
    return None


def rwr_attention(
    query,
    key,
    value,
    config,
    *,
    lens_strength,
    concentration,
    discoverability=None,
    padding_mask=None,
    seed=None,
    neighbors=None,
    graph=None,
):
    """RWR attention of one sequence with itself.

    Half precision is taken to float32 and back.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        value: Tensor of shape `(B, S, N, V)`.
        config: The options, with the fields of `keras_rwr.RWRConfig`.
        lens_strength: Number, one a head, or tensor: gamma.
        concentration: Number, one a head, or tensor: kappa.
        discoverability: `None` or tensor of shape `(N, H)`, u.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        seed: `None`, int, or int tensor of shape `(2,)` or `(4,)`: dropout's.
        neighbors: `None` or what `keras_rwr.graph.select_neighbors` returned.
        graph: Not taken, see `supports`.

    Returns:
        Tensor of shape `(B, S, N, V)` in the dtype of `query`.
    """
    from keras_rwr.backends.tensorflow import dropout, operation

    returned, heads = query.dtype, query.shape[2]
    dtype = tf.float64 if returned == tf.float64 else tf.float32
    is_dropped = config.dropout > 0.0 and seed is not None
    attend = operation.attention(as_options(config, is_dropped))
    output = attend(
        *(tf.cast(x, dtype) for x in (query, key, value)),
        _per_head(concentration, heads, dtype),
        _per_head(lens_strength, heads, dtype),
        None if discoverability is None else tf.cast(discoverability, dtype),
        None if padding_mask is None else tf.cast(padding_mask, tf.bool),
        None if neighbors is None else tf.cast(neighbors, tf.int32),
        dropout.seed_words(seed) if is_dropped else None,
    )
    return tf.cast(output, returned)


def as_options(config, is_dropped):
    """The options of a call, with the fields of `keras_rwr.RWRConfig`, as `Options`."""
    return Options(
        alpha=config.alpha,
        steps=config.steps,
        neighbor_block=config.neighbor_block,
        window=config.window,
        cut=config.cut,
        exponential=config.edge_weight == "exponential",
        reversible=config.reversible,
        reciprocal_beta=config.reciprocal_beta,
        causal=config.is_causal,
        dropout=config.dropout if is_dropped else 0.0,
        block_size=config.block_size,
    )


def _per_head(value, heads, dtype):
    """A number, or one a head, as a tensor `(N,)`."""
    value = tf.cast(tf.convert_to_tensor(value), dtype)
    return tf.broadcast_to(tf.reshape(value, (-1,)), (heads,))
