"""Weights files: those of `MultiHeadAttention`, of the same options, and all that must not load."""

import keras
import numpy as np
import pytest
from test_layer import (
    DIM,
    EXTRAS,
    HEADS,
    KEY_DIM,
    LENS,
    PLAIN,
    R5,
    SHAPE,
    assert_same,
    built,
    layer_of,
    make_inputs,
    model_of,
    numpy,
    paths,
    run,
)

FILE = "any.weights.h5"


class Block(keras.Model):
    """A model that holds its attention as an attribute."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def block_of(attention):
    block = Block(attention)
    block.build(SHAPE)
    return block


MODELS = {"subclassed": block_of, "functional": model_of}


def values(layer):
    return {name: numpy(weight) for name, weight in paths(layer).items()}


def assert_walk_is(layer, expected):
    found = values(layer)
    for weight in layer.extra_weights:
        name = f"walk/{weight.name}"
        np.testing.assert_array_equal(found[name], expected[name], name)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_files_load_both_ways(tmp_path, dropout):
    stock = block_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM, dropout=dropout))
    layer = block_of(layer_of(dropout=dropout, **PLAIN | {"topk": 0}))
    x = make_inputs()
    assert np.abs(numpy(run(layer, x)) - numpy(run(stock, x))).max() > 0.01
    stock.save_weights(tmp_path / FILE)
    layer.load_weights(tmp_path / FILE)
    assert_same(run(layer, x), run(stock, x))

    built(layer.attention)
    layer.save_weights(tmp_path / "rwr.weights.h5")
    stock.load_weights(tmp_path / "rwr.weights.h5")
    assert_same(run(stock, x), run(layer, x), atol=1e-5)


def test_files_that_name_layers_after_their_class_are_refused(tmp_path):
    stock = model_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    layer = model_of(layer_of())
    stock.save_weights(tmp_path / FILE)
    with pytest.raises(ValueError, match="expected 2 variables"):
        layer.load_weights(tmp_path / FILE)
    layer.set_weights([numpy(weight) for weight in stock.weights])
    assert_same(layer.layers[-1].key_dense.kernel, stock.layers[-1].key_dense.kernel, atol=0)


@pytest.mark.parametrize("options", [LENS, EXTRAS], ids=["first edition", "second edition"])
def test_stock_files_leave_the_walk_as_it_begins(tmp_path, options):
    stock = block_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    built(stock.attention)
    stock.save_weights(tmp_path / FILE)
    layer = layer_of(**options)
    block = block_of(layer)
    before = values(layer)
    block.load_weights(tmp_path / FILE)
    assert_walk_is(layer, before)
    for name, value in values(stock.attention).items():
        np.testing.assert_array_equal(values(layer)[name], value)
    # The walk's weights of a file do not hinder the stock layer.
    built(layer)
    block.save_weights(tmp_path / FILE)
    stock.load_weights(tmp_path / FILE)
    for name, value in values(stock.attention).items():
        np.testing.assert_array_equal(values(layer)[name], value)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [LENS, EXTRAS], ids=["first edition", "second edition"])
def test_files_of_the_same_options_load(tmp_path, options, kind):
    saved, loaded = layer_of(**options), layer_of(**options)
    model = MODELS[kind](saved)
    built(saved)
    model.save_weights(tmp_path / FILE)
    MODELS[kind](loaded).load_weights(tmp_path / FILE)
    assert_walk_is(loaded, values(saved))


DISCOVERABLE = {"use_discoverability": True}
OTHERS = {
    # 0.1.0 left the discoverability of these two as it was, without a word.
    "one weight less": ({**DISCOVERABLE, "edge_weight": "exponential"}, DISCOVERABLE),
    "one weight more": (DISCOVERABLE, {**DISCOVERABLE, "edge_weight": "exponential"}),
    "none": (EXTRAS, {}),
    "another of the same shape": ({"trainable_lens": True}, {"edge_weight": "exponential"}),
    "other steps": (R5, {**R5, "steps": 2}),
    "other graphs": (R5, {**R5, "graph_heads": 2}),
    "other size": (R5, {**R5, "graph_dim": 5}),
    "other convolution": (R5, {**R5, "graph_convolution": 3}),
    "other stopping": (R5, {**R5, "stopping": "learned"}),
    "graph of heads": ({**R5, **DISCOVERABLE}, {**DISCOVERABLE, "edge_weight": "exponential"}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_options_raise(tmp_path, name, kind):
    saved, loaded = (layer_of(**options) for options in OTHERS[name])
    model = MODELS[kind](saved)
    built(saved)
    model.save_weights(tmp_path / FILE)
    other = MODELS[kind](loaded)
    before = values(loaded)
    received = "|".join(weight.name for weight in saved.extra_weights)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"options must be those of.*Received: .*({received})"
        ):
            other.load_weights(tmp_path / FILE)
        assert_walk_is(loaded, before)


def test_a_failure_does_not_outlive_its_file(tmp_path):
    stock = block_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    wrong, right = layer_of(**LENS), layer_of(**EXTRAS)
    files = {name: tmp_path / f"{name}.weights.h5" for name in ("stock", "wrong", "right")}
    stock.save_weights(files["stock"])
    block_of(wrong).save_weights(files["wrong"])
    model = block_of(right)
    built(right)
    model.save_weights(files["right"])
    expected = values(right)
    layer = layer_of(**EXTRAS)
    block = block_of(layer)
    before = values(layer)
    with pytest.raises(ValueError, match="options must be those"):
        block.load_weights(files["wrong"])
    block.load_weights(files["stock"])
    assert_walk_is(layer, before)
    with pytest.raises(ValueError, match="options must be those"):
        block.load_weights(files["wrong"])
    block.load_weights(files["right"])
    assert_walk_is(layer, expected)


def test_layers_of_one_model_load_each_their_own(tmp_path):
    def make():
        x = keras.Input((None, DIM))
        first, second = layer_of(**EXTRAS), layer_of(**LENS)
        return first, second, keras.Model(x, second(*[first(x, x)] * 2))

    first, second, model = make()
    built(first), built(second, seed=5)
    model.save_weights(tmp_path / FILE)
    others = make()
    others[2].load_weights(tmp_path / FILE)
    assert_walk_is(others[0], values(first))
    assert_walk_is(others[1], values(second))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_weights_of_reduced_precision_load(tmp_path, dtype):
    saved, loaded = (layer_of(**EXTRAS, dtype=dtype) for _ in range(2))
    model = block_of(saved)
    built(saved)
    model.save_weights(tmp_path / FILE)
    block_of(loaded).load_weights(tmp_path / FILE)
    assert_walk_is(loaded, values(saved))
