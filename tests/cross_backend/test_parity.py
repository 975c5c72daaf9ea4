"""The same calls on torch, jax, tensorflow and (forward) numpy, each in its own process."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import helpers
import numpy as np
import oracle
import oracle_gradients
import pytest

BACKENDS = ("torch", "jax", "tensorflow", "numpy")
SHARED = ("portable", "reference")
IMPLEMENTATIONS = dict.fromkeys(BACKENDS, SHARED) | {"tensorflow": (*SHARED, "xla")}
LAST_KEPT = 40  # tokens after this one are replaced for the causality check

COMMON = {"window": 17, "topk": 32, "neighbor_block": 16, "is_causal": True}
CALLS = {
    "R1": COMMON,
    "R2": {**COMMON, "reversible": True},
    "R3": {**COMMON, "reversible": True, "reciprocal_beta": 0.7, "dropout": 0.2},
    "R4": {**COMMON, "edge_weight": "exponential"},
}


@pytest.fixture(scope="module")
def case():
    """One well-conditioned set of inputs for the four calls."""
    return helpers.case(
        "parity",
        sizes={"batch": 2, "tokens": 61, "heads": 2, "head_dim": 7, "value_dim": 5},
        padding="right",
        discoverability=True,
        reversible=True,
        **COMMON,
    )


@pytest.fixture(scope="module")
def results(case, tmp_path_factory):
    """What each backend computed, {backend: {name: array}}."""
    folder = tmp_path_factory.mktemp("parity")
    inputs = case.inputs
    arrays = inputs.arrays()
    rng = np.random.default_rng(4)
    for name in ("query", "key", "value"):
        changed = arrays[name].copy()
        tail = changed[:, LAST_KEPT + 1 :]
        tail[...] = 3.0 * rng.standard_normal(tail.shape)
        arrays[f"changed_{name}"] = changed
    np.savez(
        folder / "inputs.npz",
        calls=json.dumps(CALLS),
        seed=np.array([20, 24], "int32"),
        padding_mask=inputs.padding_mask,
        cotangent=inputs.cotangent,
        **arrays,
    )
    found = {}
    for backend in BACKENDS:
        target = folder / f"{backend}.npz"
        environment = {**os.environ, "KERAS_BACKEND": backend}
        # These processes compile with every optimisation.
        environment.pop("XLA_FLAGS", None)
        script = pathlib.Path(__file__).with_name("run_backend.py")
        done = subprocess.run(
            [sys.executable, str(script), str(folder / "inputs.npz"), str(target)],
            cwd=pathlib.Path(__file__).resolve().parents[2],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{backend}:\n{done.stderr}"
        found[backend] = dict(np.load(target))
    return found


def test_every_backend_ran_every_call(results):
    gradients = len(oracle_gradients.NAMES)
    for backend, arrays in results.items():
        outputs = len(CALLS) * len(IMPLEMENTATIONS[backend])
        assert len(arrays) == outputs * (2 if backend == "numpy" else 2 + gradients), backend


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("pair", list(itertools.combinations(BACKENDS, 2)), ids="-".join)
def test_backends_agree(results, call, pair):
    first, second = (results[backend] for backend in pair)
    names = [name for name in first if name in second and name.startswith(f"{call}/")]
    assert len(names) == 2 * (2 if "numpy" in pair else 2 + len(oracle_gradients.NAMES))
    for name in names:
        helpers.assert_close(first[name], second[name], helpers.TOLERANCES["backends"], name)


@pytest.mark.parametrize("call", CALLS)
def test_xla_agrees_with_every_backend(results, call):
    for backend in BACKENDS:
        for implementation in SHARED:
            prefix = f"{call}/{implementation}/"
            names = [name[len(prefix) :] for name in results[backend] if name.startswith(prefix)]
            assert len(names) == 2 + (0 if backend == "numpy" else len(oracle_gradients.NAMES))
            for name in names:
                ours = results["tensorflow"][f"{call}/xla/{name}"]
                theirs = results[backend][prefix + name]
                what = f"{backend}/{implementation}/{name}"
                helpers.assert_close(ours, theirs, helpers.TOLERANCES["backends"], what)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_oracle(results, case, call, backend):
    inputs = case.inputs
    expected = oracle.rwr_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        oracle.Options(**CALLS[call]),
        lens_strength=inputs.lens_strength,
        concentration=inputs.concentration,
        discoverability=inputs.discoverability,
        padding_mask=inputs.padding_mask,
        neighbors=case.neighbors,
        seed=(20, 24),
    )
    for implementation in IMPLEMENTATIONS[backend]:
        output = results[backend][f"{call}/{implementation}/output"]
        helpers.assert_close(output, expected, helpers.TOLERANCES["output"], implementation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_sees_a_later_one_with_every_optimisation(results, backend):
    for call, implementation in itertools.product(CALLS, IMPLEMENTATIONS[backend]):
        label = f"{call}/{implementation}"
        before, after = results[backend][f"{label}/output"], results[backend][f"{label}/changed"]
        kept = slice(None, LAST_KEPT + 1)
        np.testing.assert_array_equal(after[:, kept], before[:, kept], err_msg=label)
        assert not np.array_equal(after, before), label
