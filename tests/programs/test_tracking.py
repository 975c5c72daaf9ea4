"""The tracking study: what its task asks, its models, and a run at tiny sizes."""

import numpy as np
import pytest

from studies import tracking

TINY = {
    **{"hops": 2, "chains": 2, "tokens": 16, "vocabulary": 16, "width": 8, "heads": 2},
    **{"batch-size": 4, "training-steps": 3, "warmup-steps": 1, "rwr-window": 2, "rwr-topk": 2},
}


def flags(*more, **changes):
    values = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)] + [*more]


def make_runs(*arguments, **changes):
    return tracking.make_runs(tracking.parse(flags(*arguments, **changes))[1])


@pytest.mark.parametrize(("hops", "chains"), [(1, 7), (4, 2), (3, 1)])
def test_answers_follow_from_the_statements(hops, chains):
    number = hops * chains
    task = tracking.Task(hops, chains, tokens=41, vocabulary=46)
    sequences, targets, asked = task.draw(3, 5)
    assert sequences.shape == targets.shape == asked.shape == (5, 41)
    for sequence, answers, questions in zip(sequences, targets, asked, strict=True):
        told = sequence[: 2 * number].reshape(number, 2).tolist()
        meanings = dict(told)
        assert len(meanings) == number and min(meanings) > 0 and max(meanings) < 23
        literals = {x for x in meanings.values() if x >= 23}
        assert len(literals) == chains and max(literals) < 46
        places = np.flatnonzero(questions)
        assert sorted(sequence[places]) == sorted(meanings) and places.min() >= 2 * number
        for place in places:
            answer, earlier = sequence[place], number
            for _ in range(questions[place]):
                now = [name for name, _ in told].index(answer)
                assert now < earlier  # told after what it points to
                answer, earlier = meanings[answer], now
            assert answers[place] == answer and answer in literals
        found = np.bincount(questions[places], minlength=hops + 1)[1:]
        assert found.tolist() == [chains] * hops
        others = np.delete(np.arange(2 * number, 41), places - 2 * number)
        assert not sequence[others].any() and not answers[others].any()


def test_batches_are_repeatable_and_come_again():
    task = tracking.Task(2, 2, 16, 16)
    batches, again = (tracking.Batches(task, 4) for _ in range(2))
    for one, other in zip(batches[2], again[2 + tracking.POOL], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(batches[2][0], batches[3][0])


def test_the_models_are_what_their_names_say():
    runs = {run["model"]: run for run in make_runs("--models", "R0", "R0x2", "R4", "R5x3")}
    counts = {}
    for name, run in runs.items():
        layers = tracking.build_model(run).layers
        found = [x for x in layers if type(x).__name__ in ("MultiHeadAttention", "RWRAttention")]
        counts[name] = (type(found[0]).__name__, len(found))
        options = getattr(found[0], "options", None)
        if options is not None:
            assert (options.window, options.topk, options.concentration) == (2, 2, 8.0)
            assert options.stopping == ("gated" if name == "R5x3" else "restart")
    full, walking = "MultiHeadAttention", "RWRAttention"
    assert counts == {"R0": (full, 1), "R0x2": (full, 2), "R4": (walking, 1), "R5x3": (walking, 3)}


def test_a_run_can_be_continued(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    tracking.main(flags("--models", "R5", "--seeds", "0", *out))
    first = tracking.read_results(tmp_path / "results.jsonl")
    tracking.main(flags("--models", "R5", "R0", "--seeds", "0", *out))
    rows = tracking.read_results(tmp_path / "results.jsonl")
    assert rows[:1] == first and [row["model"] for row in rows] == ["R5", "R0"]
    tracking.main(flags("--models", "R1", "--report", *out))
    assert tracking.read_results(tmp_path / "results.jsonl") == rows
    for row in rows:
        assert len(row["accuracy"]) == 2 and all(0 <= x <= 1 for x in row["accuracy"])
        # a question's mean loss, before anything is learned
        assert row["loss"] == pytest.approx(np.log(16), rel=0.1)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| 2 | 2 | 16 | 3 | R5 | 1 |" in table and table in capsys.readouterr().out


def test_one_layer_that_walks_follows_a_chain():
    """Two hops in one layer, in seconds: what one layer of full attention cannot do."""
    sizes = {"tokens": 24, "vocabulary": 32, "width": 64, "batch_size": 32, "rwr_window": 4}
    sizes.update(training_steps=150, warmup_steps=20, rwr_topk=4)
    (run,) = make_runs("--models", "R5", "--seeds", "0", "--no-positions", **sizes)
    assert min(tracking.train(run)["accuracy"]) > 0.95


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--tokens", "8"], "`tokens` must be at least 12 with 2 chains of 2 hops. Received: tok"),
        (["--vocabulary", "9"], "`vocabulary` must be at least 10 with"),
        (["--models", "R9"], "`models` must be steps of R0, R1"),
        (["--models", "R5x0"], "or such with a number of layers as in R0x2. Received: models=R5x0"),
        (["--models", "R4", "--rwr-alpha", "1.5"], "R4: `alpha` must be"),
        (["--rwr-layers", "0"], "`rwr_layers` must be left out"),
        (["--width", "9"], "`width` must be a multiple of `heads`. Received: width=9, heads=2"),
        (["--training-steps", "0"], "`training_steps` must be at least 1."),
    ],
)
def test_bad_arguments_are_named(capsys, tmp_path, arguments, rule):
    with pytest.raises(SystemExit):
        tracking.main(flags("--out", str(tmp_path / "new"), *arguments))
    assert rule in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
