"""`examples/finetune_gpt2.py` and the picture of its model, at tiny sizes and without a network."""

import lzma
import re
import sys
from importlib import import_module
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

from keras_rwr.models import RWRGPT2CausalLM
from keras_rwr.statistics import record_calls

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW = 4
OPTIONS = ("--options", f"window={WINDOW}", "topk=8", "neighbor_block=4", "steps=1")
TINY = ("--context", "32", "--batch-size", "2", "--epochs", "1")


@pytest.fixture(scope="module")
def finetune(tmp_path_factory):
    """The script, with a few hundred words in place of the embedded text."""
    sys.path.insert(0, str(EXAMPLES))
    module = import_module("finetune_gpt2")
    rng = np.random.default_rng(0)
    kinds = 2 * [["the", "cat", "sat", "on", "a", "mat", "."]] + [["no", "dog", "ran", "in", "."]]
    words = [rng.choice(kind, 600) for kind in kinds]
    path = tmp_path_factory.mktemp("novels") / "train.txt.xz"
    path.write_bytes(lzma.compress("<|endoftext|>".join(map(" ".join, words)).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NOVELS", path)
        yield module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def finished(finetune, tmp_path_factory):
    """The folder of a run that made its own preset, and its perplexities."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    measured = finetune.main([*TINY, *OPTIONS, "--out", str(folder)])
    return folder, measured


def test_a_run_learns_and_saves_a_preset(finished):
    folder, measured = finished
    assert list(measured) == ["stock", "converted", "fine-tuned"]
    assert 4 < measured["fine-tuned"] < measured["converted"] / 2
    task = RWRGPT2CausalLM.from_preset(str(folder / "model"))
    assert task.backbone.rwr_options["window"] == WINDOW
    assert task.backbone.rwr_options["edge_weight"] == "exponential"


def test_lora_trains_factors_and_the_preset_has_them_merged(finetune, finished, tmp_path):
    preset = finished[0] / "stock"
    more = ("--preset", str(preset), "--lora", "2", "--ablation-step", "R5")
    finetune.main([*TINY, *more, "--out", str(tmp_path), "--options", f"window={WINDOW}"])
    assert (tmp_path / "adapter.lora.h5").exists()
    loaded = RWRGPT2CausalLM.from_preset(str(tmp_path / "model"))
    assert loaded.backbone.rwr_options["rwr_layers"] == [1]
    stock = keras_hub.models.GPT2CausalLM.from_preset(str(preset))
    for name, is_trained in (("query", True), ("key", False), ("value", True)):
        now, before = (
            getattr(x.backbone.transformer_layers[0]._self_attention_layer, f"_{name}_dense").kernel
            for x in (loaded, stock)
        )
        now, before = keras.ops.convert_to_numpy(now), keras.ops.convert_to_numpy(before)
        assert np.array_equal(now, before) != is_trained


def test_options_are_read_as_what_they_are(finetune):
    words = ["window=64", "edge_weight=exponential", "self_edges=false", "rwr_layers=[1]"]
    expected = {"window": 64, "edge_weight": "exponential", "self_edges": False, "rwr_layers": [1]}
    assert finetune.read_options(words) == expected


# --- the picture of a trained model --------------------------------------------------------------


@pytest.fixture
def saliency(finetune):
    return import_module("saliency")


def test_a_picture_of_what_a_token_attends_to(finished, saliency, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("the cat sat on a mat. " * 3)
    picture = tmp_path / "saliency.png"
    saliency.main([str(finished[0] / "model"), "--text", str(text), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out


@pytest.mark.parametrize("stopping", ["restart", "gated"])
def test_the_parts_of_a_tokens_attention(saliency, stopping):
    keras.utils.set_random_seed(3)
    backbone = make_backbone(stopping)
    token_ids = np.random.default_rng(1).integers(0, 50, (1, 30))
    with record_calls(backbone) as calls:
        backbone({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    found = saliency.explain_token(calls[-1], head=1, token=20)
    mass = 1.5 if stopping == "gated" else 0.3 * (1 - 0.8**2)
    local, walk = found["LOCAL"], found["walk"]
    assert local.sum() == pytest.approx(1.0, abs=1e-5)
    assert local[20 - WINDOW : 21].min() > 0
    assert not local[: 20 - WINDOW].any() and not local[21:].any()
    assert walk.sum() == pytest.approx(mass, abs=1e-5)
    assert walk[: 20 - WINDOW].any() and not walk[21:].any()
    np.testing.assert_allclose(found["LOCAL + walk"], local + walk, atol=1e-6)
    share = 1.5 if stopping == "gated" else 1 - 0.8**2
    assert found["importance"].sum() == pytest.approx(share, abs=1e-5)


def make_backbone(stopping):
    return RWRGPT2CausalLM.backbone_cls(
        **{"vocabulary_size": 50, "num_layers": 2, "num_heads": 2, "hidden_dim": 16},
        **{"intermediate_dim": 16, "max_sequence_length": 32, "window": WINDOW, "topk": 8},
        **{"neighbor_block": 4, "steps": 1, "stopping": stopping},
    )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (["--token", "99"], r"`token` must be in \[-\d+, \d+\). Received: token=99"),
        (["--head", "-3"], r"`head` must be in \[-2, 2\). Received: head=-3"),
        (["--text", "missing.txt"], "Received: text=missing.txt"),
    ],
)
def test_pictures_of_what_is_not_there(finished, saliency, capsys, change, rule):
    arguments = [str(finished[0] / "model"), "--text", "the cat sat", *change]
    with pytest.raises(SystemExit):
        saliency.main(arguments)
    assert re.search(rule, capsys.readouterr().err)


def test_pictures_need_a_model_with_rwr_attention(finished, saliency, capsys, tmp_path):
    for preset, rule in ((tmp_path / "no", "be a folder"), (finished[0] / "stock", "a GPT2Backb")):
        with pytest.raises(SystemExit):
            saliency.main([str(preset), "--text", "the cat sat"])
        assert rule in capsys.readouterr().err
