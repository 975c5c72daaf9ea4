"""Attends with interpreted Pallas kernels on one and on four devices: `run_pallas.py out.npz`."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import keras
import numpy as np
import run_jax

from keras_rwr.ops import rwr_attention

OPTIONS = {"window": 3, "topk": 4, "neighbor_block": 2, "steps": 2, "is_causal": True}


def loss(query, key, value):
    output = rwr_attention(
        query, key, value, implementation="pallas", dropout=0.1, seed=3, **OPTIONS
    )
    return jax.numpy.sum(output**2)


def main(target):
    results = {"devices": len(jax.devices())}
    arrays = jax.random.normal(jax.random.key(0), (3, 4, 13, 2, 8))
    for kind in run_jax.KINDS:
        distribution = run_jax.jax_distribution.make_distribution(kind)
        keras.distribution.set_distribution(distribution)
        inputs = list(arrays)
        if kind != "none":
            mesh = distribution.device_mesh.backend_mesh
            heads = "model" if kind == "model" else None
            spec = jax.sharding.PartitionSpec("batch", None, heads)
            inputs = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in inputs]
        program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs).compile()
        value, gradients = program(*inputs)
        results[f"{kind}/loss"] = value
        results[f"{kind}/gradients"] = np.stack(gradients)
        results[f"{kind}/gathers"] = run_jax.collectives(program.as_text())["all-gather"]
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
