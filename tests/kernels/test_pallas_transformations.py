"""The Pallas kernels under jax's transformations, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCES, assert_close, compiled

import keras_rwr
from keras_rwr.ops import rwr_attention

OPTIONS = {"window": 3, "topk": 4, "neighbor_block": 2, "steps": 2, "is_causal": True}


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def attend(x, **options):
    """Self-attention of (B, S, N, H) with itself."""
    options = {"implementation": "pallas", **OPTIONS, **options}
    return rwr_attention(x, x[..., ::-1], 0.5 * x, **options)


def loss(attend, x):
    return jnp.sum(jnp.cos(jnp.arange(x.size)).reshape(x.shape) * attend(x))


@functools.cache
def expected():
    """Of two sequences: outputs and gradients of the portable implementation."""
    run = functools.partial(attend, implementation="portable")
    x = draw(2, 13, 2, 5)
    found = [compiled(jax.value_and_grad(lambda x: loss(run, x[None])))(one) for one in x]
    return x, [jnp.stack(part) for part in zip(*found, strict=True)]


def test_vmap_of_gradients():
    x, (values, gradients) = expected()
    run = compiled(jax.vmap(jax.value_and_grad(lambda x: loss(attend, x[None]))))
    found = run(x)
    assert_close(found[0], values, TOLERANCES["output"])
    assert_close(found[1], gradients, TOLERANCES["gradient"])


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_scan_over_layers(is_checkpointed):
    scales = jnp.array([0.5, 0.25])

    def layers(attend, x):
        def layer(x, scale):
            return x + scale * attend(x), None

        layer = jax.checkpoint(layer) if is_checkpointed else layer
        return jax.lax.scan(layer, x, scales)[0]

    x = draw(1, 13, 1, 5)
    gradients = [
        compiled(jax.grad(functools.partial(loss, functools.partial(layers, run))))(x)
        for run in (attend, functools.partial(attend, implementation="portable"))
    ]
    # Layer upon layer, roundings choose no other blocks here, but add up.
    assert_close(*gradients, 2 * TOLERANCES["gradient"])


def test_shard_map_over_heads():
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    x, (_, gradients) = expected()
    run = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    cotangent = jnp.cos(jnp.arange(x[0].size)).reshape(x[0].shape)
    found = compiled(lambda x: jax.vjp(run, x)[1](jnp.stack([cotangent] * 2))[0])(x)
    assert_close(found, gradients, TOLERANCES["gradient"])


def test_layer_in_half_precision():
    layer = keras_rwr.RWRAttention(
        num_heads=2, key_dim=4, window=3, topk=4, neighbor_block=2, steps=1,
        implementation="pallas", dtype="mixed_bfloat16",
    )  # fmt: skip
    exact = keras_rwr.RWRAttention.from_config(
        {**layer.get_config(), "implementation": "reference", "dtype": "float32"}
    )
    x = np.asarray(draw(1, 13, 8))
    outputs = []
    for one in (layer, exact):
        one.build(x.shape, x.shape)
        for variable, other in zip(one.weights, layer.weights, strict=True):
            variable.assign(other)
        outputs.append(one(x, x, use_causal_mask=True))
    assert outputs[0].dtype == "bfloat16"
    assert_close(outputs[0].astype("float32"), outputs[1], 2e-2)
