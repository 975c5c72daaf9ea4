"""The example scripts, as a user starts them, at tiny sizes and without a network."""

import gzip
import json
import lzma
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
from importlib import import_module
from pathlib import Path

import keras
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 32,
    "vocabulary-size": 300,
    "batch-size": 2,
    "training-steps": 40,
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
    for step in ("R0", "R4")
    for name in ("backbone.weights.h5", "checkpoint.npz", "losses.csv", "result.json")
}


def flags(*more, **changes):
    values = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + [
        str(text) for text in more
    ]


@pytest.fixture(autouse=True, scope="module")
def importable():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def data(importable):
    return import_module("ablation_data")


@pytest.fixture(scope="module")
def main(importable):
    return import_module("gpt2_ablation").main


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


def test_dry_run_trains_every_step_once_and_keeps_nothing(tmp_path):
    command = [sys.executable, EXAMPLES / "gpt2_ablation.py", "--dry-run", *flags()]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("R")]
    assert [line.split(":")[0] for line in lines] == ["R0", "R1", "R2", "R3", "R4"]
    for line in lines:
        assert np.isfinite(float(line.split()[-1])), line
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def finished(main, text, tmp_path_factory):
    """The folder of an unbroken run of R0 and R4."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    main(flags("--run-dir", folder, "--dataset", text, "--ablation-step", "R0,R4"))
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
    train = import_module("ablation_train")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit, match=r"^R4 needs .* Received: batch_size=2, .*8.00GiB\)$"):
        train.main(finished, "R4")
    error.args = ("something else",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="something else"):
            train.main(finished, "R4")


def test_losses_are_written_at_each_evaluation(finished):
    read_losses = import_module("ablation_log").read_losses
    for step in ("R0", "R4"):
        rows = read_losses(finished / step / "losses.csv")
        assert [row["step"] for row in rows] == list(range(2, 41, 2))
        assert rows[-1]["tokens"] == 40 * 2 * 32
        assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
        assert all(row["peak_memory_mb"] > 50 for row in rows)


def test_table_says_what_the_issue_asks_for(finished):
    table = json.loads((finished / "table.json").read_text())
    stock, walking = table
    assert [row["step"] for row in table] == ["R0", "R4"]
    assert stock["statistics"] is None and stock["options"] is None
    assert walking["options"]["edge_weight"] == "exponential"
    assert walking["options"]["window"] == TINY["rwr-window"]
    assert walking["parameters"] == stock["parameters"] + TINY["heads"]
    for row in table:
        assert row["perplexity"] == pytest.approx(np.exp(row["validation_loss"]))
        assert row["tokens_per_second"] > 0 and row["peak_memory_mb"] > 50
        parts = row["losses_by_position"]
        assert [part["first"] for part in parts] == list(range(32))  # the whole context
        mean = np.mean([part["loss"] for part in parts])
        assert mean == pytest.approx(row["validation_loss"], rel=1e-5)
    assert stock["difference_percent"] == 0
    ratio = walking["perplexity"] / stock["perplexity"]
    assert walking["difference_percent"] == pytest.approx(100 * (ratio - 1))
    assert 0 < walking["outside_window"] < 1
    assert 0 < walking["entropy"] < np.log(32)
    assert len(walking["statistics_by_layer"]) == 1
    markdown = (finished / "table.md").read_text()
    assert "| R0 | stock GPT-2 attention |" in markdown
    assert f"Backend {keras.backend.backend()} on" in markdown
    lines = (finished / "table.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("step,description,parameters")


def test_own_validation_text_vocabulary_and_dtype(main, finished, text, tmp_path):
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
    (row,) = json.loads((tmp_path / "run" / "table.json").read_text())
    assert row["options"]["trainable_lens"]
    assert row["statistics"]["concentration"] == pytest.approx(7.0, rel=0.1)
    assert np.isfinite(row["validation_loss"])
    with np.load(tmp_path / "run" / "data" / "tokens.npz") as stored:
        ids = {number: word for word, number in vocabulary.items()}
        words = "".join(ids[x] for x in stored["validation"]).replace("Ġ", " ")
    assert words.startswith("now something else entirely, now")
    train = import_module("ablation_train")
    backbone = train.build_backbone("R4", config["arguments"], config["overrides"]["R4"])
    assert backbone.compute_dtype == "bfloat16" and backbone.variable_dtype == "float32"


def test_all_steps_start_from_the_same_weights(finished):
    train = import_module("ablation_train")
    config = json.loads((finished / "config.json").read_text())
    with np.load(finished / "data" / "initial-0.npz") as stored:
        initial = dict(stored)
    keras.utils.set_random_seed(99)
    backbone = train.build_backbone("R3", config["arguments"], config["overrides"]["R4"])
    train.load_initial(backbone, finished / "data" / "initial-0.npz")
    weights = {weight.path: weight.numpy() for weight in backbone.weights}
    extra = set(weights) - set(initial)
    assert [path.split("/")[-1] for path in extra] == ["discoverability"]
    for path, value in initial.items():
        assert np.array_equal(weights[path], value), path


def test_a_killed_run_continues_as_if_it_had_not_been(finished, main, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("R4", "table.*", "curves.*"))
    command = [sys.executable, EXAMPLES / "ablation_train.py", folder, "R4"]
    # a pipe that nobody reads would stop a worker that writes much
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = folder / "R4" / "checkpoint.npz"
    while not checkpoint.exists() and worker.poll() is None:
        time.sleep(0.002)
    worker.kill()
    worker.wait()
    assert checkpoint.exists()
    assert not (folder / "R4" / "result.json").exists()
    main(["--resume", "--run-dir", str(folder)])
    read_losses = import_module("ablation_log").read_losses
    expected, actual = (read_losses(path / "R4" / "losses.csv") for path in (finished, folder))
    exact = ("step", "tokens", "training_loss", "validation_loss", "learning_rate")
    assert [[row[name] for name in exact] for row in actual] == [
        [row[name] for name in exact] for row in expected
    ]
    assert set(tree(folder)) == FILES
    unbroken, killed = (
        json.loads((path / "table.json").read_text())[1] for path in (finished, folder)
    )
    for name in ("validation_loss", "statistics", "parameters", "difference_percent"):
        assert killed[name] == unbroken[name]


def test_resuming_with_dropout_and_a_row_ahead(finished, tmp_path, monkeypatch):
    log, train = import_module("ablation_log"), import_module("ablation_train")
    config = json.loads((finished / "config.json").read_text())
    config["arguments"].update(training_steps=6, dropout=0.2)
    folders = [tmp_path / "unbroken", tmp_path / "broken"]
    for folder in folders:
        shutil.copytree(finished / "data", folder / "data")
    expected = train.train(folders[0], "R0", config, verbose=0)

    class Killed(Exception):
        pass

    write_arrays = log.write_arrays

    def write_twice(path, arrays):
        if arrays["epoch"] == 2:
            raise Killed
        write_arrays(path, arrays)

    monkeypatch.setattr(log, "write_arrays", write_twice)
    with pytest.raises(Killed):
        train.train(folders[1], "R0", config, verbose=0)
    assert len(log.read_losses(folders[1] / "R0" / "losses.csv")) == 2
    monkeypatch.undo()
    keras.utils.set_random_seed(1)
    actual = train.train(folders[1], "R0", config, verbose=0)
    assert actual["training_loss"] == expected["training_loss"]
    assert actual["validation_loss"] == expected["validation_loss"]
    assert len(log.read_losses(folders[1] / "R0" / "losses.csv")) == 3


# === What it refuses ===


def refused(main, capsys, arguments):
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
            "--rwr-alpha need an RWR step (R1 to R4)",
        ),
        (["--no-use-rwr", "--rwr-steps", "2"], "--rwr-steps need an RWR step (R1 to R4)"),
        (["--use-rwr", "--ablation-step", "R0"], "`use_rwr` must agree with `ablation_step`"),
        (["--ablation-step", "R1", "--rwr-reciprocal-beta", ".6"], "needs a reversible step"),
        (["--rwr-alpha", "1.2"], "R1: `alpha` must be in (0, 1]. Received: alpha=1.2"),
        (
            ["--rwr-topk", "24"],
            "R1: `topk` must be a multiple of `neighbor_block`. Received: topk=24",
        ),
        (["--rwr-window", "8"], "`neighbor_block` must be at most `window + 1` in a causal call"),
        (["--rwr-lens-strength", "nan"], "R1: `lens_strength` must be finite. Received: lens_st"),
        (["--rwr-edge-weight", "flat"], "invalid choice: 'flat'"),
        (["--width", "30", "--heads", "4"], "`width` must be a multiple of `heads`. Received: wid"),
        (["--training-steps", "30"], "`training_steps` must be a multiple of `evaluate_every`"),
        (["--warmup-steps", "160"], "`warmup_steps` must be less than `training_steps`. Received:"),
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
def test_bad_arguments_are_named(main, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, capsys, arguments)
    assert tree(tmp_path) == {}


def test_which_steps_the_flags_choose(importable):
    choose = import_module("ablation_arguments").choose_steps
    assert choose({}) == choose({"ablation_step": ["all"]}) == ["R0", "R1", "R2", "R3", "R4"]
    assert choose({"ablation_step": ["R4,R0", "R2"]}) == ["R0", "R2", "R4"]
    assert choose({"use_rwr": True}) == ["R1"]
    assert choose({"use_rwr": False}) == ["R0"]
    assert choose({"use_rwr": True, "ablation_step": ["R0", "R3"]}) == ["R0", "R3"]


def test_missing_dataset_leaves_the_folder_usable(main, capsys, tmp_path):
    arguments = flags("--run-dir", tmp_path / "run", "--dataset", tmp_path / "nowhere")
    message = refused(main, capsys, arguments)
    assert "`dataset` must be `embedded`, a .txt/.gz/.xz file" in message
    assert f"Received: dataset={tmp_path / 'nowhere'}" in message
    assert tree(tmp_path) == {}


def test_a_short_dataset_is_refused(main, capsys, tmp_path):
    arguments = flags("--run-dir", tmp_path / "run", "--dataset", tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("a few words")
    assert "must hold enough text for a byte-pair vocab" in refused(main, capsys, arguments)
    (tmp_path / "short.txt").write_text("a few words " * 4)
    assert "must hold more training tokens than `context`" in refused(main, capsys, arguments)
    assert set(tree(tmp_path)) == {"short.txt"}


def test_unwritable_run_folder(main, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused(main, capsys, flags("--run-dir", tmp_path / "file" / "run"))
    assert "`run_dir` must be a writable folder" in message
    assert f"Received: run_dir={tmp_path / 'file' / 'run'}" in message


def test_a_new_run_never_touches_a_used_folder(main, capsys, finished):
    before = tree(finished)
    message = refused(main, capsys, flags("--run-dir", finished))
    assert "`run_dir` must be new or empty, or --resume given" in message
    assert tree(finished) == before


def test_resuming_another_configuration_names_the_keys(main, capsys, finished, monkeypatch):
    before = tree(finished)
    changed = ["--width", 32, "--rwr-window", 8, "--ablation-step", "R0,R4"]
    message = refused(main, capsys, ["--resume", "--run-dir", finished, *changed])
    assert (
        "rwr_window, width differ. Received: rwr_window=8 (run: 4), width=32 (run: 16)" in message
    )
    others = {"torch": "jax", "jax": "tensorflow", "tensorflow": "torch"}
    config = json.loads(before["config.json"])
    backend = others[config["backend"]]
    (finished / "config.json").write_text(json.dumps({**config, "backend": backend}))
    message = refused(main, capsys, ["--resume", "--run-dir", finished])
    (finished / "config.json").write_bytes(before["config.json"])
    assert f"backend differ. Received: backend={config['backend']} (run: {backend})" in message
    assert tree(finished) == before


def test_resuming_needs_a_run(main, capsys, tmp_path):
    message = refused(main, capsys, ["--resume", "--run-dir", tmp_path / "none"])
    assert "`run_dir` must hold a run to resume (config.json)" in message
    assert tree(tmp_path) == {}


# === Text ===


def test_text_files_of_each_kind(data, tmp_path):
    content = "one\r\n<|endoftext|>two é<|endoftext|> \n"
    raw = content.encode("utf-8")
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    for name in ("a.txt", "b.txt.gz", "c.xz"):
        assert data.read_path(tmp_path / name) == ["one\n", "two é"]
    assert data.read_path(tmp_path) == ["one\n", "two é"] * 3


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.txt", b"\xff\xfe", "must be UTF-8 text"),
        ("a.gz", b"not compressed", "must be a readable text file"),
        ("a.gz", gzip.compress(b"some text")[:-9], "must be a readable text file"),
        ("a.xz", b"not compressed", "must be a readable text file"),
        ("a.xz", lzma.compress(b"some text")[:-9], "must be a readable text file"),
        ("a.txt", b" \n", "must hold text; it is empty"),
    ],
)
def test_unreadable_files_are_named(data, tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.UsageError, match=rule) as error:
        data.read_path(tmp_path / name)
    assert str(error.value).endswith(f"Received: dataset={tmp_path / name}")


def test_a_folder_without_text_is_named(data, tmp_path):
    with pytest.raises(data.UsageError, match=r"a folder that holds .txt, .gz, .xz files"):
        data.read_path(tmp_path)


def test_embedded_text_is_whole_books(data):
    training, validation = data.load_documents("embedded", tokens=0)
    assert [len(training), len(validation)] == [6, 1]
    assert training[0].startswith("## Chapter 1\n\nIt is a truth universally acknowledged")
    assert sum(path.stat().st_size for path in (EXAMPLES / "data").iterdir()) < 1_000_000


def test_held_out_text_is_the_end_of_the_dataset(data):
    documents = ["a" * 60, "b" * 37, "c" * 3]
    training, validation = data.hold_out(documents, share=0.05)
    assert training == ["a" * 60, "b" * 35] and validation == ["b" * 2, "c" * 3]
    assert data.hold_out(["abcd"], share=0.25) == (["abc"], ["d"])


def test_vocabulary_is_that_of_gpt2s_tokenizer(data):
    from keras_hub.tokenizers import GPT2Tokenizer

    documents = ["the cat sat on the mat. " * 20, "Straße\n"]
    vocabulary, merges = data.train_vocabulary(documents, 280)
    assert vocabulary["<|endoftext|>"] == 0
    assert len(vocabulary) <= 280
    tokenizer = GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    ids = data.encode(documents, tokenizer)
    assert list(ids).count(0) == 2 and ids[-1] == 0
    first = int(np.flatnonzero(ids == 0)[0])
    assert tokenizer.detokenize([ids[:first].tolist()])[0] == documents[0]


def test_batches_visit_each_block_once_a_pass(data):
    blocks, batch = 7, 3
    rows = np.concatenate([data.batch_rows(blocks, batch, step, seed=5) for step in range(14)])
    passes = rows.reshape(6, blocks)
    assert all(sorted(one) == list(range(blocks)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) > 1
    assert not np.array_equal(rows[:21], np.concatenate(
        [data.batch_rows(blocks, batch, step, seed=6) for step in range(7)]
    ))  # fmt: skip


def test_targets_are_the_next_tokens(data):
    rows = data.cut_blocks(np.arange(24), context=5, name="training")
    assert rows.shape == (4, 6)
    inputs, targets = data.as_batch(rows)
    assert np.array_equal(inputs["token_ids"] + 1, targets)
    assert inputs["padding_mask"].min() == 1
    with pytest.raises(data.UsageError, match=r"Received: 5 training tokens, context=5"):
        data.cut_blocks(np.arange(5), context=5, name="training")


def fake_datasets(load):
    exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    return types.SimpleNamespace(load_dataset=load, exceptions=exceptions)


def test_finewebedu_is_read_only_as_far_as_needed(data, monkeypatch):
    read = []

    def load(path, **options):
        assert (path, options["streaming"]) == ("HuggingFaceFW/fineweb-edu", True)
        for number in range(1000):
            read.append(number)
            yield {"text": "x" * 100}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    training, validation = data.load_documents("finewebedu", tokens=250)
    assert len(read) == 15
    assert sum(map(len, training)) == 1425 and sum(map(len, validation)) == 75


def test_finewebedu_offline_names_the_other_choices(data, monkeypatch):
    def load(path, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    with pytest.raises(data.UsageError, match=r"offline.*no route to host") as error:
        data.load_documents("finewebedu", tokens=10)
    assert "`embedded`, a .txt/.gz/.xz file, a folder of such files" in str(error.value)
    assert str(error.value).endswith("Received: dataset=finewebedu")


def test_finewebedu_without_the_package(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.UsageError, match=r"needs the package `datasets`.*`embedded`"):
        data.load_documents("finewebedu", tokens=10)


# === The quickstart ===


def test_quickstart_learns(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[1] == "parameters,"
    assert float(words[-1]) < 0.8 * float(words[-3])
