"""What the graphs and walks of a model look like, measured on a few sequences."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_rwr import _reference
from keras_rwr._attend import transition_matrix
from keras_rwr._core import WalkCore
from keras_rwr._heads import Heads, Inputs
from keras_rwr._tensors import repeat_heads
from keras_rwr._tokens import Masks
from keras_rwr.options import Call, Options, Tuning

__all__ = ["RecordedCall", "attention_statistics", "record_calls", "walk_statistics"]

Tensor = Any
Totals = dict[str, tuple[Any, Any]]


def walk_statistics(model: keras.layers.Layer, inputs: Any) -> list[dict[str, float]]:
    """Measures the graph and the walk of each `RWRAttention` that walks in a call of a model.

    Numbers are means over the real (not padding) tokens of all sequences, and over all heads or
    graphs:

    - `degree`: the weighted degree `D_i = sum_j S_ij g_j` of a token that is not isolated (0 if
      all are). Exponential edges weigh at most 1, as cosine ones do.
    - `edges`: the number of keys with `P_ij > 0`; 0 for an isolated token.
    - `outside_window`: the share of the walk's weight beyond the window,
      `sum_{|i-j| > window} |r_ij| / sum_j |r_ij|`.
    - `entropy`: `-sum_j p_ij log p_ij` with `p_ij = |r_ij| / sum_j |r_ij|`, in nats. A token that
      visits m tokens equally often has log m.
    - `isolated`: the share of tokens without weight, whose walk stays at home.
    - `hit_rate`: of the `topk` keys beyond the window on which full attention, the softmax of
      `q_i k_j / sqrt(H)` over all keys, would put most weight, the share that the token links to.
      Over tokens with at least `topk` keys there; 0 if there is none.
    - `attention_on_edges`: the share of that attention's weight that lies on the token's edges.
    - `lens_strength`: gamma, with `stopping="restart"`; otherwise theta: `hop_0`, `hop_1` and on.
    - `concentration`: kappa; for exponential edges only.

    Here r is the walk that the layer uses: the reciprocal mix when it is reversible. Matrices are
    dense, those of one sequence at a time, so keep `inputs` to a few short sequences.

    Args:
        model: A built Keras model or layer: a GPT-2 backbone or task, a classifier, any other.
        inputs: What `model` is called with, such as a dict of `"token_ids"` and `"padding_mask"`.

    Returns:
        A list with one dict for each call of an `RWRAttention` with steps to walk, in their order,
        from the name of a statistic to a float.

    Raises:
        TypeError: If `model` is no Keras layer.
        ValueError: If no such layer is called, or one sees no real token.
    """
    with record_calls(model) as calls:
        model(inputs, training=False)
    if not calls:
        raise ValueError(
            "`model` must call an RWRAttention with `steps` > 0. "
            f"Received: model={type(model).__name__} without one"
        )
    return [attention_statistics(call) for call in calls]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of an `RWRAttention`.

    Attributes:
        layer: The `RWRAttention`.
        inputs: `Inputs`, the tensors of its call.
        is_causal: Bool. Whether it was causal.
    """

    layer: Any
    inputs: Inputs
    is_causal: bool

    def sequences(self) -> Iterator[Inputs]:
        """The inputs of one sequence after another, or of all at once with a caller's graph."""
        if self.inputs.graph is not None:
            yield self.inputs
            return
        batch = ops.shape(self.inputs.query)[0]
        shared = ("concentration", "lens_strength", "discoverability", "seed")
        for entry in range(batch):
            tensors = {
                name: x
                if x is None or name in shared or (name == "hop_weights" and len(x.shape) < 4)
                else x[entry : entry + 1]
                for name, x in self.inputs.tensors().items()
            }
            yield Inputs(**tensors)


@contextlib.contextmanager
def record_calls(model: keras.layers.Layer) -> Iterator[list[RecordedCall]]:
    """Notes the calls of a model's layers of RWR attention that have steps to walk.

    Args:
        model: Keras layer or model.

    Yields:
        A list that fills with a `RecordedCall` for each.

    Raises:
        TypeError: If `model` is no Keras layer.

    Example:

    ```python
    with record_calls(model) as calls:
        model(inputs, training=False)
    query, key = calls[-1].inputs.query, calls[-1].inputs.key  # of the last layer
    ```
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras layer. Received: model={model!r}")
    calls: list[RecordedCall] = []

    def recording(layer: Any) -> Any:
        make_inputs = layer.walk.inputs

        def record(x: Tensor, query: Tensor, key: Tensor, value: Tensor, masks: Masks, *others):
            inputs = make_inputs(x, query, key, value, masks, *others)
            # Keras builds a model by calling it without numbers.
            if not in_symbolic_scope():
                calls.append(RecordedCall(layer, inputs, masks.is_causal))
            return inputs

        return record

    layers = [x for x in model._flatten_layers() if isinstance(getattr(x, "walk", None), WalkCore)]
    layers = [x for x in layers if x.options.steps > 0]
    for layer in layers:
        object.__setattr__(layer.walk, "inputs", recording(layer))
    try:
        yield calls
    finally:
        for layer in layers:
            object.__delattr__(layer.walk, "inputs")


def attention_statistics(call: RecordedCall) -> dict[str, float]:
    """The statistics of a `RecordedCall`; see `walk_statistics`."""
    options, query, mask = call.layer.options, call.inputs.query, call.inputs.padding_mask
    if 0 in query.shape or (mask is not None and not ops.any(mask)):
        raise ValueError(
            "`inputs` must have a real token. "
            f"Received: none in a query of shape {tuple(query.shape)}"
        )
    totals: dict[str, list] = {}
    for inputs in call.sequences():
        for name, part in _sequence_totals(inputs, options, call.is_causal).items():
            totals.setdefault(name, []).append(part)
    return _means(totals)


def _sequence_totals(inputs: Inputs, options: Options, is_causal: bool) -> Totals:
    """What one sequence adds to each statistic: the sum of its values and their number."""
    heads = Heads.create(inputs, options, Call(is_causal))
    graph = transition_matrix(heads, options, Tuning())
    heads = dataclasses.replace(heads, graph=graph)
    size, number = graph.tiling.size, heads.query.shape[1]
    real = heads.tokens.real[..., 0]  # (1, 1, S)
    isolated = graph.isolated[:, :, :size, 0]  # (1, G, S)
    degree = ops.exp(graph.log_degree[:, :, :size, 0])
    walk = ops.abs(_reference.walk_matrices(heads, options)[1])  # (1, N, S, S)
    total = ops.sum(walk, -1, keepdims=True)
    shares = walk / ops.where(total > 0, total, 1.0)  # p_ij
    entropy = -ops.sum(shares * ops.log(ops.where(shares > 0, shares, 1.0)), -1)
    positions = np.arange(size)
    outside = np.abs(positions[:, None] - positions[None, :]) > options.window
    linked = ops.logical_and(graph.to_dense() > 0, ops.logical_not(isolated)[..., None])
    linked = ops.cast(linked, "float32")  # (1, G, S, S)
    found = {
        "degree": _total(degree, ops.logical_and(real, ops.logical_not(isolated))),
        "edges": _total(ops.sum(linked, -1), real),
        "outside_window": _total(ops.sum(ops.where(outside, shares, 0.0), -1), real),
        "entropy": _total(entropy, real),
        "isolated": _total(ops.cast(isolated, "float32"), real),
    }
    attention = full_attention(heads, number)
    linked = repeat_heads(linked, number)
    found["hit_rate"] = (0.0, 0)
    found["attention_on_edges"] = _total(ops.sum(attention * linked, -1), real)
    if options.topk > 0:
        far = ops.where(outside, attention, 0.0)
        _, top = ops.top_k(far, min(options.topk, size))
        hits = ops.mean(ops.take_along_axis(linked, ops.cast(top, "int32"), axis=-1), -1)
        enough = ops.sum(ops.cast(far > 0, "int32"), -1) >= options.topk
        found["hit_rate"] = _total(hits, ops.logical_and(enough, real))
    theta = heads.hop_weights
    if options.stopping == "restart":
        gamma = ops.convert_to_tensor(inputs.lens_strength)
        found["lens_strength"] = _total(gamma, ops.ones_like(gamma, "bool"))
    else:
        for t in range(options.steps + 1):
            found[f"hop_{t}"] = _total(theta[..., t], real)
    if options.edge_weight == "exponential":
        kappa = heads.concentration
        found["concentration"] = _total(kappa, ops.ones_like(kappa, "bool"))
    return found


def full_attention(heads: Heads, number: int) -> Tensor:
    """`softmax_j(q_i k_j / sqrt(H))` over all keys, `(B, N, S, S)`; 0 in a row without a key."""
    key = repeat_heads(heads.key, number)
    logits = (heads.query @ ops.swapaxes(key, -1, -2)) / heads.query.shape[-1] ** 0.5
    # A row without a key has no logit near its peak, so that all of its weights are 0.
    logits = ops.where(heads.tokens.pairs(), logits, -1e30)
    weights = ops.exp(logits - ops.maximum(ops.amax(logits, -1, keepdims=True), -1e20))
    total = ops.sum(weights, -1, keepdims=True)
    return weights / ops.where(total > 0, total, 1.0)


def _total(values: Tensor, chosen: Tensor) -> tuple[Any, Any]:
    """The sum of the values that are chosen, and their number; the two broadcast together."""
    values, chosen = (ops.convert_to_numpy(x) for x in (values, chosen))
    values, chosen = np.broadcast_arrays(values, chosen)
    return values[chosen].sum(dtype="float64"), chosen.sum()


def _means(totals: dict[str, list]) -> dict[str, float]:
    """Floats by name of lists of (sum, number) by name; 0 for a mean of nothing."""
    found = {}
    for name, parts in totals.items():
        total, number = (math.fsum(float(x) for x in column) for column in zip(*parts, strict=True))
        found[name] = total / number if number > 0 else 0.0
    return found
