"""Gradients of both implementations against float64 autograd of an independent formula."""

import numpy as np
import pytest
from helpers import (
    ALL_CASES,
    SOFTMAX,
    SUM_CASES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    run_case,
    value_and_gradients,
)
from keras import ops


@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_portable(case):
    _, gradients = run_case(case, "portable")
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_reference(case):
    _, gradients = run_case(case, "reference")
    assert_gradients_close(gradients, case.expected_gradients[1])


def test_the_cases_move_every_gradient():
    for name in ("query", "key", "value", "discoverability", "concentration", "lens_strength"):
        moved = [np.abs(case.expected_gradients[1][name]).max() for case in ALL_CASES]
        assert max(moved) > 0.1, name
    softened = [case.expected_gradients[1]["lens_strength"] for case in SOFTMAX]
    assert min(np.abs(gradient).max() for gradient in softened) > 1e-3


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
