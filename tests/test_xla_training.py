"""The XLA implementation in Keras models on TensorFlow: fit, precision, strategies, export."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TOLERANCES, assert_close, numpy
from keras import ops

from keras_rwr import RWRAttention, backends
from keras_rwr.backends import tensorflow as xla

SMALL = {"window": 3, "topk": 8, "neighbor_block": 4}
LENGTH, WIDTH, CLASSES = 29, 12, 3


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that the implementation was given."""
    found = []
    attend = xla.rwr_attention

    def watched(query, *arguments, **options):
        found.append(tuple(query.shape))
        return attend(query, *arguments, **options)

    monkeypatch.setattr(xla, "rwr_attention", watched)
    return found


def make_model(implementation=None, **options):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((LENGTH, WIDTH))
    layer = RWRAttention(2, 6, implementation=implementation, **{**SMALL, **options})
    x = inputs + layer(inputs, inputs, use_causal_mask=True)
    outputs = keras.layers.Dense(CLASSES)(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs)


def data(count=10):
    rng = np.random.default_rng(2)
    return rng.standard_normal((count, LENGTH, WIDTH), "float32"), rng.integers(0, CLASSES, count)


def train(model, jit_compile="auto", count=10, epochs=2):
    """Losses of a training in batches of 4, and the weights after it."""
    model.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    history = model.fit(*data(count), batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"], [numpy(x.value) for x in model.trainable_variables]


@pytest.mark.parametrize(("jit_compile", "count"), [("auto", 8), (True, 8), (False, 10)])
def test_fit(jit_compile, count, calls):
    options = {"edge_weight": "exponential", "trainable_lens": True}
    losses, weights = train(make_model(**options), jit_compile, count)
    assert calls and all(shape[1:] == (LENGTH, 2, 6) for shape in calls)
    before = len(calls)
    expected, others = train(make_model("portable", **options), False, count)
    assert len(calls) == before
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0]
    for weight, other in zip(weights, others, strict=True):
        assert_close(weight, other, TOLERANCES["gradient_of_a_sum"])


def test_mixed_bfloat16(calls):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_model()
        losses, weights = train(model, False)
        assert model(data()[0]).dtype == tf.bfloat16
    finally:
        keras.config.set_dtype_policy("float32")
    assert calls
    assert losses[-1] < losses[0]
    assert {x.dtype for x in weights} == {np.dtype("float32")}
    expected, _ = train(make_model(), False)
    np.testing.assert_allclose(losses, expected, rtol=0.02)


def test_a_strategy_trains_as_no_strategy_does(calls):
    expected, weights = train(make_model(), False)
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        model = make_model()
    losses, others = train(model, False)
    assert calls
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for weight, other in zip(weights, others, strict=True):
        assert_close(other, weight, TOLERANCES["gradient"])


def test_saved_model(tmp_path, calls):
    model = make_model(reversible=True)
    inputs, _ = data()
    expected = numpy(model(inputs))
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    before = len(calls)
    for count in (1, 10):  # the batch was unknown when the model was exported
        assert_close(numpy(served.serve(inputs[:count])), expected[:count], TOLERANCES["output"])
    assert len(calls) == before, "the file holds the implementation"
    graph = served.serve.get_concrete_function(tf.TensorSpec((None, LENGTH, WIDTH))).graph
    assert any(x.attr["_XlaMustCompile"].b for x in graph.as_graph_def().library.function)


def test_gradients_of_a_reloaded_saved_model(tmp_path):
    model = make_model()
    inputs = tf.constant(data()[0])

    def gradient(fn):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(fn(inputs) ** 2)
        return numpy(tape.gradient(loss, inputs))

    module = tf.Module()
    module.model = model  # keeps the variables
    module.run = tf.function(model, input_signature=[tf.TensorSpec((None, LENGTH, WIDTH))])
    tf.saved_model.save(module, str(tmp_path / "module"))
    again = tf.saved_model.load(str(tmp_path / "module"))
    assert_close(gradient(again.run), gradient(model), TOLERANCES["gradient"])


def test_a_model_saved_by_keras(tmp_path, calls):
    model = make_model("xla")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    inputs, _ = data(3)
    assert_close(numpy(again(inputs)), numpy(model(inputs)), 1e-6)
    assert len(calls) >= 2


def test_the_watch_is_on_the_implementation(calls):
    assert backends.tensorflow is xla
    query = ops.ones((1, LENGTH, 2, 6))
    numpy(xla.rwr_attention(query, query, query, _config(), lens_strength=0.3, concentration=20.0))
    assert calls == [(1, LENGTH, 2, 6)]


def _config():
    from keras_rwr.config import RWRConfig

    return RWRConfig(**SMALL)
