"""Attention that JAX brings along: XLA's, and cuDNN's with and without a window."""

import numpy as np
from keras import ops

from benchmarks.peers import Peer, masked_formula, needs_half_on_gpu, op_builder, register


def window_of(case):
    return case.options.get("window", 128)


def dot_product_attention(implementation, has_window=False):
    """`Peer.build` of `jax.nn.dot_product_attention`."""

    def attention(case, query, key, value):
        import jax

        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=case.is_causal,
            local_window_size=(window_of(case), 0) if has_window else None,
            implementation=implementation,
        )

    return op_builder(attention)


def window_formula(case, query, key, value):
    """Explicit softmax attention to the keys up to a window before a query."""
    position = np.arange(case.tokens)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance <= window_of(case))
    return masked_formula(query, key, value, ops.convert_to_tensor(mask))


def window_supports(case, device):
    return needs_half_on_gpu(case, device) or (
        None if case.is_causal else "its window reaches back from a query"
    )


for peer in (
    Peer(
        *("jax-xla", "jax.nn.dot_product_attention, XLA's own", "op", "dense"),
        dot_product_attention("xla"),
        backend="jax",
        is_default=False,
    ),
    Peer(
        *("jax-cudnn", "jax.nn.dot_product_attention, cuDNN's kernels", "op", "dense"),
        dot_product_attention("cudnn"),
        needs_half_on_gpu,
        backend="jax",
        is_default=False,
    ),
    Peer(
        "jax-cudnn-window",
        "jax.nn.dot_product_attention on the window alone, cuDNN's kernels",
        *("op", "window"),
        dot_product_attention("cudnn", has_window=True),
        window_supports,
        backend="jax",
        is_default=False,
    ),
    Peer(
        "window-formula",
        "softmax attention on the window, with explicit scores",
        *("op", "window"),
        op_builder(window_formula),
        is_default=False,
    ),
):
    register(peer)
