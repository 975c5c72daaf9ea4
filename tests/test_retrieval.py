"""`examples/retrieval.py`: what its tasks ask, and a run at tiny sizes."""

import csv
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "tokens": 20,
    "pairs": 3,
    "symbols": 5,
    "window": 4,
    "topk": 4,
    "neighbor-block": 2,
    "layers": 1,
    "width": 8,
    "heads": 2,
    "training-steps": 3,
    "batch-size": 2,
}


@pytest.fixture(autouse=True, scope="module")
def importable():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def retrieval(monkeypatch):
    module = import_module("retrieval")
    monkeypatch.setattr(module, "TEST_SEQUENCES", 4)
    return module


def flags(*more, **changes):
    values = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)] + [*more]


@pytest.mark.parametrize(("pairs", "hops"), [(7, 1), (8, 2), (6, 6)])
def test_answers_follow_from_the_pairs(pairs, hops):
    task = import_module("retrieval_data").Task(41, pairs, 11, hops)
    sequences, targets, asked = task.draw(3, 5)
    assert sequences.shape == targets.shape == asked.shape == (5, 41)
    assert sequences.max() < task.vocabulary_size == 23 and sequences.min() == 0
    for sequence, answers, questions in zip(sequences, targets, asked, strict=True):
        told = sequence[: 2 * pairs].reshape(pairs, 2).tolist()
        meanings = dict(told)
        assert len(meanings) == pairs and max(meanings) <= 11
        places = np.flatnonzero(questions)
        assert sorted(sequence[places]) == sorted(meanings) and places.min() >= 2 * pairs
        for place in places:
            answer, earlier = sequence[place], pairs
            for _ in range(questions[place]):
                now = [key for key, _ in told].index(answer)
                assert now < earlier  # told after what it points to
                answer, earlier = meanings[answer], now
            assert answers[place] == answer > 11
        found = np.bincount(questions[places], minlength=hops + 1)[1:]
        assert found.tolist() == [pairs // hops] * hops
        others = np.delete(np.arange(2 * pairs, 41), places - 2 * pairs)
        assert not sequence[others].any() and not answers[others].any()


def test_batches_are_new_and_repeatable():
    data = import_module("retrieval_data")
    task = data.Task(20, 4, 5, 2)
    batches, again = (data.Batches(task, 4, seed=1) for _ in range(2))
    for one, other in zip(batches[2], again[2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(np.unique(batches[2][2])) == {0.0, 1.0}
    assert not np.array_equal(batches[2][0], batches[3][0])
    assert not np.array_equal(batches[2][0], data.Batches(task, 4, seed=2)[2][0])


def read(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_can_be_continued(retrieval, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    retrieval.main(flags("--models", "full", "R4", "--steps", "1", *out))
    first = read(tmp_path)
    assert [(row["model"], row["walk_steps"]) for row in first] == [("full", "0"), ("R4", "1")]
    retrieval.main(flags("--models", "window", "R4", "--steps", "1", *out))
    rows = read(tmp_path)
    assert rows[:2] == first and [row["model"] for row in rows[2:]] == ["window"]
    retrieval.main(flags("--models", "R1", "--report", *out))
    assert read(tmp_path) == rows
    with pytest.raises(SystemExit, match="2"):
        retrieval.main(["--report", "--out", str(tmp_path / "empty")])
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= float(row["best_accuracy"]) <= 1
        assert float(row["all_hops_accuracy"]) == pytest.approx(float(row["accuracy"]))
        # A question's mean loss, before it has learned anything.
        assert 0.7 * np.log(11) < float(row["loss"]) < 1.6 * np.log(11)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    walk = "alpha 0.5, gamma 4 at first, kappa 8, 4 in blocks of 2"
    assert f"| 20 | 3 | 1 | 1 | 8 | R4, 1 step | {walk} | 1 |" in table
    assert table in capsys.readouterr().out


def test_the_models_are_what_their_names_say(retrieval):
    changes = {"alpha": 0.3, "concentration": 8}
    _, given = retrieval.parse(flags("--steps", "2", **changes))
    layers = {run.model: retrieval.make_attention(run) for run in retrieval.make_runs(given)}
    assert list(layers) == ["full", "window", "R1", "R2", "R3", "R4"]
    assert type(layers.pop("full")).__name__ == "MultiHeadAttention"
    configs = {name: layer.get_config() for name, layer in layers.items()}
    assert configs["window"]["topk"] == 0 and configs["window"]["lens_strength"] == 0.0
    for name, config in configs.items():
        assert config["window"] == 4
        assert config["edge_weight"] == ("exponential" if name == "R4" else "cosine")
        assert config["reversible"] == (name in ("R2", "R3"))
        assert config["trainable_lens"] == (name != "window")
        if name != "window":
            assert config["alpha"] == 0.3 and config["concentration"] == 8
    assert configs["R3"]["use_discoverability"] and configs["R1"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tokens": 8}, "`tokens` must be at least three times `pairs`. Received: tokens=8"),
        ({"symbols": 2}, "`symbols` must be at least `pairs`."),
        ({"hops": 2}, "`hops` must be at least 1 and a divisor of `pairs`."),
        ({"alpha": 1.5}, "`alpha` must be"),
        ({"width": 9}, "`width` must be a multiple of `heads`. Received: width=9, heads=2"),
        ({"training_steps": 0}, "`training_steps` must be at least 1. Received: training_steps=0"),
        ({"topk": 5}, "`topk` must be a multiple of `neighbor_block`. Received: topk=5"),
    ],
)
def test_bad_arguments_are_named(retrieval, capsys, tmp_path, changes, rule):
    with pytest.raises(SystemExit):
        retrieval.main(flags("--out", str(tmp_path / "new"), **changes))
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
