"""The graph and walk statistics, against loops over dense matrices."""

import csv
import math

import keras
import numpy as np
import oracle
import pytest
from helpers import assert_close
from test_layer import (
    BATCH,
    DIM,
    EXTRAS,
    HEADS,
    KEY_DIM,
    LENGTH,
    R5,
    SEGMENTS,
    SMALL,
    Expected,
    built,
    layer_of,
    make_inputs,
    numpy,
)

import keras_rwr
from keras_rwr.ablation import build_backbone
from keras_rwr.statistics import attention_statistics, record_calls, walk_statistics

NAMES = ["degree", "edges", "outside_window", "entropy", "isolated"]
HITS = ["hit_rate", "attention_on_edges"]


class Masked(keras.Model):
    """One layer and its masks."""

    def __init__(self, layer, is_causal):
        super().__init__()
        self.attention = layer
        self.is_causal = is_causal

    def call(self, inputs):
        return self.attention(
            inputs["query"],
            inputs["value"],
            attention_mask=inputs.get("padding_mask"),
            segment_ids=inputs.get("segment_ids"),
            use_causal_mask=self.is_causal,
        )


def looped(layer, inputs, is_causal):
    """Lists of all that each statistic is the mean of, by loops over the oracle's matrices."""
    masks = {name: inputs[name] for name in ("padding_mask", "segment_ids") if name in inputs}
    known = Expected(layer, inputs["query"], inputs["value"], is_causal=is_causal, **masks)
    options = known.options
    batch, size, heads, features = known.query.shape
    graphs = oracle.graphs(known.query, known.key, options, **known.graph)
    theta = oracle.hop_weights_of_tokens(
        options, known.theta.get("hop_weights"), (batch, size, heads)
    )
    labels = oracle.token_labels((batch, size), **masks)
    values = {name: [] for name in (*NAMES, *HITS)}
    if "hop_weights" in known.theta:
        values |= {
            f"hop_{t}": theta[labels != oracle.PADDING][..., t] for t in range(theta.shape[-1])
        }
    else:
        values["lens_strength"] = known.theta["lens_strength"]
    if options.edge_weight == "exponential":
        values["concentration"] = known.graph["concentration"]

    for b, row in enumerate(graphs):
        for graph in row:
            linked = graph.symmetric > 0
            for i in np.flatnonzero(labels[b] != oracle.PADDING):
                values["isolated"].append(float(not linked[i].any()))
                values["edges"].append(linked[i].sum())
                if linked[i].any():
                    values["degree"].append(graph.degree[i])
    for b, n in np.ndindex(batch, heads):
        graph = graphs[b][n * len(graphs[b]) // heads]
        _, walk = oracle.forward_and_mixed_walk(graph, options, theta[b, :, n])
        for i in np.flatnonzero(labels[b] != oracle.PADDING):
            seen = [j for j in range(size) if oracle.is_valid(i, j, labels[b], options)]
            linked = [j for j in seen if graph.symmetric[i, j] > 0]
            shares = np.abs(walk[i]) / np.abs(walk[i]).sum()
            far = [j for j in seen if abs(i - j) > options.window]
            values["outside_window"].append(math.fsum(shares[far]))
            values["entropy"].append(-math.fsum(p * math.log(p) for p in shares if p > 0))
            logits = [known.query[b, i, n] @ known.key[b, j, n] / features**0.5 for j in seen]
            attention = dict(zip(seen, oracle.softmax(logits), strict=True))
            values["attention_on_edges"].append(math.fsum(attention[j] for j in linked))
            if len(far) >= options.topk > 0:
                top = sorted(far, key=lambda j: -attention[j])[: options.topk]
                values["hit_rate"].append(np.mean([j in linked for j in top]))
    return values


STATISTICS = {
    "R1": ({}, True),
    "R3": ({"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True}, True),
    "R4": ({"edge_weight": "exponential", "trainable_lens": True}, False),
    "R5": (EXTRAS, True),
    "two graphs": ({**R5, "graph_heads": 2, "stopping": "learned"}, False),
    "no neighbours": ({"topk": 0, "self_edges": False, "threshold": 0.3}, True),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_equal_loops(name):
    """Over the tokens of all sequences: those of a long one count for more."""
    options, is_causal = STATISTICS[name]
    options = {"window": 2, "topk": 3, "neighbor_block": 1, **options}
    # How the output is computed does not matter.
    layer = built(layer_of(**options, implementation="reference"))
    inputs = {
        "query": make_inputs(),
        "value": make_inputs(1),
        "padding_mask": np.arange(LENGTH)[None] < np.array([[LENGTH], [6]]),
        "segment_ids": SEGMENTS,
    }
    (found,) = walk_statistics(Masked(layer, is_causal), inputs)
    expected = looped(layer, inputs, is_causal)
    assert list(found) == list(expected)
    for key, values in expected.items():
        mean = np.mean(values) if np.size(values) else 0.0
        assert found[key] == pytest.approx(mean, rel=2e-5, abs=1e-6), key
    # The mean of the two sequences' means is another.
    halves = [{key: x[b : b + 1] for key, x in inputs.items()} for b in range(BATCH)]
    halves = [looped(layer, half, is_causal) for half in halves]
    for key in ("edges", "entropy"):
        assert abs(np.mean([np.mean(half[key]) for half in halves]) - found[key]) > 1e-3


@pytest.mark.costly
def test_a_graph_made_before_the_call_counts_each_sequence():
    layer = built(layer_of(edge_weight="exponential"))
    x, real = make_inputs(), np.arange(LENGTH)[None] < np.array([[LENGTH], [9]])
    graph = keras_rwr.graph.build_sparse_w(
        layer.query_dense(x),
        layer.key_dense(x),
        edge_weight="exponential",
        concentration=layer.walk.concentration,
        padding_mask=real,
        **SMALL,
    )
    graph = keras_rwr.graph.normalize_to_p(graph)
    with record_calls(layer) as calls:
        layer(x, x, attention_mask=real)
        layer(x, x, attention_mask=real, graph=graph)
    own, shared = (attention_statistics(call) for call in calls)
    assert shared == pytest.approx(own, rel=1e-5)


def test_isolated_tokens_have_no_edges():
    """A causal graph of the window without self edges leaves the first token alone."""
    options = {"window": 1, "topk": 0, "self_edges": False, "edge_weight": "exponential"}
    layer = built(layer_of(**options, alpha=0.5, steps=1))
    inputs = {"query": make_inputs(), "value": make_inputs()}
    (found,) = walk_statistics(Masked(layer, True), inputs)
    assert found["isolated"] == pytest.approx(1 / LENGTH)
    assert found["edges"] == pytest.approx((LENGTH - 1) / LENGTH)
    assert found["outside_window"] == found["hit_rate"] == 0.0
    # The others stay with 2/3 and go one back with 1/3.
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert found["entropy"] == pytest.approx(entropy * (LENGTH - 1) / LENGTH, rel=1e-5)


def test_a_window_that_holds_all():
    layer = built(layer_of(window=LENGTH, edge_weight="exponential", alpha=1.0))
    inputs = {"query": make_inputs(), "value": make_inputs()}
    (found,) = walk_statistics(Masked(layer, True), inputs)
    assert found["outside_window"] == found["hit_rate"] == found["isolated"] == 0.0
    # Exponential edges without a cut link every token to all before it.
    assert found["edges"] == (LENGTH + 1) / 2
    assert found["attention_on_edges"] == pytest.approx(1.0)
    # A walk that restarts at once stays at home.
    assert found["entropy"] == pytest.approx(0.0, abs=1e-6)


# --- models, and in training ---------------------------------------------------------------------


def test_calls_are_recorded_in_their_order():
    first, second = layer_of(**R5), layer_of(steps=0)
    x = make_inputs()

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def call(self, x):
            return self.first(self.second(self.first(x, x), x), x, use_causal_mask=True)

    model = Twice()
    with record_calls(model) as calls:
        model(x)
    assert [call.layer for call in calls] == [first, first]
    assert [call.is_causal for call in calls] == [False, True]
    assert_close(numpy(calls[0].inputs.key), numpy(first.key_dense(x)), 1e-6)
    # Afterwards nothing is recorded, and what it did to the layers is undone.
    model(x)
    assert len(calls) == 2
    assert not any("inputs" in vars(layer.walk) for layer in (first, second))


SIZES = {
    "vocabulary_size": 29,
    "num_layers": 4,
    "num_heads": HEADS,
    "hidden_dim": HEADS * KEY_DIM,
    "intermediate_dim": 20,
    "dropout": 0.0,
    "max_sequence_length": LENGTH,
}


@pytest.mark.costly
def test_layers_of_a_backbone_that_walk():
    token_ids = np.random.default_rng(5).integers(0, 29, (BATCH, LENGTH)).astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": np.ones((BATCH, LENGTH), "int32")}
    backbone = build_backbone("R5", {"window": 3, "graph_dim": 6}, **SIZES)
    layers = walk_statistics(backbone, inputs)
    assert len(layers) == 2
    for statistics in layers:
        assert list(statistics) == [*NAMES, *HITS, *(f"hop_{t}" for t in range(5)), "concentration"]
        assert [statistics[f"hop_{t}"] for t in range(5)] == [0.5, 1.0, 0.5, 0.5, 0.5]
        assert statistics["concentration"] == pytest.approx(20.0)
        # Three tokens before it and eight more.
        assert 1 <= statistics["edges"] <= 11


def test_bad_input():
    for model in ("model", None, lambda x: x):
        with pytest.raises(TypeError, match=r"`model` must be a Keras layer\. Received: model="):
            walk_statistics(model, make_inputs())
    with pytest.raises(
        ValueError, match=r"must call an RWRAttention with `steps` > 0\. Received: model=Dense"
    ):
        walk_statistics(keras.layers.Dense(3), make_inputs())
    model, x = Masked(built(layer_of(topk=0, steps=1)), True), make_inputs()
    for inputs, shape in (
        ({"query": x, "value": x, "padding_mask": np.zeros((BATCH, LENGTH), bool)}, r"\(2, 23"),
        ({"query": x[:0], "value": x[:0]}, r"\(0, 23"),
        ({"query": x[:, :0], "value": x[:, :0]}, r"\(2, 0"),
    ):
        with pytest.raises(ValueError, match=f"must have a real token.*shape {shape}, 4, 5"):
            walk_statistics(model, inputs)


def test_statistics_in_the_logs(tmp_path):
    inputs = keras.Input((LENGTH, DIM))
    first = layer_of(topk=0)
    second = layer_of(topk=0, edge_weight="exponential", trainable_lens=True)
    x = first(inputs, inputs, use_causal_mask=True)
    x = second(x, x, use_causal_mask=True)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(keras.optimizers.SGD(0.5), loss="mse")
    x, y = make_inputs(), make_inputs(1)
    path = tmp_path / "losses.csv"
    callbacks = [keras_rwr.callbacks.RWRStatsCallback(x), keras.callbacks.CSVLogger(str(path))]
    history = model.fit(x, y[..., :1], epochs=2, verbose=0, callbacks=callbacks).history
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for number, names in ((0, NAMES), (1, [*NAMES, "concentration"])):
        for name in (*names, *HITS, "lens_strength"):
            values = [float(row[f"rwr_{number}_{name}"]) for row in rows]
            assert history[f"rwr_{number}_{name}"] == pytest.approx(values)
    # The trained gamma of the second layer moves, the fixed one of the first does not.
    first, second = ([row[f"rwr_{i}_lens_strength"] for row in rows] for i in (0, 1))
    assert first[0] == first[1] and second[0] != second[1]
    assert walk_statistics(model, x)[1]["lens_strength"] == pytest.approx(float(second[-1]))
