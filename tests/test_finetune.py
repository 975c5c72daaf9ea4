"""`examples/finetune_gpt2.py` as a user starts it, at tiny sizes and without a network."""

import json
import lzma
import os
import re
import shutil
import socket
import sys
from importlib import import_module
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

from keras_rwr.models import RWRGPT2CausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL_PRESET = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "vocabulary-size": 300,
    "dropout": 0.1,
    "pretraining-steps": 2,
}
TINY = {
    "context": 32,
    "batch-size": 2,
    "training-steps": 4,
    "evaluate-every": 2,
    "warmup-steps": 1,
    "validation-tokens": 128,
    "rwr-window": 4,
    "rwr-topk": 8,
    "rwr-neighbor-block": 4,
    "rwr-steps": 1,
    "sample-tokens": 4,
    "sampler": "greedy",
}


def flags(*more, **changes):
    values = TINY if "--preset" in more else {**SMALL_PRESET, **TINY}
    values = {**values, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))] + [
        str(text) for text in more
    ]


@pytest.fixture(scope="module")
def main():
    sys.path.insert(0, str(EXAMPLES))
    yield import_module("finetune_gpt2").main
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True, scope="module")
def short_novels(main, tmp_path_factory):
    """A few hundred words in place of the embedded text."""
    folder = tmp_path_factory.mktemp("novels")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "."], (3, 2000))
    text = "<|endoftext|>".join(" ".join(novel) for novel in words)
    (folder / "train.txt.xz").write_bytes(lzma.compress(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("finetune_model"), "EMBEDDED", folder)
        yield


@pytest.fixture(scope="module")
def finished(main, tmp_path_factory):
    """The folder of an unbroken run that made its own preset."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    main(flags("--run-dir", folder))
    return folder


def read(path):
    return json.loads(path.read_text("utf-8"))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_reports_and_saves_a_preset(finished):
    report = read(finished / "report.json")
    assert list(report["perplexity"]) == ["stock", "converted", "fine-tuned"]
    assert all(1 < value < 400 for value in report["perplexity"].values())
    assert report["perplexity"]["fine-tuned"] < report["perplexity"]["converted"]
    assert report["parameters"] == report["trained_parameters"]
    assert report["sample"].startswith("It was a") and len(report["sample"]) > len("It was a")

    task = RWRGPT2CausalLM.from_preset(str(finished / "model"))
    assert task.backbone.rwr_options["window"] == TINY["rwr-window"]
    with np.load(finished / "checkpoint.npz") as checkpoint:
        trained = list(checkpoint.values())
    for weight in task.backbone.weights:
        value = keras.ops.convert_to_numpy(weight)
        assert any(np.array_equal(value, other) for other in trained), weight.path


def test_a_killed_run_goes_on_as_if_it_had_not_been(finished, main, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    results = ("model", "report.json", "checkpoint.npz", "losses.csv")
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*results))
    log = import_module("ablation_log")
    write_arrays = log.write_arrays

    class Killed(Exception):
        pass

    def write_once(path, arrays):
        if arrays["epoch"] == 2:
            raise Killed
        write_arrays(path, arrays)

    monkeypatch.setattr(log, "write_arrays", write_once)
    with pytest.raises(Killed):
        main(["--resume", str(folder)])
    monkeypatch.undo()
    expected = read(finished / "report.json")
    # Saves the compilation of another sample.
    monkeypatch.setattr(import_module("finetune_model"), "sample", lambda *_: expected["sample"])
    assert read(folder / "perplexity.json") == read(finished / "perplexity.json")
    main(["--resume", str(folder)])
    assert files(folder) == files(finished)
    assert read(folder / "report.json") == expected


def test_lora_trains_factors_and_the_preset_has_them_merged(finished, main, tmp_path, monkeypatch):
    tasks = []
    sample = lambda task, _: tasks.append(task) or ""  # noqa: E731
    monkeypatch.setattr(import_module("finetune_model"), "sample", sample)
    folder, preset = tmp_path / "run", finished / "preset"
    short = {"training_steps": 1, "evaluate_every": 1, "warmup_steps": 0, "lora": 2}
    main(flags("--preset", preset, "--run-dir", folder, **short))

    factors = 2 * (16 * 2 + 8)  # of kernels (16, 2, 8)
    assert read(folder / "report.json")["trained_parameters"] == 2 * (factors + 16)  # and biases
    assert (folder / "adapter.lora.h5").exists()
    tasks.append(RWRGPT2CausalLM.from_preset(str(folder / "model")))
    tasks.append(keras_hub.models.GPT2CausalLM.from_preset(str(preset)))
    for name, is_trained in (("query", True), ("key", False), ("value", True)):
        trained, loaded, before = (
            keras.ops.convert_to_numpy(
                getattr(
                    task.backbone.transformer_layers[0]._self_attention_layer, f"_{name}_dense"
                ).kernel
            )
            for task in tasks
        )
        assert np.allclose(loaded, trained, atol=1e-7)
        assert np.array_equal(loaded, before) != is_trained


# === What it refuses ===


def refused(main, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "0"], "`lora` must be at least 1. Received: lora=0"),
        (["--pretraining-steps", "0"], "`pretraining_steps` must be at least 1. Received: pretra"),
        (["--rwr-alpha", "1.2"], "R1: `alpha` must be in (0, 1]. Received: alpha=1.2"),
        (["--ablation-step", "R0", "--rwr-steps", "2"], "--rwr-steps need an RWR step (R1 to R4)"),
        (["--preset", "gpt2_base_en", "--width", "8"], "--width must be left out with `preset`"),
        (["--dataset", "finewebedu"], "`dataset` must be `embedded` (one novel), a .txt/.gz/.xz"),
        (["--dataset", "nowhere"], "nothing is there. Received: dataset=nowhere"),
        (["--resume", "nowhere"], "`run_dir` must hold a run to resume (config.json)"),
        (["--sampler", "best"], "invalid choice: 'best'"),
        (
            ["--context", "64", "--rwr-topk", "96", "--layers", "1", "--width", "4"],
            "the RWR options must fit the preset: `topk` must be at most `max_sequence_length`",
        ),
    ],
)
def test_bad_arguments_are_named(main, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, capsys, arguments)
    assert files(tmp_path) == set()


def test_presets_that_do_not_fit(finished, main, capsys, tmp_path):
    run = ["--run-dir", tmp_path / "run"]
    message = refused(main, capsys, flags("--preset", finished / "model", *run))
    assert "`preset` must be a GPT-2 with stock attention" in message
    message = refused(main, capsys, flags("--preset", finished / "preset", *run, context=64))
    assert "`context` must be at most the preset's, 32. Received: context=64" in message
    message = refused(main, capsys, flags("--preset", tmp_path, *run))
    assert "`preset` could not be loaded (ValueError: " in message and "offline" not in message
    assert files(tmp_path) == set()


def test_a_resumed_run_keeps_its_arguments(finished, main, capsys):
    message = refused(main, capsys, ["--resume", finished, "--lora", "2"])
    assert "`resume` must be the only flag" in message and "--lora given too" in message


@pytest.mark.parametrize(
    ("preset", "error"),
    [
        ("gpt2_base_en", ConnectionError("no route to host")),
        ("hf://openai-community/gpt2", ValueError("Preset has no config.json")),
    ],
)
def test_without_a_network(main, capsys, tmp_path, monkeypatch, preset, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "create_connection", fail_to_connect)
    monkeypatch.setattr(keras_hub.models.GPT2CausalLM, "from_preset", fail)
    message = refused(main, capsys, flags("--preset", preset, "--run-dir", tmp_path / "run"))
    assert f"`preset` could not be loaded ({type(error).__name__}: {error})" in message
    assert "Is this machine offline? Give a folder that save_to_preset has written, or" in message
    assert message.endswith(f"Received: preset={preset}")
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if preset.startswith("hf://") else "0")
    assert files(tmp_path) == set()


def fail_to_connect(*args, **kwargs):
    raise OSError("no network")


# --- the picture of a trained model --------------------------------------------------------------


@pytest.fixture
def saliency(main):
    return import_module("saliency")


def test_a_picture_of_what_a_token_attends_to(finished, saliency, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("the cat sat on a mat. " * 3)
    picture = tmp_path / "saliency.png"
    saliency.main([str(finished / "model"), "--text", str(text), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out


def test_the_parts_of_a_tokens_attention(finished, saliency):
    backbone = RWRGPT2CausalLM.from_preset(str(finished / "model")).backbone
    token_ids = list(np.random.default_rng(1).integers(0, backbone.vocabulary_size, 30))
    found = saliency.explain_token(backbone, token_ids, layer=0, head=1, token=20)
    window, mass = TINY["rwr-window"], 1.0 - 0.8**2
    local, walk = found["LOCAL"], found["walk"]
    assert local.sum() == pytest.approx(1.0, abs=1e-5)
    assert local[20 - window : 21].min() > 0
    assert not local[: 20 - window].any() and not local[21:].any()
    assert walk.sum() == pytest.approx(mass, abs=1e-5)
    assert walk[: 20 - window].any() and not walk[21:].any()
    np.testing.assert_allclose(found["LOCAL + gamma * walk"], local + 0.3 * walk, atol=1e-6)
    assert found["importance"].sum() == pytest.approx(mass, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (["--token", "99"], r"`token` must be in \[-\d+, \d+\). Received: token=99"),
        (["--head", "-3"], r"`head` must be in \[-2, 2\). Received: head=-3"),
        (["--text", "missing.txt"], "Received: text=missing.txt"),
    ],
)
def test_pictures_of_what_is_not_there(finished, saliency, capsys, change, rule):
    arguments = [str(finished / "model"), "--text", "the cat sat", *change]
    with pytest.raises(SystemExit):
        saliency.main(arguments)
    assert re.search(rule, capsys.readouterr().err)


def test_pictures_need_a_model_with_rwr_attention(finished, saliency, capsys, tmp_path):
    for preset, rule in ((tmp_path / "none", "be a folder"), (finished / "preset", "a GPT2Backb")):
        with pytest.raises(SystemExit):
            saliency.main([str(preset), "--text", "the cat sat"])
        assert rule in capsys.readouterr().err
