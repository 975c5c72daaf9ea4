"""The graph and walk statistics, against loops over dense matrices."""

import math

import numpy as np
import pytest

from keras_rwr import RWRConfig
from keras_rwr.ablation import build_backbone
from keras_rwr.statistics import matrix_statistics, walk_statistics

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
    actual = matrix_statistics(weights, walk, real, config)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_no_token_has_a_neighbor():
    nothing = np.zeros((1, 1, 3, 3))
    real = np.ones((1, 3), bool)
    actual = matrix_statistics(nothing, 0.5 * np.eye(3)[None, None], real, RWRConfig(window=1))
    assert actual == dict.fromkeys(NAMES, 0.0) | {"isolated": 1.0}


def tokens():
    return np.random.default_rng(5).integers(0, 29, (2, 23)).astype("int32")


@pytest.mark.parametrize("step", ["R1", "R3", "R4"])
def test_each_layer_has_statistics_in_their_ranges(step):
    overrides = {"window": 3, "topk": 8, "neighbor_block": 4}
    layers = walk_statistics(build_backbone(step, overrides, **SIZES), tokens())
    assert len(layers) == 2
    for statistics in layers:
        assert list(statistics) == NAMES
        assert 0 < statistics["degree"] <= statistics["edges"] * math.exp(8)
        # the token itself, three before it, two blocks of four; a walk reaches further
        assert 1 <= statistics["edges"] <= 12
        assert 0 < statistics["outside_window"] < 1
        assert 0 < statistics["entropy"] <= math.log(23)
        assert 0 <= statistics["isolated"] < 0.5


def test_a_walk_that_restarts_at_once_stays_at_home():
    overrides = {"window": 3, "topk": 8, "neighbor_block": 4, "alpha": 1.0}
    for statistics in walk_statistics(build_backbone("R1", overrides, **SIZES), tokens()):
        assert statistics["outside_window"] == 0.0
        assert statistics["entropy"] == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_outside_a_window_that_holds_all():
    overrides = {"window": 23, "topk": 8, "neighbor_block": 4, "edge_weight": "exponential"}
    for statistics in walk_statistics(build_backbone("R1", overrides, **SIZES), tokens()):
        assert statistics["outside_window"] == 0.0
        # exponential edges without a cut link every token to all before it
        assert statistics["edges"] == 12.0
        assert statistics["isolated"] == 0.0


def test_padding_does_not_count():
    backbone = build_backbone("R2", {"window": 3, "topk": 8, "neighbor_block": 4}, **SIZES)
    short = tokens()[:, :17]
    padded = np.concatenate([short, np.full((2, 6), 7, "int32")], axis=1)
    mask = np.arange(23)[None, :].repeat(2, 0) < 17
    for expected, actual in zip(
        walk_statistics(backbone, short), walk_statistics(backbone, padded, mask), strict=True
    ):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"RWR attention in each layer\. Received: Cached"):
        walk_statistics(build_backbone("R0", **SIZES), tokens())
    backbone = build_backbone("R1", {"window": 15}, **SIZES)
    with pytest.raises(ValueError, match=r"must mark a real token.*\(2, 23\)"):
        walk_statistics(backbone, tokens(), np.zeros((2, 23), bool))
