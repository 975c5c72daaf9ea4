"""RWR attention in O(S) memory, in `keras.ops`: any backend, any device, any differentiation.

LOCAL works on tiles of queries against their band of keys, the walk is Horner's scheme on the
sparse graph. Fusion `"sum"` only: `"softmax"` needs the walk's dense rows.

Letters: B batch, S positions, N heads, H head size, V value size, C tiles, M queries in a tile,
L keys in a tile's band.
"""

from keras import ops

from keras_rwr.dropout import keep_mask
from keras_rwr.graph import transition
from keras_rwr.tensors import head_major, key_bias, per_head, prepare, reciprocal
from keras_rwr.tiling import Tiling


def supports(spec):
    """Why the call is refused, or `None`."""
    if spec.config.fusion != "sum":
        return f'fusion "{spec.config.fusion}" needs the dense rows of the walk'
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
    trace=None,
):
    """RWR attention; arguments and result as in `keras_rwr.reference.rwr_attention`.

    `trace`, a list, gets the iterates of the walk appended; see `walk`.
    """
    bias = None
    if discoverability is not None:
        bias = key_bias(key, discoverability)  # (B, S, N)
    if graph is None:
        graph = transition(query, key, config, concentration, padding_mask, neighbors, bias)

    query, key, valid = prepare(query, key, padding_mask)
    dtype, value = value.dtype, head_major(value)
    if padding_mask is not None:
        value = ops.where(valid, value, 0.0)
    gamma = per_head(lens_strength, value.dtype)
    local = windowed_attention(query, key, value, valid, config, bias, seed)  # (B, N, S, V)
    walked = graph.tiling.cut(walk(graph, graph.tiling.pad(value), config, trace))
    output = local + gamma * walked
    return ops.cast(ops.transpose(ops.where(valid, output, 0.0), (0, 2, 1, 3)), dtype)


def walk(graph, value, config, trace=None):
    """`alpha sum_t (1 - alpha)^t P^t V`, mixed with the backward walk when reciprocal.

    Args:
        graph: Normalised `SparseGraph`.
        value: Tensor of shape `(B, N, padded_size, V)`.
        config: `RWRConfig`.
        trace: `None` or list. It gets the iterates of Horner's scheme, `Z^0` to `Z^steps`, of shape
            `(B, N, padded_size, walk_features)`, appended.

    Returns:
        Tensor of the shape of `value`.
    """
    current = start = walk_start(value, graph.stationary[..., None], config)
    if trace is not None:
        trace.append(start)
    for _ in range(config.steps):
        current = start + (1.0 - config.alpha) * graph.matmul(current)
        if trace is not None:
            trace.append(current)
    return walk_end(current, config)


def walk_start(value, stationary, config):
    """What is walked: V, or `[V, V / pi, 1 / pi]` when reciprocal.

    Args:
        value: Tensor of shape `(B, N, S, V)`.
        stationary: Tensor of shape `(B, N, S, 1)`, pi.
        config: `RWRConfig`.

    Returns:
        Tensor of shape `(B, N, S, walk_features)`.
    """
    if not config.is_reciprocal:
        return value
    inverse = reciprocal(stationary)
    return ops.concatenate([value, value * inverse, inverse], axis=-1)


def walk_end(current, config):
    """The walk's sum for its last iterate, `(B, N, S, walk_features)` to `(B, N, S, V)`."""
    walked = config.alpha * current
    if not config.is_reciprocal:
        return walked
    # r_back_ij = rho (r_ij / pi_j) / sum_k (r_ik / pi_k): the same walk of V / pi and of 1 / pi.
    features = walked.shape[-1] // 2
    forward, backward = walked[..., :features], walked[..., features : 2 * features]
    backward = config.mass * backward * reciprocal(walked[..., 2 * features :])
    return config.reciprocal_beta * forward + (1.0 - config.reciprocal_beta) * backward


def walk_features(config, value_dim):
    """Number of features that are walked for values of size `value_dim`."""
    return 2 * value_dim + 1 if config.is_reciprocal else value_dim


def windowed_attention(query, key, value, valid, config, bias=None, seed=None):
    """LOCAL: softmax attention within the window, 0 for a query without a key.

    Args:
        query: Tensor of shape `(B, N, S, H)`.
        key: Tensor of shape `(B, N, S, H)`.
        value: Tensor of shape `(B, N, S, V)`.
        valid: Bool tensor of shape `(B or 1, 1, S, 1)`, true at real tokens.
        config: `RWRConfig`.
        bias: `None` or tensor of shape `(B, S, N)`, added to the logits of key j.
        seed: `None`, int or int tensor of shape `(2,)`: dropout's.

    Returns:
        Tensor of shape `(B, N, S, V)`.
    """
    tiling = Tiling.create(ops.shape(query)[2], config)
    near = tiling.local_mask(tiling.pad(ops.cast(valid, "int32")) > 0, config)

    def tiles(x):
        return tiling.split(tiling.pad(x))

    def band(x):
        return tiling.band(tiles(x))

    logits = ops.matmul(
        tiles(query * query.shape[-1] ** -0.5), ops.swapaxes(band(key), -1, -2)
    )  # (B, N, C, M, L)
    if bias is not None:
        bias = ops.where(valid, ops.transpose(bias, (0, 2, 1))[..., None], 0.0)
        logits = logits + ops.swapaxes(band(bias), -1, -2)
    logits = ops.where(near, logits, -1e30)
    # A row without a key has no logit near its peak, so that all of its weights are 0.
    peak = ops.maximum(ops.stop_gradient(ops.amax(logits, -1, keepdims=True)), -1e20)
    weights = ops.exp(logits - peak)
    total = ops.sum(weights, -1, keepdims=True)
    if seed is not None and config.dropout > 0.0:
        rows = ops.reshape(ops.arange(tiling.padded_size, dtype="int32"), (-1, tiling.tile, 1))
        keep = keep_mask(seed, config.dropout, *ops.shape(query)[:2], rows, rows + tiling.offsets())
        weights = ops.where(keep, weights / (1.0 - config.dropout), 0.0)
    output = ops.matmul(weights, band(value)) / ops.where(total > 0, total, 1.0)
    return tiling.cut(tiling.join(output))
