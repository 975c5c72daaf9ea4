"""The definition of RWR attention, dense: `S x S` matrices, one line a formula.

    y_i = LOCAL(i) + gamma * RWR(i)

Every implementation is held against this one. It takes O(S^2) memory and O(S^3) time.

Letters: B batch, S positions, N heads, H head size; i a query, j and k keys.
"""

from keras import ops

from keras_rwr.blocks import best_columns
from keras_rwr.dropout import keep_mask
from keras_rwr.graph import select_neighbors
from keras_rwr.tensors import head_major, key_bias, per_head, prepare, reciprocal, unit


def supports(spec):
    """The reference takes every call."""
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
    """RWR attention, `y = A V` with the dense matrix of `attention_matrix`.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        value: Tensor of shape `(B, S, N, V)`.
        config: `RWRConfig`.
        lens_strength: Scalar or tensor of shape `(N,)`, gamma.
        concentration: Scalar or tensor of shape `(N,)`, kappa.
        discoverability: `None` or tensor of shape `(N, H)`, u.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        seed: `None`, int or int tensor of shape `(2,)`: dropout's.
        neighbors: `None` or int tensor `(B, N, S, topk / neighbor_block)` of key blocks.
        graph: `None` or a normalised `SparseGraph` to walk on.

    Returns:
        Tensor of shape `(B, S, N, V)` in the dtype of `query`.
    """
    matrix = attention_matrix(
        query,
        key,
        config,
        lens_strength=lens_strength,
        concentration=concentration,
        discoverability=discoverability,
        padding_mask=padding_mask,
        seed=seed,
        neighbors=neighbors,
        graph=graph,
    )
    values = head_major(value)  # (B, N, S, V)
    if padding_mask is not None:
        values = ops.where(ops.cast(padding_mask, "bool")[:, None, :, None], values, 0.0)
    return ops.cast(ops.transpose(ops.matmul(matrix, values), (0, 2, 1, 3)), query.dtype)


def attention_matrix(
    query,
    key,
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
    """The matrix A with `y = A V`: softmax LOCAL plus gamma R, or the softmax of both.

    Args: see `rwr_attention`. Without a seed nothing is dropped.

    Returns:
        Tensor of shape `(B, N, S, S)`.
    """
    forward, walk = _walks(
        query, key, config, concentration, discoverability, padding_mask, neighbors, graph
    )
    bias = _bias(key, discoverability, padding_mask)
    query, key, valid = prepare(query, key, padding_mask)
    near = _near(valid, config)
    gamma = per_head(lens_strength, query.dtype)

    logits = ops.matmul(query, _transpose(key)) / query.shape[-1] ** 0.5 + bias
    if config.fusion == "sum":
        scores = _softmax(logits, near, config, seed) + gamma * walk
    else:
        reached = ops.logical_and(walk > 0, ops.logical_not(near))
        farthest = _strongest(walk, reached, config.topk)
        logits = ops.where(near, logits, 0.0) + gamma * forward
        scores = _softmax(logits, ops.logical_or(near, farthest), config, seed)
    return ops.where(valid, scores, 0.0)


def walk_matrix(
    query,
    key,
    config,
    *,
    concentration,
    discoverability=None,
    padding_mask=None,
    neighbors=None,
    graph=None,
):
    """The walk's weights r_ij, mixed with the backward walk's when `config.is_reciprocal`.

    Args: see `rwr_attention`.

    Returns:
        Tensor of shape `(B, N, S, S)` whose rows sum to `config.mass`.
    """
    return _walks(
        query, key, config, concentration, discoverability, padding_mask, neighbors, graph
    )[1]


def _walks(query, key, config, concentration, discoverability, padding_mask, neighbors, graph):
    """r and r_recip, each of shape (B, N, S, S)."""
    if graph is None:
        transition, stationary = transition_matrix(
            query,
            key,
            config,
            concentration=concentration,
            discoverability=discoverability,
            padding_mask=padding_mask,
            neighbors=neighbors,
        )
    else:
        transition = graph.to_dense()
        stationary = graph.stationary[..., : graph.tiling.size]

    # r_i = alpha * sum_t (1 - alpha)^t (P^t)_i by Horner's scheme: Z <- I + (1 - alpha) P Z.
    identity = ops.eye(ops.shape(transition)[-1], dtype=transition.dtype)
    visits = identity + ops.zeros_like(transition)
    for _ in range(config.steps):
        visits = identity + (1.0 - config.alpha) * ops.matmul(transition, visits)
    forward = config.alpha * visits
    if not config.is_reciprocal:
        return forward, forward

    # r_back_ij = rho * (r_ij / pi_j) / sum_k (r_ik / pi_k)
    relative = forward * reciprocal(stationary)[:, :, None, :]
    backward = config.mass * relative * reciprocal(ops.sum(relative, -1, keepdims=True))
    beta = config.reciprocal_beta
    return forward, beta * forward + (1.0 - beta) * backward


def transition_matrix(
    query,
    key,
    config,
    *,
    concentration,
    discoverability=None,
    padding_mask=None,
    neighbors=None,
):
    """The transition matrix P and the stationary weights `pi_j = g_j D_j`.

    Args: see `rwr_attention`.

    Returns:
        Tensors of shapes `(B, N, S, S)` and `(B, N, S)`.
    """
    if neighbors is None:
        neighbors = select_neighbors(query, key, config, padding_mask)
    bias = _bias(key, discoverability, padding_mask)  # (B, N, 1, S)
    query, key, valid = prepare(query, key, padding_mask)
    near = _near(valid, config)
    edges = ops.logical_or(near, _chosen(neighbors, near, valid, config))
    cosine = ops.matmul(unit(query), _transpose(unit(key)))  # c_ij

    def weigh(mask):
        if config.edge_weight == "cosine":
            weights = cosine - min(config.cut, 0.0)
        else:
            # exp(kappa (c - 1)) up to a factor that P and the ratios of pi do not see.
            weights = ops.exp(per_head(concentration, cosine.dtype) * cosine)
        if config.cut is not None:
            mask = ops.logical_and(mask, cosine > config.cut)
        return ops.where(mask, weights, 0.0)

    weights = weigh(edges)  # W_ij
    if config.reversible:
        # W_ji of a local pair exists even where it would look ahead; S is then cut to the past.
        weights = 0.5 * (weights + _transpose(weigh(ops.logical_or(edges, _transpose(near)))))
        if config.is_causal:
            weights = ops.where(_past(weights), weights, 0.0)
    gain = ops.exp(bias)  # g_j
    weights = weights * gain
    degree = ops.sum(weights, -1, keepdims=True)  # D_i
    isolated = degree <= (1e-6 if config.edge_weight == "cosine" else 0.0)
    degree = ops.where(isolated, 1.0, degree)
    identity = ops.eye(ops.shape(weights)[-1], dtype=weights.dtype)
    transition = ops.where(isolated, identity, weights * reciprocal(degree))
    return transition, gain[..., 0, :] * degree[..., 0]


def _bias(key, discoverability, padding_mask):
    """b_j = clip(k_j u, -8, 8), of shape (B, N, 1, S); 0 without discoverability."""
    if discoverability is None:
        return ops.zeros_like(head_major(key[..., :1]))[..., None, :, 0]
    bias = key_bias(key, discoverability)
    if padding_mask is not None:
        bias = ops.where(ops.cast(padding_mask, "bool")[..., None], bias, 0.0)
    return ops.transpose(bias, (0, 2, 1))[:, :, None, :]


def _past(x):
    positions = ops.arange(ops.shape(x)[-1], dtype="int32")
    return positions[None, :] <= positions[:, None]


def _near(valid, config):
    """L_i: real pairs within the window, of shape (B or 1, 1, S, S)."""
    positions = ops.arange(ops.shape(valid)[2], dtype="int32")
    offsets = positions[None, :] - positions[:, None]  # j - i
    near = ops.abs(offsets) <= config.window
    if config.is_causal:
        near = ops.logical_and(near, offsets <= 0)
    return ops.logical_and(near, ops.logical_and(valid, _transpose(valid)))


def _chosen(neighbors, near, valid, config):
    """G_i: real tokens of the chosen blocks outside the window, of shape (B, N, S, S)."""
    if neighbors is None:
        return ops.zeros_like(near)
    block = ops.arange(ops.shape(valid)[2], dtype="int32") // config.neighbor_block
    chosen = ops.any(neighbors[..., None] == block, axis=-2)
    if config.is_causal:
        chosen = ops.logical_and(chosen, _past(near))
    real = ops.logical_and(valid, _transpose(valid))
    return ops.logical_and(ops.logical_and(chosen, real), ops.logical_not(near))


def _strongest(walk, mask, topk):
    """The topk largest entries of each row of `walk` within `mask`, as a mask."""
    if topk == 0:
        return ops.zeros_like(mask)
    columns = best_columns(ops.where(mask, ops.stop_gradient(walk), -1e30), topk)
    positions = ops.arange(ops.shape(walk)[-1], dtype="int32")
    # One slot after another: all at once would be S x topk x S.
    strongest = ops.zeros_like(mask)
    for slot in range(topk):
        strongest = ops.logical_or(strongest, columns[..., slot : slot + 1] == positions)
    return strongest


def _softmax(logits, mask, config, seed):
    """Softmax over `mask`, with dropout; rows without a key are 0."""
    logits = ops.where(mask, logits, -1e30)
    peak = ops.stop_gradient(ops.amax(logits, -1, keepdims=True))
    weights = ops.where(mask, ops.exp(logits - peak), 0.0)
    total = ops.sum(weights, -1, keepdims=True)
    probabilities = weights / ops.where(total > 0, total, 1.0)
    if seed is None or config.dropout == 0.0:
        return probabilities
    batch, heads, size = ops.shape(logits)[:3]
    positions = ops.arange(size, dtype="int32")
    keep = keep_mask(seed, config.dropout, batch, heads, positions[:, None], positions[None, :])
    return ops.where(keep, probabilities / (1.0 - config.dropout), 0.0)


def _transpose(x):
    return ops.swapaxes(x, -1, -2)
