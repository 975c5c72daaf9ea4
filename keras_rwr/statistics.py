"""What the graphs and walks of a model look like, measured on a few sequences."""

import contextlib
import dataclasses
import math

import numpy as np
from keras import ops

from keras_rwr import graph as graphs
from keras_rwr import reference
from keras_rwr.layer import RWRAttention
from keras_rwr.masks import merge_masks
from keras_rwr.tensors import key_bias, prepare


def walk_statistics(model, inputs):
    """Measures the graph and the walk of each `RWRAttention` that a call of a model passes.

    Numbers are means over the real (not padding) tokens of all sequences and all heads:

    - `degree`: the weighted degree `D_i = sum_j S_ij g_j` of a token that is not isolated (0 if
      all are). Exponential edges weigh at most 1, as cosine ones do.
    - `edges`: the number of keys with `S_ij > 0`, the token itself included.
    - `outside_window`: the share of the walk's mass beyond the window,
      `sum_{|i-j| > window} r_ij / sum_j r_ij`.
    - `entropy`: `-sum_j p_ij log p_ij` with `p_ij = r_ij / sum_j r_ij`, in nats. A token that
      visits m tokens equally often has log m.
    - `isolated`: the share of tokens without weight, whose walk stays at home.
    - `hit_rate`: of the `topk` keys beyond the window on which full attention, the softmax of
      `q_i k_j / sqrt(H)` over all keys, would put most weight, the share that the token links to.
      Over tokens with at least `topk` keys there; 0 if there is none.
    - `attention_on_edges`: the share of that attention's weight that lies on the token's edges.
    - `lens_strength`: gamma, over the heads.
    - `concentration`: kappa, over the heads; for exponential edges only.

    Here r is the walk that the layer uses: the reciprocal mix when it is reversible. Matrices are
    dense, those of one sequence at a time, so keep `inputs` to a few short sequences.

    Args:
        model: A built Keras model or layer: a GPT-2 backbone or task, a classifier, any other.
        inputs: What `model` is called with, such as a dict of `"token_ids"` and `"padding_mask"`.

    Returns:
        A list with one dict for each call of an `RWRAttention`, in their order, from the name of a
        statistic to a float.

    Raises:
        ValueError: If the call passes no `RWRAttention`, or a layer sees no real token.
    """
    with record_calls(model) as calls:
        model(inputs, training=False)
    if not calls:
        raise ValueError(
            f"`model` must call an RWRAttention. Received: model={type(model).__name__} without one"
        )
    return [attention_statistics(call) for call in calls]


@dataclasses.dataclass(frozen=True)
class RecordedCall:
    """One call of an `RWRAttention`.

    Attributes:
        layer: The `RWRAttention`.
        inputs: Tensor of shape `(B, S, dim)`, its query input.
        padding_mask: Tensor of shape `(B, S)`, true at real tokens.
        is_causal: Bool. Whether it was called with a causal mask.
    """

    layer: RWRAttention
    inputs: object
    padding_mask: object
    is_causal: bool

    @property
    def config(self):
        """`RWRConfig` of the call, without dropout."""
        return dataclasses.replace(
            self.layer.rwr_config, is_causal=self.is_causal, dropout=0.0, block_size=None
        )

    def query_and_key(self):
        """The projections, float32 tensors of shape `(B, S, N, H)`."""
        layer = self.layer
        projected = layer._query_dense(self.inputs), layer._key_dense(self.inputs)
        return tuple(ops.cast(x, "float32") for x in projected)

    def weights(self):
        """A dict of `concentration`, `lens_strength` and `discoverability` as the layer has them.

        The first two are numbers or arrays of shape `(N,)`, the last `None` or a tensor.
        """
        options = self.layer.get_config()
        found = {"discoverability": self.layer.discoverability}
        for name in ("concentration", "lens_strength"):
            variable = getattr(self.layer, name)
            found[name] = options[name] if variable is None else ops.convert_to_numpy(variable)
        return found


@contextlib.contextmanager
def record_calls(model):
    """Notes the calls of a model's `RWRAttention` layers.

    Args:
        model: Keras layer or model.

    Yields:
        A list that fills with a `RecordedCall` for each.

    Example:

    ```python
    with record_calls(model) as calls:
        model(inputs, training=False)
    query, key = calls[-1].query_and_key()  # of the last layer
    ```
    """
    calls = []

    def recording(layer):
        call = layer.call

        def record(query, value, *args, use_causal_mask=False, **options):
            mask = merge_masks(query, **{k: x for k, x in options.items() if k.endswith("_mask")})
            if mask is None:
                mask = ops.ones(ops.shape(query)[:2], "bool")
            calls.append(RecordedCall(layer, query, mask, bool(use_causal_mask)))
            return call(query, value, *args, use_causal_mask=use_causal_mask, **options)

        return record

    layers = [x for x in model._flatten_layers() if isinstance(x, RWRAttention)]
    for layer in layers:
        vars(layer)["call"] = recording(layer)
    try:
        yield calls
    finally:
        for layer in layers:
            del vars(layer)["call"]


def attention_statistics(call):
    """The statistics of a `RecordedCall`, a dict of floats; see `walk_statistics`."""
    real = ops.convert_to_numpy(call.padding_mask).astype(bool)
    if not real.any():
        raise ValueError(
            "`inputs` must have a real token. "
            f"Received: a padding mask of shape {real.shape} without one"
        )
    config, own = call.config, call.weights()
    query, key = call.query_and_key()
    totals = {}
    for entry in range(len(real)):
        one = slice(entry, entry + 1)
        for name, part in sequence_totals(query[one], key[one], real[one], config, own).items():
            totals.setdefault(name, []).append(part)
    found = means(totals)
    found["lens_strength"] = float(np.mean(own["lens_strength"]))
    if config.edge_weight == "exponential":
        found["concentration"] = float(np.mean(own["concentration"]))
    return found


def sequence_totals(query, key, real, config, own):
    """What one sequence adds to each statistic.

    Args:
        query: Tensor of shape `(1, S, N, H)`.
        key: Tensor of shape `(1, S, N, H)`.
        real: Bool array of shape `(1, S)`, true at real tokens.
        config: `RWRConfig` of the call.
        own: Dict, what `RecordedCall.weights` returns.

    Returns:
        A dict from the name of a statistic to the sum of its values and their number.
    """
    graph = graphs.build_sparse_w(
        query,
        key,
        window=config.window,
        topk=config.topk,
        neighbor_block=config.neighbor_block,
        threshold=config.threshold,
        edge_weight=config.edge_weight,
        concentration=own["concentration"],
        is_causal=config.is_causal,
        padding_mask=real,
    )
    if config.reversible:
        graph = graphs.reversible(graph)
    weights = graph.to_dense()  # (1, N, S, S), S_ij
    bias = None
    if own["discoverability"] is not None:
        bias = key_bias(key, own["discoverability"])  # (1, S, N)
        weights = weights * ops.exp(ops.transpose(bias, (0, 2, 1)))[:, :, None, :]  # times g_j
    graph = graphs.normalize_to_p(graph, bias)
    walk = reference.walk_matrix(
        query, key, config, concentration=own["concentration"], graph=graph
    )  # (1, N, S, S)
    return {
        **matrix_totals(weights, walk, real, config),
        **hit_totals(weights, full_attention(query, key, real, config.is_causal), real, config),
    }


def means(totals):
    """Floats by name of lists of (sum, number) by name; 0 for a mean of nothing."""
    found = {}
    for name, parts in totals.items():
        total, number = (math.fsum(float(x) for x in column) for column in zip(*parts, strict=True))
        found[name] = total / number if number > 0 else 0.0
    return found


def total_of(values, chosen):
    """The sum of the values that are chosen, and their number.

    Args:
        values: Tensor.
        chosen: Bool tensor of the same shape, or of one that broadcasts to it.
    """
    chosen = ops.broadcast_to(chosen, ops.shape(values))
    rows = ops.sum(ops.where(chosen, values, 0.0), -1)  # the rest in float64
    return ops.convert_to_numpy(rows).sum(dtype="float64"), ops.convert_to_numpy(chosen).sum()


def full_attention(query, key, real, is_causal):
    """`softmax_j(q_i k_j / sqrt(H))` over all keys.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        real: Bool array of shape `(B, S)`, true at real tokens.
        is_causal: Bool. Whether later keys are left out.

    Returns:
        Tensor of shape `(B, N, S, S)`; zeros in a row without a key.
    """
    query, key, _ = prepare(query, key, None)  # (B, N, S, H)
    logits = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) / query.shape[-1] ** 0.5
    seen = real[:, None, None, :]
    if is_causal:
        seen = np.logical_and(seen, np.tri(real.shape[1], dtype=bool))
    # A row without a key has no logit near its peak, so that all of its weights are 0.
    logits = ops.where(seen, logits, -1e30)
    weights = ops.exp(logits - ops.maximum(ops.amax(logits, -1, keepdims=True), -1e20))
    total = ops.sum(weights, -1, keepdims=True)
    return weights / ops.where(total > 0, total, 1.0)


def hit_totals(weights, attention, real, config):
    """How well edges meet the keys that full attention looks at; see `walk_statistics`.

    Args:
        weights: Tensor of shape `(B, N, S, S)`, above 0 on edges.
        attention: Tensor of shape `(B, N, S, S)`, full attention's weights, 0 where it cannot look.
        real: Bool array of shape `(B, S)`, true at real tokens.
        config: `RWRConfig`.

    Returns:
        A dict from `hit_rate` and `attention_on_edges` to their sums and numbers.
    """
    linked = ops.cast(ops.convert_to_tensor(weights) > 0, "float32")
    attention = ops.convert_to_tensor(attention)
    on_edges = ops.sum(attention * linked, -1)  # (B, N, S)
    found = {"hit_rate": (0.0, 0), "attention_on_edges": total_of(on_edges, real[:, None])}
    if config.topk > 0:
        far = ops.where(outside(real.shape[1], config), attention, 0.0)
        count = min(config.topk, real.shape[1])
        _, top = ops.top_k(far, count)
        hits = ops.mean(ops.take_along_axis(linked, top, axis=-1), -1)
        enough = ops.sum(ops.cast(far > 0, "int32"), -1) >= config.topk
        found["hit_rate"] = total_of(hits, ops.logical_and(enough, real[:, None]))
    return found


def outside(size, config):
    """Bool array of shape `(S, S)`: pairs further apart than the window."""
    positions = np.arange(size)
    return np.abs(positions[:, None] - positions[None, :]) > config.window


def matrix_totals(weights, walk, real, config):
    """The statistics of dense matrices; see `walk_statistics`.

    Args:
        weights: Tensor of shape `(B, N, S, S)`, `S_ij g_j`.
        walk: Tensor of shape `(B, N, S, S)`, `r_ij`.
        real: Bool array of shape `(B, S)`, true at real tokens.
        config: `RWRConfig`.

    Returns:
        A dict from the name of a statistic to the sum of its values and their number.
    """
    weights, walk = ops.convert_to_tensor(weights), ops.convert_to_tensor(walk)
    degree = ops.sum(weights, -1)  # (B, N, S)
    isolated = degree <= (1e-6 if config.edge_weight == "cosine" else 0.0)
    rows = ops.broadcast_to(real[:, None], ops.shape(degree))
    shares = walk / ops.sum(walk, -1, keepdims=True)  # p_ij
    entropy = -ops.sum(shares * ops.log(ops.where(shares > 0, shares, 1.0)), -1)
    edges = ops.sum(ops.cast(weights > 0, "float32"), -1)
    beyond = ops.sum(ops.where(outside(real.shape[1], config), shares, 0.0), -1)
    return {
        "degree": total_of(degree, ops.logical_and(rows, ops.logical_not(isolated))),
        "edges": total_of(edges, rows),
        "outside_window": total_of(beyond, rows),
        "entropy": total_of(entropy, rows),
        "isolated": total_of(ops.cast(isolated, "float32"), rows),
    }
