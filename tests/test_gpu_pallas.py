"""The Pallas kernels on a GPU. Needs one, and KERAS_BACKEND=jax: `pytest -m gpu <this file>`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import oracle
import pytest
import torch
from helpers import (
    KERNEL_CASES,
    TOLERANCES,
    Case,
    assert_close,
    assert_gradients_close,
    draw_inputs,
    numpy,
    run_case,
)
from precision import assert_as_exact_as_eager

import keras_rwr
from keras_rwr._dispatch import current_device
from keras_rwr.ops import rwr_attention

pytestmark = [
    pytest.mark.gpu,
    # What JAX says of the lowering that these kernels take on GPUs, see CONTRIBUTING.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

R3 = {"reversible": True, "reciprocal_beta": 0.7}
R4 = {"edge_weight": "exponential"}
HALF = [torch.float16, torch.bfloat16]
TOKENS = 1031


@pytest.fixture(autouse=True)
def on_a_gpu():
    if current_device() != "gpu":
        pytest.fail(f"This test needs a GPU. Received: device={current_device()}")


def draw(*shape, dtype="bfloat16", count=3, seed=0):
    """Query, key and value (B, S, N, H) that lean on one another."""
    query, *others = jax.random.normal(jax.random.key(seed), (count, *shape))
    return [x.astype(dtype) for x in (query + 0.7 * others[0], *others)]


def attend(query, key, value, **options):
    options = {"is_causal": True, "implementation": "pallas", **options}
    return rwr_attention(query, key, value, **options)


def with_gradients(run):
    """A compiled function of query, key and value that returns the output and their gradients."""

    @jax.jit
    def differentiate(*tensors):
        output, pullback = jax.vjp(run, *tensors)
        slope = jnp.cos(jnp.arange(output.size, dtype="float32")).reshape(output.shape)
        return output, *pullback(slope.astype(output.dtype))

    return differentiate


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(numpy(one), numpy(other))


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_float32(case):
    output, gradients = run_case(case, "pallas")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_half_precision(case, dtype):
    assert_as_exact_as_eager(case, dtype)


class LongCase(Case):
    """A case whose inputs are any draw: kernels and oracle take the kernels' own neighbours."""

    @property
    def oracle_options(self):
        options = {name: x for name, x in self.options if name != "block_size"}
        return oracle.Options(**options)

    def draw(self):
        sizes = {"batch": 2, "tokens": TOKENS, "heads": 3, **dict(self.sizes)}
        inputs = draw_inputs(np.random.default_rng(0), padding=self.padding, **sizes)
        return dataclasses.replace(inputs, discoverability=0.25 * inputs.discoverability)


# Lengths that no tile divides, and heads that no tile holds exactly.
SETUPS = {
    "R1": ({}, 64),
    "R2 of 96": ({"reversible": True}, 96),
    "R3 both ways": ({**R3, "is_causal": False}, 64),
    "R4 of 128": (R4, 128),
    "R1 of 256": ({}, 256),
    "large blocks": ({"neighbor_block": 64, "topk": 64, "block_size": 64}, 256),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", SETUPS)
def test_default_sizes(name, dtype):
    options, head_size = SETUPS[name]
    options = {"is_causal": True, "window": 128, "topk": 32, "neighbor_block": 16, **options}
    if dtype == torch.float32 and "edge_weight" not in options:
        options["threshold"] = -1.0  # at 0, of a million cosines some are decided by rounding
    sizes = {"head_dim": head_size, "value_dim": head_size}
    case = LongCase(
        name,
        tuple(options.items()),
        tuple(sizes.items()),
        padding="right",
        discoverability="R3" in name,
    )
    assert_as_exact_as_eager(case, dtype)


@pytest.mark.parametrize("options", [{}, {**R3, "dropout": 0.1, "seed": 3}, R4])
def test_the_same_inputs_give_the_same_bits(options):
    tensors = draw(2, 1500, 4, 64)
    run = with_gradients(functools.partial(attend, **options))
    expected = run(*tensors)
    for _ in range(3):
        # Other work in between, so that blocks of the GPU finish in another order.
        jax.random.normal(jax.random.key(1), (2048, 2048)) @ jnp.ones((2048, 2048))
        assert_same(run(*tensors), expected)


def test_no_token_sees_a_later_one():
    tensors, others = draw(1, 3000, 2, 64), draw(1, 3000, 2, 64, seed=1)
    for options in ({}, R4):
        run = jax.jit(functools.partial(attend, **options))
        before = numpy(run(*tensors))
        for last in (100, 1234, 2950):
            changed = [
                jnp.concatenate([x[:, : last + 1], y[:, last + 1 :]], 1)
                for x, y in zip(tensors, others, strict=True)
            ]
            after = numpy(run(*changed))
            np.testing.assert_array_equal(after[:, : last + 1], before[:, : last + 1])
            assert not np.array_equal(after, before)


def test_explain():
    told = keras_rwr.explain((1, 4096, 12, 64), dtype="bfloat16", is_causal=True)
    assert told.implementation == "pallas"
    told = keras_rwr.explain((1, 4096, 12, 64), device="cpu", is_causal=True)
    assert told.implementation == "portable"
    assert "GPU" in told.refusals["pallas"]


def test_training():
    losses = {}
    for implementation in ("pallas", "reference"):
        keras.utils.set_random_seed(7)
        layer = keras_rwr.RWRAttention(
            num_heads=2, key_dim=32, window=32, topk=32, implementation=implementation, **R4
        )
        inputs = keras.Input((192, 64))
        outputs = layer(inputs, inputs, use_causal_mask=True)
        model = keras.Model(inputs, keras.layers.Dense(64)(outputs))
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        x = np.random.default_rng(0).standard_normal((8, 192, 64)).astype("float32")
        y = np.roll(x, 1, 1)
        history = model.fit(x, y, batch_size=8, epochs=20, verbose=0)
        losses[implementation] = history.history["loss"]
    assert losses["reference"][-1] < 0.9 * losses["reference"][0]
    np.testing.assert_allclose(losses["pallas"], losses["reference"], rtol=1e-3)
