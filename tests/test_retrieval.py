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


@pytest.mark.parametrize(("name", "hops"), [("recall", 1), ("pointers", 1), ("pointers", 3)])
def test_answers_follow_from_the_pairs(name, hops):
    task = import_module("retrieval_data").Task(name, 41, 7, 11, hops)
    sequences, targets, asked = task.draw(3, 5)
    assert sequences.shape == targets.shape == asked.shape == (5, 41)
    assert sequences.max() < task.vocabulary_size and sequences.min() == 0
    for sequence, answers, questions in zip(sequences, targets, asked, strict=True):
        pairs = dict(sequence[:14].reshape(7, 2).tolist())
        assert len(pairs) == 7
        places = np.flatnonzero(questions)
        assert sorted(sequence[places]) == sorted(pairs) and places.min() >= 14
        for place in places:
            answer = sequence[place]
            for _ in range(hops):
                answer = pairs[answer]
            assert answers[place] == answer
        others = np.delete(np.arange(14, 41), places - 14)
        assert not sequence[others].any() and not answers[others].any()
        if name == "pointers":
            assert sorted(pairs) == sorted(pairs.values()) == list(range(1, 8))
        else:
            assert max(pairs) <= 11 < min(pairs.values())


def test_batches_are_new_and_repeatable():
    data = import_module("retrieval_data")
    task = data.Task("recall", 20, 3, 5, 1)
    batches, again = (data.Batches(task, 4, seed=1) for _ in range(2))
    for one, other in zip(batches[2], again[2], strict=True):
        np.testing.assert_array_equal(one, other)
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
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= float(row["best_accuracy"]) <= 1
        # A question's mean loss, before it has learned anything.
        assert 0.7 * np.log(11) < float(row["loss"]) < 1.6 * np.log(11)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert (
        "| recall | 20 | 3 | - | R4, 1 steps | 8 | 1 |" in table
        and table in capsys.readouterr().out
    )


def test_the_models_are_what_their_names_say(retrieval):
    _, given = retrieval.parse(flags("--steps", "2", "--trainable-lens"))
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
    assert configs["R3"]["use_discoverability"] and configs["R1"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tokens": 8}, "`tokens` must be at least three times `pairs`. Received: tokens=8"),
        ({"symbols": 2}, "`symbols` must be at least `pairs`."),
        ({"hops": 3}, "`hops` must be at least 1 and less than `pairs`."),
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
