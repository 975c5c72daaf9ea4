"""The sparse graph that RWR attention walks on, by itself.

Every token is linked to the tokens of its window (the local edges) and to a few blocks of similar
keys outside of it (the far edges). A graph takes O(S) memory.
"""

from typing import Any

from keras import ops

from keras_rwr._checks import as_tensor, check_bool, check_per_head, check_shape, compatible
from keras_rwr._select import select
from keras_rwr._tensors import head_major, per_head, precision, unit, where
from keras_rwr._tokens import Tokens
from keras_rwr._weigh import SparseGraph, link, normalize, symmetrize
from keras_rwr.options import CONCENTRATION_RANGE, Call, Options, Tuning

__all__ = ["SparseGraph", "build_sparse_w", "normalize_to_p", "reversible", "sparse_mm"]

Tensor = Any

# Two calls can share a graph only if these options agree.
GRAPH_OPTIONS = (
    "window",
    "topk",
    "neighbor_block",
    "threshold",
    "edge_weight",
    "reversible",
    "self_edges",
)


def build_sparse_w(
    query: Tensor,
    key: Tensor,
    *,
    window: int = 128,
    topk: int = 32,
    neighbor_block: int = 16,
    threshold: float | None = None,
    edge_weight: str = "cosine",
    concentration: Any = 20.0,
    self_edges: bool = True,
    is_causal: bool = False,
    padding_mask: Tensor = None,
    segment_ids: Tensor = None,
    block_size: int | None = None,
) -> SparseGraph:
    """Links each token to its window and to its `topk` most similar tokens outside of it.

    `W_ij = f(c_ij)` on i's edges with the cosine `c_ij` of query i and key j, where `f(c) = c -
    min(threshold, 0)` for cosine edges and `f(c) = exp(concentration * (c - 1))` for exponential
    ones, and 0 for cosines not above the threshold. No gradient flows through the choice of the
    edges; it flows through their weights, and counts a norm below 0.1 as 0.1. A padding token has
    no edges.

    Args:
        query: Float tensor of shape `(B, S, G, F)`.
        key: Float tensor of shape `(B, S, G, F)`.
        window: Int >= 0. Half-width of the local window. Defaults to 128.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that a query
            links to. Defaults to 32.
        neighbor_block: Int >= 1. They come in blocks of this many consecutive keys, chosen by the
            product with the block's mean unit key. Defaults to 16.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it. `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`.
        concentration: Float in [1, 64], or one a graph. Sharpness of exponential edges.
            Defaults to 20.
        self_edges: Bool. Whether a token is its own neighbour. Defaults to `True`.
        is_causal: Bool. Edges to the past and to oneself only. Defaults to `False`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        segment_ids: `None` or int tensor of shape `(B, S)`: edges stay within a segment.
        block_size: `None` or int >= 1. Queries in a tile; changes speed only.

    Returns:
        A `SparseGraph` with the weights W.

    Raises:
        ValueError: If an argument is outside its range or the shapes do not fit.
        TypeError: If an argument is of the wrong type.
    """
    options = Options.pick(locals() | {"concentration": 20.0})
    call, tuning = Call(is_causal), Tuning(block_size=block_size)
    query, key = as_tensor("query", query), as_tensor("key", key)
    check_shape("query", query, "(B, S, G, F)", (None, None, None, None))
    check_shape("key", key, "(B, S, G, F)", query.shape)
    check_per_head("concentration", concentration, query.shape[2], *CONCENTRATION_RANGE)
    padding_mask = check_rows("padding_mask", padding_mask, query, "any")
    segment_ids = check_rows("segment_ids", segment_ids, query, "int")
    call.check(options, segment_ids is not None)
    tokens = Tokens.create(ops.shape(query)[1], is_causal, padding_mask, segment_ids)
    dtype = precision(query, key)
    query, key = (unit(where(tokens.real, head_major(x, dtype), 0.0)) for x in (query, key))
    neighbors = select(query, key, tokens, options)
    kappa = per_head(concentration, dtype)
    return link(query, key, neighbors, tokens, options, kappa, tuning.block_size)


def reversible(graph: SparseGraph) -> SparseGraph:
    """Symmetrises the weights, `S = (W + W^T) / 2`, and cuts them to the past when causal.

    The window counts both ways: a causal local pair weighs `(f(c_ij) + f(c_ji)) / 2`, a causal far
    pair `f(c_ij) / 2`. In a bidirectional graph far edges count from both of their ends.

    Args:
        graph: A `SparseGraph` from `build_sparse_w`.

    Returns:
        A `SparseGraph` with the weights S.

    Raises:
        ValueError: If `graph` is reversible or normalised already.
        TypeError: If `graph` is no `SparseGraph`.
    """
    _check_graph(graph)
    if graph.options.reversible or graph.transition is not None:
        raise ValueError(
            "`graph` must come from `build_sparse_w`, neither symmetrised nor normalised. "
            f"Received: graph={graph}"
        )
    return symmetrize(graph)


def normalize_to_p(graph: SparseGraph, key_bias: Tensor = None) -> SparseGraph:
    """Makes the transition matrix, `P_ij = S_ij g_j / D_i` with `D_i = sum_j S_ij g_j`.

    A token without weight (`D_i <= 1e-6` for cosine edges, no edge at all for exponential ones) is
    isolated: it stays where it is, `P_i = e_i`, and its degree counts as 1. The gradient of cosine
    edges counts a degree below 1 as 1.

    Args:
        graph: A `SparseGraph` of weights.
        key_bias: `None` or tensor of shape `(B, S, G)`, the logarithm of the discoverability g.

    Returns:
        A `SparseGraph` with the weights P, whose rows sum to 1; its `degree` is D.

    Raises:
        ValueError: If `graph` is normalised already or `key_bias` has another shape.
        TypeError: If an argument is of the wrong type.
    """
    _check_graph(graph)
    if graph.transition is not None:
        raise ValueError(f"`graph` must not be normalised already. Received: graph={graph}")
    if key_bias is not None:
        key_bias = as_tensor("key_bias", key_bias)
        check_shape("key_bias", key_bias, "(B, S, G)", graph_shape(graph))
        key_bias = ops.cast(key_bias, graph.log_weights.local.dtype)
        key_bias = ops.transpose(key_bias, (0, 2, 1))[..., None]
    return normalize(graph, key_bias)


def sparse_mm(graph: SparseGraph, values: Tensor, transpose: bool = False) -> Tensor:
    """Multiplies the graph's matrix, or its transpose, with one vector of features a token.

    Args:
        graph: A `SparseGraph` (W, S or P).
        values: Float tensor of shape `(B, S, G, F)`.
        transpose: Bool. Multiply with the transpose. Defaults to `False`.

    Returns:
        Tensor of shape `(B, S, G, F)`: `sum_j graph_ij values_j` for each token i.

    Raises:
        ValueError: If the shape of `values` does not fit the graph.
        TypeError: If an argument is of the wrong type.
    """
    _check_graph(graph)
    check_bool("transpose", transpose)
    values = as_tensor("values", values)
    check_shape("values", values, "(B, S, G, F)", (*graph_shape(graph), None))
    values = graph.tiling.pad(head_major(values, graph.log_weights.local.dtype))
    product = graph.matrix.transposed_matmul(values) if transpose else graph.matrix.matmul(values)
    return ops.transpose(graph.tiling.cut(product), (0, 2, 1, 3))


def check_fits(graph: Any, query: Tensor, kv_heads: int, options: Options, call: Call) -> None:
    """Checks that a caller's graph is normalised and fits the call.

    Raises:
        TypeError: If it is no `SparseGraph`.
        ValueError: If it is not normalised, or was built for other shapes or options.
    """
    _check_graph(graph)
    if graph.transition is None:
        raise ValueError(
            "`graph` must be normalised by `keras_rwr.graph.normalize_to_p`. "
            f"Received: graph={graph}"
        )
    built = {name: getattr(graph.options, name) for name in GRAPH_OPTIONS}
    asked = {name: getattr(options, name) for name in GRAPH_OPTIONS}
    built["is_causal"], asked["is_causal"] = graph.tokens.is_causal, call.is_causal
    for name, value in asked.items():
        if built[name] != value:
            raise ValueError(
                "`graph` must be built with the call's options. "
                f"Received: {name}={built[name]!r} in the graph, {name}={value!r} in the call"
            )
    batch, size, graphs = graph_shape(graph)
    heads = query.shape[2]
    if not compatible((batch, size), query.shape[:2]) or (graphs != heads and kv_heads % graphs):
        raise ValueError(
            "`graph` must be built for the call's batch size, length and heads. Received: graph of "
            f"(B, S, G) = {(batch, size, graphs)}, query of shape {tuple(query.shape)}"
        )


def check_rows(name: str, x: Tensor, query: Tensor, kind: str) -> Tensor:
    """An optional tensor of one number a token, `(B, S)`."""
    if x is None:
        return None
    x = as_tensor(name, x, kind)
    check_shape(name, x, "(B, S)", query.shape[:2])
    return x


def graph_shape(graph: SparseGraph) -> tuple:
    """`(B, S, G)`."""
    local = graph.log_weights.local
    return local.shape[0], graph.tiling.size, local.shape[1]


def _check_graph(graph: Any) -> None:
    if not isinstance(graph, SparseGraph):
        raise TypeError(f"`graph` must be a SparseGraph. Received: graph={graph!r}")
