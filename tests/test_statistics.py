"""The graph and walk statistics, against loops over dense matrices."""

import csv
import math

import keras
import numpy as np
import oracle
import pytest
from test_layer import (
    BATCH,
    EXTRAS,
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

SIZES = {
    "vocabulary_size": 29,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 12,
    "intermediate_dim": 20,
    "dropout": 0.0,
    "max_sequence_length": 32,
}
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
    "R1": ({}, False),
    "R1 causal": ({}, True),
    "R3": ({"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True}, True),
    "R4": ({"edge_weight": "exponential", "trainable_lens": True}, False),
    "R5": (EXTRAS, True),
    "two graphs": ({**EXTRAS, "graph_heads": 2, "stopping": "learned", "reversible": True}, False),
    "no neighbours": ({"topk": 0, "self_edges": False, "threshold": 0.3}, True),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_equal_loops(name):
    """Over the tokens of all sequences: those of a long one count for more."""
    options, is_causal = STATISTICS[name]
    layer = built(layer_of(**{"window": 2, "topk": 3, "neighbor_block": 1, **options}))
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
    # Means of each sequence's means are others, and so are those with padding.
    halves = [{k: x[b : b + 1] for k, x in inputs.items()} for b in range(BATCH)]
    alone = [walk_statistics(Masked(layer, is_causal), half)[0] for half in halves]
    for key in ("edges", "entropy"):
        assert abs(np.mean([part[key] for part in alone]) - found[key]) > 1e-3


def test_statistics_without_masks():
    layer = built(layer_of(**R5))
    inputs = {"query": make_inputs(), "value": make_inputs(1)}
    (found,) = walk_statistics(Masked(layer, False), inputs)
    for key, values in looped(layer, inputs, False).items():
        assert found[key] == pytest.approx(np.mean(values), rel=2e-5, abs=1e-6), key


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
    np.testing.assert_allclose(numpy(calls[0].inputs.key), numpy(first.key_dense(x)), rtol=1e-5)
    model(x)
    assert len(calls) == 2


def tokens():
    return np.random.default_rng(5).integers(0, 29, (2, 23)).astype("int32")


def probe(token_ids, mask=None):
    mask = np.ones_like(token_ids) if mask is None else mask.astype("int32")
    return {"token_ids": token_ids, "padding_mask": mask}


@pytest.mark.parametrize("step", ["R1", "R3", "R4"])
def test_each_layer_has_statistics_in_their_ranges(step):
    overrides = {"window": 3, "topk": 8, "neighbor_block": 4}
    layers = walk_statistics(build_backbone(step, overrides, **SIZES), probe(tokens()))
    assert len(layers) == 2
    for statistics in layers:
        names = [*NAMES, *HITS, "lens_strength", *(["concentration"] if step == "R4" else [])]
        assert list(statistics) == names
        assert 0 < statistics["hit_rate"] < 1
        assert 0 < statistics["attention_on_edges"] < 1
        assert statistics["lens_strength"] == pytest.approx(0.3)
        assert statistics.get("concentration", 20.0) == pytest.approx(20.0)
        assert 0 < statistics["degree"] <= statistics["edges"] * math.exp(8)
        # the token itself, three before it, two blocks of four; a walk reaches further
        assert 1 <= statistics["edges"] <= 12
        assert 0 < statistics["outside_window"] < 1
        assert 0 < statistics["entropy"] <= math.log(23)
        assert 0 <= statistics["isolated"] < 0.5


def test_a_walk_that_restarts_at_once_stays_at_home():
    overrides = {"window": 3, "topk": 8, "neighbor_block": 4, "alpha": 1.0}
    for statistics in walk_statistics(build_backbone("R1", overrides, **SIZES), probe(tokens())):
        assert statistics["outside_window"] == 0.0
        assert statistics["entropy"] == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_outside_a_window_that_holds_all():
    overrides = {"window": 23, "topk": 8, "neighbor_block": 4, "edge_weight": "exponential"}
    for statistics in walk_statistics(build_backbone("R1", overrides, **SIZES), probe(tokens())):
        assert statistics["outside_window"] == 0.0
        assert statistics["attention_on_edges"] == pytest.approx(1.0)
        assert statistics["hit_rate"] == 0.0
        # exponential edges without a cut link every token to all before it
        assert statistics["edges"] == 12.0
        assert statistics["isolated"] == 0.0


def test_padding_does_not_count():
    backbone = build_backbone("R2", {"window": 3, "topk": 8, "neighbor_block": 4}, **SIZES)
    short = tokens()[:, :17]
    padded = np.concatenate([short, np.full((2, 6), 7, "int32")], axis=1)
    mask = np.arange(23)[None, :].repeat(2, 0) < 17
    for expected, actual in zip(
        walk_statistics(backbone, probe(short)),
        walk_statistics(backbone, probe(padded, mask)),
        strict=True,
    ):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bad_input():
    for model in ("model", None, lambda x: x):
        with pytest.raises(TypeError, match=r"`model` must be a Keras layer\. Received: model="):
            walk_statistics(model, probe(tokens()))
    with pytest.raises(
        ValueError, match=r"must call an RWRAttention with `steps` > 0\. Received: model=GPT2Back"
    ):
        walk_statistics(build_backbone("R0", **SIZES), probe(tokens()))
    backbone = build_backbone("R1", {"window": 15}, **SIZES)
    with pytest.raises(ValueError, match=r"must have a real token.*\(2, 23, 2, 6\)"):
        walk_statistics(backbone, probe(tokens(), np.zeros((2, 23))))
    for shape in ((0, LENGTH, 6), (2, 0, 6)):
        with pytest.raises(ValueError, match="must have a real token"):
            walk_statistics(small_model(), np.zeros(shape, "float32"))
    # What it did to the layers is undone.
    walks = [layer.walk for layer in backbone._flatten_layers() if hasattr(layer, "walk")]
    assert walks and not any("inputs" in vars(walk) for walk in walks)


# --- any model, and in training ------------------------------------------------------------------


def small_model():
    inputs = keras.Input((None, 6))
    options = {"window": 2, "topk": 4, "neighbor_block": 2}
    first = keras_rwr.RWRAttention(2, 3, **options)
    second = keras_rwr.RWRAttention(2, 3, edge_weight="exponential", trainable_lens=True, **options)
    x = first(inputs, inputs)
    x = second(x, x, use_causal_mask=True)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def test_each_call_of_any_model():
    x = np.random.default_rng(0).normal(size=(3, 19, 6)).astype("float32")
    both_ways, causal = walk_statistics(small_model(), x)
    assert list(both_ways) == [*NAMES, *HITS, "lens_strength"]
    assert list(causal) == [*NAMES, *HITS, "lens_strength", "concentration"]
    # Both ways most tokens see two on each side besides the token itself.
    assert both_ways["edges"] <= 9.0 and causal["edges"] <= 7.0


def test_statistics_in_the_logs(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(2, 4, 19, 6)).astype("float32")
    model = small_model()
    model.compile(keras.optimizers.SGD(0.5), loss="mse")
    path = tmp_path / "losses.csv"
    callbacks = [keras_rwr.callbacks.RWRStatsCallback(x[:2]), keras.callbacks.CSVLogger(str(path))]
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
    assert walk_statistics(model, x[:2])[1]["lens_strength"] == pytest.approx(float(second[-1]))
