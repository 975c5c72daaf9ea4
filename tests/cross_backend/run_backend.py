"""Runs fixed calls on one backend: `run_backend.py inputs.npz outputs.npz`."""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from helpers import BACKEND, IMPLEMENTATIONS, value_and_gradients
from keras import ops

from keras_rwr.ops import rwr_attention


def main(source, target):
    stored = dict(np.load(source))
    calls = json.loads(str(stored.pop("calls")))
    results = {}
    for name, options in calls.items():
        prefix = f"{name}/"
        inputs = {
            key.removeprefix(prefix): x for key, x in stored.items() if key.startswith(prefix)
        }
        for implementation in IMPLEMENTATIONS:
            results.update(run(inputs, options, implementation, f"{name}/{implementation}"))
    np.savez(target, **results)


def run(inputs, options, implementation, label):
    inputs = dict(inputs)
    fixed = {name: ops.convert_to_tensor(inputs.pop(name)) for name in ("seed", "padding_mask")}
    cotangent = inputs.pop("cotangent")
    later = {name: inputs.pop(name) for name in list(inputs) if name.startswith("changed_")}

    def output(*tensors):
        given = dict(zip(inputs, tensors, strict=True))
        return rwr_attention(**given, **fixed, implementation=implementation, **options)

    def loss(*tensors):
        result = output(*tensors)
        return ops.sum(result * ops.convert_to_tensor(cotangent)), result

    arrays = list(inputs.values())
    changed = [later.get(f"changed_{name}", array) for name, array in inputs.items()]
    if BACKEND == "numpy":
        return {f"{label}/output": output(*arrays), f"{label}/changed": output(*changed)}
    result, gradients = value_and_gradients(loss, *arrays)
    after, _ = value_and_gradients(loss, *changed)
    found = {f"{label}/output": result, f"{label}/changed": after}
    for name, gradient in zip(inputs, gradients, strict=True):
        found[f"{label}/{name}"] = gradient
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
