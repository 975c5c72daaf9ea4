"""`RWRAttention` as a Keras layer: against `MultiHeadAttention`, masks, saving, training."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_rwr
from keras_rwr import RWRAttention
from keras_rwr.layer import ClipToRange

BATCH, LENGTH, DIM, HEADS, KEY_DIM = 2, 23, 12, 3, 5
SHAPE = (BATCH, LENGTH, DIM)

# A window and neighbours that matter at this length.
SMALL = {"window": 3, "topk": 4, "neighbor_block": 2}
# The window holds everything and the walk is off: plain attention.
PLAIN = {"window": LENGTH, "lens_strength": 0.0}

ABLATION = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True},
    "R4": {"edge_weight": "exponential"},
}
EXTRAS = {"edge_weight": "exponential", "use_discoverability": True, "trainable_lens": True}
EXTRA_NAMES = ["discoverability", "concentration", "lens_strength"]

# float32 roundings of two orders of the same few sums.
ATOL = 2e-6

RIGHT_PADDING = np.arange(LENGTH)[None] < np.array([[LENGTH], [15]])
HOLES = np.random.default_rng(7).uniform(size=(BATCH, LENGTH)) > 0.3
HOLES[:, 0] = True


def make_inputs(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(x)


def layer_of(**options):
    return RWRAttention(HEADS, KEY_DIM, **{**SMALL, **options})


def built(layer, seed=3):
    """Builds the layer if need be, and draws every weight, biases and extra weights too."""
    if not layer.built:
        layer.build(SHAPE, SHAPE)
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.name == "concentration":
            weight.assign(rng.uniform(5.0, 25.0, weight.shape))
        else:
            weight.assign(0.4 * rng.normal(size=weight.shape))
    return layer


def copy_weights(source, target):
    paths = [weight.path.split("/", 1)[1] for weight in source.weights]
    assert paths == [weight.path.split("/", 1)[1] for weight in target.weights]
    for old, new in zip(source.weights, target.weights, strict=True):
        new.assign(old)


def model_of(layer, **call):
    x = keras.Input((None, DIM))
    return keras.Model(x, layer(x, x, **call))


class Block(keras.Model):
    """A model that holds its attention as an attribute."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)


def block_of(attention):
    block = Block(attention)
    block(make_inputs())
    return block


def assert_same(a, b, atol=ATOL):
    np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=atol)


# --- as MultiHeadAttention -----------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"value_dim": 7, "use_gate": True, "dropout": 0.2, "attention_axes": 1},
        {"use_bias": False, "output_shape": (4, 3)},
    ],
    ids=["plain", "gate", "shape"],
)
@pytest.mark.parametrize("padding", [None, RIGHT_PADDING, HOLES], ids=["full", "right", "holes"])
def test_equals_multi_head_attention(is_causal, arguments, padding):
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM, **arguments))
    layer = RWRAttention(HEADS, KEY_DIM, **arguments, **PLAIN)
    layer.build(SHAPE, SHAPE)
    copy_weights(stock, layer)
    x = make_inputs()
    mask = None if padding is None else padding[:, None, :]
    expected = numpy(stock(x, x, attention_mask=mask, use_causal_mask=is_causal))
    output = numpy(layer(x, x, attention_mask=mask, use_causal_mask=is_causal))
    assert output.shape == expected.shape
    real = np.ones((BATCH, LENGTH), bool) if padding is None else padding
    assert_same(output[real], expected[real])


def test_scores_equal_those_of_multi_head_attention():
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    layer = RWRAttention(HEADS, KEY_DIM, **PLAIN)
    layer.build(SHAPE, SHAPE)
    copy_weights(stock, layer)
    x = make_inputs()
    _, expected = stock(x, x, return_attention_scores=True, use_causal_mask=True)
    _, scores = layer(x, x, return_attention_scores=True, use_causal_mask=True)
    assert_same(scores, expected)


def test_query_key_and_value_may_have_different_features():
    value_shape, key_shape = (BATCH, LENGTH, 9), (BATCH, LENGTH, 4)
    stock = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    layer = RWRAttention(HEADS, KEY_DIM, **PLAIN)
    stock.build(SHAPE, value_shape, key_shape)
    layer.build(SHAPE, value_shape, key_shape)
    copy_weights(stock, layer)
    arguments = make_inputs(), make_inputs(1, value_shape), make_inputs(2, key_shape)
    assert_same(layer(*arguments), stock(*arguments))


def test_the_default_layer_differs_from_multi_head_attention():
    layer = built(layer_of())
    stock = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    stock.build(SHAPE, SHAPE)
    copy_weights(layer, stock)
    x = make_inputs()
    assert np.abs(numpy(layer(x, x)) - numpy(stock(x, x))).max() > 0.01


def test_made_from_the_config_of_multi_head_attention():
    stock = keras.layers.MultiHeadAttention(HEADS, KEY_DIM, use_bias=False, name="attention")
    layer = RWRAttention.from_config(stock.get_config())
    assert layer.name == "attention"
    assert not layer.use_bias
    assert layer.rwr_config == keras_rwr.RWRConfig()


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_weight_files_load_both_ways(tmp_path, dropout):
    stock = block_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM, dropout=dropout))
    layer = block_of(RWRAttention(HEADS, KEY_DIM, dropout=dropout, **PLAIN))
    x = make_inputs()
    assert np.abs(numpy(layer(x)) - numpy(stock(x))).max() > 0.01
    stock.save_weights(tmp_path / "stock.weights.h5")
    layer.load_weights(tmp_path / "stock.weights.h5")
    assert_same(layer(x), stock(x))

    built(layer.attention)
    layer.save_weights(tmp_path / "rwr.weights.h5")
    stock.load_weights(tmp_path / "rwr.weights.h5")
    assert_same(stock(x), layer(x))


def test_files_that_name_layers_after_their_class_are_refused(tmp_path):
    stock = model_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    layer = model_of(layer_of())
    stock.save_weights(tmp_path / "stock.weights.h5")
    with pytest.raises(ValueError, match="expected 2 variables"):
        layer.load_weights(tmp_path / "stock.weights.h5")
    layer.set_weights([numpy(weight) for weight in stock.weights])
    assert_same(layer.layers[-1].key_dense.kernel, stock.layers[-1].key_dense.kernel, atol=0)


def test_extra_weights_only_where_an_option_needs_them():
    assert len(built(layer_of()).weights) == 8
    shapes = {
        "discoverability": ({"use_discoverability": True}, (HEADS, KEY_DIM)),
        "concentration": ({"edge_weight": "exponential"}, (HEADS,)),
        "lens_strength": ({"trainable_lens": True}, (HEADS,)),
    }
    for name, (options, shape) in shapes.items():
        layer = layer_of(**options)
        layer.build(SHAPE, SHAPE)
        (extra,) = [weight for weight in layer.weights if weight.path.count("/") == 1]
        assert extra.path == f"{layer.name}/{name}"
        assert tuple(extra.shape) == shape
        assert extra.trainable


def test_extra_weights_start_at_their_arguments():
    layer = layer_of(**EXTRAS, concentration=[2.0, 3.0, 4.0], lens_strength=0.7)
    layer.build(SHAPE, SHAPE)
    np.testing.assert_array_equal(numpy(layer.discoverability), np.zeros((HEADS, KEY_DIM)))
    np.testing.assert_allclose(numpy(layer.concentration), [2.0, 3.0, 4.0])
    np.testing.assert_allclose(numpy(layer.lens_strength), [0.7] * 3, rtol=1e-7)


def test_stock_files_leave_extra_weights_alone(tmp_path):
    stock = block_of(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    stock.save_weights(tmp_path / "stock.weights.h5")
    layer = layer_of(**EXTRAS)
    block_of(layer).load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(numpy(layer.concentration), [20.0] * HEADS)
    assert_same(layer.query_dense.kernel, stock.attention.query_dense.kernel, atol=0)


def test_extra_weights_are_saved_by_name(tmp_path):
    saved = layer_of(**EXTRAS)
    model = model_of(saved)
    built(saved)
    model.save_weights(tmp_path / "rwr.weights.h5")
    loaded = layer_of(**EXTRAS)
    model_of(loaded).load_weights(tmp_path / "rwr.weights.h5")
    for name in EXTRA_NAMES:
        assert_same(getattr(loaded, name), getattr(saved, name), atol=0)
    # Both have one weight of shape (N,): it must not load as the other.
    model_of(layer_of(trainable_lens=True)).save_weights(tmp_path / "lens.weights.h5")
    for options in ({"edge_weight": "exponential"}, {}):
        with pytest.raises(ValueError, match=r"Received: \['lens_strength'\]"):
            model_of(layer_of(**options)).load_weights(tmp_path / "lens.weights.h5")


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "is_causal"), [("R3", True), ("R4", False)])
def test_every_form_of_padding_mask_is_the_same(step, is_causal):
    layer = built(layer_of(**ABLATION[step]))
    x = make_inputs()

    def call(**masks):
        return numpy(layer(x, x, use_causal_mask=is_causal, **masks))

    expected = call(attention_mask=HOLES)
    assert np.abs(expected - call()).max() > 1e-3
    for mask in (HOLES[:, None, :], HOLES.astype("int32"), HOLES.astype("float32")):
        np.testing.assert_array_equal(call(attention_mask=mask), expected)
    for name in ("query_mask", "value_mask", "key_mask"):
        np.testing.assert_array_equal(call(**{name: HOLES}), expected)
    # Masks of the same sequence add up.
    first, second = HOLES | (np.arange(LENGTH) < 9), HOLES | (np.arange(LENGTH) >= 9)
    np.testing.assert_array_equal(call(query_mask=first, attention_mask=second), expected)
    # One row serves the whole batch.
    row = np.broadcast_to(HOLES[:1], HOLES.shape)
    np.testing.assert_array_equal(call(attention_mask=HOLES[:1]), call(attention_mask=row))


def test_keras_masks_are_taken_and_passed_on():
    ids = np.where(RIGHT_PADDING, np.random.default_rng(1).integers(1, 11, (BATCH, LENGTH)), 0)
    layer = built(layer_of())
    embedding = keras.layers.Embedding(11, DIM, mask_zero=True)
    pooling = keras.layers.GlobalAveragePooling1D()
    inputs = keras.Input((None,), dtype="int32")
    embedded = embedding(inputs)
    output = layer(embedded, embedded, use_causal_mask=True)
    model = keras.Model(inputs, [output, pooling(output), pooling(embedded)])

    vectors = ops.take(embedding.embeddings, ids, axis=0)
    expected = numpy(layer(vectors, vectors, attention_mask=RIGHT_PADDING, use_causal_mask=True))
    mean = [expected[b, RIGHT_PADDING[b]].mean(0) for b in range(BATCH)]
    outputs = model(ids)
    assert_same(outputs[0], expected)
    assert_same(outputs[1], mean)
    # The input keeps its mask: layers beside this one need it too.
    assert_same(outputs[2], [numpy(vectors)[b, RIGHT_PADDING[b]].mean(0) for b in range(BATCH)])

    eager = embedding(ids)
    assert_same(pooling(layer(eager, eager, use_causal_mask=True)), mean)
    assert_same(pooling(eager), outputs[2])


@pytest.mark.parametrize("step", ABLATION)
def test_padding_content_never_reaches_real_tokens(step):
    layer = built(layer_of(**ABLATION[step]))
    x = make_inputs()
    other = np.where(HOLES[..., None], x, 100.0 * make_inputs(9))
    a = numpy(layer(x, x, attention_mask=HOLES))
    b = numpy(layer(other, other, attention_mask=HOLES))
    np.testing.assert_array_equal(a[HOLES], b[HOLES])


@pytest.mark.parametrize("step", ABLATION)
def test_the_future_never_reaches_the_past(step):
    layer = built(layer_of(**ABLATION[step]))
    x = make_inputs()
    expected = numpy(layer(x, x, use_causal_mask=True))
    for seen in (1, 8, 17):
        other = np.concatenate([x[:, :seen], make_inputs(seen)[:, seen:]], axis=1)
        output = numpy(layer(other, other, use_causal_mask=True))
        np.testing.assert_array_equal(output[:, :seen], expected[:, :seen])
    other = np.concatenate([x[:, :17], make_inputs(17)[:, 17:]], axis=1)
    assert np.abs(numpy(layer(other, other)) - numpy(layer(x, x)))[:, :17].max() > 1e-3


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.2}, ValueError, r"`alpha` must be in \(0, 1\]. Received: alpha=1.2"),
        ({"topk": 5}, ValueError, "multiple of `neighbor_block`"),
        ({"window": 1.5}, TypeError, "`window` must be an integer"),
        ({"dropout": 1.0}, ValueError, "`dropout` must be in"),
        ({"edge_weight": "dot"}, ValueError, "`edge_weight` must be one of"),
        ({"fusion": "max"}, ValueError, "`fusion` must be one of"),
        ({"concentration": 50.0}, ValueError, r"`concentration` must be in \[1, 40\]"),
        ({"concentration": np.array([1.0, 2.0, 0.5])}, ValueError, r"`concentration` must be in"),
        ({"lens_strength": [0.1, 0.2]}, ValueError, "`lens_strength` must have one value a head"),
        ({"lens_strength": float("nan")}, ValueError, "`lens_strength` must be finite"),
        ({"lens_strength": None}, TypeError, "`lens_strength` must be a number"),
        ({"trainable_lens": 1}, TypeError, "`trainable_lens` must be a bool. Received"),
        ({"use_discoverability": "yes"}, TypeError, "`use_discoverability` must be a bool"),
        ({"implementation": "cuda"}, ValueError, "Received: implementation='cuda'"),
        ({"attention_axes": 2}, ValueError, "`attention_axes` .* Received: attention_axes=2"),
        ({"attention_axes": (1, 2)}, ValueError, "Received: attention_axes="),
        ({"flash_attention": True}, ValueError, "Received: flash_attention=True"),
        ({"sliding_window": 4}, ValueError, "pass `window`.*Received: sliding_window=4"),
        ({"num_heads": 0}, ValueError, "Received: num_heads=0"),
        ({"unknown": 1}, ValueError, "unknown"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RWRAttention(**{"num_heads": HEADS, "key_dim": KEY_DIM, **SMALL, **arguments})


SHORTER = (BATCH, LENGTH - 1, DIM)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((SHAPE, SHORTER), "`query` and `value` must be the same sequence.*Received: query of"),
        ((SHAPE, SHAPE, SHORTER), "`query` and `key` must be the same sequence.*Received: query"),
        ((SHAPE, (1, LENGTH, DIM)), "`query` and `value` must be the same sequence"),
        (((LENGTH, DIM), (LENGTH, DIM)), "`query` must have shape"),
        (((2, 3, 4, DIM), (2, 3, 4, DIM)), r"`query` must have shape \(B, S, dim\). Received"),
        ((SHAPE, (2, 3, 4, DIM)), r"`value` must have shape"),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_bad_shapes(shapes, message, symbolic):
    if symbolic:
        arguments = [keras.KerasTensor(shape) for shape in shapes]
    else:
        arguments = [make_inputs(0, shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        layer_of()(*arguments)
    if not symbolic and all(len(shape) == 3 for shape in shapes):
        layer = built(layer_of())
        with pytest.raises(ValueError, match=message):
            layer(*arguments)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (BATCH, LENGTH, LENGTH)),
        ("attention_mask", (LENGTH, LENGTH)),
        ("attention_mask", (BATCH, LENGTH - 1)),
        ("attention_mask", (BATCH, 1, 1, LENGTH)),
        ("attention_mask", (LENGTH,)),
        ("query_mask", (BATCH, 1, LENGTH)),
        ("value_mask", (BATCH, LENGTH + 1)),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_bad_masks(name, shape, symbolic):
    layer = layer_of()
    if symbolic:
        x, mask = keras.KerasTensor(SHAPE), keras.KerasTensor(shape, dtype="bool")
    else:
        x, mask = make_inputs(), np.ones(shape, bool)
    rule = r"\(B, S\) or \(B, 1, S\)" if name == "attention_mask" else r"\(B, S\)"
    with pytest.raises(ValueError, match=f"`{name}` must have shape {rule}.*Received: {name} of"):
        layer(x, x, **{name: mask})


def test_a_mask_of_unknown_rows_is_refused():
    x = keras.KerasTensor((None, None, DIM))
    layer = layer_of()
    layer(x, x, attention_mask=keras.KerasTensor((None, None), dtype="bool"))
    layer(x, x, attention_mask=keras.KerasTensor((None, 1, None), dtype="bool"))
    with pytest.raises(ValueError, match="`attention_mask` must have shape"):
        layer(x, x, attention_mask=keras.KerasTensor((None, None, None), dtype="bool"))


def test_wide_blocks_are_refused_in_causal_calls_only():
    layer = layer_of(window=2, topk=8, neighbor_block=4)
    symbolic = keras.KerasTensor(SHAPE)
    layer(symbolic, symbolic)
    for x in (symbolic, make_inputs()):
        with pytest.raises(ValueError, match=r"`neighbor_block` must be at most `window \+ 1`"):
            layer(x, x, use_causal_mask=True)


# --- saving --------------------------------------------------------------------------------------

OPTION_SETS = [
    {},
    {**EXTRAS, "concentration": [2.0, 3.0, 4.0], "lens_strength": [0.1, 0.2, 0.3]},
    {
        "alpha": 0.35,
        "steps": 2,
        "threshold": -0.1,
        "reversible": True,
        "reciprocal_beta": 0.7,
        "fusion": "softmax",
        "block_size": 8,
        "head_dim_pad": 16,
        "implementation": "reference",
        "dropout": 0.1,
        "seed": 5,
        "value_dim": 4,
        "use_gate": True,
        "kernel_regularizer": "l2",
    },
]


@pytest.mark.parametrize("options", OPTION_SETS, ids=["default", "extras", "many"])
def test_config_round_trip(options):
    layer = layer_of(**options)
    config = layer.get_config()
    for name, value in {**SMALL, **options}.items():
        if name != "kernel_regularizer":
            assert config[name] == value
    layer.build(SHAPE, SHAPE)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is RWRAttention
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("options", OPTION_SETS, ids=["default", "extras", "many"])
def test_keras_file_round_trip(tmp_path, options):
    layer = layer_of(**options)
    model = model_of(layer, use_causal_mask=True)
    built(layer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is RWRAttention
    assert_same(loaded(make_inputs()), model(make_inputs()), atol=0)


def test_clip_to_range():
    clip = ClipToRange(1.0, 40.0)
    np.testing.assert_array_equal(numpy(clip(np.float32([0.5, 7.0, 41.0]))), [1.0, 7.0, 40.0])
    again = keras.constraints.deserialize(keras.constraints.serialize(clip))
    assert (again.minimum, again.maximum) == (1.0, 40.0)


# --- precision, LoRA, quantisation ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "step"),
    [
        ("mixed_bfloat16", "R3"),
        ("mixed_bfloat16", "R4"),
        ("mixed_float16", "R4"),
        ("bfloat16", "R1"),
    ],
)
def test_reduced_precision(policy, step):
    # Without neighbours, whose choice could turn on a rounding.
    options = {**ABLATION[step], "topk": 0, "dropout": 0.1}
    exact, layer = built(layer_of(**options)), built(layer_of(**options, dtype=policy))
    x = make_inputs()
    output = layer(x, x, attention_mask=HOLES.astype("float32"), use_causal_mask=True)
    compute_dtype = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(output.dtype) == compute_dtype
    variable_dtype = "float32" if policy.startswith("mixed") else policy
    assert {weight.dtype for weight in layer.trainable_weights} == {variable_dtype}
    expected = numpy(exact(x, x, attention_mask=HOLES, use_causal_mask=True))
    # Inputs, weights and projections rounded to the compute dtype, 2^-9 or 2^-11 each.
    atol = (0.05 if compute_dtype == "bfloat16" else 0.01) * np.abs(expected).max()
    assert_same(ops.cast(output, "float32"), expected, atol=atol)
    symbolic, scores = layer(
        keras.KerasTensor(SHAPE), keras.KerasTensor(SHAPE), return_attention_scores=True
    )
    assert symbolic.dtype == scores.dtype == compute_dtype
    _, scores = layer(x, x, return_attention_scores=True)
    assert keras.backend.standardize_dtype(scores.dtype) == compute_dtype


def test_lora_on_the_projections():
    layer = built(layer_of(**EXTRAS))
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    for attention in (layer, stock):
        for dense in (attention.query_dense, attention.value_dense):
            dense.enable_lora(2)
    assert len(layer.weights) - len(stock.weights) == len(EXTRA_NAMES)
    x = make_inputs()
    before = numpy(layer(x, x))
    layer.query_dense.lora_kernel_b.assign(np.ones((2, KEY_DIM)))
    assert np.abs(numpy(layer(x, x)) - before).max() > 1e-4


def test_int8_quantisation():
    layer = layer_of(topk=0)
    model = model_of(layer, use_causal_mask=True)
    built(layer)
    x = make_inputs()
    expected = numpy(model(x))
    model.quantize("int8", filters=lambda layer: isinstance(layer, keras.layers.EinsumDense))
    assert layer.query_dense.kernel.dtype == "int8"
    output = numpy(model(x))
    # Inputs and weights of each projection rounded to 1/127 of their largest value.
    assert_same(output, expected, atol=0.05 * np.abs(expected).max())
    assert np.abs(output - expected).max() > 0


# --- scores and graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
@pytest.mark.parametrize("step", ABLATION)
def test_scores_are_the_matrix_of_the_output(step, fusion):
    layer = built(layer_of(**ABLATION[step], fusion=fusion, value_dim=4, use_gate=True))
    x = make_inputs()
    output, scores = layer(
        x, x, attention_mask=HOLES, use_causal_mask=True, return_attention_scores=True
    )
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)
    heads = ops.einsum("bnij,bjnh->binh", scores, layer.value_dense(x))
    gate = layer._gate_dense(x)
    assert_same(layer.output_dense(heads * gate), output, atol=1e-5)
    assert_same(output, layer(x, x, attention_mask=HOLES, use_causal_mask=True), atol=1e-5)


def test_symbolic_outputs_have_the_shapes_of_real_ones():
    layer = layer_of(output_shape=(4, 3))
    x = keras.KerasTensor((None, None, DIM))
    output, scores = layer(x, x, return_attention_scores=True)
    assert output.shape == (None, None, 4, 3)
    assert scores.shape == (None, HEADS, None, None)
    assert layer.compute_output_shape(SHAPE, SHAPE) == (BATCH, LENGTH, 4, 3)
    output, scores = layer(make_inputs(), make_inputs(), return_attention_scores=True)
    assert output.shape == (BATCH, LENGTH, 4, 3)
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_graph_made_before_the_call(is_causal):
    layer = built(layer_of(edge_weight="exponential"))
    x = make_inputs()
    graph = keras_rwr.graph.normalize_to_p(
        keras_rwr.graph.build_sparse_w(
            layer.query_dense(x),
            layer.key_dense(x),
            edge_weight="exponential",
            concentration=layer.concentration,
            is_causal=is_causal,
            padding_mask=HOLES,
            **SMALL,
        )
    )
    masks = {"attention_mask": HOLES, "use_causal_mask": is_causal}
    assert_same(layer(x, x, **masks, graph=graph), layer(x, x, **masks), atol=1e-5)
    # Another layer walks on the same graph.
    other = built(layer_of(edge_weight="exponential"), seed=4)
    shared, own = numpy(other(x, x, **masks, graph=graph)), numpy(other(x, x, **masks))
    assert np.abs(shared - own).max() > 1e-3
    with pytest.raises(ValueError, match="`graph` must be built with the call's options"):
        layer(x, x, use_causal_mask=not is_causal, graph=graph)


# --- training ------------------------------------------------------------------------------------


def test_dropout_in_training_only():
    layer = built(layer_of(dropout=0.5, seed=3))
    x = make_inputs()
    expected = built(layer_of())(x, x)
    assert_same(layer(x, x), expected, atol=0)
    assert_same(layer(x, x, training=False), expected, atol=0)
    first, second = numpy(layer(x, x, training=True)), numpy(layer(x, x, training=True))
    assert np.abs(first - numpy(expected)).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2
    again = built(layer_of(dropout=0.5, seed=3))
    np.testing.assert_array_equal(numpy(again(x, x, training=True)), first)


@pytest.mark.parametrize("step", ["R1", "R3", "R4"])
def test_fit(step):
    x = keras.Input((None, DIM))
    layer = layer_of(**ABLATION[step], trainable_lens=True, dropout=0.1, concentration=39.5)
    model = keras.Model(x, keras.layers.Dense(1)(layer(x, x, use_causal_mask=True)))
    model.compile(keras.optimizers.Adam(0.03), "mse")
    inputs = make_inputs(0, (4, LENGTH, DIM))
    targets = np.cumsum(inputs[..., :1], axis=1) / 5.0
    history = model.fit(inputs, targets, batch_size=2, epochs=6, verbose=0)
    assert history.history["loss"][-1] < 0.8 * history.history["loss"][0]
    assert np.isfinite(history.history["loss"]).all()
    assert np.abs(numpy(layer.lens_strength) - 0.3).min() > 1e-4
    if layer.discoverability is not None:
        assert np.abs(numpy(layer.discoverability)).max() > 1e-4
    if layer.concentration is not None:
        assert (numpy(layer.concentration) <= 40.0).all()
        assert np.abs(numpy(layer.concentration) - 39.5).max() > 1e-3


def test_training_keeps_the_concentration_in_its_range():
    layer = built(layer_of(edge_weight="exponential"))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([layer.concentration])
    for step, bound in ((1000.0, 1.0), (-1000.0, 40.0)):
        optimizer.apply([ops.full((HEADS,), step)])
        np.testing.assert_array_equal(numpy(layer.concentration), [bound] * HEADS)


def test_one_functional_model_takes_every_length():
    model = model_of(built(layer_of(reversible=True)), use_causal_mask=True)
    layer = model.layers[-1]
    for length in (1, LENGTH):
        x = make_inputs(length, (BATCH, length, DIM))
        expected = layer(x, x, use_causal_mask=True)
        assert_same(model(x), expected, atol=1e-5)
    assert_same(model.predict(x, verbose=0), expected, atol=1e-5)


class KerasLayerTest(TestCase):
    def test_basics(self):
        self.run_layer_test(
            RWRAttention,
            init_kwargs={"num_heads": HEADS, "key_dim": KEY_DIM, **SMALL, **EXTRAS, "dropout": 0.1},
            input_shape={"query_shape": SHAPE, "value_shape": SHAPE},
            expected_output_shape=SHAPE,
            expected_num_trainable_weights=8 + len(EXTRAS),
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
            run_training_check=False,
        )
