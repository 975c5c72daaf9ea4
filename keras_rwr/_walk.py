"""The walk: `sum_t theta_t P^t V`, one sparse product a step."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from keras import ops

from keras_rwr._far import NEGATIVE
from keras_rwr._sparse import SparseMatrix
from keras_rwr._tensors import minimum, per_head, repeat_heads, where
from keras_rwr._weigh import SparseGraph, softmax_rows
from keras_rwr.options import Options

Tensor = Any

_NEGLIGIBLE = 1e-30  # a share of walks that counts as none
_LARGEST_EXPONENT = 80.0  # within float32's range


def restart_weights(options: Options, lens_strength: Tensor, dtype: str) -> Tensor:
    """`theta_t = gamma alpha (1 - alpha)^t`, a tensor of shape `(1, N or 1, 1, T + 1)`."""
    gamma = per_head(lens_strength, dtype)[None]
    return ops.concatenate([gamma * weight for weight in options.restart_weights], axis=-1)


def walk(
    graph: SparseGraph,
    value: Tensor,
    hop_weights: Tensor,
    options: Options,
    local: Tensor,
    matmul: Callable = SparseMatrix.matmul,
) -> Tensor:
    """Adds to LOCAL what walkers bring back: the values that t steps lead to, weighted.

    Args:
        graph: `SparseGraph` with its transition matrix.
        value: Tensor of shape `(B, M, S, V)`; the number of graphs divides M, which divides N.
        hop_weights: Tensor of shape `(B or 1, N or 1, S or 1, T + 1)`, theta.
        options: `Options`.
        local: Tensor of shape `(B, N, S, V)`, LOCAL of the query heads.
        matmul: Function of a `SparseMatrix` and features: their product.

    Returns:
        Tensor of shape `(B, N, S, V)`.
    """
    steps, heads = hop_weights.shape[-1] - 1, local.shape[1]
    states = walk_states(graph, value, steps, matmul)
    backward = None
    if options.is_reciprocal:
        backward = backward_states(graph, value, steps, matmul)
    return local + combine(states, backward, hop_weights, options, heads)


def combine(
    states: Iterable[Tensor],
    backward: Iterable[tuple[Tensor, Tensor]] | None,
    hop_weights: Tensor,
    options: Options,
    heads: int,
) -> Tensor:
    """`sum_t theta_t Z^t`, mixed with the backward walk when reciprocal.

    Args:
        states: What `walk_states` returns.
        backward: What `backward_states` returns, `None` if not reciprocal.
        hop_weights: Tensor of shape `(B or 1, N or 1, S or 1, T + 1)`, theta.
        options: `Options`.
        heads: Int. Number of query heads N.

    Returns:
        Tensor of shape `(B, N, S, V)`.
    """
    forward = weigh_states((repeat_heads(x, heads) for x in states), hop_weights)
    if backward is None:
        return forward
    repeated = [(repeat_heads(x, heads), repeat_heads(log_sum, heads)) for x, log_sum in backward]
    beta = options.reciprocal_beta
    return beta * forward + (1.0 - beta) * mix_backward(repeated, hop_weights, options)


def weigh_states(states: Iterable[Tensor], hop_weights: Tensor) -> Tensor:
    """`sum_t theta_t Z^t` of states `(B, N, S, V)`."""
    total = None
    for t, state in enumerate(states):
        weighted = hop_weights[..., t : t + 1] * state
        total = weighted if total is None else total + weighted
    return total


def walk_states(
    graph: SparseGraph, value: Tensor, steps: int, matmul: Callable = SparseMatrix.matmul
) -> Iterator[Tensor]:
    """`Z^t = P^t V` for t = 0 … steps, tensors of the shape of `value`."""
    yield value
    state = _side_by_side(graph, value)
    for _ in range(steps):
        state = matmul(graph.matrix, state)
        yield _heads(graph, state, value)


def backward_states(
    graph: SparseGraph, value: Tensor, steps: int, matmul: Callable = SparseMatrix.matmul
) -> Iterator[tuple[Tensor, Tensor]]:
    """The walk along `B_ij = P_ij pi_i / pi_j`, its rows normalised anew after each step.

    Args:
        graph: `SparseGraph` with its transition matrix.
        value: Tensor of shape `(B, M, S, V)`.
        steps: Int >= 0.
        matmul: Function of a `SparseMatrix` and features: their product.

    Returns:
        For t = 0 … steps the rows of `B^t V` divided by their sums, of the shape of `value`, and
        the logarithm of the sums, `log (B^t 1)`, a tensor of shape `(B, G, S, 1)`.
    """
    state, log_sum = _side_by_side(graph, value), ops.zeros_like(graph.log_degree)
    yield value, graph.tiling.cut(log_sum)
    for _ in range(steps):
        # B_ij = g_i S_ij / D_j
        rows, log_sum = softmax_rows(graph.log_weights, log_sum - graph.log_degree)
        log_sum = log_sum if graph.bias is None else log_sum + graph.bias
        state = matmul(rows, state)
        yield _heads(graph, state, value), graph.tiling.cut(log_sum)


def shares_of_hops(hop_weights: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """`rho = sum_t theta_t` and `theta_t / rho`; without a walk, the shares of the restart."""
    mass = ops.sum(hop_weights, axis=-1, keepdims=True)
    hops = ops.arange(hop_weights.shape[-1], dtype=hop_weights.dtype)
    restart = ops.exp(hops * math.log(max(1.0 - options.alpha, _NEGLIGIBLE)))
    walks = mass != 0
    shares = where(walks, hop_weights / where(walks, mass, 1.0), restart / ops.sum(restart))
    return mass, shares


def mix_backward(
    states: list[tuple[Tensor, Tensor]], hop_weights: Tensor, options: Options
) -> Tensor:
    """`rho sum_t theta_t B^t V / sum_t theta_t B^t 1` with `rho = sum_t theta_t`.

    Args:
        states: What `backward_states` returns, for each head.
        hop_weights: Tensor of shape `(1, N or 1, 1, T + 1)`.
        options: `Options`.
    """
    mass, shares = shares_of_hops(hop_weights, options)
    log_sums = ops.concatenate([log_sum for _, log_sum in states], axis=-1)  # (B, N, S, T + 1)
    size = ops.abs(shares)
    counts = size > _NEGLIGIBLE
    logits = where(counts, log_sums + ops.log(where(counts, size, 1.0)), NEGATIVE)
    peak = ops.stop_gradient(ops.amax(logits, axis=-1, keepdims=True))
    # A share of 0 has a gradient too, which may be large.
    weights = shares * ops.exp(minimum(log_sums - peak, _LARGEST_EXPONENT))
    weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    return mass * weigh_states([state for state, _ in states], weights)


def _side_by_side(graph: SparseGraph, value: Tensor) -> Tensor:
    """`(B, M, S, V)` to `(B, G, padded_size, M / G V)`: heads that share a graph are columns."""
    return graph.tiling.pad(side_by_side(value, graph.graphs))


def _heads(graph: SparseGraph, state: Tensor, value: Tensor) -> Tensor:
    """Undoes `_side_by_side`."""
    return apart(graph.tiling.cut(state), value.shape[1])


def side_by_side(value: Tensor, graphs: int) -> Tensor:
    """`(B, M, S, V)` to `(B, G, S, M / G V)`: heads that share a graph are columns."""
    batch, heads, size, features = ops.shape(value)
    if heads == graphs:
        return value
    value = ops.reshape(value, (batch, graphs, heads // graphs, size, features))
    value = ops.transpose(value, (0, 1, 3, 2, 4))
    return ops.reshape(value, (batch, graphs, size, heads // graphs * features))


def apart(state: Tensor, heads: int) -> Tensor:
    """Undoes `side_by_side`."""
    batch, graphs, size, features = ops.shape(state)
    if heads == graphs:
        return state
    shared = heads // graphs
    state = ops.reshape(state, (batch, graphs, size, shared, features // shared))
    state = ops.transpose(state, (0, 1, 3, 2, 4))
    return ops.reshape(state, (batch, heads, size, features // shared))
