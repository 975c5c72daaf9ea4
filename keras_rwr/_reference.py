"""The definition of RWR attention, dense: `S x S` matrices, one line a formula.

    y_i = LOCAL(i) + sum_t theta_t (P^t V)_i

Every implementation is held against this one. It takes O(S^2) memory and O(S^3) time.

Letters: B batch, S positions, N heads; i a query, j and k keys. All matrices are `(B, N, S, S)`.
"""

import math
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_rwr._dropout import keep_mask
from keras_rwr._far import NEGATIVE, best_columns
from keras_rwr._select import select
from keras_rwr._tensors import (
    log_add,
    minimum,
    repeat_heads,
    scale_gradient,
    softmax,
)
from keras_rwr._tokens import Tokens
from keras_rwr._walk import mix_backward, weigh_states
from keras_rwr._weigh import ISOLATED, log_weight
from keras_rwr.options import Call, Options

if TYPE_CHECKING:
    from keras_rwr._heads import Heads

Tensor = Any


def rwr_attention(heads: "Heads", options: Options, call: Call, seed: Tensor = None) -> Tensor:
    """`y = A V`, of shape `(B, N, S, V)`."""
    matrix = attention_matrix(heads, options, call, seed)
    return matrix @ repeat_heads(heads.value, heads.query.shape[1])


def attention_matrix(heads: "Heads", options: Options, call: Call, seed: Tensor = None) -> Tensor:
    """The matrix A with `y = A V`: softmax LOCAL plus the walk, or the softmax of both."""
    number, near = heads.query.shape[1], _near(heads.tokens, options.window)
    # q_i k_j / sqrt(H) + b_j
    key = repeat_heads(heads.key, number)
    logits = (heads.query @ _transpose(key)) / heads.query.shape[-1] ** 0.5
    if heads.local_bias is not None:
        logits = logits + _transpose(heads.local_bias)
    if not options.walks:
        return _softmax(logits, near, call, seed)

    if options.fusion == "sum":
        return _softmax(logits, near, call, seed) + walk_matrices(heads, options)[1]
    gamma = heads.hop_weights[..., :1] / options.alpha
    restart = ops.convert_to_tensor(options.restart_weights, dtype=logits.dtype)
    forward, walked = walk_matrices(heads, options, restart[None, None, None])
    far = ops.logical_and(heads.tokens.pairs(), ops.logical_not(_within(heads.tokens, options)))
    farthest = _strongest(walked, ops.logical_and(far, walked > 0), options.topk)
    logits = ops.where(near, logits, 0.0) + gamma * forward
    return _softmax(logits, ops.logical_or(near, farthest), call, seed)


def walk_matrices(heads: "Heads", options: Options, theta: Tensor = None) -> tuple[Tensor, Tensor]:
    """`r = sum_t theta_t P^t`, and the same mixed with the backward walk when reciprocal."""
    theta = heads.hop_weights if theta is None else theta
    number = heads.query.shape[1]
    if heads.graph is None:
        log_weights, log_degree, bias, transition = transition_matrix(heads, options)
    else:
        log_weights, log_degree, bias, transition = _matrices_of(heads.graph)
    log_weights, log_degree, transition = (
        repeat_heads(x, number) for x in (log_weights, log_degree, transition)
    )
    bias = repeat_heads(bias, number)

    identity = ops.eye(ops.shape(transition)[-1], dtype=transition.dtype)
    powers = [identity + ops.zeros_like(transition)]  # P^t
    for _ in range(theta.shape[-1] - 1):
        powers.append(transition @ powers[-1])
    forward = weigh_states(powers, theta)
    if not options.is_reciprocal:
        return forward, forward

    # r_back_ij = rho (r_ij / pi_j) / sum_k (r_ik / pi_k) is the row-normalised walk along
    # B_ij = P_ij pi_i / pi_j = g_i S_ij / D_j, here with the sums of its rows as logarithms.
    walks = [(powers[0], ops.zeros_like(log_degree))]
    for _ in range(theta.shape[-1] - 1):
        rows, log_sum = walks[-1]
        logits = log_weights + _transpose(log_sum - log_degree)
        log_sum = bias + ops.logsumexp(logits, axis=-1, keepdims=True)
        walks.append((softmax(logits) @ rows, log_sum))
    backward = mix_backward(walks, theta, options)
    beta = options.reciprocal_beta
    return forward, beta * forward + (1.0 - beta) * backward


def transition_matrix(heads: "Heads", options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transition matrix P and what it is made of.

    Returns:
        log S of shape `(B, G, S, S)`, log D and b of shape `(B, G, S, 1)`, and P.
    """
    neighbors = select(heads.graph_query, heads.graph_key, heads.tokens, options)
    near = _near(heads.tokens, options.window, options.self_edges)
    edges = ops.logical_or(near, _chosen(neighbors, heads.tokens, options))
    cosine = heads.graph_query @ _transpose(heads.graph_key)  # c_ij
    bias = heads.graph_bias  # b_j
    if bias is None:
        bias = ops.zeros_like(heads.graph_key[..., :1])
    kappa = heads.concentration

    weights = log_weight(cosine, edges, options, kappa)  # log W_ij
    if options.reversible:
        # W_ji of a local pair exists even where it would look ahead; S is then cut to the past.
        both = ops.logical_or(edges, _transpose(near))
        mirrored = _transpose(log_weight(cosine, both, options, kappa))
        weights = log_add(weights, mirrored) - math.log(2.0)
        weights = ops.where(_in_past(heads.tokens), weights, NEGATIVE)

    log_degree = ops.logsumexp(weights + _transpose(bias), axis=-1, keepdims=True)
    if options.edge_weight == "cosine":
        isolated = log_degree <= math.log(ISOLATED)
        # The gradient counts a degree below 1 as 1; see `keras_rwr._weigh.normalize`.
        weights = scale_gradient(weights, ops.exp(minimum(log_degree, 0.0)))
    else:
        isolated = log_degree <= 0.5 * NEGATIVE
    identity = ops.eye(ops.shape(weights)[-1], dtype="bool")
    alone = ops.where(identity, -bias, NEGATIVE)
    weights = ops.where(isolated, alone, weights)  # log S_ij
    logits = weights + _transpose(bias)
    log_degree = ops.logsumexp(logits, axis=-1, keepdims=True)  # log D_i
    return weights, log_degree, bias, softmax(logits)


def _matrices_of(graph: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `transition_matrix` returns, of a graph that was built earlier."""
    size, dense = graph.tiling.size, graph.to_dense()
    log_degree = graph.log_degree[:, :, :size]
    bias = ops.zeros_like(log_degree) if graph.bias is None else graph.bias[:, :, :size]
    tiny = dense <= 0
    logits = ops.where(tiny, NEGATIVE, ops.log(ops.where(tiny, 1.0, dense)) + log_degree)
    return logits - _transpose(bias), log_degree, bias, dense


def _in_past(tokens: Tokens) -> Tensor:
    """Pairs that S keeps: all, or when causal those with the key at the query or before it."""
    positions = ops.arange(tokens.size, dtype="int32")
    offsets = positions[None, :] - positions[:, None]  # j - i
    return offsets <= 0 if tokens.is_causal else offsets == offsets


def _within(tokens: Tokens, options: Options) -> Tensor:
    """Pairs within the window, whatever they may see, `(S, S)`."""
    positions = ops.arange(tokens.size, dtype="int32")
    return ops.abs(positions[None, :] - positions[:, None]) <= options.window


def _near(tokens: Tokens, window: int, self_edges: bool = True) -> Tensor:
    """L_i: valid pairs within the window, of shape (B or 1, 1, S, S)."""
    positions = ops.arange(tokens.size, dtype="int32")
    distance = ops.abs(positions[None, :] - positions[:, None])
    near = ops.logical_and(tokens.pairs(), distance <= window)
    return near if self_edges else ops.logical_and(near, distance > 0)


def _chosen(neighbors: Tensor, tokens: Tokens, options: Options) -> Tensor:
    """G_i: valid tokens of the chosen blocks outside the window, of shape (B, G, S, S)."""
    pairs = tokens.pairs()
    if neighbors is None:
        return ops.zeros_like(pairs)
    block = ops.arange(tokens.size, dtype="int32") // options.neighbor_block
    chosen = ops.any(neighbors[..., None] == block, axis=-2)
    outside = ops.logical_not(_within(tokens, options))
    return ops.logical_and(chosen, ops.logical_and(pairs, outside))


def _strongest(walk: Tensor, mask: Tensor, topk: int) -> Tensor:
    """The topk largest entries of each row of `walk` within `mask`, as a mask."""
    if topk == 0:
        return ops.zeros_like(mask)
    columns = best_columns(ops.where(mask, ops.stop_gradient(walk), NEGATIVE), topk)
    positions = ops.arange(ops.shape(walk)[-1], dtype="int32")
    # One slot after another: all at once would be S x topk x S.
    strongest = ops.zeros_like(mask)
    for slot in range(topk):
        strongest = ops.logical_or(strongest, columns[..., slot : slot + 1] == positions)
    return strongest


def _softmax(logits: Tensor, mask: Tensor, call: Call, seed: Tensor) -> Tensor:
    """Softmax over `mask`, with dropout; rows without a key are 0."""
    logits = ops.where(mask, logits, NEGATIVE)
    peak = ops.stop_gradient(ops.amax(logits, -1, keepdims=True))
    weights = ops.where(mask, ops.exp(logits - peak), 0.0)
    total = ops.sum(weights, -1, keepdims=True)
    probabilities = weights / ops.where(total > 0, total, 1.0)
    if seed is None or call.dropout == 0.0:
        return probabilities
    batch, number, size = ops.shape(logits)[:3]
    positions = ops.arange(size, dtype="int32")
    keep = keep_mask(seed, call.dropout, batch, number, positions[:, None], positions[None, :])
    return ops.where(keep, probabilities / (1.0 - call.dropout), 0.0)


def _transpose(x: Tensor) -> Tensor:
    return ops.swapaxes(x, -1, -2)
