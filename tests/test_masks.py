"""What `RWRAttention` takes as masks: padding, causality and packed documents, in every form."""

import itertools

import keras
import numpy as np
import pytest
from helpers import BACKEND, assert_close, compiled
from keras import ops
from test_layer import (
    ABLATION,
    BATCH,
    DIM,
    EXTRAS,
    HOLES,
    LENGTH,
    R5,
    SEGMENTS,
    SHAPE,
    assert_same,
    built,
    layer_of,
    make_inputs,
    numpy,
    run,
)

from keras_rwr._tokens import Tokens, read_masks

RIGHT_PADDING = np.arange(LENGTH)[None] < np.array([[LENGTH], [15]])
CAUSAL = np.tri(LENGTH, dtype=bool)[None]
SINGLE = {**EXTRAS, "topk": 3}


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_form_of_padding_mask_is_the_same(is_causal):
    layer = built(layer_of(topk=0, steps=1))
    x = make_inputs()

    def call(**masks):
        return numpy(run(layer, x, x, use_causal_mask=is_causal, **masks))

    expected = call(attention_mask=HOLES)
    assert np.abs(expected - call()).max() > 1e-3
    for mask in (
        HOLES[:, None, :],
        HOLES[:, None, None, :],
        HOLES.astype("int32"),
        HOLES.astype("float32"),
        ops.convert_to_tensor(HOLES),
        HOLES.tolist(),
    ):
        np.testing.assert_array_equal(call(attention_mask=mask), expected)
    for name in ("query_mask", "value_mask", "key_mask"):
        np.testing.assert_array_equal(call(**{name: HOLES}), expected)
    # Masks of the same sequence add up.
    first, second = HOLES | (np.arange(LENGTH) < 9), HOLES | (np.arange(LENGTH) >= 9)
    np.testing.assert_array_equal(call(query_mask=first, attention_mask=second), expected)
    np.testing.assert_array_equal(call(value_mask=first, key_mask=second), expected)
    # One row serves the whole batch.
    row = np.broadcast_to(HOLES[:1], HOLES.shape)
    np.testing.assert_array_equal(call(attention_mask=HOLES[:1]), call(attention_mask=row))


def test_keras_masks_are_taken_and_passed_on():
    ids = np.where(RIGHT_PADDING, np.random.default_rng(1).integers(1, 11, (BATCH, LENGTH)), 0)
    layer = built(layer_of(**R5))
    embedding = keras.layers.Embedding(11, DIM, mask_zero=True)
    pooling = keras.layers.GlobalAveragePooling1D()
    inputs = keras.Input((None,), dtype="int32")
    embedded = embedding(inputs)
    output = layer(embedded, embedded, use_causal_mask=True)
    model = keras.Model(inputs, [output, pooling(output), pooling(embedded)])

    def without_model(ids):
        embedded = embedding(ids)
        return pooling(layer(embedded, embedded, use_causal_mask=True)), pooling(embedded)

    vectors = ops.take(embedding.embeddings, ids, axis=0)
    expected = run(layer, vectors, vectors, attention_mask=RIGHT_PADDING, use_causal_mask=True)
    expected = numpy(expected)
    outputs, pooled = run(model, ids), compiled(without_model)(ids)
    assert_same(outputs[0], expected)
    mean = [expected[b, RIGHT_PADDING[b]].mean(0) for b in range(BATCH)]
    assert_same(outputs[1], mean)
    assert_same(pooled[0], mean)
    # The input keeps its mask: layers beside this one need it too.
    mean = [numpy(vectors)[b, RIGHT_PADDING[b]].mean(0) for b in range(BATCH)]
    assert_same(outputs[2], mean)
    assert_same(pooled[1], mean)


@pytest.mark.parametrize("step", ABLATION)
def test_padding_content_never_reaches_real_tokens(step):
    layer = built(layer_of(**ABLATION[step]))
    x = make_inputs()
    other = np.where(HOLES[..., None], x, 100.0 * make_inputs(9))
    other[~HOLES] *= np.where(np.arange((~HOLES).sum()) % 2, 1.0, np.nan)[:, None]
    call = compiled(lambda x: layer(x, x, attention_mask=HOLES))
    a, b = numpy(call(x)), numpy(call(other))
    np.testing.assert_array_equal(a[HOLES], b[HOLES])
    # Padding's own output is that of the output projection at 0.
    np.testing.assert_array_equal(b[~HOLES], [numpy(layer.output_dense.bias)] * (~HOLES).sum())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [SINGLE, {"neighbor_block": 1, **ABLATION["R3"]}])
def test_left_padding_changes_no_real_output(options, is_causal):
    layer = built(layer_of(**options))
    x, padding = make_inputs(), 5
    expected = numpy(run(layer, x, x, use_causal_mask=is_causal))
    padded = np.concatenate([make_inputs(8)[:, :padding], x], axis=1)
    mask = np.ones((BATCH, 1), bool) & (np.arange(LENGTH + padding) >= padding)
    output = numpy(run(layer, padded, padded, attention_mask=mask, use_causal_mask=is_causal))
    assert_close(output[:, padding:], expected, 1e-5)


# --- causality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ABLATION)
def test_the_future_never_reaches_the_past(step):
    layer, x = built(layer_of(**ABLATION[step])), make_inputs()
    call = compiled(lambda x: layer(x, x, use_causal_mask=True))
    expected = numpy(call(x))
    for seen in (1, 8, 17):
        other = np.concatenate([x[:, :seen], make_inputs(seen)[:, seen:]], axis=1)
        np.testing.assert_array_equal(numpy(call(other))[:, :seen], expected[:, :seen])
    assert np.abs(numpy(run(layer, other, other)) - numpy(run(layer, x, x)))[:, :17].max() > 1e-3
    # Not even where it is no number.
    for broken in (np.nan, np.inf, -np.inf):
        other = x.copy()
        other[:, 17, 3], other[:, 20] = broken, 1e30
        output = numpy(call(other))
        np.testing.assert_array_equal(output[:, :17], expected[:, :17])
        assert np.isnan(output[:, 17:]).all()


# --- packed documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [SINGLE, {**SINGLE, "graph_heads": 2, "stopping": "learned", "reversible": True}, {"topk": 0}],
    ids=["R5", "two reversible graphs", "window"],
)
def test_packed_documents_are_those_run_alone(options, is_causal):
    layer = built(layer_of(**options))
    x = make_inputs()
    output = numpy(run(layer, x, x, segment_ids=SEGMENTS, use_causal_mask=is_causal))
    alone = compiled(lambda x: layer(x, x, use_causal_mask=is_causal))
    bounds = np.flatnonzero(np.diff(SEGMENTS[0], prepend=9, append=9))
    assert len(bounds) == 5
    for start, stop in itertools.pairwise(bounds):
        if SEGMENTS[0, start] != SEGMENTS[0, 0]:
            document = slice(start, stop)
            assert_close(output[:, document], numpy(alone(x[:, document])), 1e-5)
    # The first and the third have the same number: what lies between them is as padding.
    one = np.equal(SEGMENTS, SEGMENTS[0, 0])
    expected = numpy(run(layer, x, x, attention_mask=one, use_causal_mask=is_causal))
    assert_close(output[one], expected[one], 1e-5)


def test_segments_of_one_row_serve_the_batch():
    layer = built(layer_of(**SINGLE))
    x = make_inputs()
    expected = numpy(run(layer, x, x, segment_ids=SEGMENTS))
    for segments in (SEGMENTS[:1], SEGMENTS.tolist(), SEGMENTS.astype("int64") + 7):
        np.testing.assert_array_equal(numpy(run(layer, x, x, segment_ids=segments)), expected)


def test_blocks_with_segments_are_refused():
    layer, x = layer_of(), make_inputs()
    rule = "`neighbor_block` must be 1, or `topk` 0, with `segment_ids`.*neighbor_block=2"
    symbols = keras.KerasTensor(SHAPE), keras.KerasTensor((BATCH, LENGTH), dtype="int32")
    square = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    for call in (
        lambda: layer(x, x, segment_ids=SEGMENTS),
        lambda: layer(x, x, attention_mask=square),
        lambda: layer(symbols[0], symbols[0], segment_ids=symbols[1]),
    ):
        with pytest.raises(ValueError, match=rule):
            call()


# --- square masks --------------------------------------------------------------------------------


def square(padding=None, segments=None, is_causal=False):
    """A mask `(B, S, S)` as Keras would combine it."""
    mask = np.ones((BATCH, LENGTH, LENGTH), bool)
    if padding is not None:
        mask &= padding[:, None, :]
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    return mask & CAUSAL if is_causal else mask


def pairs(**masks):
    """Which token sees which, and what else there is to know of masks."""
    found = read_masks(keras.KerasTensor(SHAPE), **masks)
    tokens = Tokens.create(LENGTH, found.is_causal, found.padding_mask, found.segment_ids)
    seen = np.broadcast_to(numpy(tokens.pairs())[:, 0], (BATCH, LENGTH, LENGTH))
    return seen, found.is_causal, found.segment_ids is not None


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize(
    "padding",
    [None, HOLES, RIGHT_PADDING, RIGHT_PADDING[:, ::-1]],
    ids=["full", "holes", "right", "left"],
)
def test_square_masks_say_padding_causality_and_packing(padding, segments, is_causal):
    mask = square(padding, segments, is_causal)
    # Whether padding sees anything does not matter.
    blind = mask if padding is None else mask & padding[:, :, None]
    forms = [mask, mask[:, None], mask.astype("int32"), blind, blind[:, None].astype("float32")]
    expected = pairs(attention_mask=padding, segment_ids=segments, use_causal_mask=is_causal)
    np.testing.assert_array_equal(expected[0], blind)
    for form in forms:
        found = pairs(attention_mask=form, use_causal_mask=False)
        np.testing.assert_array_equal(found[0], blind)
        assert found[1:] == expected[1:] == (is_causal, segments is not None)
        # What it says may be said twice.
        found = pairs(attention_mask=form, query_mask=padding, use_causal_mask=is_causal)
        np.testing.assert_array_equal(found[0], blind)
    # And part of it may be said elsewhere.
    found = pairs(
        attention_mask=square(None, segments), value_mask=padding, use_causal_mask=is_causal
    )
    np.testing.assert_array_equal(found[0], blind)


def test_outputs_with_square_masks():
    layer, x = built(layer_of(topk=0, steps=1)), make_inputs()
    expected = layer(x, x, attention_mask=HOLES, segment_ids=SEGMENTS, use_causal_mask=True)
    output = layer(x, x, attention_mask=square(HOLES, SEGMENTS, is_causal=True))
    np.testing.assert_array_equal(numpy(output), numpy(expected))


def test_square_masks_of_one_row_serve_the_batch():
    for mask in (CAUSAL, CAUSAL[None]):
        seen, is_causal, _ = pairs(attention_mask=mask, use_causal_mask=False)
        assert is_causal
        np.testing.assert_array_equal(seen, square(is_causal=True))


BAND = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) < 4
SQUARES = {
    "future alone": np.triu(np.ones((LENGTH, LENGTH), bool)),
    "band": BAND,
    "causal band": BAND & CAUSAL[0],
    "prefix": CAUSAL[0] | (np.arange(LENGTH) < 5),
    "not oneself": ~np.eye(LENGTH, dtype=bool),
    "nothing in one row": square()[0] & (np.arange(LENGTH) != 4)[:, None],
    "one pair less": np.where(np.eye(LENGTH, k=-9, dtype=bool), np.arange(LENGTH) != 2, CAUSAL[0]),
}


@pytest.mark.parametrize("name", SQUARES)
def test_other_square_masks_are_refused(name):
    layer, x = layer_of(**SINGLE), make_inputs()
    mask = square()
    mask[1] = SQUARES[name]
    for form in (mask, mask[:, None]):
        with pytest.raises(
            ValueError, match=r"`attention_mask` must have.*that says something else"
        ):
            layer(x, x, attention_mask=form)


def test_square_masks_beside_segments_are_refused():
    layer, x = layer_of(**SINGLE), make_inputs()
    with pytest.raises(ValueError, match="`segment_ids` must be `None` where `attention_mask`"):
        layer(x, x, attention_mask=square(segments=SEGMENTS), segment_ids=SEGMENTS)
    seen, is_causal, has_segments = pairs(
        attention_mask=CAUSAL, segment_ids=SEGMENTS, use_causal_mask=False
    )
    assert is_causal and has_segments
    np.testing.assert_array_equal(seen, square(segments=SEGMENTS, is_causal=True))


def compiled_call(layer, x, mask):
    """A call with a mask whose numbers are not known yet."""
    if BACKEND == "jax":
        import jax

        return jax.jit(lambda x, mask: layer(x, x, attention_mask=mask))(x, mask)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x, mask: layer(x, x, attention_mask=mask))(x, mask)
    # torch compiles what it can and calls Python for the rest, where the numbers are known.
    return layer(*[keras.KerasTensor(x.shape)] * 2, attention_mask=keras.KerasTensor(mask.shape))


def test_square_masks_are_refused_in_compiled_calls():
    layer, x = built(layer_of(**SINGLE)), make_inputs()
    rule = "`attention_mask` of shape .* must have known values.*`segment_ids`.*`use_causal_mask`"
    with pytest.raises(ValueError, match=rule):
        compiled_call(layer, x, square(is_causal=True))
    symbol = keras.Input((LENGTH, DIM))
    with pytest.raises(ValueError, match=rule):
        layer(symbol, symbol, attention_mask=keras.Input((1, LENGTH, LENGTH), dtype="bool"))
    # Padding and documents are taken there.
    masks = keras.Input((LENGTH,), dtype="bool"), keras.Input((LENGTH,), dtype="int32")
    output = layer(symbol, symbol, attention_mask=masks[0], segment_ids=masks[1])
    model = keras.Model([symbol, *masks], output)
    expected = run(layer, x, x, attention_mask=HOLES, segment_ids=SEGMENTS)
    assert_same(model.predict([x, HOLES, SEGMENTS], verbose=0), expected, atol=1e-5)


# --- bad masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (LENGTH, LENGTH)),
        ("attention_mask", (BATCH, LENGTH - 1)),
        ("attention_mask", (BATCH, LENGTH - 1, LENGTH)),
        ("attention_mask", (BATCH, 4, LENGTH, LENGTH)),
        ("attention_mask", (BATCH, LENGTH, 1)),
        ("attention_mask", (LENGTH,)),
        ("query_mask", (BATCH, 1, LENGTH)),
        ("value_mask", (BATCH, LENGTH + 1)),
        ("key_mask", (BATCH + 1, LENGTH)),
        ("segment_ids", (BATCH, 1, LENGTH)),
        ("segment_ids", (BATCH, LENGTH + 1)),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_bad_masks(name, shape, symbolic):
    layer = layer_of(neighbor_block=1)
    if symbolic:
        x, mask = keras.KerasTensor(SHAPE), keras.KerasTensor(shape, dtype="int32")
    else:
        x, mask = make_inputs(), np.ones(shape, "int32")
    rule = (
        r"one of the shapes \(B, S\), \(B, 1, S\)"
        if name == "attention_mask"
        else r"shape \(B, S\)"
    )
    with pytest.raises(ValueError, match=rf"`{name}` must have {rule}.*Received: {name} of"):
        layer(x, x, **{name: mask})


def test_a_mask_of_unknown_rows_is_refused():
    x = keras.KerasTensor((None, None, DIM))
    layer = layer_of()
    layer(x, x, attention_mask=keras.KerasTensor((None, None), dtype="bool"))
    layer(x, x, attention_mask=keras.KerasTensor((None, 1, None), dtype="bool"))
    layer(x, x, attention_mask=keras.KerasTensor((None, 1, 1, None), dtype="bool"))
    with pytest.raises(ValueError, match=r"`attention_mask` of shape .* must have known values"):
        layer(x, x, attention_mask=keras.KerasTensor((None, None, None), dtype="bool"))
