"""The graph and walk statistics, against loops over dense matrices."""

import csv
import dataclasses
import math

import keras
import numpy as np
import oracle
import pytest
from helpers import numpy
from keras import ops

import keras_rwr
from keras_rwr.ablation import build_backbone
from keras_rwr.options import Options
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


def looped(call, options):
    """All statistics of a recorded call by loops over the oracle's matrices."""
    inputs = call.inputs
    query, key = numpy(inputs.query), numpy(inputs.key)
    batch, size, heads, features = query.shape
    real = numpy(inputs.padding_mask).astype(bool)
    u = None if inputs.discoverability is None else ops.convert_to_numpy(inputs.discoverability)
    kappa = np.float64(numpy(ops.convert_to_tensor(inputs.concentration)))
    names = set(oracle.Options.__dataclass_fields__) & set(Options.names())
    known = oracle.Options(
        **{name: getattr(options, name) for name in names}, is_causal=call.is_causal
    )
    graphs = oracle.graphs(
        query, key, known, concentration=kappa, discoverability=u, padding_mask=real
    )
    theta = oracle.restart_weights(known)
    values = {name: [] for name in (*NAMES, *HITS)}
    for b, n in np.ndindex(batch, heads):
        graph = graphs[b][n]
        walk = oracle.walk_matrix(graph.transition, theta)
        if options.is_reciprocal:
            mass, beta = sum(theta), options.reciprocal_beta
            walk = oracle.reciprocal_matrix(walk, graph.stationary, mass, beta)
        for i in np.flatnonzero(real[b]):
            seen = [j for j in range(size) if real[b, j] and (j <= i or not call.is_causal)]
            linked = [j for j in seen if graph.symmetric[i, j] > 0]
            values["isolated"].append(float(not linked))
            if linked:
                values["degree"].append(graph.degree[i])
            values["edges"].append(len(linked))
            shares = walk[i] / walk[i].sum()
            far = [j for j in seen if abs(i - j) > options.window]
            values["outside_window"].append(math.fsum(shares[far]))
            values["entropy"].append(-math.fsum(p * math.log(p) for p in shares if p > 0))
            scores = np.exp([query[b, i, n] @ key[b, j, n] / features**0.5 for j in seen])
            attention = dict(zip(seen, scores / scores.sum(), strict=True))
            values["attention_on_edges"].append(math.fsum(attention[j] for j in linked))
            if len(far) >= options.topk:
                top = sorted(far, key=lambda j: -attention[j])[: options.topk]
                values["hit_rate"].append(np.mean([j in linked for j in top]))
    return {name: float(np.mean(value)) for name, value in values.items()}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("step", ["R1", "R3", "R4"])
def test_statistics_equal_loops(step, is_causal):
    """Sequences of different lengths count by their tokens: no mean of means."""
    options = {"window": 2, "topk": 4, "neighbor_block": 1}
    options |= {"use_discoverability": True} if step == "R3" else {}
    options |= {"R1": {}, "R3": {"reversible": True}, "R4": {"edge_weight": "exponential"}}[step]
    layer = keras_rwr.RWRAttention(3, 5, **options)
    x = np.random.default_rng(3).normal(size=(2, 13, 6)).astype("float32")
    real = np.arange(13)[None, :] < np.array([[13], [5]])
    layer.build(x.shape, x.shape)
    for weight in layer.extra_weights:
        if weight.name == "discoverability":
            weight.assign(np.random.default_rng(4).normal(size=weight.shape))
    with record_calls(layer) as calls:
        layer(x, x, attention_mask=real, use_causal_mask=is_causal)
    (call,) = calls
    found = attention_statistics(call)
    for name, value in looped(call, layer.options).items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_keys_come_from_the_input_for_keys():
    layer = keras_rwr.RWRAttention(2, 5, window=2, topk=4, neighbor_block=1)
    query, key = np.random.default_rng(3).normal(size=(2, 1, 13, 6)).astype("float32")
    with record_calls(layer) as calls:
        layer(query, key)
    np.testing.assert_allclose(numpy(calls[0].inputs.key), numpy(layer.key_dense(key)), rtol=1e-6)
    same = keras_rwr.statistics.RecordedCall(
        layer, dataclasses.replace(calls[0].inputs, key=layer.key_dense(query)), False
    )
    found, other = attention_statistics(calls[0]), attention_statistics(same)
    assert abs(found["degree"] - other["degree"]) > 1e-3


def test_hop_weights_of_a_gated_walk():
    options = {"window": 2, "topk": 2, "neighbor_block": 1, "steps": 2, "stopping": "gated"}
    layer = keras_rwr.RWRAttention(2, 5, **options)
    x = np.random.default_rng(3).normal(size=(2, 9, 6)).astype("float32")
    with record_calls(layer) as calls:
        layer(x, x)
    found = attention_statistics(calls[0])
    assert [found[f"hop_{t}"] for t in range(3)] == [0.5, 1.0, 0.5]
    assert "lens_strength" not in found


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
    with pytest.raises(
        ValueError, match=r"must call an RWRAttention with `steps` > 0\. Received: model=GPT2Back"
    ):
        walk_statistics(build_backbone("R0", **SIZES), probe(tokens()))
    backbone = build_backbone("R1", {"window": 15}, **SIZES)
    with pytest.raises(ValueError, match=r"must have a real token.*\(2, 23\)"):
        walk_statistics(backbone, probe(tokens(), np.zeros((2, 23))))
    # What it did to the layers is undone.
    walks = [layer.walk for layer in backbone._flatten_layers() if hasattr(layer, "walk")]
    assert walks and not any("inputs" in vars(walk) for walk in walks)


# --- any model, and in training ------------------------------------------------------------------


def small_model():
    inputs = keras.Input((19, 6))
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
