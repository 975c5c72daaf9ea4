"""RWR attention in Pallas, for JAX on NVIDIA GPUs through Pallas's Triton lowering.

Forward and backward pass are kernels of their own, in memory linear in the number of tokens: see
`band_kernels`, `list_kernels`, `gradient_kernels` and `selection_kernels` for the formulas,
`forward` and `backward` for their order, `operation` for how JAX differentiates them, `lists` for
the queries that chose a key block. Online softmax and the backward pass of LOCAL are
FlashAttention's (Dao et al., https://arxiv.org/abs/2205.14135).

Where the environment variable KERAS_RWR_INTERPRET is 1, Pallas interprets the kernels on the CPU.
"""

import os

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax.layout import arrange, by_head, pad, restore
from keras_rwr.backends.jax.plan import Plan, most_places, padded

# What the kernels are made for: "gpu", "tpu" (to export only) or "interpreter".
target = "interpreter" if os.environ.get("KERAS_RWR_INTERPRET") == "1" else "gpu"

_DEVICES = {"gpu": "gpu", "interpreter": "cpu"}
_DTYPES = ("bfloat16", "float16", "float32")
_LARGEST_HEAD = 256
_LARGEST_BLOCK = 128
_LARGEST_INT = 2**31 - 1


def supports(spec):
    """Why the kernels cannot run a call, or `None`."""
    config = spec.config
    if spec.device == "tpu":
        return "its kernels lower for a TPU but were never run on one"
    if spec.device != _DEVICES.get(target):
        interpreted = target == "interpreter"
        where = "the CPU, where KERAS_RWR_INTERPRET=1 is set" if interpreted else "a GPU"
        return f"its kernels run on {where}"
    if spec.dtype not in _DTYPES:
        return f"its kernels compute in {', '.join(_DTYPES)}"
    if config.fusion != "sum":
        return f'fusion "{config.fusion}" needs the dense rows of the walk'
    if config.edge_weight == "exponential" and config.reversible:
        return (
            "its kernels have no logarithms, which the scales of exponential edges both ways need"
        )
    if spec.has_graph:
        return "its kernels weigh edges as they go and cannot walk on a graph built earlier"
    if not all(isinstance(size, int) for size in spec.query_shape):
        return "its tiles need to know the shape of the query"
    sizes = {"head size": spec.query_shape[-1], "value size": spec.value_size}
    features = {name: padded(size, config.head_dim_pad) for name, size in sizes.items()}
    for name, size in features.items():
        if size > _LARGEST_HEAD:
            return f"its tiles hold a {name} of at most {_LARGEST_HEAD}"
    is_wide = max(features.values()) > _LARGEST_HEAD // 2
    largest = _LARGEST_BLOCK // 2 if is_wide else _LARGEST_BLOCK
    if config.neighbor_block > largest:
        heads = f" with heads beyond {_LARGEST_HEAD // 2}" if is_wide else ""
        return f"its tiles hold a neighbor_block of at most {largest}{heads}"
    if most_places(spec.query_shape, config) > _LARGEST_INT:
        return f"its lists have at most {_LARGEST_INT} places"
    return None


def select_neighbors(query, key, config, padding_mask=None):
    """Chooses each query's key blocks outside its window.

    Args:
        query: Array of shape `(B, S, N, H)`.
        key: Array of shape `(B, S, N, H)`.
        config: The options, with the fields of `keras_rwr._dispatch.KernelCall`.
        padding_mask: `None` or array of shape `(B, S)`, true at real tokens.

    Returns:
        Int32 array of shape `(B, N, S, topk / neighbor_block)`, -1 for none, or `None` when no
        token lies outside any window.
    """
    from keras_rwr.backends.jax import selection

    if config.slots == 0 or query.shape[1] <= config.window + 1:
        return None
    query, key = (jax.lax.stop_gradient(x.astype(query.dtype)) for x in (query, key))
    real = None
    if padding_mask is not None:
        real = padding_mask.astype(bool)
        query, key = (jnp.where(real[:, :, None, None], x, 0) for x in (query, key))
    return selection.select_neighbors(query, key, config, real, target)


def rwr_attention(
    query,
    key,
    value,
    config,
    *,
    lens_strength,
    concentration,
    discoverability=None,
    padding_mask=None,
    seed=None,
    neighbors=None,
    graph=None,
):
    """RWR attention of one sequence with itself.

    Float16 is taken to float32 for the reciprocal walk, whose 1 / pi leaves float16's range.

    Args:
        query: Array of shape `(B, S, N, H)`.
        key: Array of shape `(B, S, N, H)`.
        value: Array of shape `(B, S, N, V)`.
        config: The options, with the fields of `keras_rwr._dispatch.KernelCall`.
        lens_strength: Number, one a head, or array: gamma.
        concentration: Number, one a head, or array: kappa.
        discoverability: `None` or array of shape `(N, H)`, u.
        padding_mask: `None` or array of shape `(B, S)`, true at real tokens.
        seed: `None`, int, or int array of shape `(2,)` or `(4,)`: dropout's.
        neighbors: `None` or what `select_neighbors` returned.
        graph: Not taken, see `supports`.

    Returns:
        Array of shape `(B, S, N, V)` in the dtype of `query`.
    """
    from keras_rwr.backends.jax.call import Inputs
    from keras_rwr.backends.jax.operation import attend

    batch, size, heads, _ = query.shape
    returned = query.dtype
    dtype = returned
    if dtype == jnp.float16 and config.is_reciprocal:
        dtype = jnp.float32
    dropped = seed is not None and config.dropout > 0.0
    plan = Plan.create(
        query.shape,
        value.shape[-1],
        dtype,
        config,
        target,
        slots=0 if neighbors is None else neighbors.shape[-1],
        dropped=dropped,
        biased=discoverability is not None,
    )
    real = jnp.ones((1, size, 1, 1), bool)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if padding_mask is not None:
        real = padding_mask.astype(bool)[:, :, None, None]  # (B, S, 1, 1)
        query, key, value = (jnp.where(real, x, 0) for x in (query, key, value))
    bias = word = None
    if discoverability is not None:
        bias = jnp.where(real, _key_bias(key, discoverability)[..., None], 0.0)  # (B, S, N, 1)
        bias = by_head(pad(bias, plan.padded_size, 1))
    if dropped:
        word = _dropout_words(_seed_words(seed), batch, heads)
    everywhere = jnp.broadcast_to(real, (batch, size, heads, 1))
    inputs = Inputs(
        query=arrange(query, plan, plan.head),
        key=arrange(key, plan, plan.head),
        value=arrange(value, plan, plan.values),
        bias=bias,
        sharpness=jnp.tile(_per_head(concentration, heads), batch).reshape(-1, 1, 1),
        real=by_head(pad(everywhere, plan.padded_size, 1)),
        neighbors=neighbors.reshape(batch * heads, size, -1) if plan.slots else None,
        word=word,
    )
    local, state = attend(plan, inputs)
    local = restore(local, plan, plan.value_size).astype(jnp.float32)  # (B, S, N, V)
    walked = _end_walk(restore(state, plan, plan.state).astype(jnp.float32), real, plan)
    output = local + _per_head(lens_strength, heads)[:, None] * walked[..., : plan.value_size]
    return jnp.where(real, output, 0.0).astype(returned)


def _end_walk(state, real, plan):
    """The walk's sum for its last state, `(B, S, N, F)`; see `keras_rwr.portable.walk_end`."""
    walked = plan.alpha * state
    if not plan.reciprocal:
        return walked
    forward, backward, total = jnp.split(walked, 3, axis=-1)
    total = jnp.where(real, total[..., :1], 1.0)
    # 1 / total, whose gradient does not overflow where 1 / total**2 would.
    scale = jax.lax.stop_gradient(total)
    backward *= plan.mass * (1.0 / scale) * (1.0 / (total / scale))
    return plan.reciprocal_beta * forward + (1.0 - plan.reciprocal_beta) * backward


def _key_bias(key, discoverability):
    """`clip(k_j u, -8, 8)` in float32: `(B, S, N)`."""
    bias = jnp.einsum(
        "bsnh,nh->bsn",
        key.astype(jnp.float32),
        jnp.asarray(discoverability).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.clip(bias, -8.0, 8.0)


def _per_head(value, heads):
    """A number, or one a head, as a float32 array `(N,)`."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32).reshape(-1), (heads,))


def _seed_words(seed):
    """A seed as four int32 words, see `keras_rwr._dropout`."""
    if isinstance(seed, int):
        seed = jnp.array([(seed + 2**31) % 2**32 - 2**31], jnp.int32)
    seed = jnp.asarray(seed).astype(jnp.int32)
    return jnp.pad(seed, (0, 4 - seed.shape[0]))


def _dropout_words(seed, batch, heads):
    """The hash of the seed and of each batch entry and head, uint32 `(B * N, 1, 1)`."""
    from keras_rwr.backends.jax.tiles import mix

    first, second, entry, head = seed.astype(jnp.uint32)
    entries = entry + jnp.arange(batch, dtype=jnp.uint32)[:, None]
    heads = head + jnp.arange(heads, dtype=jnp.uint32)
    return mix(mix(mix(mix(first) ^ second) ^ entries) ^ heads).reshape(-1, 1, 1)
