"""The graph and walk statistics, against loops over dense matrices."""

import csv
import math

import keras
import numpy as np
import pytest
from helpers import numpy

import keras_rwr
from keras_rwr import RWRConfig
from keras_rwr.ablation import build_backbone
from keras_rwr.statistics import (
    full_attention,
    hit_totals,
    matrix_totals,
    means,
    walk_statistics,
)

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


def looped_statistics(weights, walk, real, config):
    values = {name: [] for name in NAMES}
    batch, heads, size, _ = weights.shape
    for n in range(batch):
        for h in range(heads):
            for i in range(size):
                if not real[n, i]:
                    continue
                degree = math.fsum(weights[n, h, i])
                floor = 1e-6 if config.edge_weight == "cosine" else 0.0
                values["isolated"].append(float(degree <= floor))
                if degree > floor:
                    values["degree"].append(degree)
                values["edges"].append(sum(w > 0 for w in weights[n, h, i]))
                mass = math.fsum(walk[n, h, i])
                far = [walk[n, h, i, j] for j in range(size) if abs(i - j) > config.window]
                values["outside_window"].append(math.fsum(far) / mass)
                shares = [r / mass for r in walk[n, h, i] if r > 0]
                values["entropy"].append(-math.fsum(p * math.log(p) for p in shares))
    return {name: float(np.mean(value)) for name, value in values.items()}


def of(totals):
    """The means of one part."""
    return means({name: [part] for name, part in totals.items()})


@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_matrix_statistics_equal_loops(edge_weight):
    rng = np.random.default_rng(3)
    shape = (2, 3, 11, 11)
    weights = np.where(rng.random(shape) < 0.4, rng.random(shape), 0.0)
    weights[0, 0, 5] = 0.0
    weights[1, 2, 7] = 1e-9
    walk = np.where(rng.random(shape) < 0.7, rng.random(shape), 0.0) + 0.1 * np.eye(11)
    real = np.arange(11)[None, :] < np.array([[11], [8]])
    config = RWRConfig(window=2, topk=0, edge_weight=edge_weight)
    expected = looped_statistics(weights, walk, real, config)
    actual = of(matrix_totals(weights, walk, real, config))
    assert actual == pytest.approx(expected, rel=1e-6)


def test_no_token_has_a_neighbor():
    nothing = np.zeros((1, 1, 3, 3))
    real = np.ones((1, 3), bool)
    walk = 0.5 * np.eye(3)[None, None]
    actual = of(matrix_totals(nothing, walk, real, RWRConfig(window=1)))
    assert actual == dict.fromkeys(NAMES, 0.0) | {"isolated": 1.0}


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
        assert statistics.get("concentration", 20.0) == 20.0
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
        ValueError, match=r"must call an RWRAttention\. Received: model=GPT2Backbone"
    ):
        walk_statistics(build_backbone("R0", **SIZES), probe(tokens()))
    backbone = build_backbone("R1", {"window": 15}, **SIZES)
    with pytest.raises(ValueError, match=r"must have a real token.*\(2, 23\)"):
        walk_statistics(backbone, probe(tokens(), np.zeros((2, 23))))
    # What it did to the layers is undone.
    assert not any("call" in vars(layer) for layer in backbone._flatten_layers())


def looped_hits(linked, attention, real, config):
    hits, kept = [], []
    batch, heads, size, _ = linked.shape
    for b in range(batch):
        for n in range(heads):
            for i in np.flatnonzero(real[b]):
                row = attention[b, n, i]
                kept.append(math.fsum(row[linked[b, n, i]]))
                far = [j for j in range(size) if abs(i - j) > config.window and row[j] > 0]
                if len(far) >= config.topk:
                    top = sorted(far, key=lambda j: -row[j])[: config.topk]
                    hits.append(np.mean([linked[b, n, i, j] for j in top]))
    return {"hit_rate": np.mean(hits), "attention_on_edges": np.mean(kept)}


@pytest.mark.parametrize("is_causal", [False, True])
def test_hits_equal_loops(is_causal):
    rng = np.random.default_rng(7)
    query, key = rng.standard_normal((2, 2, 13, 3, 5)).astype("float32")
    real = np.arange(13) < np.array([[13], [9]])
    attention = numpy(full_attention(query, key, real, is_causal))
    for b, n, i in np.ndindex(2, 3, 13):
        seen = [j for j in range(13) if real[b, j] and (j <= i or not is_causal)]
        scores = np.exp([query[b, i, n] @ key[b, j, n] / 5**0.5 for j in seen])
        np.testing.assert_allclose(attention[b, n, i, seen], scores / scores.sum(), rtol=1e-5)
        assert attention[b, n, i].sum() == pytest.approx(1.0)
    weights = rng.random(attention.shape) * (rng.random(attention.shape) < 0.6)
    config = RWRConfig(window=2, topk=4, neighbor_block=1)
    found = of(hit_totals(weights, attention, real, config))
    assert found == pytest.approx(looped_hits(weights > 0, attention, real, config), rel=1e-6)
    nowhere = of(hit_totals(weights, attention, real, RWRConfig(window=2, topk=0)))
    assert nowhere["hit_rate"] == 0.0


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
