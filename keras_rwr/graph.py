"""The sparse graph that RWR attention walks on, in `keras.ops`.

Every token is linked to the tokens of its window (the local edges) and to a few blocks of similar
keys outside of it (the far edges). A graph holds its local edges by tiles, a tile of queries
against the band of keys around it, and its far edges by the block numbers that each query chose,
so that it takes O(S) memory.

Letters: B batch, S positions, N heads, H head size, F features, C tiles, M queries in a tile,
L keys in a tile's band, K = `topk`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_rwr.blocks import (
    NEGATIVE,
    best_columns,
    far_dot,
    far_gather,
    far_scatter,
    far_sum,
    map_chunks,
    to_blocks,
)
from keras_rwr.config import CONCENTRATION_RANGE, GRAPH_OPTIONS, RWRConfig, check_per_head
from keras_rwr.tensors import check_shapes, compatible, per_head, prepare, reciprocal, unit
from keras_rwr.tiling import Tiling

Tensor = Any

_ISOLATED = 1e-6
# Queries whose block scores are made at once: it bounds the largest buffer, whatever the length.
_SELECT_ROWS = 256


def build_sparse_w(
    query,
    key,
    *,
    window=128,
    topk=32,
    neighbor_block=16,
    threshold=None,
    edge_weight="cosine",
    concentration=20.0,
    is_causal=False,
    padding_mask=None,
    block_size=None,
):
    """Links each token to its window and to its `topk` most similar tokens outside of it.

    `W_ij = f(c_ij)` on i's edges with the cosine `c_ij` of query i and key j, where `f(c) = c -
    min(threshold, 0)` for cosine edges and `f(c) = exp(concentration * (c - 1))` for exponential
    ones, and 0 for cosines not above the threshold. No gradient flows through the choice of the
    edges; it flows through their weights. A padding token has no edges.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        window: Int >= 0. Half-width of the local window. Defaults to 128.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that a query
            links to. Defaults to 32.
        neighbor_block: Int >= 1. They come in blocks of this many consecutive keys, chosen by the
            cosine with the block's mean key. Defaults to 16.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it. `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`.
        concentration: Float in [1, 40], or one a head. Sharpness of exponential edges.
            Defaults to 20.
        is_causal: Bool. Edges to the past and to oneself only. Defaults to `False`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        block_size: `None` or int >= 1. Queries in a tile; changes speed only.

    Returns:
        A `SparseGraph` with the weights W.

    Raises:
        ValueError: If an argument is outside its range or the shapes do not fit.
        TypeError: If an argument is of the wrong type.
    """
    config = RWRConfig(
        window=window,
        topk=topk,
        neighbor_block=neighbor_block,
        threshold=threshold,
        edge_weight=edge_weight,
        is_causal=is_causal,
        block_size=block_size,
    )
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    check_shapes(query, key, padding_mask=padding_mask)
    check_per_head("concentration", concentration, query.shape[2], *CONCENTRATION_RANGE)
    neighbors = select_neighbors(query, key, config, padding_mask)
    return weigh_edges(query, key, config, concentration, padding_mask, neighbors, peak=1.0)


def reversible(graph):
    """Symmetrises the weights, `S = (W + W^T) / 2`, and cuts them to the past when causal.

    The window counts both ways: a causal local pair weighs `(f(c_ij) + f(c_ji)) / 2`, a causal far
    pair `f(c_ij) / 2`. In a bidirectional graph far edges count from both of their ends.

    Args:
        graph: A `SparseGraph` from `build_sparse_w`.

    Returns:
        A `SparseGraph` with the weights S.

    Raises:
        ValueError: If `graph` is reversible or normalised already.
    """
    _check_graph(graph)
    if graph.config.reversible or graph.stationary is not None:
        raise ValueError(
            "`graph` must come from `build_sparse_w`, neither symmetrised nor normalised. "
            f"Received: graph={graph}"
        )
    far = None if graph.far is None else 0.5 * graph.far
    return dataclasses.replace(
        graph,
        config=dataclasses.replace(graph.config, reversible=True),
        local=0.5 * (graph.local + graph.mirror()),
        far=far,
        back=None if graph.config.is_causal else far,
    )


def normalize_to_p(graph, key_bias=None):
    """Makes the transition matrix, `P_ij = S_ij g_j / D_i` with `D_i = sum_j S_ij g_j`.

    A token without weight (`D_i <= 1e-6` for cosine edges, `D_i = 0` for exponential ones) is
    isolated: it stays where it is, `P_i = e_i`, and its degree counts as 1.

    Args:
        graph: A `SparseGraph` of weights.
        key_bias: `None` or tensor of shape `(B, S, N)`, the logarithm of the discoverability g.

    Returns:
        A `SparseGraph` with the weights P, whose rows sum to 1; its `degree` is D and its
        `stationary` is `g D`, which P leaves unchanged when the graph is reversible and
        bidirectional.

    Raises:
        ValueError: If `graph` is normalised already or `key_bias` has another shape.
    """
    _check_graph(graph)
    if graph.stationary is not None:
        raise ValueError(f"`graph` must not be normalised already. Received: graph={graph}")
    tiling = graph.tiling
    local, far, back = graph.local, graph.far, graph.back
    gain = None
    if key_bias is not None:
        key_bias = ops.cast(ops.convert_to_tensor(key_bias), local.dtype)
        expected = (graph.local.shape[0], tiling.size, graph.local.shape[1])
        if len(key_bias.shape) != 3 or not compatible(key_bias.shape, expected):
            raise ValueError(
                f"`key_bias` must have shape (B, S, N) = {expected}. "
                f"Received: key_bias of shape {tuple(key_bias.shape)}"
            )
        gain = ops.exp(tiling.pad(ops.transpose(key_bias, (0, 2, 1))[..., None]))  # (B, N, S, 1)
        local = local * ops.swapaxes(tiling.band(tiling.split(gain)), -1, -2)
        if far is not None:
            far = far * graph.gather(gain)
        if back is not None:
            back = back * gain
    rows = ops.sum(local, -1)  # (B, N, C, M)
    degree = ops.reshape(rows, (*ops.shape(rows)[:2], tiling.padded_size))  # (B, N, S)
    if far is not None:
        degree = degree + ops.sum(far, -1)
    if back is not None:
        degree = degree + graph.scatter(back, ops.ones_like(degree)[..., None])[..., 0]
    degree, isolated = isolate(degree, graph.config)
    share = ops.where(isolated, ops.zeros_like(degree), reciprocal(degree))[..., None]
    loops = tiling.split(ops.cast(isolated, local.dtype)[..., None])  # (B, N, C, M, 1)
    local = local * tiling.split(share) + loops * ops.cast(tiling.diagonal(), local.dtype)
    if far is not None:
        far = far * share
    if back is not None:
        back = back * graph.gather(share)
    return dataclasses.replace(
        graph,
        local=local,
        far=far,
        back=back,
        mirror=None,
        padded_degree=degree,
        stationary=degree if gain is None else degree * gain[..., 0],
    )


def sparse_mm(graph, values, transpose=False):
    """Multiplies the graph's matrix, or its transpose, with one vector of features a token.

    Args:
        graph: A `SparseGraph` (W, S or P).
        values: Tensor of shape `(B, S, N, F)`.
        transpose: Bool. Multiply with the transpose. Defaults to `False`.

    Returns:
        Tensor of shape `(B, S, N, F)`: `sum_j graph_ij values_j` for each token i.

    Raises:
        ValueError: If the shape of `values` does not fit the graph.
    """
    _check_graph(graph)
    values = ops.cast(ops.convert_to_tensor(values), graph.local.dtype)
    expected = (graph.local.shape[0], graph.tiling.size, graph.local.shape[1], None)
    if len(values.shape) != 4 or not compatible(values.shape, expected):
        raise ValueError(
            f"`values` must have shape (B, S, N, F) = {expected}. "
            f"Received: values of shape {tuple(values.shape)}"
        )
    values = graph.tiling.pad(ops.transpose(values, (0, 2, 1, 3)))
    product = graph.transposed_matmul(values) if transpose else graph.matmul(values)
    return ops.transpose(graph.tiling.cut(product), (0, 2, 1, 3))


@dataclasses.dataclass(frozen=True, eq=False)
class SparseGraph:
    """A sparse S×S matrix for each batch entry and head, with local and far edges.

    Made by `build_sparse_w`, `reversible` and `normalize_to_p`; used by `sparse_mm` and by the
    `graph` argument of `keras_rwr.ops.rwr_attention` and `keras_rwr.RWRAttention`. Inside, heads
    come before positions and positions are padded to whole tiles.

    Attributes:
        config: `RWRConfig` whose graph options the graph was built with.
        tiling: `Tiling` of the positions.
        local: Tensor of shape `(B, N, C, M, L)`, weights of the local edges.
        blocks: `None` or int tensor `(B, N, padded_size, K / neighbor_block)`, the key blocks that
            each query chose; -1 for none.
        far: `None` or tensor `(B, N, padded_size, K)`, weights of the edges to their tokens.
        back: `None` or tensor `(B, N, padded_size, K)`, weights of these edges from key to query.
        mirror: `None` or function without arguments that returns the local part of `W^T`.
        padded_degree: `None` or tensor `(B, N, padded_size)`, the row sums D before normalisation.
        stationary: `None` or tensor `(B, N, padded_size)`, the stationary weights `g D`.
    """

    config: RWRConfig
    tiling: Tiling
    local: Tensor
    blocks: Tensor = None
    far: Tensor = None
    back: Tensor = None
    mirror: Callable | None = None
    padded_degree: Tensor = None
    stationary: Tensor = None

    @property
    def neighbors(self):
        """Int tensor `(B, N, S, K / neighbor_block)`: chosen key blocks, -1 for none."""
        if self.blocks is None:
            return ops.full((*ops.shape(self.local)[:2], self.tiling.size, 0), -1, dtype="int32")
        return self.tiling.cut(self.blocks)

    @property
    def degree(self):
        """Tensor `(B, S, N)`: the row sums D (1 where isolated), or `None` before normalisation."""
        if self.padded_degree is None:
            return None
        return ops.transpose(self.padded_degree[..., : self.tiling.size], (0, 2, 1))

    def matmul(self, x):
        """`(B, N, padded_size, F)` to the same shape: `sum_j graph_ij x_j`."""
        tiling = self.tiling
        product = tiling.join(ops.matmul(self.local, tiling.band(tiling.split(x))))
        if self.far is not None:
            product = product + self.gather_sum(self.far, x)
        if self.back is not None:
            product = product + self.scatter(self.back, x)
        return product

    def transposed_matmul(self, x):
        """`(B, N, padded_size, F)` to the same shape: `sum_i graph_ij x_i`."""
        tiling = self.tiling
        parts = ops.matmul(ops.swapaxes(self.local, -1, -2), tiling.split(x))
        product = tiling.join(tiling.unband(parts))
        if self.far is not None:
            product = product + self.scatter(self.far, x)
        if self.back is not None:
            product = product + self.gather_sum(self.back, x)
        return product

    def gather_sum(self, weights, x):
        """`sum_k weights_ik x_key(i, k)` over the far keys: `(B, N, padded_size, F)`."""
        return far_sum(weights, self.blocks, x, self.config.neighbor_block)

    def gather(self, x):
        """`(B, N, padded_size, 1)` to the values of the far keys, `(B, N, padded_size, K)`."""
        return far_gather(self.blocks, x, self.config.neighbor_block)

    def scatter(self, weights, x):
        """`sum_i weights_ik x_i` into the far keys of i: `(B, N, padded_size, F)`."""
        return far_scatter(weights, self.blocks, x, self.config.neighbor_block)

    def to_dense(self):
        """The whole matrix, of shape `(B, N, S, S)`: for tests and analysis of short sequences."""
        batch, heads = ops.shape(self.local)[:2]
        identity = ops.eye(self.tiling.padded_size, dtype=self.local.dtype)
        identity = ops.broadcast_to(identity, (batch, heads, *identity.shape))
        size = self.tiling.size
        return self.matmul(identity)[..., :size, :size]

    def __repr__(self):
        kind = "P" if self.stationary is not None else "S" if self.config.reversible else "W"
        options = ", ".join(f"{name}={getattr(self.config, name)!r}" for name in GRAPH_OPTIONS)
        return f"<SparseGraph {kind} of {self.tiling.size} tokens, {options}>"


def select_neighbors(query, key, config, padding_mask=None):
    """Chooses each query's key blocks outside its window, without a gradient.

    A block's score is the cosine-like product of the unit query with the mean of the block's unit
    keys. Ties go to the lower block.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        config: `RWRConfig`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.

    Returns:
        Int tensor of shape `(B, N, S, K / neighbor_block)` of block numbers, -1 for none, or `None`
        when no token lies outside any window.
    """
    size, block = ops.shape(query)[1], config.neighbor_block
    if config.slots == 0 or (isinstance(size, int) and size <= config.window + 1):
        return None
    query, key, valid = prepare(query, key, padding_mask)
    query, key = ops.stop_gradient(unit(query)), ops.stop_gradient(unit(key))

    # Mean unit key and first and last real position of each block.
    positions = ops.arange(size, dtype="int32")[:, None]  # (S, 1)
    real = ops.cast(valid, key.dtype)  # (B, 1, S, 1)
    means = block_means(key, real, block)  # (B, N, J, H)
    far_away = 2 * size + block
    first = to_blocks(ops.where(valid, positions - far_away, 0), block)
    first = ops.amin(first, (-1, -2))[:, :, None] + far_away  # (B or 1, 1, 1, J)
    last = to_blocks(ops.where(valid, positions + far_away, 0), block)
    last = ops.amax(last, (-1, -2))[:, :, None] - far_away

    def choose(args):
        rows, real_rows, position = args  # (B, N, R, H), (B or 1, 1, R, 1), (R, 1)
        scores = ops.matmul(rows, ops.swapaxes(means, -1, -2))  # (B, N, R, J)
        candidate = first < position - config.window
        if not config.is_causal:
            candidate = ops.logical_or(candidate, last > position + config.window)
        candidate = ops.logical_and(candidate, real_rows)
        return best_columns(ops.where(candidate, scores, NEGATIVE), config.slots)

    return ops.stop_gradient(map_chunks(choose, (query, valid, positions), _SELECT_ROWS))


def block_means(key, real, block):
    """The mean key of each block: `(B, N, S, H)`, 0 at padding, to `(B, N, J, H)`.

    Args:
        key: Tensor of shape `(B, N, S, H)`.
        real: Tensor of shape `(B or 1, 1, S, 1)`, 1 at real tokens and 0 at padding.
        block: Int. Tokens in a block.
    """
    count = ops.sum(to_blocks(real, block), -2)
    return ops.sum(to_blocks(key, block), -2) / ops.maximum(count, 1.0)


def weigh(cosine, mask, config, kappa, peak=0.0):
    """Weights `f(c)` of the edges in a mask; see `build_sparse_w`, and `weigh_edges` for `peak`."""
    if config.edge_weight == "cosine":
        weights = cosine - config.cut if config.cut < 0.0 else cosine
    else:
        weights = ops.exp(kappa * (cosine - peak))
    if config.cut is not None:
        mask = ops.logical_and(mask, cosine > config.cut)
    return ops.where(mask, weights, 0.0)


def isolate(degree, config):
    """The degrees D, 1 for isolated tokens, and which tokens are isolated."""
    isolated = degree <= (_ISOLATED if config.edge_weight == "cosine" else 0.0)
    return ops.where(isolated, ops.ones_like(degree), degree), isolated


def weigh_edges(query, key, config, concentration, padding_mask, neighbors, peak=0.0):
    """Weighs local and chosen far edges; see `build_sparse_w`.

    Exponential weights are `exp(concentration * (c - peak))`. Only ratios of weights matter to a
    walk, and around a peak of 0 they and their squares stay within float32's range.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        config: `RWRConfig`.
        concentration: Scalar or tensor of shape `(N,)`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        neighbors: What `select_neighbors` returned.
        peak: Float. The cosine whose exponential weight is 1.

    Returns:
        A `SparseGraph` with the weights W.
    """
    size = ops.shape(query)[1]
    tiling = Tiling.create(size, config)
    query, key, valid = prepare(query, key, padding_mask)
    query, key = tiling.pad(unit(query)), tiling.pad(unit(key))
    valid = tiling.pad(ops.cast(valid, "int32")) > 0
    sharpness = per_head(concentration, query.dtype)  # (N or 1, 1, 1)

    near = tiling.local_mask(valid, config)

    def local(rows, columns):
        band = ops.swapaxes(tiling.band(tiling.split(columns)), -1, -2)
        cosine = ops.matmul(tiling.split(rows), band)
        return weigh(cosine, near, config, sharpness[..., None], peak)

    blocks = far = None
    if neighbors is not None:
        width = config.neighbor_block
        blocks = tiling.pad(neighbors + 1) - 1  # (B, N, padded_size, K / b)
        cosine = far_dot(query, blocks, key, width)
        real = ops.cast(valid, query.dtype) * ops.ones_like(query[..., :1])
        real = far_gather(blocks, real, width) > 0
        within = ops.arange(width, dtype="int32")
        keys = ops.reshape(blocks[..., None] * width + within, ops.shape(cosine))
        distance = keys - ops.arange(tiling.padded_size, dtype="int32")[:, None]
        outside = distance < -config.window
        if not config.is_causal:
            outside = ops.logical_or(outside, distance > config.window)
        chosen = ops.repeat(blocks >= 0, width, axis=-1)
        mask = ops.logical_and(ops.logical_and(chosen, real), outside)
        far = weigh(cosine, mask, config, sharpness, peak)
    return SparseGraph(
        config=config,
        tiling=tiling,
        local=local(query, key),
        blocks=blocks,
        far=far,
        mirror=lambda: local(key, query),
    )


def transition(query, key, config, concentration, padding_mask, neighbors, bias=None):
    """The walk's transition matrix P, from query and key to `normalize_to_p`.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        config: `RWRConfig`.
        concentration: Scalar or tensor of shape `(N,)`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        neighbors: What `select_neighbors` returned.
        bias: `None` or tensor of shape `(B, S, N)`, the logarithm of the discoverability.

    Returns:
        A normalised `SparseGraph`.
    """
    plain = dataclasses.replace(config, reversible=False)
    graph = weigh_edges(query, key, plain, concentration, padding_mask, neighbors)
    if config.reversible:
        graph = reversible(graph)
    if bias is not None and padding_mask is not None:
        bias = ops.where(ops.cast(padding_mask, "bool")[..., None], bias, 0.0)
    return normalize_to_p(graph, bias)


def _check_graph(graph):
    if not isinstance(graph, SparseGraph):
        raise TypeError(f"`graph` must be a SparseGraph. Received: graph={graph!r}")
