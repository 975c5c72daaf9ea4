"""The implementations on a GPU against the oracle. Needs one: `pytest -m gpu tests/test_gpu.py`."""

import contextlib

import keras
import numpy as np
import pytest
import test_decoding as decoding
from helpers import ALL_CASES, SUM_CASES, TOLERANCES, assert_close, assert_gradients_close, run_case

from keras_rwr._dispatch import current_device

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu():
    if current_device() != "gpu":
        pytest.fail(f"This test needs a GPU. Received: device={current_device()}")
    with ieee_products():
        yield


def ieee_products():
    """JAX multiplies float32 matrices in TF32 unless told otherwise; torch does not."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_portable(case):
    output, gradients = run_case(case, "portable")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_reference(case):
    output, gradients = run_case(case, "reference")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.parametrize("name", decoding.OPTIONS)
def test_stepwise_decoding(name):
    layer = decoding.make_layer(**decoding.OPTIONS[name])
    x = decoding.make_inputs()
    output = decoding.stepwise(layer, x, behind=decoding.make_inputs(5))
    np.testing.assert_allclose(output, decoding.full(layer, x), rtol=0, atol=1e-5)
