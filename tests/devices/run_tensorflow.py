"""Trains on one and on two logical CPU devices: `run_tensorflow.py results.npz`.

It uses the functions of examples/distributed/tensorflow_mirrored.py.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "distributed"))

import tensorflow_mirrored
from tensorflow import distribute

STEPS, BATCH = 3, 8


def main(target):
    strategies = {
        "two": distribute.MirroredStrategy(tensorflow_mirrored.split_cpu(2)),
        "one": None,
    }
    results = {}
    for name, strategy in strategies.items():
        model, losses = tensorflow_mirrored.train(strategy, STEPS, BATCH, num_layers=1, steps=2)
        results[f"{name}/losses"] = losses
        results[f"{name}/weights"] = np.concatenate(
            [np.ravel(weight) for weight in model.trainable_variables]
        )
    results["replicas"] = strategies["two"].num_replicas_in_sync
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
