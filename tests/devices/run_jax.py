"""Trains, generates and compiles on one and on four CPU devices: `run_jax.py results.npz`.

It uses the functions of examples/distributed/jax_distribution.py, which sets the devices up.
"""

import json
import pathlib
import re
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "distributed"))

import jax_distribution  # isort: skip, it must be imported before jax
import jax
import keras
import language_model

from keras_rwr import _cache, _decoding
from keras_rwr._heads import Inputs
from keras_rwr.ops import rwr_attention
from keras_rwr.options import Options

KINDS = ("none", "data", "model")
STEPS, BATCH = 3, 8
SMALL = {"num_layers": 1, "steps": 2}  # less to compile


def main(target):
    results = {"devices": len(jax.devices())}
    for kind in KINDS:
        keras.distribution.set_distribution(jax_distribution.make_distribution(kind))
        # Dropout too: each device must drop the pairs of its own batch entries and heads.
        model, losses = jax_distribution.train(STEPS, BATCH, dropout=0.2, **SMALL)
        results[f"{kind}/losses"] = losses
        results[f"{kind}/weights"] = np.concatenate(
            [np.ravel(weight) for weight in model.trainable_variables]
        )
        results[f"{kind}/sharded"] = sum(
            not weight.value.sharding.is_fully_replicated for weight in model.trainable_variables
        )
        results[f"{kind}/tokens"] = language_model.continue_sequence(model)
        if kind != "none":
            for part, lowered in compile_parts(kind).items():
                results[f"{kind}/{part}"] = json.dumps(collectives(lowered.compile().as_text()))
    np.savez(target, **results)


OPTIONS = {
    "edge_weight": "exponential",
    "window": 7,
    "topk": 8,
    "neighbor_block": 4,
    "is_causal": True,
    "reversible": True,
}


def compile_parts(kind):
    """The attention's forward and backward pass, and its step in decoding, to compile."""
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    heads = "model" if kind == "model" else None

    def like(shape, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)

    def loss(query, key, value, concentration):
        options = {**OPTIONS, "concentration": concentration, "dropout": 0.1, "seed": 3}
        return jax.numpy.sum(rwr_attention(query, key, value, **options) ** 2)

    options = Options.pick(OPTIONS)
    sizes = _cache.Sizes(
        heads=2, kv_heads=2, key_dim=16, value_dim=16, graphs=2, graph_dim=16, has_graph=False
    )
    empty = _cache.empty_cache(options, sizes, 8, 64, "float32").tensors()

    def step(query, index, *rows):
        cache = _cache.WalkCache(**dict(zip(empty, rows, strict=True)))
        inputs = Inputs(query=query, key=query, value=query)
        output, cache = _decoding.attend(inputs, None, options, sizes, cache, index)
        return output, cache.tensors()

    x = like((8, 64, 2, 16), "batch", None, heads)
    cache = [like(x.shape, "batch", heads) for x in empty.values()]
    token = like((8, 1, 2, 16), "batch", None, heads)
    return {
        "training": jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, like((2,))),
        "decoding": jax.jit(step).lower(token, jax.numpy.int32(40), *cache),
    }


def collectives(text):
    """How many of each collective operation a compiled program has."""
    names = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    return {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in names}


if __name__ == "__main__":
    main(*sys.argv[1:])
