"""RWR attention in Triton, for torch on NVIDIA and AMD GPUs.

Forward and backward pass are kernels of their own, in memory linear in the number of tokens: see
`band_kernels`, `list_kernels` and `band_gradient_kernels` for the formulas, `forward` and
`backward` for their order, `operators` for how torch sees them. The sources of the ideas: online
softmax and the backward pass of LOCAL are FlashAttention's (Dao et al.,
https://arxiv.org/abs/2205.14135).
"""

import importlib.util
import os

import torch

from keras_rwr.backends.torch import operators, plan

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch: kernels run on the CPU, step by step, to be tested.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = ("float16", "float32") if _IS_INTERPRETED else ("bfloat16", "float16", "float32")
_LARGEST_HEAD = 256
_LARGEST_BLOCK = 128


def supports(spec):
    """Why the kernels of the whole operation cannot run a call, or `None`."""
    config = spec.config
    reason = supports_stages(spec)
    if reason is not None:
        return reason
    if config.edge_weight == "exponential" and config.reversible:
        return (
            "its kernels have no logarithms, which the scales of exponential edges both ways need"
        )
    if spec.has_graph:
        return "its kernels weigh edges as they go and cannot walk on a graph built earlier"
    if config.neighbor_block > _LARGEST_BLOCK:
        return f"its tiles hold a neighbor_block of at most {_LARGEST_BLOCK}"
    return None


def supports_stages(spec):
    """Why the kernels of stages cannot run a call, or `None`."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if spec.device != ("cpu" if _IS_INTERPRETED else "gpu"):
        where = "the CPU, where TRITON_INTERPRET=1 is set" if _IS_INTERPRETED else "a GPU"
        return f"its kernels run on {where}"
    if spec.dtype not in _DTYPES:
        return f"its kernels compute in {', '.join(_DTYPES)}"
    if spec.config.fusion != "sum":
        return f'fusion "{spec.config.fusion}" needs the dense rows of the walk'
    for name, size in (("head size", spec.query_shape[-1]), ("value size", spec.value_size)):
        if size is not None and size > _LARGEST_HEAD:
            return f"its tiles hold a {name} of at most {_LARGEST_HEAD}"
    return None


def stages():
    """The stages by name, see `keras_rwr._dispatch.Stages`."""
    from keras_rwr.backends.torch import local, select, vectors, walk, weigh

    return {
        "contain": vectors.contain,
        "unit": vectors.unit,
        "select": select.select,
        "weigh": weigh.weigh,
        "walk": walk.walk,
        "attend_locally": local.attend_locally,
    }


def select_neighbors(query, key, config, padding_mask=None):
    """Chooses each query's key blocks outside its window.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        config: The options, with the fields of `keras_rwr._dispatch.KernelCall`.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.

    Returns:
        Int32 tensor of shape `(B, N, S, topk / neighbor_block)`, -1 for none, or `None` when no
        token lies outside any window.
    """
    if config.slots == 0 or query.shape[1] <= config.window + 1:
        return None
    query, key = _same_dtype(query, key)
    return operators.select_neighbors(
        query,
        key,
        _as_bool(padding_mask),
        config.slots,
        config.neighbor_block,
        config.window,
        config.is_causal,
        config.block_size,
    )


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

    Under `torch.autocast` it computes, and returns, in the dtype of the cast. Float16 is taken to
    float32 for the reciprocal walk, whose 1 / pi leaves float16's range.

    Args:
        query: Tensor of shape `(B, S, N, H)`.
        key: Tensor of shape `(B, S, N, H)`.
        value: Tensor of shape `(B, S, N, V)`.
        config: The options, with the fields of `keras_rwr._dispatch.KernelCall`.
        lens_strength: Number, one a head, or tensor: gamma.
        concentration: Number, one a head, or tensor: kappa.
        discoverability: `None` or tensor of shape `(N, H)`, u.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        seed: `None`, int, or int tensor of shape `(2,)` or `(4,)`: dropout's.
        neighbors: `None` or what `select_neighbors` returned.
        graph: Not taken, see `supports`.

    Returns:
        Tensor of shape `(B, S, N, V)` in the dtype of `query`.
    """
    query, key, value = _same_dtype(query, key, value)
    dtype, heads, device = query.dtype, query.shape[2], query.device
    if dtype == torch.float16 and config.is_reciprocal:
        query, key, value = (x.float() for x in (query, key, value))
    padding_mask = _as_bool(padding_mask)
    if padding_mask is not None:
        value = torch.where(padding_mask[:, :, None, None], value, 0.0)
    bias = None
    if discoverability is not None:
        bias = _key_bias(key, discoverability, padding_mask)
    inputs = (
        query,
        key,
        value,
        bias,
        _per_head(concentration, heads, device),
        _per_head(lens_strength, heads, device),
        padding_mask,
        neighbors,
        plan.seed_words(seed, device) if config.dropout > 0.0 and seed is not None else None,
    )
    options = (
        config.alpha,
        config.steps,
        config.neighbor_block,
        config.window,
        config.cut,
        config.edge_weight == "exponential",
        config.reversible,
        config.reciprocal_beta,
        config.is_causal,
        config.dropout if seed is not None else 0.0,
        config.block_size,
        config.head_dim_pad,
    )
    return operators.rwr_attention(inputs, options).to(dtype)


def _same_dtype(first, *others):
    """All in the first one's dtype, or in that of `torch.autocast` where it is active."""
    dtype = first.dtype
    if torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) for x in (first, *others))


def _as_bool(mask):
    return None if mask is None else mask.to(torch.bool).contiguous()


def _key_bias(key, discoverability, padding_mask):
    """`clip(k_j u, -8, 8)`, 0 at padding: `(B, N, S)` in float32."""
    key = key.float()
    if padding_mask is not None:
        key = torch.where(padding_mask[:, :, None, None], key, 0.0)
    with torch.autocast(key.device.type, enabled=False):
        bias = torch.einsum("bsnh,nh->bns", key, discoverability.float())
    return bias.clamp(-8.0, 8.0).contiguous()


def _per_head(value, heads, device):
    """A number, or one a head, as a float32 tensor `(N,)`."""
    if isinstance(value, (int, float)):
        return torch.full((heads,), float(value), device=device)
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    return value.reshape(-1).expand(heads).contiguous()
