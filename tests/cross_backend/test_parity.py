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
import pytest

BACKENDS = ("torch", "jax", "tensorflow", "numpy")
IMPLEMENTATIONS = ("portable", "reference")
LAST_KEPT = 40  # tokens after this one are replaced for the causality check
SEED = (20, 24)

SIZES = {"batch": 2, "tokens": 61, "heads": 2, "head_dim": 7, "value_dim": 5}
COMMON = {"window": 17, "topk": 32, "neighbor_block": 16, "is_causal": True}
STEPS = {
    "R1": COMMON,
    "R2": {**COMMON, "reversible": True},
    "R3": {**COMMON, "reversible": True, "reciprocal_beta": 0.7, "dropout": 0.2},
    "R4": {**COMMON, "edge_weight": "exponential"},
    "R5": {**helpers.ABLATION["R5"], **helpers.SINGLE, "is_causal": True},
}
CASES = {
    name: helpers.case(
        f"parity {name}", sizes=SIZES, padding="right", discoverability=True, seed=SEED, **options
    )
    for name, options in STEPS.items()
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each backend computed, {backend: {name: array}}."""
    folder = tmp_path_factory.mktemp("parity")
    rng = np.random.default_rng(4)
    stored = {}
    for call, case in CASES.items():
        inputs = case.inputs
        arrays = dict(inputs.arrays())
        for name, array in inputs.arrays().items():
            if array.ndim == 4:
                changed = array.copy()
                tail = changed[:, LAST_KEPT + 1 :]
                tail[...] = 3.0 * rng.standard_normal(tail.shape)
                arrays[f"changed_{name}"] = changed
        arrays["seed"] = np.array(SEED, "int32")
        arrays |= {"padding_mask": inputs.padding_mask, "cotangent": inputs.cotangent}
        stored |= {f"{call}/{name}": array for name, array in arrays.items()}
    calls = {name: dict(case.options) for name, case in CASES.items()}
    np.savez(folder / "inputs.npz", calls=json.dumps(calls), **stored)
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
    gradients = sum(len(case.inputs.arrays()) for case in CASES.values())
    for backend, arrays in results.items():
        outputs = 2 * len(CASES) + (0 if backend == "numpy" else gradients)
        assert len(arrays) == len(IMPLEMENTATIONS) * outputs, backend


@pytest.mark.parametrize("call", CASES)
@pytest.mark.parametrize("pair", list(itertools.combinations(BACKENDS, 2)), ids="-".join)
def test_backends_agree(results, call, pair):
    first, second = (results[backend] for backend in pair)
    names = [name for name in first if name in second and name.startswith(f"{call}/")]
    count = 0 if "numpy" in pair else len(CASES[call].inputs.arrays())
    assert len(names) == 2 * (2 + count)
    for name in names:
        # One number a head, a graph or a number of steps is a sum over all tokens.
        kind = "backends" if first[name].ndim == 4 else "gradient_of_a_sum"
        helpers.assert_close(first[name], second[name], helpers.TOLERANCES[kind], name)


@pytest.mark.parametrize("call", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_oracle(results, call, backend):
    for implementation in IMPLEMENTATIONS:
        output = results[backend][f"{call}/{implementation}/output"]
        expected = CASES[call].expected
        helpers.assert_close(output, expected, helpers.TOLERANCES["output"], implementation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_sees_a_later_one_with_every_optimisation(results, backend):
    for call, implementation in itertools.product(CASES, IMPLEMENTATIONS):
        label = f"{call}/{implementation}"
        before, after = results[backend][f"{label}/output"], results[backend][f"{label}/changed"]
        kept = slice(None, LAST_KEPT + 1)
        np.testing.assert_array_equal(after[:, kept], before[:, kept], err_msg=label)
        assert not np.array_equal(after, before), label


def test_the_oracle_is_another_program():
    assert not {"keras", "keras_rwr"} & set(vars(oracle))
