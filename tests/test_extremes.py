"""Calls at the edges of what is allowed: the right values, finite outputs, bounded gradients."""

import dataclasses

import keras
import numpy as np
import oracle
import oracle_gradients
import pytest
from helpers import (
    BACKEND,
    IMPLEMENTATIONS,
    SINGLE,
    TOLERANCES,
    assert_close,
    attention,
    attention_gradients,
    case,
    compiled,
    numpy,
)
from keras import ops

from keras_rwr.ops import attention_scores, rwr_attention, token_importance

pytestmark = pytest.mark.costly
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
ONE_HEAD = {"batch": 1, "heads": 1}
CAUSAL = {"is_causal": True, **SINGLE}


def truth(inputs, options):
    """The oracle's output and the formula's gradients."""
    options = oracle.Options(**options)
    arguments = inputs.graph_arguments()
    walk = inputs.given("lens_strength", "hop_weights")
    graphs = oracle.graphs(inputs.query, inputs.key, options, **arguments)
    neighbors = np.stack([np.stack([graph.neighbors for graph in row]) for row in graphs])
    vectors = (inputs.query, inputs.key, inputs.value)
    output = oracle.rwr_attention(*vectors, options, neighbors=neighbors, **arguments, **walk)
    _, gradients = oracle_gradients.gradients(
        inputs.arrays(),
        inputs.cotangent,
        options=options,
        labels=inputs.labels(),
        neighbors=neighbors,
    )
    return output, gradients


def check(inputs, options, implementation, tolerance=1.0):
    """Right values and gradients, the latter returned."""
    run = attention(inputs, options, implementation)
    output, gradients = attention_gradients(run, inputs)
    expected, expected_gradients = truth(inputs, options)
    assert_close(output, expected, tolerance * TOLERANCES["output"])
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        allowed = tolerance * TOLERANCES["gradient_of_a_sum"]
        assert_close(gradient, expected_gradients[name], allowed, name)
    return gradients


def drawn(name, **arguments):
    """(inputs, options) of a case."""
    made = case(name, **arguments)
    return made.inputs, dict(made.options)


# --- values --------------------------------------------------------------------------------------

EXTREMES = {
    "alpha 1": {"alpha": 1.0},
    "alpha 1e-3": {"alpha": 1e-3, "steps": 8},
    "no step": {"steps": 0},
    "no step reversible": {"steps": 0, "reversible": True},
    "eight steps": {"steps": 8, "reversible": True, "reciprocal_beta": 0.3},
    "one token": {"tokens": 1, "reversible": True, "threshold": -1.0},
    "one token of R5": {"tokens": 1, "graph_heads": 1, "edge_weight": "exponential"},
    "isolated": {
        "edge_weight": "exponential",
        "threshold": 0.6,
        "reversible": True,
        "self_edges": False,
        "discoverability": True,
    },
}


@every_implementation
@pytest.mark.parametrize("name", EXTREMES)
def test_options_at_their_limits(name, implementation):
    check(*drawn(name, **{**CAUSAL, **EXTREMES[name]}), implementation)


@every_implementation
@pytest.mark.parametrize("kappa", [1.0, 40.0, 64.0])
@pytest.mark.parametrize("reversible", [False, True])
def test_sharp_edges(kappa, reversible, implementation):
    inputs, options = drawn(
        "sharp", edge_weight="exponential", reversible=reversible, discoverability=True, **CAUSAL
    )
    inputs = dataclasses.replace(inputs, concentration=np.full(2, kappa, "float32"))
    # Logarithms of up to 64 keep two decimals less.
    check(inputs, options, implementation, tolerance=3.0)


@every_implementation
@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_biases_of_eight_and_beyond(edge_weight, is_causal, implementation):
    inputs, options = drawn(
        "biases",
        edge_weight=edge_weight,
        reversible=True,
        discoverability=True,
        **{**CAUSAL, "is_causal": is_causal},
    )
    direction = inputs.discoverability / np.linalg.norm(inputs.discoverability, axis=-1)[:, None]
    inputs = dataclasses.replace(inputs, discoverability=(20.0 * direction).astype("float32"))
    bias = np.einsum("bjnh,nh->bjn", inputs.key, inputs.discoverability)
    assert (bias > 8).any() and (bias < -8).any()
    check(inputs, options, implementation, tolerance=3.0)


@every_implementation
def test_a_bias_of_twenty_acts_as_eight(implementation):
    inputs, options = drawn("clip", **ONE_HEAD, **CAUSAL)
    query, value = inputs.query, inputs.value
    # The discoverability reads the first feature: that of token 3 is 0, of the others 1.
    key = inputs.key.copy()
    key[..., 0] = 1.0
    key[:, 3, :, 0] = 0.0
    tensors = [ops.convert_to_tensor(x) for x in (query, key, value)]
    results = {}
    for bias in (7.0, 8.0, 20.0):
        u = np.zeros((1, 7), "float32")
        u[0, 0] = bias
        results[bias] = numpy(
            rwr_attention(*tensors, discoverability=u, implementation=implementation, **options)
        )
    np.testing.assert_array_equal(results[20.0], results[8.0])
    assert not np.allclose(results[7.0], results[8.0], rtol=1e-4)


@every_implementation
@pytest.mark.parametrize("is_causal", [True, False])
def test_single_neighbours_among_more_than_256_tokens(is_causal, implementation):
    inputs, options = drawn(
        "long",
        batch=1,
        tokens=300,
        heads=1,
        head_dim=8,
        edge_weight="exponential",
        self_edges=False,
        window=2,
        topk=4,
        neighbor_block=1,
        is_causal=is_causal,
    )
    run = compiled(attention(inputs, options, implementation))
    tensors = {name: ops.convert_to_tensor(x) for name, x in inputs.arrays().items()}
    walk = inputs.given("lens_strength")
    expected = oracle.rwr_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        oracle.Options(**options),
        **inputs.graph_arguments(),
        **walk,
    )
    assert_close(numpy(run(**tensors)), expected, TOLERANCES["output"])


@every_implementation
@pytest.mark.parametrize("reversible", [False, True])
def test_degrees_next_to_nothing(reversible, implementation):
    # Two features: keys to the east; queries a little east of north, the last ones due north or
    # west, so that degrees are about 1e-3, 1e-5, and nothing.
    sizes = {**ONE_HEAD, "tokens": 9, "head_dim": 2}
    inputs, options = drawn("faint", reversible=reversible, **sizes, **CAUSAL)
    east = np.array([1e-4, 3e-5, 1e-5, 1e-6, 1e-3, 2e-5, 0.5, 0.0, -1.0])
    query = np.zeros((1, 9, 1, 2), "float32")
    query[0, :, 0, 0], query[0, :, 0, 1] = east, 1.0
    key = np.zeros_like(query)
    key[..., 0] = np.linspace(0.5, 1.5, 9)[None, :, None]
    inputs = dataclasses.replace(inputs, query=query, key=key)
    graphs = oracle.graphs(query, key, oracle.Options(**options))
    if not reversible:
        faint = graphs[0][0].degree
        assert ((faint > 1e-6) & (faint < 1e-3)).sum() >= 4 and (faint == 1.0).any()
    gradients = check(inputs, options, implementation, tolerance=10.0)
    assert max(np.abs(gradient).max() for gradient in gradients.values()) < 10.0


@every_implementation
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1e4, 1e18])
@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_vectors_of_any_length(scale, edge_weight, implementation):
    inputs, options = drawn(
        "lengths", graph_heads=1, edge_weight=edge_weight, reversible=True, **CAUSAL
    )
    scaled = {
        name: (scale * getattr(inputs, name)).astype("float32")
        for name in ("graph_query", "graph_key")
    }
    check(dataclasses.replace(inputs, **scaled), options, implementation, tolerance=3.0)


@every_implementation
def test_queries_and_keys_of_any_length(implementation):
    # Here the logits of LOCAL are 1e4 and more: only finiteness can be asked for.
    inputs, options = drawn("long vectors", edge_weight="exponential", **CAUSAL)
    for scale in (0.0, 1e-20, 1e4, 1e18):
        scaled = {
            name: (scale * getattr(inputs, name)).astype("float32") for name in ("query", "key")
        }
        run = attention(dataclasses.replace(inputs, **scaled), options, implementation)
        output, gradients = attention_gradients(run, dataclasses.replace(inputs, **scaled))
        assert np.isfinite(output).all(), scale
        for name, gradient in gradients.items():
            assert np.isfinite(gradient).all(), (scale, name)


@every_implementation
@pytest.mark.parametrize("options", [{}, {"graph_heads": 1, "hop_weights": "token"}], ids=str)
def test_nothing_but_padding(options, implementation):
    inputs, options = drawn("padding", edge_weight="exponential", **options, **CAUSAL)
    nothing = np.zeros(inputs.query.shape[:2], bool)
    inputs = dataclasses.replace(inputs, padding_mask=nothing)
    output, gradients = attention_gradients(attention(inputs, options, implementation), inputs)
    assert not output.any()
    for name, gradient in gradients.items():
        assert not gradient.any(), name


@every_implementation
def test_no_strength_with_the_reciprocal_mix(implementation):
    inputs, options = drawn("strength", reversible=True, discoverability=True, **CAUSAL)
    inputs = dataclasses.replace(inputs, lens_strength=np.array([0.0, 0.3], "float32"))
    check(inputs, options, implementation)


@every_implementation
def test_hop_weights_of_zero_with_the_reciprocal_mix(implementation):
    inputs, options = drawn("zeros", reversible=True, hop_weights="head", **CAUSAL)
    weights = inputs.hop_weights.copy()
    weights[0] = 0.0
    weights[1, 1:] = 0.0
    inputs = dataclasses.replace(inputs, hop_weights=weights)
    run = attention(inputs, options, implementation)
    output, gradients = attention_gradients(run, inputs)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
    # Nobody takes a step, so the direction of the walk says nothing.
    forward = {**options, "reversible": False}
    assert_close(output, truth(inputs, forward)[0], TOLERANCES["output"])


# --- gradients -----------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-7, 2e-6, 1e-3])
@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_gradients_of_short_vectors_are_bounded(length, edge_weight, implementation):
    inputs, options = drawn("short", edge_weight=edge_weight, discoverability=True, **CAUSAL)
    query, key = inputs.query.copy(), inputs.key.copy()
    for x in (query, key):
        x[:, 11] *= length / np.linalg.norm(x[:, 11], axis=-1, keepdims=True)
    inputs = dataclasses.replace(inputs, query=query, key=key)
    gradients = check(inputs, options, implementation)
    largest = {name: np.abs(gradient).max() for name, gradient in gradients.items()}
    assert max(largest["query"], largest["key"]) < 100.0, largest


# --- what is not a number ------------------------------------------------------------------------

POISONS = {
    "R1": {},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "discoverability": True},
    "R4": {"edge_weight": "exponential"},
    "R5": {"graph_heads": 1, "edge_weight": "exponential", "self_edges": False},
    "blocks": {"topk": 8, "neighbor_block": 4},
}


@every_implementation
@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_token_changes_no_earlier_one(name, poison, implementation):
    made = case(f"poison {name}", **{**CAUSAL, **POISONS[name]})
    inputs, options = made.inputs, dict(made.options)
    run = compiled(attention(inputs, options, implementation))

    def output(arrays):
        return numpy(run(**{name: ops.convert_to_tensor(x) for name, x in arrays.items()}))

    clean = output(inputs.arrays())
    for which in inputs.given("query", "key", "value", "graph_query", "graph_key"):
        arrays = {name: x.copy() for name, x in inputs.arrays().items()}
        arrays[which][0, 19, 0, 2] = poison
        found = output(arrays)
        np.testing.assert_array_equal(found[0, :19], clean[0, :19], err_msg=which)
        np.testing.assert_array_equal(found[1], clean[1], err_msg=which)
        assert np.isnan(found[0, 19]).any(), which


# --- dtypes --------------------------------------------------------------------------------------

WIDE = {
    "R3": {"reversible": True, "discoverability": True},
    "R4": {"edge_weight": "exponential"},
    "R5": {"graph_heads": 1, "edge_weight": "exponential", "hop_weights": "token"},
}


# JAX has float64 only where a switch is set for the whole process.
HAS_FLOAT64 = BACKEND != "jax"
ACCURACY = 1e-12 if HAS_FLOAT64 else TOLERANCES["output"]
ACCURACY_OF_GRADIENTS = 1e-11 if HAS_FLOAT64 else TOLERANCES["gradient_of_a_sum"]


@every_implementation
@pytest.mark.parametrize("name", WIDE)
def test_float64(name, implementation):
    inputs, options = drawn(f"wide {name}", **WIDE[name], **CAUSAL)
    arrays = {name: x.astype("float64") for name, x in inputs.arrays().items()}
    cotangent = inputs.cotangent.astype("float64")
    inputs = dataclasses.replace(inputs, cotangent=cotangent, **arrays)
    run = attention(inputs, options, implementation)
    output, gradients = attention_gradients(run, inputs)
    assert output.dtype == ("float64" if HAS_FLOAT64 else "float32")
    expected, expected_gradients = truth(inputs, options)
    assert_close(output, expected, ACCURACY)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], ACCURACY_OF_GRADIENTS, name)


@every_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", WIDE)
def test_half_precision(name, dtype, implementation):
    inputs, options = drawn(f"half {name}", **WIDE[name], **CAUSAL)
    run = attention(inputs, options, implementation)
    vectors = ("query", "key", "value", "graph_query", "graph_key")
    tensors = {name: ops.convert_to_tensor(x) for name, x in inputs.arrays().items()}
    halves = {name: ops.cast(x, dtype) if name in vectors else x for name, x in tensors.items()}
    singles = {name: ops.cast(x, "float32") for name, x in halves.items()}
    output = compiled(run)(**halves)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert_close(numpy(output), numpy(compiled(run)(**singles)), 1.1 * rounding)


@every_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_output_has_the_dtype_of_the_query(dtype, implementation):
    inputs, options = drawn("mixed", **CAUSAL)
    query, key, value = (
        ops.convert_to_tensor(x) for x in inputs.given("query", "key", "value").values()
    )
    others = [other for other in ("float16", "bfloat16", "float32") if other != dtype]
    query, key, value = ops.cast(query, dtype), ops.cast(key, others[0]), ops.cast(value, others[1])
    output = rwr_attention(query, key, value, implementation=implementation, **options)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    scores = attention_scores(query, key, **options)
    assert keras.backend.standardize_dtype(scores.dtype) == dtype
    symbols = [keras.KerasTensor(x.shape, x.dtype) for x in (query, key, value)]
    assert rwr_attention(*symbols, **options).dtype == dtype


# --- nothing at all ------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (0, 0, 0, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"reversible": True, "fusion": "sum"}], ids=str)
def test_empty_calls_have_empty_outputs(shape, options, implementation):
    x = ops.zeros(shape)
    output = rwr_attention(
        x, x, ops.zeros((*shape[:3], 3)), implementation=implementation, **options, **SINGLE
    )
    assert tuple(output.shape) == (*shape[:3], 3)
    assert keras.backend.standardize_dtype(output.dtype) == "float32"


# --- the edges of definitions --------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_an_edge_needs_more_than_the_threshold(edge_weight, implementation):
    # Cosines of exactly 0.5 and 1: four equal features, of which the query shares two signs more.
    key = np.ones((1, 2, 1, 4), "float32")
    query = np.array([1.0, 1.0, 1.0, -1.0], "float32") * np.ones_like(key)
    options = {"edge_weight": edge_weight, "window": 1, "topk": 0, "lens_strength": 1.0}
    options.update(alpha=0.5, steps=1, implementation=implementation)
    value = np.eye(2, dtype="float32")[None, :, None]  # outputs are rows of the matrix

    def walked(threshold):
        output = rwr_attention(query, key, value, threshold=threshold, **options)
        return numpy(output)[0, 0, 0]

    # Both tokens get half of LOCAL; the walk takes half of its mass one step further.
    np.testing.assert_allclose(walked(0.499), [1.125, 0.625], rtol=1e-6)
    np.testing.assert_allclose(walked(0.5), [1.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", WIDE)
def test_token_importance_leaves_padding_out(name):
    made = case(f"importance {name}", padding="holes", **WIDE[name], **CAUSAL)
    inputs, options = made.inputs, dict(made.options)
    arguments = made.tensor_arguments()
    arguments.pop("lens_strength", None)
    found = numpy(token_importance(inputs.query, inputs.key, **arguments, **options))
    expected = oracle.token_importance(inputs.query, inputs.key, made.oracle_options, **arguments)
    assert_close(found, expected, TOLERANCES["output"])
    real = inputs.padding_mask
    assert not found[~real].any()
    if made.hop_weights is None:
        mass = oracle.walk_mass(made.oracle_options)
        np.testing.assert_allclose(found.sum(1), mass, rtol=1e-5)
    # What stands at padding says nothing.
    query, key = inputs.query.copy(), inputs.key.copy()
    query[~real], key[~real] = np.nan, 100.0
    again = numpy(token_importance(query, key, **arguments, **options))
    np.testing.assert_array_equal(again, found)
