"""The language study: its models, its slices, and a run at tiny sizes."""

import re

import numpy as np
import pytest
from keras import ops

from studies import data, language
from studies.language_models import build_model

TINY = {
    **{"layers": 2, "width": 16, "heads": 2, "context": 24, "window": 3, "batch-size": 2},
    **{"training-steps": 4, "evaluate-every": 2, "warmup-steps": 1, "validation-tokens": 96},
    "vocabulary-size": 300,
}
MODELS = ("full", "fair", "fair-1", "fair-all", "local", "R2:neighbor-block=4", "R5:topk=2")


def flags(*more, **changes):
    values = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)] + [*more]


def make_runs(*arguments, **changes):
    return language.make_runs(language.parse(flags(*arguments, **changes))[1])


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_causal_and_see_as_far_as_their_names_say(name):
    (run,) = make_runs("--models", name)
    model = build_model(run)
    tokens = np.random.default_rng(0).integers(0, 300, (1, 24))
    expected = numpy(model(tokens))
    for place in (20, 0):
        changed = tokens.copy()
        changed[0, place] = (tokens[0, place] + 1) % 300
        moved = (numpy(model(changed)) != expected).any(-1)[0]
        assert not moved[:place].any() and moved[place]
        # Two layers of a window of three, with keys convolved over four tokens.
        if name == "local" and place == 0:
            assert not moved[2 * (3 + 3) + 1 :].any()
        elif name in ("full", "fair"):
            assert moved[place:].all()


def test_heads_that_have_begun_follow_what_followed():
    (run,) = make_runs("--models", "fair-all", layers=1)
    attention = next(x for x in build_model(run).layers if type(x).__name__ == "Attention")
    np.testing.assert_array_equal(numpy(attention.query.kernel), numpy(attention.key.kernel))
    x = np.random.default_rng(1).normal(size=(1, 9, 16)).astype("float32")
    x[0, 8] = x[0, 2]
    query, key = attention.query(x), attention.key(x)
    moved = np.concatenate([0 * numpy(key)[:, :1], numpy(key)[:, :-1]], axis=1)
    cosines = np.einsum("bsnh,btnh->bnst", numpy(query), moved)
    cosines /= np.linalg.norm(numpy(query)[0, 8], axis=-1)[None, :, None, None]
    cosines /= np.maximum(np.linalg.norm(moved, axis=-1), 1e-9).transpose(0, 2, 1)[:, :, None]
    assert (cosines[0, :, 8].argmax(-1) == 3).all()


def test_slices():
    tokens = np.array([1, 2, 3, 1, 2, 9, 8, 7, 6, 1, 2, 3])
    names = [language.SLICES[x] for x in language.slice_of(tokens, window=4)]
    assert names == [*["new"] * 3, "near", *["new"] * 5, "far", "far"]


def test_a_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    whole, parts = ["--out", str(tmp_path / "whole")], ["--out", str(tmp_path / "parts")]
    chosen = ["--models", "fair", "R5:topk=2", "--seeds", "0", "1"]
    language.main(flags(*chosen, *whole))
    rows = language.read_results(tmp_path / "whole" / "results.jsonl")
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("fair", 0),
        ("R5:topk=2", 0),
        ("fair", 1),
        ("R5:topk=2", 1),
    ]
    for row in rows:
        weights = {"far": 0.0, "near": 0.0, "new": 0.0}
        with np.load(language.folder_of(tmp_path / "whole", row) / "validation.npz") as stored:
            slices = stored["slices"]
        weights = {name: (slices == x).mean() for x, name in enumerate(language.SLICES)}
        total = sum(share * row[name] for name, share in weights.items() if share > 0)
        assert total == pytest.approx(row["loss"], rel=1e-5)
    out = capsys.readouterr().out
    assert "| R5:topk=2 | 2 |" in out and "minus fair (95 %)" in out
    assert (tmp_path / "whole" / "differences.png").stat().st_size > 5_000

    # Stopped after its first evaluation, and started again.
    class Stop(Exception):
        pass

    end = language.RunLog.on_epoch_end

    def stop(self, epoch, logs=None):
        end(self, epoch, logs)
        raise Stop

    monkeypatch.setattr(language.RunLog, "on_epoch_end", stop)
    with pytest.raises(Stop):
        language.main(flags("--models", "fair", *parts))
    monkeypatch.undo()
    language.main(flags("--models", "fair", *parts))
    (row,) = language.read_results(tmp_path / "parts" / "results.jsonl")
    assert row["loss"] == rows[0]["loss"]
    language.main(flags("--models", "fair", "--report", *parts))


def test_packages_are_text_and_held_out_whole(monkeypatch, tmp_path):
    for package in [f"package{x}" for x in range(40)]:
        for number in range(2):
            path = tmp_path / package / f"module{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"# {package}\n" + "x = 1\n" * 500, "utf-8")
    (tmp_path / "package0" / "short.py").write_text("y = 2\n", "utf-8")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    training, validation = data.read_packages()
    names = [{text.split("\n")[0] for text in part} for part in (training, validation)]
    assert names[0] and names[1] and not names[0] & names[1]
    assert len(names[0] | names[1]) == 40
    assert data.read_packages() == (training, validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "R0"], "`models` must be some of full, fair"),
        (["--models", "best"], "Received: models=best"),
        (["--models", "R5:topk=0.5"], "invalid int value: '0.5'"),
        (["--models", "R1"], "`neighbor_block` must be at most `window \\+ 1`"),
        (["--window", "-1"], "Received: window=-1"),
        (["--heads", "3"], "`width` must be a multiple of `heads`"),
        (["--training-steps", "5"], "`training_steps` must be a multiple of `evaluate_every`"),
        (["--seeds", "-1"], "`seeds` must be at least 0"),
        (["--layers", "1", "--models", "R5"], "`layers` must be at least 2 for R5"),
        (["--report"], "`out` must hold results to report"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        language.main(flags("--out", str(tmp_path / "none"), *arguments))
    assert re.search(message, capsys.readouterr().err)
