"""RWR attention of arranged arrays as one function, and how JAX differentiates it."""

import functools

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax.backward import Backward
from keras_rwr.backends.jax.forward import Forward
from keras_rwr.backends.jax.layout import by_head
from keras_rwr.backends.jax.lists import reverse_lists


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, inputs):
    """LOCAL and the walk's last state.

    Args:
        plan: `Plan`.
        inputs: `Inputs`.

    Returns:
        Arrays of shape `(B, S, N, F)`: LOCAL, and Z^steps, whose features are those of
        `Plan.state_parts`.
    """
    saved = _forward(plan, inputs)
    return saved.local, saved.states[-1]


def _attend_forward(plan, inputs):
    saved = _forward(plan, inputs)
    return (saved.local, saved.states[-1]), saved


def _attend_backward(plan, saved, cotangents):
    return (Backward(plan, saved.inputs, saved.scales, saved.lists).backward(saved, *cotangents),)


attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan, inputs):
    scales = tuple(_scale(x, inputs.real) for x in (inputs.query, inputs.key))
    lists = reverse_lists(plan, inputs.neighbors) if plan.slots else None
    return Forward(plan, inputs, scales, lists).forward()


def _scale(x, real):
    """`1 / max(|x|, 1e-6)`, -1 at padding: `(B, S, N, F)` to `(B N, S, 1)`."""
    squares = by_head(jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
    return jnp.where(real, jax.lax.rsqrt(jnp.maximum(squares, 1e-12)), -1.0)
