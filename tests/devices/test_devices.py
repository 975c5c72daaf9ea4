"""Training and generation on several devices, each in processes of their own, on the CPU."""

import json
import os
import pathlib
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
STEPS = 3

# The sum over a batch is added up in another order, which changes a gradient by a few float32
# roundings (6e-8), and three small steps do not amplify them.
LOSS_TOLERANCE = 2e-6
# Adam divides a gradient by its own size, so that roundings of the smallest gradients change whole
# steps of 3e-3. Few weights have such gradients: the bound is on the norm of all of them.
WEIGHT_TOLERANCE = 1e-5


def run(backend, *command, **variables):
    """Runs Python in a process of its own and returns what it printed."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same_training(losses, weights, expected_losses, expected_weights):
    assert len(expected_losses) == STEPS
    assert expected_losses[-1] < expected_losses[0] - 0.01
    np.testing.assert_allclose(losses, expected_losses, rtol=LOSS_TOLERANCE)
    error = np.linalg.norm(weights - expected_weights) / np.linalg.norm(expected_weights)
    assert error < WEIGHT_TOLERANCE


# --- jax -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax_results(tmp_path_factory):
    target = tmp_path_factory.mktemp("jax") / "results.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = pathlib.Path(__file__).with_name("run_jax.py")
    run("jax", script, target, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    return dict(np.load(target))


@pytest.mark.parametrize("kind", ["data", "model"])
def test_jax_distributions_train_as_one_device_does(jax_results, kind):
    assert jax_results["devices"] == 4
    assert_same_training(
        jax_results[f"{kind}/losses"],
        jax_results[f"{kind}/weights"],
        jax_results["none/losses"],
        jax_results["none/weights"],
    )


@pytest.mark.parametrize("kind", ["data", "model"])
def test_jax_distributions_generate_the_same_tokens(jax_results, kind):
    tokens = jax_results["none/tokens"]
    assert len(np.unique(tokens)) > 1
    np.testing.assert_array_equal(jax_results[f"{kind}/tokens"], tokens)


def test_jax_layout_map_divides_the_weights(jax_results):
    # Of one layer: four kernels and three biases of the attention, two kernels and a bias of the
    # feedforward network; and two embeddings.
    assert jax_results["model/sharded"] == 12
    assert jax_results["data/sharded"] == 0


@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.parametrize("part", ["training", "decoding"])
def test_jax_devices_do_not_exchange_query_key_and_value(jax_results, kind, part):
    collectives = json.loads(str(jax_results[f"{kind}/{part}"]))
    summed = collectives.pop("all-reduce")
    assert collectives == {"all-gather": 0, "all-to-all": 0, "collective-permute": 0}
    # The gradient of the concentration is a sum over the batch.
    assert summed == (part == "training")


# --- torch ---------------------------------------------------------------------------------------


def torch_results(folder, script, processes):
    """What a script printed and saved: losses, weights, continuation, and all of its output."""
    weights = folder / f"{script}.{processes}.weights.h5"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    arguments = [EXAMPLES / script, "--steps", STEPS, "--weights", weights]
    output = run("torch", *(launcher if processes > 1 else []), *arguments)
    arrays = []
    with h5py.File(weights) as file:
        file.visititems(
            lambda name, x: arrays.append((name, np.ravel(x))) if hasattr(x, "shape") else None
        )
    return {
        "losses": [float(x) for x in re.findall(r"^step \d+: loss (\S+)$", output, re.M)],
        "weights": np.concatenate([x for _, x in sorted(arrays, key=lambda item: item[0])]),
        "continuation": re.search(r"^continuation: .*$", output, re.M)[0],
        "output": output,
    }


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    return torch_results(tmp_path_factory.mktemp("torch"), "torch_ddp.py", 1)


@pytest.mark.parametrize("script", ["torch_ddp.py", "torch_fsdp2.py"])
def test_torch_processes_train_as_one_does(torch_alone, tmp_path, script):
    found = torch_results(tmp_path, script, 2)
    assert_same_training(
        found["losses"], found["weights"], torch_alone["losses"], torch_alone["weights"]
    )
    assert found["continuation"] == torch_alone["continuation"]
    if script == "torch_fsdp2.py":
        shares = re.findall(r"process \d holds (\d+) of (\d+) weights", found["output"])
        assert len(shares) == 2
        for held, number in shares:
            # An odd number of rows is not halved evenly.
            assert int(held) < 0.55 * int(number)


# --- tensorflow ----------------------------------------------------------------------------------


def test_tensorflow_mirrored_strategy_trains_as_one_device_does(tmp_path):
    target = tmp_path / "results.npz"
    run("tensorflow", pathlib.Path(__file__).with_name("run_tensorflow.py"), target)
    results = dict(np.load(target))
    assert results["replicas"] == 2
    assert_same_training(
        results["two/losses"], results["two/weights"], results["one/losses"], results["one/weights"]
    )
