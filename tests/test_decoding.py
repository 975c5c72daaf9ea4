"""Cached decoding: stepwise against the full forward pass, its work, its errors."""

import contextlib
import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_rwr import decoding
from keras_rwr.layer import RWRAttention

BATCH, LENGTH, DIM, HEADS, KEY, VALUE = 3, 23, 12, 2, 8, 5
PROMPT = 7
OPTIONS = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True},
    "R4": {"edge_weight": "exponential", "concentration": [5.0, 30.0]},
    "R2+R4": {"edge_weight": "exponential", "reversible": True, "threshold": -0.2},
    "forward": {"reversible": True, "reciprocal_beta": 1.0, "threshold": -0.3},
    "cut": {"threshold": 0.3, "lens_strength": [0.2, 2.0]},
    "no step": {"steps": 0},
    "one step": {"steps": 1, "use_bias": False},
    "no neighbours": {"topk": 0},
    "all local": {"window": LENGTH},
    "no window": {"window": 0, "neighbor_block": 1, "topk": 3},
    "six slots": {"neighbor_block": 1, "topk": 6},
    "gate": {"use_gate": True},
    "softmax": {"fusion": "softmax", "reversible": True},
}
CASES = [(name, 2) for name in OPTIONS] + [(name, 1) for name in ("R1", "R2", "R3", "R4")]


def make_layer(**options):
    options = {"window": 3, "topk": 4, "neighbor_block": 2, **options}
    layer = RWRAttention(HEADS, KEY, value_dim=VALUE, **options)
    layer.build((None, None, DIM), (None, None, DIM))
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        if weight.name not in ("concentration", "lens_strength"):
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
    return ops.convert_to_numpy(ops.cast(layer(x, x, use_causal_mask=True), "float32"))


def advance(layer, x, cache, start, stop):
    """The outputs of the tokens from `start` to `stop` and the cache behind them."""
    x = x[:, start:stop]
    output, cache = layer(x, x, use_causal_mask=True, cache=cache, cache_update_index=start)
    return ops.convert_to_numpy(ops.cast(output, "float32")), cache


def stepwise(layer, x, behind):
    """A prompt, two tokens at once, then one by one.

    The first pass covers all positions, with other tokens behind the prompt, as KerasHub's
    generation has padding there: it must not matter.
    """
    padded = np.concatenate([x[:, :PROMPT], behind[:, PROMPT:]], axis=1)
    with no_gradient():
        output, cache = advance(layer, padded, layer.empty_cache(BATCH, LENGTH), 0, LENGTH)
        outputs = [output[:, :PROMPT]]
        stops = [PROMPT, PROMPT + 2, *range(PROMPT + 3, LENGTH + 1)]
        for start, stop in itertools.pairwise(stops):
            output, cache = advance(layer, x, cache, start, stop)
            outputs.append(output)
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(("name", "block"), CASES)
def test_stepwise_decoding_equals_the_full_forward_pass(name, block):
    layer = make_layer(**{"neighbor_block": block, **OPTIONS[name]})
    x = make_inputs()
    output = stepwise(layer, x, behind=make_inputs(5))
    np.testing.assert_allclose(output, full(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_reduced_precision(dtype):
    # Exponential weights and 1 / pi span many orders of magnitude.
    options = {"edge_weight": "exponential", "concentration": 30.0, "reversible": True}
    layer = make_layer(**options, dtype=dtype)
    cache = layer.empty_cache(BATCH, LENGTH)
    assert keras.backend.standardize_dtype(cache.rows.dtype) == "float32"
    plain = make_layer(dtype=dtype).empty_cache(BATCH, LENGTH)
    assert keras.backend.standardize_dtype(plain.rows.dtype) == dtype.removeprefix("mixed_")
    x = make_inputs()
    # The projections round alike in both; the walks agree to float32.
    unit = 2.0**-8 if dtype == "mixed_bfloat16" else 2.0**-11
    expected = full(layer, x)
    atol = 2 * unit * np.abs(expected).max()
    np.testing.assert_allclose(stepwise(layer, x, behind=x), expected, rtol=0, atol=atol)


def test_a_recorded_call_leaves_the_cache_as_it_was():
    layer = make_layer()
    x = make_inputs()
    _, cache = advance(layer, x, layer.empty_cache(BATCH, LENGTH), 0, PROMPT)
    before = ops.convert_to_numpy(cache.rows).copy()
    first, _ = advance(layer, x, cache, PROMPT, PROMPT + 1)
    np.testing.assert_array_equal(ops.convert_to_numpy(cache.rows), before)
    second, _ = advance(layer, x, cache, PROMPT, PROMPT + 1)
    np.testing.assert_array_equal(first, second)


def test_the_cache_of_one_prompt_serves_several_beams():
    layer = make_layer()
    x = np.repeat(make_inputs()[:1], BATCH, axis=0)
    with no_gradient():
        _, cache = advance(layer, x[:1], layer.empty_cache(1, LENGTH), 0, PROMPT)
        cache = decoding.WalkCache(
            *(ops.repeat(t, BATCH, axis=0) for t in cache.tensors().values())
        )
        x[1:, PROMPT:] += 1.0
        outputs = []
        for position in range(PROMPT, LENGTH):
            output, cache = advance(layer, x, cache, position, position + 1)
            outputs.append(output)
    output = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(output, full(layer, x)[:, PROMPT:], rtol=0, atol=1e-5)


def test_the_work_of_a_token_grows_by_block_scores_alone(monkeypatch):
    """Multiplications of all products, and numbers gathered, at two contexts."""
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

    count(ops, "matmul", lambda args, result: int(np.prod(result.shape)) * args[0].shape[-1])
    count(decoding, "block_rows", lambda args, result: int(np.prod(result.shape)))
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
        ({"attention_mask": np.ones((BATCH, 1), bool)}, "`attention_mask` must be `None` in"),
        ({"training": True}, "`training` must be false in cached"),
    ],
)
def test_bad_cached_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        cached(make_layer(dropout=0.1), **arguments)


def test_caches_of_other_layers_are_refused():
    layer = make_layer()
    for other in (make_layer(steps=3), make_layer(reversible=True)):
        with pytest.raises(ValueError, match=r"`cache` must be made by .* with the same options"):
            cached(layer, cache=other.empty_cache(BATCH, LENGTH))
    with pytest.raises(ValueError, match="Received: rows of shape"):
        cached(layer, cache=layer.empty_cache(BATCH + 1, LENGTH))
    with pytest.raises(TypeError, match="`cache` must be a WalkCache"):
        cached(layer, cache=np.zeros((BATCH, 2, LENGTH, HEADS, KEY), "float32"))
    x = keras.KerasTensor((BATCH, 1, DIM))
    with pytest.raises(ValueError, match="`cache` must be `None` in a symbolic call"):
        layer(x, x, cache=layer.empty_cache(BATCH, LENGTH), use_causal_mask=True)
