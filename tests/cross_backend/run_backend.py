"""Runs fixed calls on one backend: `run_backend.py inputs.npz outputs.npz`."""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import oracle_gradients
from helpers import BACKEND, IMPLEMENTATIONS, value_and_gradients
from keras import ops

from keras_rwr.ops import rwr_attention


def main(source, target):
    inputs = dict(np.load(source))
    calls = json.loads(str(inputs.pop("calls")))
    results = {}
    for name, options in calls.items():
        for implementation in IMPLEMENTATIONS:
            results.update(run(inputs, options, implementation, f"{name}/{implementation}"))
    np.savez(target, **results)


def run(inputs, options, implementation, label):
    seed = ops.convert_to_tensor(inputs["seed"])
    mask = ops.convert_to_tensor(inputs["padding_mask"])

    def output(*tensors):
        return rwr_attention(
            **dict(zip(oracle_gradients.NAMES, tensors, strict=True)),
            padding_mask=mask,
            seed=seed,
            implementation=implementation,
            **options,
        )

    def loss(*tensors):
        result = output(*tensors)
        return ops.sum(result * ops.convert_to_tensor(inputs["cotangent"])), result

    arrays = [inputs[name] for name in oracle_gradients.NAMES]
    changed = [inputs[f"changed_{name}"] for name in oracle_gradients.NAMES[:3]] + arrays[3:]
    if BACKEND == "numpy":
        return {f"{label}/output": output(*arrays), f"{label}/changed": output(*changed)}
    result, gradients = value_and_gradients(loss, *arrays)
    after, _ = value_and_gradients(loss, *changed)
    found = {f"{label}/output": result, f"{label}/changed": after}
    for name, gradient in zip(oracle_gradients.NAMES, gradients, strict=True):
        found[f"{label}/{name}"] = gradient
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
