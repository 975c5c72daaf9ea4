"""The ablation as a user starts it, at tiny sizes and without a network."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_rwr.options import Options, Tuning
from studies import training, workers
from studies.ablation import main
from studies.arguments import choose_steps, make_parser, rwr_overrides

ROOT = Path(__file__).parents[2]
TINY = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "context": 32,
    "vocabulary-size": 300,
    "batch-size": 2,
    "training-steps": 24,
    "evaluate-every": 2,
    "validation-tokens": 100,
    "warmup-steps": 4,
    "rwr-window": 4,
    "rwr-topk": 8,
    "rwr-neighbor-block": 4,
}
FILES = {
    "config.json",
    "curves.png",
    "positions.png",
    "table.csv",
    "table.json",
    "table.md",
    "data/initial-0.npz",
    "data/merges.txt",
    "data/tokens.npz",
    "data/vocabulary.json",
} | {
    f"{step}/{name}"
    for step in ("R0-0", "R5-topk=4-0")
    for name in ("backbone.weights.h5", "checkpoint.npz", "losses.csv", "result.json")
}


def flags(*more, **changes):
    values = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + [
        str(text) for text in more
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dataset of a few documents."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "."], (5, 2000))
    path.write_text("<|endoftext|>".join(" ".join(document) for document in words))
    return path


def tree(folder):
    """Content of each file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# === The command ===


@pytest.mark.parametrize(
    ("backend", "steps"),
    # Compiling a step takes seconds on the others.
    [("torch", ["R0", "R1", "R2", "R3", "R4", "R5"]), ("jax", ["R5"]), ("tensorflow", ["R3"])],
)
def test_dry_run_trains_every_step_once_and_keeps_nothing(backend, steps, tmp_path):
    command = [sys.executable, "-m", "studies.ablation", "--dry-run", *flags()]
    if backend != "torch":
        command += ["--ablation-step", *steps]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["KERAS_BACKEND"] = backend
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "training loss" in line]
    assert [line.split(":")[0] for line in lines] == steps
    for line in lines:
        assert np.isfinite(float(line.split()[-1])), line
    # Variables are tracked where no steps are chosen.
    assert ("R5, seed 0: accuracy by hops" in result.stdout) == (backend == "torch")
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of an unbroken run of R0 and R5."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    main(flags("--run-dir", folder, "--dataset", text, "--ablation-step", "R0,R5:topk=4"))
    return folder


def test_a_run_leaves_all_its_files(finished):
    assert set(tree(finished)) == FILES
    for name in ("curves.png", "positions.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate 8.00GiB\nat executable"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA: 8.00GiB"),
    ],
)
def test_too_little_memory_is_said_in_one_line(error, finished, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(training, "train", fail)
    with pytest.raises(SystemExit, match=r"^R5 needs .* Received: batch_size=2, .*8.00GiB\)$"):
        training.main(finished, "R5", 0)
    error.args = ("something else",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="something else"):
            training.main(finished, "R5", 0)


def test_losses_are_written_at_each_evaluation(finished):
    for step in ("R0-0", "R5-topk=4-0"):
        rows = workers.read_losses(finished / step / "losses.csv")
        assert [row["step"] for row in rows] == list(range(2, 25, 2))
        assert rows[-1]["tokens"] == 24 * 2 * 32
        assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
        assert all(row["peak_memory_mb"] > 50 for row in rows)


def test_table_says_what_the_issue_asks_for(finished):
    table = json.loads((finished / "table.json").read_text())
    stock, walking = table["results"]
    assert [row["step"] for row in table["rows"]] == ["R0", "R5:topk=4"]
    assert stock["statistics"] is None and stock["options"] is None
    assert walking["options"]["stopping"] == "gated" and walking["options"]["topk"] == 4
    assert walking["options"]["window"] == TINY["rwr-window"]
    for result, row in zip(table["results"], table["rows"], strict=True):
        assert row["seeds"] == 1 and row["range"] == 0
        assert row["parameters"] == result["parameters"]
        assert row["perplexity"] == pytest.approx(np.exp(result["validation_loss"]))
        assert row["tokens_per_second"] > 0 and row["peak_memory_mb"] > 50
        parts = result["losses_by_position"]
        assert [part["first"] for part in parts] == list(range(32))  # the whole context
        mean = np.mean([part["loss"] for part in parts])
        assert mean == pytest.approx(result["validation_loss"], rel=1e-5)
    ratio = walking["perplexity"] / stock["perplexity"]
    differences = [row["difference_percent"] for row in table["rows"]]
    assert differences == pytest.approx([0, 100 * (ratio - 1)])
    assert 0 < table["rows"][1]["outside_window"] < 1
    assert 0 < table["rows"][1]["entropy"] < np.log(32)
    assert len(walking["statistics_by_layer"]) == 1  # of two, the second
    markdown = (finished / "table.md").read_text()
    assert "| R0 | stock GPT-2 attention |" in markdown
    assert f"Backend {keras.backend.backend()} on" in markdown
    lines = (finished / "table.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("step,description,seeds")


def test_own_validation_text_vocabulary_and_dtype(finished, text, tmp_path):
    """As a long run on a GPU is started, with GPT-2's vocabulary in GPT-2's files."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    vocabulary = json.loads((finished / "data" / "vocabulary.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = (finished / "data" / "merges.txt").read_text()
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("now something else entirely, " * 50)
    values = {**TINY, "training-steps": 2, "warmup-steps": 0}
    del values["vocabulary-size"]
    options = [x for name, value in values.items() for x in (f"--{name}", str(value))]
    options += ["--dataset", str(text), "--validation-dataset", str(held_out)]
    options += ["--vocabulary", str(folder), "--dtype", "mixed_bfloat16"]
    options += ["--rwr-trainable-lens", "--rwr-concentration", "7", "--ablation-step", "R4"]
    main([*options, "--run-dir", str(tmp_path / "run")])

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["arguments"]["vocabulary_size"] == len(vocabulary)
    (row,) = json.loads((tmp_path / "run" / "table.json").read_text())["results"]
    assert row["options"]["trainable_lens"]
    assert row["statistics"]["concentration"] == pytest.approx(7.0, rel=0.1)
    assert np.isfinite(row["validation_loss"])
    with np.load(tmp_path / "run" / "data" / "tokens.npz") as stored:
        ids = {number: word for word, number in vocabulary.items()}
        words = "".join(ids[x] for x in stored["validation"]).replace("Ġ", " ")
    assert words.startswith("now something else entirely, now")
    backbone = training.build_backbone("R4", config["arguments"], config["overrides"]["R4"])
    assert backbone.compute_dtype == "bfloat16" and backbone.variable_dtype == "float32"


def test_all_steps_start_from_the_same_weights(finished):
    config = json.loads((finished / "config.json").read_text())
    with np.load(finished / "data" / "initial-0.npz") as stored:
        initial = dict(stored)
    keras.utils.set_random_seed(99)
    backbone = training.build_backbone("R3", config["arguments"], {"topk": 0})
    training.load_initial(backbone, finished / "data" / "initial-0.npz")
    weights = {weight.path: weight.numpy() for weight in backbone.weights}
    extra = set(weights) - set(initial)
    assert {path.split("/")[-1] for path in extra} == {"discoverability"}
    for path, value in initial.items():
        assert np.array_equal(weights[path], value), path


def test_a_killed_run_continues_as_if_it_had_not_been(finished, tmp_path):
    folder, step = tmp_path / "killed", "R5-topk=4-0"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(step, "table.*", "curves.*"))
    command = [sys.executable, "-m", "studies.training", folder, "R5:topk=4", "0"]
    # a pipe that nobody reads would stop a worker that writes much
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **quiet)
    checkpoint = folder / step / "checkpoint.npz"
    while not checkpoint.exists() and worker.poll() is None:
        time.sleep(0.002)
    worker.kill()
    worker.wait()
    assert checkpoint.exists()
    assert not (folder / step / "result.json").exists()
    main(["--resume", "--run-dir", str(folder)])
    rows = [workers.read_losses(path / step / "losses.csv") for path in (finished, folder)]
    exact = ("step", "tokens", "training_loss", "validation_loss", "learning_rate")
    expected, actual = ([[row[name] for name in exact] for row in x] for x in rows)
    assert actual == expected
    assert set(tree(folder)) == FILES
    unbroken, killed = (
        json.loads((x / step / "result.json").read_text()) for x in (finished, folder)
    )
    for name in ("validation_loss", "statistics", "parameters"):
        assert killed[name] == unbroken[name]


def test_resuming_with_dropout_and_a_row_ahead(finished, tmp_path, monkeypatch):
    config = json.loads((finished / "config.json").read_text())
    config["arguments"].update(training_steps=6, dropout=0.2)
    folders = [tmp_path / "unbroken", tmp_path / "broken"]
    for folder in folders:
        shutil.copytree(finished / "data", folder / "data")
    expected = training.train(folders[0], "R0", 0, config, verbose=0)

    class Killed(Exception):
        pass

    write_arrays = workers.write_arrays

    def write_twice(path, arrays):
        if arrays["epoch"] == 2:
            raise Killed
        write_arrays(path, arrays)

    monkeypatch.setattr(workers, "write_arrays", write_twice)
    with pytest.raises(Killed):
        training.train(folders[1], "R0", 0, config, verbose=0)
    assert len(workers.read_losses(folders[1] / "R0-0" / "losses.csv")) == 2
    monkeypatch.undo()
    keras.utils.set_random_seed(1)
    actual = training.train(folders[1], "R0", 0, config, verbose=0)
    assert actual["training_loss"] == expected["training_loss"]
    assert actual["validation_loss"] == expected["validation_loss"]
    assert len(workers.read_losses(folders[1] / "R0-0" / "losses.csv")) == 3


# === What it refuses ===


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablation-step", "R0", "R7"], "`ablation_step` must be all, or some of R0, R1, R2, R3"),
        (
            ["--ablation-step", "R0", "--rwr-alpha", "0.3"],
            "--rwr-alpha need a step with RWR attention",
        ),
        (["--no-use-rwr", "--rwr-steps", "2"], "--rwr-steps need a step with RWR attention"),
        (["--ablation-step", "R0:topk=4"], "R0 without options. Received: ablation_step=R0:topk=4"),
        (["--ablation-step", "R5:topk=x"], "argument --rwr-topk: invalid int value: 'x'"),
        (
            ["--rwr-layers", "2"],
            "must be all, or numbers of layers from 0 to 1. Received: rwr_layers=2",
        ),
        (
            ["--ablation-step", "R5", "--layers", "1"],
            "`layers` must be at least 2 for R5, in which",
        ),
        (["--ablation-step", "R5", "--rwr-alpha", ".3"], "R5: `alpha` must be left at its default"),
        (["--seeds", "0", "-1"], "`seeds` must be at least 0. Received: seeds=[0, -1]"),
        (["--use-rwr", "--ablation-step", "R0"], "`use_rwr` must agree with `ablation_step`"),
        (["--ablation-step", "R1", "--rwr-reciprocal-beta", ".6"], "needs a reversible step"),
        (["--rwr-alpha", "1.2"], "R1: `alpha` must be in (0, 1]. Received: alpha=1.2"),
        (
            ["--rwr-topk", "24"],
            "R1: `topk` must be a multiple of `neighbor_block`. Received: topk=24",
        ),
        (["--rwr-window", "8"], "`neighbor_block` must be at most `window + 1` in a causal call"),
        (["--rwr-lens-strength", "nan"], "R1: `lens_strength` must be finite. Received: lens_st"),
        (["--rwr-edge-weight", "flat"], "R1: `edge_weight` must be "),
        (["--width", "30", "--heads", "4"], "`width` must be a multiple of `heads`. Received: wid"),
        (["--training-steps", "30"], "`training_steps` must be a multiple of `evaluate_every`"),
        (["--warmup-steps", "600"], "`warmup_steps` must be less than `training_steps`. Received:"),
        (["--context", "1"], "`context` must be at least 2. Received: context=1"),
        (["--learning-rate", "-1"], "`learning_rate` must be positive. Received: learning_rate=-1"),
        (["--dropout", "1"], "`dropout` must be in [0, 1). Received: dropout=1.0"),
        (
            ["--resume"],
            "`resume` needs `run_dir` and no `dry_run`. Received: resume=True, run_dir=N",
        ),
        (["--window", "8"], "unrecognized arguments: --window 8"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--vocabulary", "nowhere"], "`vocabulary` must be a folder with vocab.json and merges"),
    ],
)
def test_bad_arguments_are_named(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, arguments)
    assert tree(tmp_path) == {}


def test_which_steps_the_flags_choose():
    every = ["R0", "R1", "R2", "R3", "R4", "R5"]
    assert choose_steps({}) == choose_steps({"ablation_step": ["all"]}) == every
    assert choose_steps({"ablation_step": ["R4,R0", "R2"]}) == ["R0", "R2", "R4"]
    assert choose_steps({"ablation_step": ["R4:topk=0", "R4"]}) == ["R4:topk=0", "R4"]
    assert choose_steps({"use_rwr": True}) == ["R1"]
    assert choose_steps({"use_rwr": False}) == ["R0"]
    assert choose_steps({"use_rwr": True, "ablation_step": ["R0", "R3"]}) == ["R0", "R3"]


def test_every_option_has_a_flag():
    given = {
        **{
            "alpha": 0.3,
            "steps": 2,
            "topk": 8,
            "neighbor_block": 4,
            "window": 9,
            "threshold": None,
        },
        **{"edge_weight": "exponential", "concentration": [4.0, 5.0], "reversible": True},
        **{"reciprocal_beta": 0.7, "lens_strength": 0.4, "trainable_lens": False, "graph_dim": 8},
        **{"use_discoverability": True, "fusion": "sum", "graph_heads": 2, "graph_convolution": 3},
        **{"self_edges": False, "stopping": "restart", "block_size": 64, "head_dim_pad": 32},
        "implementation": "portable",
    }
    assert set(given) == {*Options.names(), *Tuning.names()}
    words = ["--rwr-layers", "0", "1"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--rwr-{flag}" if value else f"--no-rwr-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--rwr-{flag}", *map(str, values)]
    arguments = vars(make_parser().parse_args(words))
    assert rwr_overrides(arguments, layers=2) == {**given, "rwr_layers": [0, 1]}
    assert rwr_overrides({"rwr_layers": ["all"]}, layers=2) == {"rwr_layers": None}


def test_missing_dataset_leaves_the_folder_usable(capsys, tmp_path):
    arguments = flags("--run-dir", tmp_path / "run", "--dataset", tmp_path / "nowhere")
    message = refused(capsys, arguments)
    assert "`dataset` must be `embedded`, a .txt/.gz/.xz file" in message
    assert f"Received: dataset={tmp_path / 'nowhere'}" in message
    assert tree(tmp_path) == {}


def test_a_short_dataset_is_refused(capsys, tmp_path):
    arguments = flags("--run-dir", tmp_path / "run", "--dataset", tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("a few words")
    assert "must hold enough text for a byte-pair vocab" in refused(capsys, arguments)
    (tmp_path / "short.txt").write_text("a few words " * 4)
    assert "must hold more training tokens than `context`" in refused(capsys, arguments)
    assert set(tree(tmp_path)) == {"short.txt"}


def test_unwritable_run_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused(capsys, flags("--run-dir", tmp_path / "file" / "run"))
    assert "`run_dir` must be a writable folder" in message
    assert f"Received: run_dir={tmp_path / 'file' / 'run'}" in message


def test_a_new_run_never_touches_a_used_folder(capsys, finished):
    before = tree(finished)
    message = refused(capsys, flags("--run-dir", finished))
    assert "`run_dir` must be new or empty, or --resume given" in message
    assert tree(finished) == before


def test_resuming_another_configuration_names_the_keys(capsys, finished, monkeypatch):
    before = tree(finished)
    changed = ["--width", 32, "--rwr-window", 8, "--ablation-step", "R0,R5:topk=4"]
    message = refused(capsys, ["--resume", "--run-dir", finished, *changed])
    assert (
        "rwr_window, width differ. Received: rwr_window=8 (run: 4), width=32 (run: 16)" in message
    )
    others = {"torch": "jax", "jax": "tensorflow", "tensorflow": "torch"}
    config = json.loads(before["config.json"])
    backend = others[config["backend"]]
    (finished / "config.json").write_text(json.dumps({**config, "backend": backend}))
    message = refused(capsys, ["--resume", "--run-dir", finished])
    (finished / "config.json").write_bytes(before["config.json"])
    assert f"backend differ. Received: backend={config['backend']} (run: {backend})" in message
    assert tree(finished) == before


def test_resuming_needs_a_run(capsys, tmp_path):
    message = refused(capsys, ["--resume", "--run-dir", tmp_path / "none"])
    assert "`run_dir` must hold a run to resume (config.json)" in message
    assert tree(tmp_path) == {}
