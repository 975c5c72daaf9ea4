"""`RWRGroupedQueryAttention` beside Keras's layer, and beside ours with repeated heads."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_rwr import Options, RWRAttention, RWRGroupedQueryAttention

BATCH, LENGTH, DIM, SIZE, HEADS, KV_HEADS = 2, 23, 10, 6, 4, 2
SHAPE = (BATCH, LENGTH, DIM)
HOLES = np.random.default_rng(3).random((BATCH, LENGTH)) < 0.7
SEGMENTS = np.repeat([[3, 0, 3]], BATCH, axis=0).repeat([9, 3, 11], axis=1).astype("int32")
PLAIN = {"window": LENGTH, "steps": 0, "lens_strength": 0.0}
SMALL = {"window": 3, "topk": 4, "steps": 2}
STEPS = {
    "R1": {**SMALL, "neighbor_block": 2},
    "R3": {
        **SMALL,
        "neighbor_block": 1,
        "reversible": True,
        "reciprocal_beta": 0.7,
        "use_discoverability": True,
        "use_gate": True,
    },
    "R5": {
        **SMALL,
        "neighbor_block": 1,
        "edge_weight": "exponential",
        "graph_heads": 1,
        "graph_dim": 5,
        "self_edges": False,
        "stopping": "gated",
    },
    "two graphs": {**SMALL, "neighbor_block": 1, "graph_heads": 2, "graph_dim": 5},
}
EVERY = pytest.mark.parametrize("step", STEPS)


def numpy(x):
    return ops.convert_to_numpy(x)


def make_inputs(seed=0, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(BATCH, length, DIM)).astype("float32")


def built(layer):
    """A layer with large random weights."""
    layer.build(SHAPE, SHAPE)
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        if weight.name != "log_concentration":
            weight.assign(0.5 * rng.normal(size=weight.shape))
    return layer


def grouped(**options):
    return built(RWRGroupedQueryAttention(SIZE, HEADS, KV_HEADS, **options))


def assert_same(actual, expected, tolerance=1e-5):
    """The tolerance counts the largest output as 1: roundings of float32 grow with it, up to 50."""
    actual, expected = numpy(actual), numpy(expected)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"use_bias": False}, {"use_gate": True, "dropout": 0.2}])
def test_equals_the_stock_layer_without_a_walk(is_causal, arguments):
    stock = built(keras.layers.GroupQueryAttention(SIZE, HEADS, KV_HEADS, **arguments))
    layer = RWRGroupedQueryAttention.from_config({**stock.get_config(), **PLAIN})
    layer.build(SHAPE, SHAPE)
    assert [x.path.split("/", 1)[1] for x in layer.weights] == [
        x.path.split("/", 1)[1] for x in stock.weights
    ]
    layer.set_weights([numpy(weight) for weight in stock.weights])
    x = make_inputs()
    for padding in (np.ones((BATCH, LENGTH), bool), HOLES):
        mask = padding[:, None, :]
        expected = stock(x, x, attention_mask=mask, use_causal_mask=is_causal)
        output = layer(x, x, attention_mask=mask, use_causal_mask=is_causal)
        assert_same(numpy(output)[padding], numpy(expected)[padding])
    arguments = {"use_causal_mask": is_causal, "return_attention_scores": True}
    for output, expected in zip(layer(x, x, **arguments), stock(x, x, **arguments), strict=True):
        assert_same(output, expected)


@pytest.mark.costly
@EVERY
def test_equals_the_layer_with_repeated_heads(step):
    layer = grouped(**STEPS[step])
    full = built(RWRAttention(HEADS, SIZE, **STEPS[step]))
    for old, new in zip(layer.weights, full.weights, strict=True):
        value = numpy(old)
        if value.shape != tuple(new.shape):  # of keys and values
            value = np.repeat(value, HEADS // KV_HEADS, axis=-2)
        new.assign(value)
    x = make_inputs()
    packed = {"segment_ids": SEGMENTS} if layer.options.neighbor_block == 1 else {}
    masks = {"attention_mask": HOLES, **packed}
    for arguments in ({}, {"use_causal_mask": True}, {"use_causal_mask": True, **masks}):
        assert_same(layer(x, x, **arguments), full(x, x, **arguments))
    _, scores = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    _, expected = full(x, x, use_causal_mask=True, return_attention_scores=True)
    assert_same(scores, expected)


@pytest.mark.costly
@EVERY
def test_cached_decoding_equals_the_full_pass(step):
    layer, x = grouped(**STEPS[step]), make_inputs()
    expected = numpy(layer(x, x, use_causal_mask=True))
    changed = np.concatenate([x[:, :9], make_inputs(4)[:, 9:]], axis=1)
    np.testing.assert_array_equal(
        numpy(layer(changed, changed, use_causal_mask=True))[:, :9], expected[:, :9]
    )
    cache = layer.empty_cache(BATCH, LENGTH)
    assert cache.key.shape[:2] == (BATCH, KV_HEADS)
    outputs, start = [], 0
    for length in (8, 1, 5, 1, 8):
        chunk = x[:, start : start + length]
        output, cache = layer(
            chunk, chunk, use_causal_mask=True, cache=cache, cache_update_index=start
        )
        outputs.append(numpy(output))
        start += length
    assert_same(np.concatenate(outputs, axis=1), expected)


@pytest.mark.costly
@EVERY
def test_files(step, tmp_path):
    inputs = keras.Input((None, DIM))
    layer = RWRGroupedQueryAttention(SIZE, HEADS, KV_HEADS, **STEPS[step], name="attention")
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    expected = numpy(model(make_inputs()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("attention").get_config() == layer.get_config()
    assert_same(loaded(make_inputs()), expected, tolerance=0)


class Holder(keras.Model):
    """Keras names a layer in a weights file after the attribute that holds it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)


@pytest.mark.parametrize("is_stock_first", [False, True])
def test_weights_files_of_the_stock_layer(is_stock_first, tmp_path):
    stock = Holder(keras.layers.GroupQueryAttention(SIZE, HEADS, KV_HEADS))
    ours = Holder(RWRGroupedQueryAttention(SIZE, HEADS, KV_HEADS, **PLAIN))
    first, second = (stock, ours) if is_stock_first else (ours, stock)
    built(first.attention)
    expected, before = first(make_inputs()), numpy(second(make_inputs()))
    assert np.abs(before - numpy(expected)).max() > 0.1
    first.save_weights(tmp_path / "first.weights.h5")
    second.load_weights(tmp_path / "first.weights.h5")
    assert_same(second(make_inputs()), expected)


def test_made_from_the_config_of_the_stock_layer():
    stock = keras.layers.GroupQueryAttention(SIZE, HEADS, KV_HEADS, use_bias=False, name="a")
    layer = RWRGroupedQueryAttention.from_config(stock.get_config())
    assert (layer.name, layer.use_bias, layer.options) == ("a", False, Options())


def test_symbolic_outputs_have_the_shapes_of_real_ones():
    layer, x = grouped(**STEPS["R5"]), keras.KerasTensor((None, None, DIM))
    output, scores = layer(x, x, return_attention_scores=True)
    assert output.shape == (None, None, DIM)
    assert scores.shape == (None, HEADS, None, None)
    output, scores = layer(make_inputs(), make_inputs(), return_attention_scores=True)
    assert output.shape == SHAPE
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)


def test_lora_on_the_projections():
    layer, x = grouped(**STEPS["R5"]), make_inputs()
    for dense in (layer._query_dense, layer._value_dense):
        dense.enable_lora(2)
    before = numpy(layer(x, x))
    layer._value_dense.lora_kernel_b.assign(np.ones((2, SIZE)))
    assert np.abs(numpy(layer(x, x)) - before).max() > 1e-3


def test_half_precision_and_training():
    # Without neighbours, whose choice could turn on a rounding.
    options = {**STEPS["R5"], "topk": 0}
    layer = grouped(**options, dtype="mixed_bfloat16", dropout=0.5)
    reference = grouped(**options)
    x = make_inputs()
    output = layer(x, x, use_causal_mask=True)
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    expected = reference(x, x, use_causal_mask=True)
    assert_same(ops.cast(output, "float32"), expected, tolerance=0.1)
    dropped = layer(x, x, use_causal_mask=True, training=True)
    assert (numpy(ops.cast(dropped, "float32")) != numpy(ops.cast(output, "float32"))).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_key_value_heads": 3}, ValueError, "must divide `num_query_heads`.*heads=3, num_q"),
        ({"head_dim": 0}, ValueError, "Received: head_dim=0"),
        ({"num_query_heads": 2.0}, TypeError, "`num_query_heads` must be an int"),
        ({"sliding_window": 4}, ValueError, "`sliding_window` must be `None`: pass `window`"),
        ({"flash_attention": True}, ValueError, "`flash_attention` must be"),
        ({"graph_heads": 3}, ValueError, "`graph_heads` must divide .* graph_heads=3, 4 query"),
        ({"lens_strength": [0.1, 0.2]}, ValueError, "one number a head, 4"),
        ({"dropout": 1.0}, ValueError, "Received: dropout=1.0"),
        ({"alpha": 0.0}, ValueError, "Received: alpha=0.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    sizes = {"head_dim": SIZE, "num_query_heads": HEADS, "num_key_value_heads": KV_HEADS}
    with pytest.raises(error, match=message):
        RWRGroupedQueryAttention(**{**sizes, **arguments})
