"""An ordinary Keras model with RWR attention: it learns from far words, and padding is no word."""

import os
import runpy
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "text_classifier.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the script has when it has run: the trained model, its texts and the loaded model."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("classifier"))
    try:
        return runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        os.chdir(before)


def test_it_learns_what_only_far_words_tell(trained):
    texts, classes = trained["texts"], trained["classes"]
    assert trained["accuracy"] > 0.95
    assert trained["larger_class"] < 0.55
    window_alone = trained["make_model"](lens_strength=0.0)
    window_alone.set_weights(trained["model"].get_weights())
    predicted = window_alone.predict(texts[:256], verbose=0)[:, 0]
    assert np.mean((predicted > 0.5) == (classes[:256] > 0.5)) < 0.7


def test_padding_is_not_part_of_a_text(trained):
    """More padding, with another embedding than in training, changes no prediction."""
    padded = np.pad(trained["texts"][:64], [(0, 0), (0, 37)])
    weights = trained["model"].get_weights()
    weights[0][0] = 10.0 * np.random.default_rng(0).normal(size=weights[0][0].shape)
    differences = []
    for mask_zero in (True, False):
        model = trained["make_model"](mask_zero=mask_zero)
        model.set_weights(weights)
        predicted = model.predict(padded, verbose=0)[:, 0]
        differences.append(np.abs(predicted - trained["predicted"][:64]).max())
    assert differences[0] < 1e-4
    assert differences[1] > 0.1  # so that the difference would show


def test_the_loaded_model_is_the_saved_one(trained):
    assert trained["difference"] == 0
    assert [x.path for x in trained["loaded"].weights] == [x.path for x in trained["model"].weights]


def test_the_guide_shows_the_scripts_own_lines():
    text = (ROOT / "docs" / "guide_text_classifier.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        assert textwrap.indent(block, "    ") in SCRIPT.read_text()


def test_adding_tensors_without_a_layer_drops_the_mask():
    """What the guide warns of."""
    words = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(4, 2, mask_zero=True)(words)
    assert getattr(keras.layers.Add()([x, x]), "_keras_mask", None) is not None
    assert getattr(x + x, "_keras_mask", None) is None
