"""How a call's arrays `(B, S, N, F)` are handed to kernels, and back.

GPUs take a head's rows wherever they are in memory. TPUs take tiles of whole arrays' last two axes,
so that there they are brought together, `(B N, S, F)`.
"""

import jax.numpy as jnp


def by_head(x):
    """`(B, S, N, F)` to `(B N, S, F)`, which stays as it is."""
    if x.ndim == 3:
        return x
    batch, size, heads, features = x.shape
    return jnp.transpose(x, (0, 2, 1, 3)).reshape(batch * heads, size, features)


def pad(x, size, features):
    """`(B, S, N, F)` to `(B, size, N, features)`, zeros behind what there is."""
    beyond = ((0, 0), (0, size - x.shape[1]), (0, 0), (0, features - x.shape[3]))
    return jnp.pad(x, beyond) if any(after for _, after in beyond) else x


def arrange(x, plan, features):
    """An array as kernels take it, padded to the plan's sizes."""
    x = pad(x, plan.padded_size, features)
    return by_head(x) if plan.target == "tpu" else x


def tokens_shape(plan, features):
    """The shape of what `arrange` returns."""
    if plan.target == "tpu":
        return plan.batch * plan.heads, plan.padded_size, features
    return plan.batch, plan.padded_size, plan.heads, features


def restore(x, plan, features):
    """What `arrange` was given."""
    if x.ndim == 3:
        x = jnp.transpose(x.reshape(plan.batch, plan.heads, *x.shape[1:]), (0, 2, 1, 3))
    return x[:, : plan.size, :, :features]
