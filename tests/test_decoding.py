"""Cached decoding: stepwise against the full forward pass, its work, its errors."""

import contextlib
import functools
import itertools

import keras
import numpy as np
import pytest
from helpers import assert_close, compiled
from keras import ops
from test_layer import float64_allowed

from keras_rwr import _decoding
from keras_rwr._cache import WalkCache
from keras_rwr.layers import RWRAttention

BATCH, LENGTH, DIM, HEADS, KEY, VALUE = 3, 23, 12, 4, 8, 5
PROMPT = 7
R5 = {
    "graph_heads": 1,
    "graph_dim": 6,
    "neighbor_block": 1,
    "edge_weight": "exponential",
    "self_edges": False,
    "stopping": "gated",
    "use_discoverability": True,
}
R3 = {"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True}
OPTIONS = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {**R3, "neighbor_block": 1},
    "R3 of blocks": R3,
    "R4": {"edge_weight": "exponential", "concentration": [5.0, 30.0, 2.0, 64.0]},
    "R2+R4": {"edge_weight": "exponential", "reversible": True, "threshold": -0.2},
    "forward": {"reversible": True, "reciprocal_beta": 1.0, "threshold": -0.3},
    "cut": {"threshold": 0.3, "lens_strength": [0.2, 2.0, 0.0, -0.5]},
    "no step": {"steps": 0},
    "one step": {"steps": 1, "use_bias": False},
    "no neighbours": {"topk": 0},
    "all local": {"window": LENGTH},
    "no window": {"window": 0, "neighbor_block": 1, "topk": 3},
    "six slots": {"neighbor_block": 1, "topk": 6},
    "gate": {"use_gate": True},
    "softmax": {"fusion": "softmax", "reversible": True, "use_discoverability": True},
    "R5": R5,
    "R5 of blocks": {**R5, "neighbor_block": 2, "graph_convolution": 2},
    "R5 without a window": {**R5, "window": 0, "graph_convolution": 7},
    "two graphs": {**R5, "graph_heads": 2, "stopping": "learned", "reversible": True},
    "graphs of heads": {**R5, "graph_heads": HEADS, "stopping": "restart"},
    "own value": {**R5, "steps": 0},
    "no self edges": {"self_edges": False, "threshold": 0.4, "reversible": True},
    "learned": {"stopping": "learned", "steps": 1, "use_discoverability": True},
    "sharp": {"edge_weight": "exponential", "concentration": 64.0, "reversible": True},
}


def make_layer(**options):
    options = {"window": 3, "topk": 4, "neighbor_block": 2, **options}
    layer = RWRAttention(HEADS, KEY, value_dim=VALUE, **options)
    layer.build((None, None, DIM), (None, None, DIM))
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        if weight.name not in ("log_concentration", "lens_strength", "hop_weights"):
            weight.assign(rng.normal(size=weight.shape) * (1.0 if "disc" in weight.name else 0.4))
    return layer


def make_inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, DIM)).astype("float32")


def no_gradient():
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def full(layer, x):
    output = compiled(lambda x: layer(x, x, use_causal_mask=True))(x)
    return ops.convert_to_numpy(ops.cast(output, layer.variable_dtype))


@functools.lru_cache(maxsize=1)
def programs(layer):
    """The pass that begins a sequence, and a later one."""

    def call(x, tensors, index):
        cache = WalkCache(**tensors)
        output, cache = layer(x, x, use_causal_mask=True, cache=cache, cache_update_index=index)
        return output, cache.tensors()

    return compiled(lambda x, tensors: call(x, tensors, 0)), compiled(call)


def advance(layer, x, cache, start, stop):
    """The outputs of the tokens from `start` to `stop` and the cache behind them."""
    x, (first, later) = ops.convert_to_tensor(x[:, start:stop]), programs(layer)
    if start == 0:
        output, tensors = first(x, cache.tensors())
    else:
        output, tensors = later(x, cache.tensors(), np.int32(start))
    output = ops.convert_to_numpy(ops.cast(output, layer.variable_dtype))
    return output, WalkCache(**tensors)


def stepwise(layer, x, behind):
    """A prompt, then token by token.

    The first pass covers all positions, with other tokens behind the prompt, as KerasHub's
    generation has padding there: it must not matter.
    """
    padded = np.concatenate([x[:, :PROMPT], behind[:, PROMPT:]], axis=1)
    with no_gradient():
        output, cache = advance(layer, padded, layer.empty_cache(BATCH, LENGTH), 0, LENGTH)
        outputs = [output[:, :PROMPT]]
        for position in range(PROMPT, LENGTH):
            output, cache = advance(layer, x, cache, position, position + 1)
            outputs.append(output)
    return np.concatenate(outputs, axis=1)


@pytest.mark.costly
@pytest.mark.parametrize("name", OPTIONS)
def test_stepwise_decoding_equals_the_full_forward_pass(name):
    layer, x = make_layer(**OPTIONS[name]), make_inputs()
    assert_close(stepwise(layer, x, behind=make_inputs(5)), full(layer, x), 1e-5)


@pytest.mark.costly
@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "stops", "more"),
    [
        ("R5", (1, 2, 3), 0),
        ("R5", (5, 14, 15, 16), 9),
        ("R3 of blocks", (6, 9, 13), 1),
        ("softmax", (4, 6, 7), 2),
        ("R5", (23,), 40),
    ],
    ids=["from one token", "chunks in a longer cache", "blocks", "softmax", "all at once"],
)
def test_prompts_chunks_and_caches_of_any_length(name, stops, more):
    layer, x = make_layer(**OPTIONS[name]), make_inputs()[:, : stops[-1]]
    cache = layer.empty_cache(BATCH, stops[-1] + more)
    outputs = []
    with no_gradient():
        for start, stop in itertools.pairwise((0, *stops)):
            output, cache = advance(layer, x, cache, start, stop)
            outputs.append(output)
    assert_close(np.concatenate(outputs, axis=1), full(layer, x), 1e-5)


@pytest.mark.parametrize("name", ["R3", "R5 of blocks", "two graphs"])
def test_what_stood_behind_the_prompt_is_forgotten(name):
    """Not even a NaN there comes back, when other tokens take its place."""
    layer, x = make_layer(**{**OPTIONS[name], "window": 11}), make_inputs()
    behind = np.full_like(x, np.nan)
    behind[1] = np.inf
    assert_close(stepwise(layer, x, behind), full(layer, x), 1e-5)


def test_a_broken_token_breaks_no_earlier_one():
    layer, x = make_layer(**R5), make_inputs()
    broken = x.copy()
    broken[:, PROMPT + 4] = np.nan
    expected = full(layer, x)
    for run in (full(layer, broken), stepwise(layer, broken, behind=broken)):
        assert_close(run[:, : PROMPT + 4], expected[:, : PROMPT + 4], 1e-5)
        assert np.isnan(run[:, PROMPT + 4]).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("exponential", "mixed_bfloat16"), ("R5", "mixed_bfloat16"), ("R5", "mixed_float16")],
)
def test_reduced_precision(name, dtype):
    # Exponential weights and 1 / pi span many orders of magnitude.
    options = {"edge_weight": "exponential", "concentration": 30.0, "reversible": True}
    # Without neighbours, whose choice could turn on a rounding.
    options = options if name == "exponential" else {**R5, "topk": 0}
    layer = make_layer(**options, dtype=dtype)
    cache = layer.empty_cache(BATCH, LENGTH)
    half = dtype.removeprefix("mixed_")
    for part, tensor in cache.tensors().items():
        exact = part in ("log_sums", "back_walks", "means")
        assert keras.backend.standardize_dtype(tensor.dtype) == ("float32" if exact else half)
    x = make_inputs()
    # The projections round alike in both; what is cached rounds once more.
    unit = 2.0**-8 if half == "bfloat16" else 2.0**-11
    assert_close(stepwise(layer, x, behind=x), full(layer, x), 2 * unit)


def test_float64():
    with float64_allowed():
        layer = make_layer(**R5, dtype="float64")
        x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, DIM))
        output, expected = stepwise(layer, x, behind=x), full(layer, x)
    assert output.dtype == expected.dtype == "float64"
    assert_close(output, expected, 1e-13)


def test_compiled_steps():
    layer, x = make_layer(**R5), make_inputs()
    step = programs(layer)[1]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(step, jit_compile=True)
    with no_gradient():
        _, cache = advance(layer, x, layer.empty_cache(BATCH, LENGTH), 0, PROMPT)
        tensors, outputs = cache.tensors(), []
        for position in range(PROMPT, LENGTH):
            index = ops.convert_to_tensor(position, dtype="int32")
            token = ops.convert_to_tensor(x[:, position : position + 1])
            output, tensors = step(token, tensors, index)
            outputs.append(ops.convert_to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), full(layer, x)[:, PROMPT:], 1e-5)


def test_a_recorded_call_leaves_the_cache_as_it_was():
    layer = make_layer()
    x = make_inputs()
    _, cache = advance(layer, x, layer.empty_cache(BATCH, LENGTH), 0, PROMPT)
    before = ops.convert_to_numpy(cache.walks).copy()
    first, _ = advance(layer, x, cache, PROMPT, PROMPT + 1)
    np.testing.assert_array_equal(ops.convert_to_numpy(cache.walks), before)
    second, _ = advance(layer, x, cache, PROMPT, PROMPT + 1)
    np.testing.assert_array_equal(first, second)


def test_the_cache_of_one_prompt_serves_several_beams():
    layer = make_layer()
    x = np.repeat(make_inputs()[:1], BATCH, axis=0)
    with no_gradient():
        _, cache = advance(layer, x[:1], layer.empty_cache(1, LENGTH), 0, PROMPT)
        cache = WalkCache(
            **{name: ops.repeat(x, BATCH, axis=0) for name, x in cache.tensors().items()}
        )
        x[1:, PROMPT:] += 1.0
        outputs = []
        for position in range(PROMPT, LENGTH):
            output, cache = advance(layer, x, cache, position, position + 1)
            outputs.append(output)
    output = np.concatenate(outputs, axis=1)
    assert_close(output, full(layer, x)[:, PROMPT:], 1e-5)


@pytest.mark.costly
def test_the_work_of_a_token_grows_by_block_scores_alone(monkeypatch):
    """Multiplications for scores, and numbers gathered, at two contexts."""
    layer = make_layer(**OPTIONS["R2"])
    counts = []

    def count(module, name, size):
        inner = getattr(module, name)

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            result = inner(*args, **kwargs)
            counts[-1] += size(args, result)
            return result

        monkeypatch.setattr(module, name, counted)

    count(_decoding, "_dots", lambda args, result: int(np.prod(result.shape)) * args[0].shape[-1])
    count(_decoding, "block_rows", lambda args, result: int(np.prod(result.shape)))
    lengths = (64, 640)
    x = make_inputs()[:, :1]
    for length in lengths:
        cache = layer.empty_cache(BATCH, length)
        counts.append(0)
        layer(x, x, use_causal_mask=True, cache=cache, cache_update_index=length - 1)
    more_blocks = (lengths[1] - lengths[0]) // 2
    assert counts[0] > 0
    assert counts[1] - counts[0] == BATCH * HEADS * more_blocks * KEY


def cached(layer, **arguments):
    x = make_inputs()[:, :1]
    cache = layer.empty_cache(BATCH, LENGTH)
    arguments = {"use_causal_mask": True, "cache": cache, "cache_update_index": 2, **arguments}
    return layer(x, x, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_causal_mask": False}, "`use_causal_mask` must be true in cached"),
        ({"cache_update_index": None}, "`cache_update_index` must be the position"),
        ({"cache_update_index": 24}, "`cache_update_index` must leave room for 1 token"),
        ({"cache_update_index": -1}, "Received: cache_update_index=-1"),
        ({"return_attention_scores": True}, "`return_attention_scores` must be false"),
        ({"attention_mask": np.ones((BATCH, 1), bool)}, "`attention_mask` must be `None`: all"),
        ({"training": True}, "`training` must be false in cached"),
    ],
)
def test_bad_cached_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        cached(make_layer(dropout=0.1), **arguments)


NO_INDICES = {
    "bool": True,
    "float": 2.0,
    "string": "2",
    "list": [2],
    "NumPy float": np.float32(2),
    "array of a float": np.array(2.0),
    "array of a bool": np.array(True),
    "array of one": np.array([2]),
    "negative array": np.array(-1),
    "large int64": np.int64(24),
    "none": None,
}


@pytest.mark.parametrize("kind", NO_INDICES)
def test_an_index_is_an_integer_within_the_cache(kind):
    with pytest.raises(
        (TypeError, ValueError), match=r"`cache_update_index` must .*Received: cache_"
    ):
        cached(make_layer(), cache_update_index=NO_INDICES[kind])


@pytest.mark.parametrize("index", [2.0, True, [2], -1, 24])
def test_an_index_tensor_is_an_integer_within_the_cache(index):
    with pytest.raises(
        (TypeError, ValueError), match=r"`cache_update_index` must .*Received: cache_"
    ):
        cached(make_layer(), cache_update_index=ops.convert_to_tensor(index))


INTEGERS = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": lambda index: ops.convert_to_tensor(index, dtype="int32"),
    "tensor of int64": lambda index: ops.convert_to_tensor(np.int64(index)),
}


@pytest.mark.costly
@pytest.mark.parametrize("kind", INTEGERS)
def test_other_integers_are_indices(kind):
    layer, x, kind = make_layer(**R5), make_inputs(), INTEGERS[kind]
    cache, outputs = layer.empty_cache(BATCH, LENGTH), []
    for start, stop in ((0, PROMPT), (PROMPT, PROMPT + 2)):
        new = x[:, start:stop]
        output, cache = layer(
            new, new, use_causal_mask=True, cache=cache, cache_update_index=kind(start)
        )
        outputs.append(ops.convert_to_numpy(output))
    expected = full(layer, x[:, : PROMPT + 2])
    assert_close(np.concatenate(outputs, axis=1), expected, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((BATCH, 0), "length"),
        ((BATCH, 2.0), "length"),
        ((BATCH, True), "length"),
        ((BATCH, None), "length"),
        ((-1, LENGTH), "batch_size"),
        ((2.0, LENGTH), "batch_size"),
        (("2", LENGTH), "batch_size"),
        (([2], LENGTH), "batch_size"),
        ((None, LENGTH), "batch_size"),
        ((np.array([1, 2]), LENGTH), "batch_size"),
    ],
)
def test_bad_caches(arguments, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be .*Received: {name}"):
        make_layer().empty_cache(*arguments)


def test_sizes_of_a_cache_may_be_tensors_and_integers_of_numpy():
    layer = make_layer()
    expected = {name: x.shape for name, x in layer.empty_cache(BATCH, LENGTH).tensors().items()}
    for batch in (np.int64(BATCH), ops.convert_to_tensor(BATCH)):
        cache = layer.empty_cache(batch, np.int32(LENGTH))
        assert {name: x.shape for name, x in cache.tensors().items()} == expected


def test_an_index_needs_a_cache():
    layer, x = make_layer(), make_inputs()
    for y in (x, keras.KerasTensor(x.shape)):
        with pytest.raises(ValueError, match="`cache_update_index` must be `None` without `cache`"):
            layer(y, y, use_causal_mask=True, cache_update_index=0)


@pytest.mark.parametrize("index", [0, 2])
def test_no_tokens_are_refused(index):
    layer, x = make_layer(), make_inputs()[:, :0]
    cache = layer.empty_cache(BATCH, LENGTH)
    with pytest.raises(ValueError, match=r"`query` must have a known length.*of shape \(3, 0"):
        layer(x, x, use_causal_mask=True, cache=cache, cache_update_index=index)


def test_caches_of_other_layers_are_refused():
    layer = make_layer()
    for other in (make_layer(steps=3), make_layer(reversible=True)):
        with pytest.raises(ValueError, match="Received: the cache of another layer"):
            cached(layer, cache=other.empty_cache(BATCH, LENGTH))
    # Loops pass the tensors alone: their names and shapes tell most layers apart.
    for other in (make_layer(steps=3), make_layer(reversible=True), make_layer(**R5)):
        cache = WalkCache(**other.empty_cache(BATCH, LENGTH).tensors())
        with pytest.raises(ValueError, match="of this layer, with tensors of the shapes"):
            cached(layer, cache=cache)
    with pytest.raises(ValueError, match="of this layer, with tensors of the shapes"):
        cached(layer, cache=layer.empty_cache(BATCH + 1, LENGTH))
    with pytest.raises(TypeError, match="`cache` must be a WalkCache"):
        cached(layer, cache=np.zeros((BATCH, 2, LENGTH, HEADS, KEY), "float32"))
    x = keras.KerasTensor((BATCH, 1, DIM))
    with pytest.raises(ValueError, match="`cache` must be `None` in a symbolic call"):
        layer(x, x, cache=layer.empty_cache(BATCH, LENGTH), use_causal_mask=True)
