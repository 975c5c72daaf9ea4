"""What the graphs and walks of a model look like, measured on a few sequences."""

import dataclasses

import numpy as np
from keras import ops

from keras_rwr import graph as graphs
from keras_rwr import reference
from keras_rwr.layer import RWRAttention
from keras_rwr.tensors import key_bias


def walk_statistics(backbone, token_ids, padding_mask=None):
    """Measures the graph and the walk of each RWR attention layer of a GPT-2 backbone.

    Every number is a mean over the real (not padding) tokens of all sequences and all heads:

    - `degree`: the weighted degree `D_i = sum_j S_ij g_j` of a token that is not isolated (0 if
      all are). Exponential edges weigh at most 1, as cosine ones do.
    - `edges`: the number of keys with `S_ij > 0`, the token itself included.
    - `outside_window`: the share of the walk's mass beyond the window,
      `sum_{|i-j| > window} r_ij / sum_j r_ij`.
    - `entropy`: `-sum_j p_ij log p_ij` with `p_ij = r_ij / sum_j r_ij`, in nats. A token that
      visits m tokens equally often has log m.
    - `isolated`: the share of tokens without weight, whose walk stays at home.

    Here r is the walk that the layer uses: the reciprocal mix when it is reversible. Matrices are
    dense, so keep `token_ids` to a few short sequences.

    Args:
        backbone: A `keras_rwr.models.RWRGPT2Backbone`, or a backbone of the same structure.
        token_ids: Int tensor of shape `(B, S)`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.

    Returns:
        A list with one dict a layer, from the name of a statistic to a float.

    Raises:
        ValueError: If a layer's attention is not `RWRAttention`, or no token is real.
    """
    token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
    if padding_mask is None:
        padding_mask = ops.ones_like(token_ids)
    padding_mask = ops.convert_to_tensor(padding_mask, dtype="int32")
    if not bool(ops.any(padding_mask != 0)):
        raise ValueError(
            "`padding_mask` must mark a real token. "
            f"Received: padding_mask of shape {tuple(padding_mask.shape)} without one"
        )
    tokens = backbone.token_embedding(token_ids)
    x = backbone.embeddings_add((tokens, backbone.position_embedding(tokens)))  # (B, S, D)
    statistics = []
    for layer in backbone.transformer_layers:
        attention = layer._self_attention_layer
        if not isinstance(attention, RWRAttention):
            raise ValueError(
                "`backbone` must have RWR attention in each layer. "
                f"Received: {type(attention).__name__} in layer '{layer.name}'"
            )
        hidden = layer._self_attention_layer_norm(x)
        statistics.append(attention_statistics(attention, hidden, padding_mask, is_causal=True))
        x = layer(x, decoder_padding_mask=padding_mask, training=False)
    return statistics


def attention_statistics(attention, inputs, padding_mask, is_causal):
    """The statistics of one layer; see `walk_statistics`.

    Args:
        attention: A built `RWRAttention`.
        inputs: Tensor of shape `(B, S, dim)`, what the layer is called with.
        padding_mask: Tensor of shape `(B, S)`, true at real tokens.
        is_causal: Bool. Whether the layer is called with a causal mask.

    Returns:
        A dict from the name of a statistic to a float.
    """
    config = dataclasses.replace(attention.rwr_config, is_causal=is_causal, dropout=0.0)
    query = ops.cast(attention._query_dense(inputs), "float32")  # (B, S, N, H)
    key = ops.cast(attention._key_dense(inputs), "float32")  # (B, S, N, H)
    concentration = attention.concentration
    if concentration is None:
        concentration = 20.0  # cosine edges have no use for it
    graph = graphs.build_sparse_w(
        query,
        key,
        window=config.window,
        topk=config.topk,
        neighbor_block=config.neighbor_block,
        threshold=config.threshold,
        edge_weight=config.edge_weight,
        concentration=concentration,
        is_causal=is_causal,
        padding_mask=padding_mask,
    )
    if config.reversible:
        graph = graphs.reversible(graph)
    weights = ops.convert_to_numpy(graph.to_dense())  # (B, N, S, S), S_ij
    bias = gain = None
    if attention.discoverability is not None:
        bias = key_bias(key, attention.discoverability)  # (B, S, N)
        gain = np.exp(np.swapaxes(ops.convert_to_numpy(bias), 1, 2))  # (B, N, S), g_j
        weights = weights * gain[:, :, None, :]
    graph = graphs.normalize_to_p(graph, bias)
    walk = reference.walk_matrix(query, key, config, concentration=concentration, graph=graph)
    return matrix_statistics(
        weights,
        ops.convert_to_numpy(walk),
        ops.convert_to_numpy(padding_mask).astype(bool),
        config,
    )


def matrix_statistics(weights, walk, real, config):
    """The statistics of dense matrices; see `walk_statistics`.

    Args:
        weights: Array of shape `(B, N, S, S)`, `S_ij g_j`.
        walk: Array of shape `(B, N, S, S)`, `r_ij`.
        real: Bool array of shape `(B, S)`, true at real tokens.
        config: `RWRConfig`.

    Returns:
        A dict from the name of a statistic to a float.
    """
    positions = np.arange(weights.shape[-1])
    outside = np.abs(positions[:, None] - positions[None, :]) > config.window
    degree = weights.sum(-1, dtype="float64")  # (B, N, S)
    rows = np.broadcast_to(real[:, None, :], degree.shape)
    isolated = degree <= (1e-6 if config.edge_weight == "cosine" else 0.0)
    linked = np.logical_and(rows, ~isolated)
    shares = walk.astype("float64")
    shares = shares / shares.sum(-1, keepdims=True)  # p_ij
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
    return {
        "degree": float(degree[linked].mean()) if linked.any() else 0.0,
        "edges": float((weights > 0).sum(-1)[rows].mean()),
        "outside_window": float((shares * outside).sum(-1)[rows].mean()),
        "entropy": float(entropy[rows].mean()),
        "isolated": float(isolated[rows].mean()),
    }
