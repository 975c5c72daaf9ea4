"""The package against the oracles: outputs, gradients and what is made for analysis."""

import dataclasses

import numpy as np
import oracle
import pytest
from helpers import (
    ALL_CASES,
    SOFTMAX,
    SUM_CASES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    attention,
    by_name,
    compiled,
    numpy,
    run_case,
    value_and_gradients,
)
from keras import ops
from oracle_gradients import NAMES

from keras_rwr.ops import attention_scores, token_importance


def assert_as_expected(case, implementation):
    output, gradients = run_case(case, implementation)
    assert output.dtype == np.float32
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


pytestmark = pytest.mark.costly


@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_portable(case):
    assert_as_expected(case, "portable")


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_reference(case):
    assert_as_expected(case, "reference")


@pytest.mark.parametrize("implementation", ["portable", "reference"])
def test_discoverability_at_first(implementation):
    """A vector of zeros changes nothing, and has a gradient."""
    case = dataclasses.replace(by_name("R3 causal"), name="R3 at first")
    zeros = np.zeros_like(case.inputs.discoverability)
    vars(case)["inputs"] = dataclasses.replace(case.inputs, discoverability=zeros)
    assert_as_expected(case, implementation)
    assert np.abs(case.expected_gradients[1]["discoverability"]).max() > 0.1


# --- without gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["R3 causal", "R5 segments", "softmax padding"])
def test_the_default_implementation(name):
    case = by_name(name)
    run = compiled(attention(case.inputs, dict(case.options), None))
    arrays = case.inputs.arrays()
    output = run(**{name: ops.convert_to_tensor(array) for name, array in arrays.items()})
    assert_close(numpy(output), case.expected, TOLERANCES["output"])


def test_plain_numbers_instead_of_tensors():
    case = by_name("R4 causal")
    arrays = case.inputs.given("query", "key", "value")
    expected = oracle.rwr_attention(
        **arrays,
        options=case.oracle_options,
        lens_strength=0.4,
        concentration=9.0,
        neighbors=case.neighbors,
    )
    run = attention(case.inputs, dict(case.options), None)
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
    for kappa, gamma in ((9.0, 0.4), ([9.0, 9.0], (0.4, 0.4))):
        plain = compiled(lambda **x: run(**x, concentration=kappa, lens_strength=gamma))  # noqa: B023
        assert_close(numpy(plain(**tensors)), expected, TOLERANCES["output"])


def run_analysis(function, expected, case, *left_out):
    """(result of the package, of the oracle) for a function of query and key."""
    arguments = {x: y for x, y in case.tensor_arguments().items() if x not in left_out}
    options = {x: y for x, y in case.options if x not in ("dropout", *left_out)}
    query, key = case.inputs.query, case.inputs.key
    run = compiled(lambda query, key: function(query, key, **arguments, **options))
    expected = expected(query, key, case.oracle_options, neighbors=case.neighbors, **arguments)
    return numpy(run(query, key)), expected


@pytest.mark.parametrize(
    "name",
    [
        "R1 causal",
        "R3 bidirectional fours",
        "padding left",
        "softmax R3",
        "R5 segments",
        "two graphs for four heads",
        "hop weights reciprocal",
    ],
)
def test_attention_scores(name):
    scores, expected = run_analysis(attention_scores, oracle.attention_scores, by_name(name))
    assert_close(scores, expected, TOLERANCES["output"])


@pytest.mark.parametrize(
    "name",
    [
        "R1 causal",
        "R3 causal",
        "padding holes",
        "padding whole row",
        "R5 segments",
        "two graphs for four heads",
    ],
)
def test_token_importance(name):
    case = by_name(name)
    left_out = ("lens_strength", "reciprocal_beta")
    importance, expected = run_analysis(token_importance, oracle.token_importance, case, *left_out)
    assert_close(importance, expected, TOLERANCES["output"])
    if case.hop_weights is None:
        mass = oracle.walk_mass(case.oracle_options) * case.inputs.real().any(-1)
        total = importance.sum(1)
        np.testing.assert_allclose(total, np.broadcast_to(mass[:, None], total.shape), rtol=1e-5)


# --- the tests themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_cases_move_every_gradient(name):
    found = [case.expected_gradients[1] for case in ALL_CASES]
    assert max(np.abs(gradients[name]).max() for gradients in found if name in gradients) > 0.1


def test_the_softmax_cases_need_the_walk():
    moved = [np.abs(case.expected_gradients[1]["lens_strength"]).max() for case in SOFTMAX]
    assert min(moved) > 1e-3


def test_the_comparison_can_fail():
    _, expected = SUM_CASES[0].expected_gradients
    wrong = {**expected, "key": expected["key"] * (1 + 1e-4)}
    with pytest.raises(AssertionError, match="gradient of key"):
        assert_gradients_close(wrong, expected)
    with pytest.raises(AssertionError, match="differ in kind"):
        assert_gradients_close({"key": expected["key"]}, expected)


def test_the_gradient_helper_on_a_known_function():
    x = np.array([1.0, 2.0, 3.0], "float32")
    unused = np.ones(2, "float32")
    output, (gradient, nothing) = value_and_gradients(
        lambda a, b: (ops.sum(a * a * a), 2.0 * a), x, unused
    )
    assert_close(gradient, 3 * x**2, TOLERANCES["gradient"])
    assert_close(output, 2 * x, TOLERANCES["output"])
    assert nothing.shape == (2,) and not nothing.any()
