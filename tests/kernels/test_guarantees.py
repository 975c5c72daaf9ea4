"""The guarantees of the specification on the interpreted kernels.

tests/test_properties.py has them for the other implementations.
"""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import test_extremes as extremes
import test_properties as properties
from helpers import (
    BACKEND,
    TOLERANCES,
    assert_close,
    attention,
    attention_gradients,
    case,
    compiled,
    numpy,
)
from keras import ops
from precision import KERNEL

# R1 to R4, each with the granularity of its neighbours. What Pallas interprets takes seconds to
# compile: there, half of them.
SETUPS = [("R1", 16), ("R3", 16), ("R2", 1), ("R4", 1)]
if BACKEND == "jax":
    SETUPS = SETUPS[:2]
every_setup = pytest.mark.parametrize(("step", "block"), SETUPS)


def make(step, block, **options):
    """A step of the ablation, as short as its window and neighbours allow."""
    if BACKEND == "jax":
        options = {"steps": 2, **options}
    made = properties.make_case(step, block, **options)
    sizes = {
        "batch": 1,
        "heads": 1,
        "tokens": {1: 17, 16: 61}[block],
        "head_dim": 7,
        "value_dim": 5,
    }
    return replace(made, sizes=tuple(sorted(sizes.items())))


def runner(made, seed=None, **tiles):
    """A function of query, key and value, in NumPy."""
    inputs = made.inputs
    others = {
        name: ops.convert_to_tensor(x)
        for name, x in inputs.arrays().items()
        if name not in ("query", "key", "value")
    }
    gamma = others.pop("lens_strength")
    options = {**dict(made.options), **tiles}

    def attend(query, key, value, gamma):
        run = attention(inputs, options, KERNEL, seed=seed)
        return run(query, key, value, lens_strength=gamma, **others)

    attend = compiled(attend)

    def run(query=inputs.query, key=inputs.key, value=inputs.value, gamma=gamma):
        return numpy(attend(*map(ops.convert_to_tensor, (query, key, value, gamma))))

    return run


@every_setup
@pytest.mark.parametrize("last", [7, 15])
def test_no_token_sees_a_later_one(step, block, last):
    made = make(step, block, is_causal=True)
    properties.assert_no_leak(
        runner(made, block_size=16), made.inputs, last, seed=last, scale=100.0
    )


def test_no_token_sees_a_later_one_with_dropout():
    made = make("R3", 1, is_causal=True, dropout=0.4)
    properties.assert_no_leak(runner(made, seed=(11, 12)), made.inputs, 11, 3, 1.0)


def test_the_leak_check_notices_a_leak():
    both_ways = make("R1", 1, is_causal=False)
    with pytest.raises(AssertionError):
        properties.assert_no_leak(runner(both_ways), both_ways.inputs, 11, 3, 1.0)


@every_setup
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_the_walk_has_its_mass(step, block, is_causal):
    made = make(step, block, is_causal=is_causal)
    gamma = made.inputs.lens_strength[:, None]
    expected = 1.0 + gamma * oracle.walk_mass(made.oracle_options)
    output = runner(made)(value=np.ones_like(made.inputs.value))
    np.testing.assert_allclose(output, expected + 0 * output, rtol=2e-6)


def test_restart_probability_one_adds_the_values():
    made = make("R2", 1, is_causal=True, alpha=1.0)
    run = runner(made)
    local = run(gamma=np.zeros(1, "float32"))
    expected = local + made.inputs.lens_strength[:, None] * made.inputs.value
    assert_close(run(), expected, TOLERANCES["output"])


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_a_wide_window_without_walk_is_multi_head_attention(is_causal):
    properties.test_a_wide_window_without_walk_is_multi_head_attention("R1", is_causal, KERNEL)


# --- padding and degenerate inputs ---------------------------------------------------------------


PADDINGS = [
    ("R1", 16, "left"),
    ("R3", 16, "holes"),
    ("R1", 16, "holes"),
    ("R2", 1, "right"),
    ("R4", 1, "left"),
    ("R5", 1, "holes"),
]


@pytest.mark.parametrize(("step", "block", "pattern"), PADDINGS[: 2 if BACKEND == "jax" else None])
def test_padding_content_changes_nothing(step, block, pattern):
    made = make(step, block, is_causal=pattern != "holes")
    mask = properties.padding_patterns(1, made.inputs.query.shape[1])[pattern]
    results = []
    for content in (None, np.nan):
        arrays = made.inputs.given("query", "key", "value", "graph_query", "graph_key")
        arrays = {name: array.copy() for name, array in arrays.items()}
        if content is not None:
            for array in arrays.values():
                array[~mask] = content
        inputs = replace(made.inputs, padding_mask=mask, **arrays)
        run = attention(inputs, dict(made.options), KERNEL)
        output, gradients = attention_gradients(run, inputs)
        results.append({"output": output, **gradients})
    before, after = results
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
        if array.ndim == 4:
            assert not array[~mask].any() and array[mask].any(), name


@pytest.mark.parametrize("step", ["R3", "R4"][: 1 if BACKEND == "jax" else None])
def test_degenerate_inputs_stay_finite(step):
    properties.test_degenerate_inputs_stay_finite(step, 16, KERNEL)


SHORT = [("cosine", 2e-6), ("exponential", 1e-3), ("cosine", 0.0), ("exponential", 1e-20)]


@pytest.mark.parametrize(("edge_weight", "length"), SHORT[: 2 if BACKEND == "jax" else None])
def test_gradients_of_short_vectors_are_bounded(edge_weight, length):
    extremes.test_gradients_of_short_vectors_are_bounded(length, edge_weight, KERNEL)


@pytest.mark.parametrize("step", ["R1", "R2", "R3", "R4"][: 2 if BACKEND == "jax" else None])
def test_one_token(step):
    properties.test_one_token(step, KERNEL, is_causal=step != "R2")


@pytest.mark.parametrize("reversible", [False, True][: 1 if BACKEND == "jax" else None])
def test_isolated_tokens_stay_where_they_are(reversible):
    # The queries from the 11th on point away from every key, and no token before looks at them.
    made = case(
        "isolated",
        sizes={"batch": 1, "heads": 1, "tokens": 19},
        is_causal=True,
        reversible=reversible,
        reciprocal_beta=0.5,
        window=3,
        topk=4,
        neighbor_block=2,
    )
    inputs = made.inputs
    query, key = inputs.query.copy(), np.abs(inputs.key)
    query[:, 11:] = -np.abs(query[:, 11:])
    # In a reversible graph a pair weighs what either direction does.
    query[:, :11] = -np.abs(query[:, :11]) if reversible else np.abs(query[:, :11])
    inputs = replace(inputs, query=query, key=key)
    results = []
    for gamma in (inputs.lens_strength, np.zeros(1, "float32")):
        changed = replace(inputs, lens_strength=gamma)
        run = attention(changed, dict(made.options), KERNEL)
        results.append(attention_gradients(run, changed))
    (output, gradients), (local, local_gradients) = results
    mass = oracle.walk_mass(made.oracle_options)
    expected = local + inputs.lens_strength[:, None] * mass * inputs.value
    assert_close(output[:, 11:], expected[:, 11:], TOLERANCES["output"])
    # Its walk has no gradient but that of its value.
    found, expected = (found["query"][:, 11:] for found in (gradients, local_gradients))
    assert_close(found, expected, TOLERANCES["gradient"])
    if not reversible:
        assert np.abs(gradients["query"] - local_gradients["query"]).max() > 0.01


# --- repeatability -------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bits():
    made = make("R3", 16, is_causal=True, dropout=0.2)
    results = []
    for _ in range(2):
        run = attention(made.inputs, dict(made.options), KERNEL, seed=(5, 6))
        output, gradients = attention_gradients(run, made.inputs)
        results.append([output, *gradients.values()])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_dropout_is_the_seeds_alone():
    made = make("R1", 16, is_causal=True, dropout=0.4)
    first = runner(made, seed=(5, 6))()
    assert not np.allclose(runner(made, seed=(5, 7))(), first)
    assert not np.allclose(runner(made, seed=(6, 6))(), first)
    # One piece of a larger call: the second batch entry's second head.
    arrays = [
        ops.convert_to_tensor(np.tile(x, (2, 1, 2, 1)))
        for x in (made.inputs.query, made.inputs.key, made.inputs.value)
    ]
    options = dict(made.options)
    run = attention(made.inputs, options, KERNEL, seed=(5, 6))
    whole = compiled(run)(*arrays)
    piece = attention(made.inputs, options, KERNEL, seed=(5, 6, 1, 1))
    output = numpy(compiled(piece)(*(x[1:, :, 1:] for x in arrays)))
    whole = numpy(whole)
    # What compilers make of other shapes may round otherwise.
    assert_close(output, whole[1:, :, 1:], TOLERANCES["output"])
    assert not np.array_equal(whole[:1, :, :1], whole[1:, :, 1:])


@pytest.mark.parametrize("reversible", [False, True][: 1 if BACKEND == "jax" else None])
def test_degrees_next_to_nothing(reversible):
    extremes.test_degrees_next_to_nothing(reversible, KERNEL)


@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_an_edge_needs_more_than_the_threshold(edge_weight):
    extremes.test_an_edge_needs_more_than_the_threshold(edge_weight, KERNEL)
