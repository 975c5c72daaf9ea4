"""`examples/ablation_study.py` at tiny sizes."""

import csv
import dataclasses
import json
import math
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    **{"layers": 1, "width": 16, "heads": 2, "context": 32, "vocabulary_size": 300},
    **{"batch_size": 2, "training_steps": 4, "evaluate_every": 2, "warmup_steps": 1},
    **{"validation_tokens": 64, "dtype": "float32"},
}
OPTIONS = {"topk": 8, "neighbor_block": 4}


@pytest.fixture(autouse=True, scope="module")
def importable():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def tiny(monkeypatch, importable):
    """A study of two runs instead of those of real size."""
    studies = import_module("ablation_studies")
    found = studies.STUDIES["small"]
    runs = {
        "R0": studies.Run("R0", {}, (0, 1), "full attention"),
        "gamma-1": studies.Run("R4", {**OPTIONS, "lens_strength": 1.0}, (0,), "R4, gamma 1"),
    }
    arguments = {**found.arguments, **TINY}
    study = dataclasses.replace(found, arguments=arguments, runs=runs, window=4)
    monkeypatch.setitem(studies.STUDIES, "small", study)
    return study


def run(out, *more):
    import_module("ablation_study").main(["small", "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the cat sat on a mat . " * 3000)
    return path


def test_a_study_from_end_to_end(tmp_path, text, capsys, monkeypatch):
    out = tmp_path / "study"
    run(out, "--dataset", text, "--seeds", 0)
    assert {x.name for x in out.iterdir()} == {
        *("R0-0", "gamma-1-0", "data", "results.csv"),
        *("table.md", "losses.png", "positions.png"),
    }
    assert (out / "data" / "initial-0.npz").exists()
    with open(out / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for name, step in (("R0", "R0"), ("gamma-1", "R4")):
        result = json.loads((out / f"{name}-0" / step / "result.json").read_text())
        assert float(rows[name]["validation_loss"]) == result["validation_loss"]
        assert float(rows[name]["tokens"]) == 4 * 2 * 32
    assert json.loads(rows["gamma-1"]["options"])["lens_strength"] == 1.0
    assert json.loads(rows["gamma-1"]["options"])["window"] == 4
    losses = [float(rows[name]["validation_loss"]) for name in ("gamma-1", "R0")]
    assert f"| {100 * math.expm1(losses[0] - losses[1]):+.2f} |" in (out / "table.md").read_text()

    with pytest.raises(SystemExit, match="2"):
        run(out, "--dataset", text, "--seeds", 0, "--training-steps", 6)
    assert "training_steps=6 (run: 4)" in capsys.readouterr().err

    # Nothing is trained again, with its folder or without; what is asked for besides is.
    (out / "gamma-1-0").rename(tmp_path / "gone")
    trained = []
    study = import_module("ablation_study")
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: trained.append(command))
    run(out, "--dataset", text)
    assert [command[-2:] for command in trained] == [[str(out / "R0-1"), "R0"]]
    assert "gamma-1" in (out / "table.md").read_text()
    run(out, "--report", "--runs", "R0")
    assert len(trained) == 1
    assert "R0" in (out / "table.md").read_text() and "R4" not in (out / "table.md").read_text()
    with open(out / "results.csv", "a", newline="") as file:
        csv.DictWriter(file, rows["R0"]).writerow({**rows["R0"], "seed": 7, "validation_loss": 3.0})
    run(out, "--report", "--seeds", 7)
    assert f"| {math.exp(3.0):.2f} |" in (out / "table.md").read_text()
    assert "R4" not in (out / "table.md").read_text()


def test_memory_is_that_of_training(tmp_path, text, monkeypatch):
    run(tmp_path / "study", "--dataset", text, "--seeds", 0, "--runs", "gamma-1")
    made = tmp_path / "study" / "gamma-1-0"
    config = json.loads((made / "config.json").read_text())
    shutil.copytree(made / "data", tmp_path / "again" / "data")
    train = import_module("ablation_train")
    peak, measure = [1.0], train.walk_statistics

    def walk_statistics(*arguments):
        peak[0] = 2.0
        return measure(*arguments)

    monkeypatch.setattr(train, "peak_device_memory_mb", lambda: peak[0])
    monkeypatch.setattr(train, "walk_statistics", walk_statistics)
    result = train.train(tmp_path / "again", "R4", config, verbose=0)
    assert result["device_memory_mb"] == 1.0 and peak == [2.0]


def test_bad_arguments(tmp_path, text, capsys):
    cases = {
        ("--runs", "R7"): "`runs` must be of R0, gamma-1. Received: R7",
        ("--dataset", tmp_path / "none"): "nothing is there. Received: dataset=",
        ("--vocabulary", tmp_path): "`vocabulary` must be a folder with vocab.json",
    }
    for flags, message in cases.items():
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / "out", "--seeds", 0, *flags)
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_another_configuration(tmp_path, text, capsys, monkeypatch):
    study = import_module("ablation_study")
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: None)
    run(tmp_path, "--dataset", text, "--runs", "R0", "--seeds", 0)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--dataset", text, "--runs", "R0", "--seeds", 0, "--training-steps", 6)
    assert "training_steps=6 (run: 4)" in capsys.readouterr().err


def test_runs_are_listed_and_right(capsys):
    """The options of every run of the real studies are those of RWR attention."""
    studies, study = import_module("ablation_studies"), import_module("ablation_study")
    config = import_module("gpt2_ablation").make_config
    for name, found in studies.STUDIES.items():
        for run_name, made in found.runs.items():
            overrides = config(study.arguments_of(found, run_name, 0, {}))["overrides"][made.step]
            for option, value in made.options.items():
                assert overrides[option] == value
        study.main([name, "--list"])
    long = studies.STUDIES["long"]
    control = long.runs["gamma-1-alpha-0.5-steps-0-window-4096"].options
    assert control["window"] == long.arguments["context"] == 4096 and control["steps"] == 0
    assert "R4-single" in capsys.readouterr().out
