"""Weights of edges: from graph queries and keys to the transition matrix P.

All weights are kept as logarithms until they are normalised, so that no scale of theirs overflows
or underflows:

    log W_ij = log(c_ij - min(threshold, 0))    or    kappa (c_ij - 1)       on i's edges
    S        = W    or    (W + W^T) / 2
    log D_i  = log sum_j exp(log S_ij + b_j)
    P_ij     = exp(log S_ij + b_j - log D_i)
    log pi_i = b_i + log D_i

with the cosine c_ij of query i and key j and the logarithm b_j of key j's discoverability.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_rwr._far import NEGATIVE, far_dot, far_gather
from keras_rwr._sparse import SparseMatrix
from keras_rwr._tensors import (
    log_add,
    minimum,
    scale_gradient,
    where,
)
from keras_rwr._tiling import Tiling
from keras_rwr._tokens import Tokens
from keras_rwr.options import Options

Tensor = Any

ISOLATED = 1e-6  # the largest degree of a token that counts as isolated, for cosine edges
_NO_EDGE = 0.5 * NEGATIVE


@dataclasses.dataclass(frozen=True, eq=False)
class SparseGraph:
    """A graph of tokens for each batch entry and head, or the transition matrix on it.

    Made by `keras_rwr.graph.build_sparse_w`, `reversible` and `normalize_to_p`; used by
    `sparse_mm` and by the argument `graph` of `keras_rwr.ops.rwr_attention` and
    `keras_rwr.RWRAttention`.

    Attributes:
        options: `Options` that the graph was built with.
        tokens: `Tokens` of the call.
        log_weights: `SparseMatrix`, the logarithms of W or S; `None` where a kernel made P at once.
        mirror: Function without arguments that returns the local part of the logarithms of W^T.
        transition: `None` or `SparseMatrix`, P.
        log_degree: `None` or tensor `(B, G, padded_size, 1)`, log D; 0 where isolated.
        bias: `None` or tensor `(B, G, padded_size, 1)`, b.
        isolated: `None` or bool tensor `(B, G, padded_size, 1)`, true at isolated tokens.
    """

    options: Options
    tokens: Tokens
    log_weights: Any
    mirror: Callable[[], Tensor] | None = None
    transition: SparseMatrix | None = None
    log_degree: Tensor = None
    bias: Tensor = None
    isolated: Tensor = None

    @property
    def tiling(self) -> Tiling:
        """`Tiling` of the positions."""
        return self._edges.tiling

    @property
    def graphs(self) -> int:
        """Number of graphs G."""
        return self._edges.local.shape[1]

    @property
    def matrix(self) -> SparseMatrix:
        """P, or the weights W or S before normalisation."""
        return self.log_weights.map(ops.exp) if self.transition is None else self.transition

    @property
    def _edges(self) -> SparseMatrix:
        """A matrix of the graph's edges."""
        matrix: Any = self.transition if self.log_weights is None else self.log_weights
        return matrix

    @property
    def neighbors(self) -> Tensor:
        """Int tensor `(B, G, S, K / neighbor_block)`: chosen key blocks, -1 for none."""
        chosen = self._edges.neighbors
        if chosen is None:
            shape = ops.shape(self._edges.local)[:2]
            return ops.full((*shape, self.tiling.size, 0), -1, dtype="int32")
        return self.tiling.cut(chosen)

    @property
    def degree(self) -> Tensor:
        """Tensor `(B, S, G)`: the row sums D (1 where isolated), or `None` before normalisation."""
        if self.log_degree is None:
            return None
        degree = ops.exp(self.tiling.cut(self.log_degree)[..., 0])
        return ops.transpose(degree, (0, 2, 1))

    def log_stationary(self) -> Tensor:
        """`log pi`, a vector."""
        return self.log_degree if self.bias is None else self.log_degree + self.bias

    def to_dense(self) -> Tensor:
        """The whole matrix, of shape `(B, G, S, S)`: for tests and analysis of short sequences."""
        return self.matrix.to_dense()

    def __repr__(self) -> str:
        kind = "S" if self.options.reversible else "W"
        kind = kind if self.transition is None else "P"
        return f"<SparseGraph {kind} of {self.tiling.size} tokens, {self.options}>"


def weigh(
    graph_query: Tensor,
    graph_key: Tensor,
    neighbors: Tensor,
    tokens: Tokens,
    options: Options,
    concentration: Tensor,
    bias: Tensor = None,
    block_size: int | None = None,
    dot: Callable = far_dot,
) -> SparseGraph:
    """The transition matrix P.

    Args:
        graph_query: Tensor of shape `(B, G, S, F)`, unit vectors.
        graph_key: Tensor of shape `(B, G, S, F)`, unit vectors.
        neighbors: What `select` returned.
        tokens: `Tokens`.
        options: `Options`.
        concentration: Tensor of shape `(G or 1, 1, 1)`, kappa.
        bias: `None` or tensor of shape `(B, G, S, 1)`, the logarithm of the discoverability.
        block_size: `None` or int. Queries in a tile.
        dot: Function, as `keras_rwr._far.far_dot`.

    Returns:
        A `SparseGraph` with its transition matrix.
    """
    graph = link(graph_query, graph_key, neighbors, tokens, options, concentration, block_size, dot)
    if options.reversible:
        graph = symmetrize(graph)
    return normalize(graph, bias)


def link(
    graph_query: Tensor,
    graph_key: Tensor,
    neighbors: Tensor,
    tokens: Tokens,
    options: Options,
    concentration: Tensor,
    block_size: int | None = None,
    dot: Callable = far_dot,
) -> SparseGraph:
    """The edges and their weights W; arguments as `weigh`."""
    tiling = Tiling.create(tokens, options.window, block_size)
    query, key = tiling.pad(graph_query), tiling.pad(graph_key)
    near = tiling.local_mask(tokens, options.window, options.self_edges)

    def local(rows: Tensor, columns: Tensor) -> Tensor:
        cosine = tiling.split(rows) @ ops.swapaxes(tiling.band(columns), -1, -2)
        return log_weight(cosine, near, options, concentration[..., None])

    block, far = options.neighbor_block, None
    if neighbors is not None:
        neighbors = tiling.pad(neighbors, -1)  # (B, G, padded_size, K / b)
        mask = _far_mask(neighbors, tiling, tokens, options)
        cosine = dot(query, neighbors, key, block)  # (B, G, padded_size, K)
        far = log_weight(cosine, mask, options, concentration)
    return SparseGraph(
        options=options,
        tokens=tokens,
        log_weights=SparseMatrix(tiling, neighbors, block, local(query, key), far),
        mirror=lambda: local(key, query),
    )


def log_weight(cosine: Tensor, mask: Tensor, options: Options, concentration: Tensor) -> Tensor:
    """`log f(c)` of the edges in a mask, `NEGATIVE` elsewhere."""
    cut = options.cut
    if cut is not None:
        mask = ops.logical_and(mask, cosine > cut)
    if options.edge_weight == "exponential":
        logarithm = concentration * (cosine - 1.0)
    else:
        positive = cosine - min(cut or 0.0, 0.0)
        logarithm = ops.log(where(mask, positive, 1.0))
    return where(mask, logarithm, NEGATIVE)


def symmetrize(graph: SparseGraph) -> SparseGraph:
    """`S = (W + W^T) / 2`, cut to the past when causal."""
    if graph.mirror is None:
        raise ValueError(f"`graph` must not be symmetrised already. Received: graph={graph}")
    weights, half = graph.log_weights, math.log(2.0)
    far = None if weights.far is None else weights.far - half
    return dataclasses.replace(
        graph,
        options=graph.options.replace(reversible=True),
        log_weights=dataclasses.replace(
            weights,
            local=log_add(weights.local, graph.mirror()) - half,
            far=far,
            back=None if graph.tokens.is_causal else far,
        ),
        mirror=None,
    )


def normalize(graph: SparseGraph, bias: Tensor = None) -> SparseGraph:
    """Divides each row by its sum.

    The gradient counts a degree below 1, that of one whole edge, as 1 where edges are cosines, so
    that it is bounded by definition. An isolated row stays where it is and passes no gradient.

    Args:
        graph: `SparseGraph` of weights.
        bias: `None` or tensor of shape `(B, G, S, 1)`, b.
    """
    tiling, weights = graph.tiling, graph.log_weights
    if bias is not None:
        bias = tiling.pad(bias)
    if graph.options.edge_weight == "cosine":
        log_degree = ops.stop_gradient(softmax_rows(weights, bias)[1])
        isolated = log_degree <= math.log(ISOLATED)
        factor = weights.rows(ops.exp(minimum(log_degree, 0.0)))
        weights = weights.map(scale_gradient, factor)
    else:
        isolated = weights.row_max() <= _NO_EDGE
    weights = _isolate(weights, isolated, bias)
    transition, log_degree = softmax_rows(weights, bias)
    return dataclasses.replace(
        graph,
        log_weights=weights,
        mirror=None,
        transition=transition,
        log_degree=log_degree,
        bias=bias,
        isolated=isolated,
    )


def softmax_rows(logits: SparseMatrix, column_logits: Tensor = None) -> tuple[SparseMatrix, Tensor]:
    """Softmax of each row, and the logarithm of its sum before.

    Args:
        logits: `SparseMatrix`.
        column_logits: `None` or vector, to add to each row.
    """
    if column_logits is not None:
        logits = logits.map(ops.add, logits.columns(column_logits))
    peak = ops.stop_gradient(logits.row_max())
    weights = logits.map(lambda x, peak: ops.exp(x - peak), logits.rows(peak))
    total = weights.row_sum()
    return weights.map(ops.divide, weights.rows(total)), peak + ops.log(total)


def _isolate(weights: SparseMatrix, isolated: Tensor, bias: Tensor) -> SparseMatrix:
    """Gives isolated rows one edge, to themselves, of degree 1."""
    tiling = weights.tiling
    alone = ops.zeros_like(isolated, weights.local.dtype) if bias is None else -bias
    diagonal = tiling.offsets() == 0  # (M, L)
    itself = where(diagonal, tiling.split(alone), NEGATIVE)
    rows = weights.rows(isolated)
    local = where(rows.local, itself, weights.local)
    others = dataclasses.replace(weights, local=None)
    others = others.map(lambda x, row: where(row, NEGATIVE, x), rows)
    return dataclasses.replace(others, local=local)


def _far_mask(neighbors: Tensor, tiling: Tiling, tokens: Tokens, options: Options) -> Tensor:
    """Which tokens of the chosen blocks are neighbours, bool `(B, G, padded_size, K)`."""
    block = options.neighbor_block
    chosen = ops.repeat(neighbors >= 0, block, axis=-1)
    within = ops.arange(block, dtype="int32")
    keys = ops.reshape(neighbors[..., None] * block + within, ops.shape(chosen))
    chosen = ops.logical_and(chosen, keys < tiling.padded_size)
    distance = keys - ops.arange(tiling.padded_size, dtype="int32")[:, None]
    outside = distance < -options.window
    if not tokens.is_causal:
        outside = ops.logical_or(outside, distance > options.window)
    real = tiling.pad(ops.cast(tokens.real, "float32"))
    real = ops.broadcast_to(real, (*ops.shape(neighbors)[:3], 1))
    real = far_gather(neighbors, real, block) > 0
    return ops.logical_and(ops.logical_and(chosen, real), outside)
