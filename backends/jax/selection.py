"""Chooses each query's key blocks.

Letters: B batch, S positions, N heads, J key blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from keras_rwr.backends.jax import launch
from keras_rwr.backends.jax.layout import by_head, pad
from keras_rwr.backends.jax.plan import ceil_div, padded
from keras_rwr.backends.jax.selection_kernels import LANES, NO_BLOCK, select_blocks

# Queries in a tile, and warps, in half precision and in float32.
_TILE, _WARPS, _STAGES = 64, 4, 3
# In half precision, more blocks than these are compared by groups.
_FEW_BLOCKS, _GROUP = 2048, 2
_SINGLE_PRECISION_TILE, _SINGLE_PRECISION_WARPS = 32, 4


@dataclasses.dataclass(frozen=True)
class SelectionPlan:
    """Static facts of one choice."""

    batch_heads: int
    size: int  # S
    tile: int
    head: int  # padded head size
    blocks: int  # J
    width: int  # keys in a block
    window: int
    slots: int
    causal: bool
    padded: bool  # whether there may be padding
    group: int  # blocks of a lane in one step
    target: str

    @property
    def tiles(self):
        return ceil_div(self.size, self.tile)

    @property
    def padded_size(self):
        return self.tiles * self.tile

    @property
    def span(self):
        """Tokens of a step's blocks."""
        return self.width * self.group * LANES

    @property
    def steps(self):
        return ceil_div(self.blocks, self.group * LANES)


def select_neighbors(query, key, config, real, target):
    """The best key blocks outside each query's window, by the mean of a block's unit keys.

    Args:
        query: Array of shape `(B, S, N, H)`, 0 at padding.
        key: Array of shape `(B, S, N, H)` of the same dtype, 0 at padding.
        config: The options, with the fields of `keras_rwr._dispatch.KernelCall`.
        real: `None` or bool array of shape `(B, S)`, true at real tokens.
        target: String, what the kernel is made for.

    Returns:
        Int32 array of shape `(B, N, S, slots)` of block numbers, best first, -1 for none. Ties go
        to the lower block, but for scores that differ by roundings in half precision.
    """
    batch, size, heads, head_size = query.shape
    is_half = query.dtype != jnp.float32
    blocks = ceil_div(size, config.neighbor_block)
    plan = SelectionPlan(
        batch_heads=batch * heads,
        size=size,
        tile=min(_TILE if is_half else _SINGLE_PRECISION_TILE, padded(size)),
        head=padded(head_size),
        blocks=blocks,
        width=config.neighbor_block,
        window=min(config.window, size),
        slots=config.slots,
        causal=config.is_causal,
        padded=real is not None,
        group=_GROUP if is_half and config.slots <= 2 and blocks > _FEW_BLOCKS else 1,
        target=target,
    )
    if real is None:
        real = jnp.ones((1, size), bool)
    means, first, last = _average_blocks(plan, key, real)
    rows = jnp.broadcast_to(real[:, None, :, None], (batch, heads, size, 1)).astype(jnp.int32)
    rows = rows.reshape(batch * heads, size, 1)
    rows = jnp.pad(rows, ((0, 0), (0, plan.padded_size - size), (0, 0)))
    query = pad(query, plan.padded_size, plan.head)
    chosen = jax.ShapeDtypeStruct((*rows.shape[:2], plan.slots), jnp.int32)

    found = launch.run(
        select_blocks,
        plan,
        (plan.tiles,),
        {
            "query": (query, launch.rows(query, plan.tile, plan.tiles)),
            "real": (rows, launch.rows(rows, plan.tile, plan.tiles)),
            "means": (means, launch.whole(means)),
            "first": (first, launch.whole(first)),
            "last": (last, launch.whole(last)) if not plan.causal else None,
        },
        {"neighbors": (chosen, launch.rows(chosen, plan.tile, plan.tiles))},
        warps=_WARPS if is_half else _SINGLE_PRECISION_WARPS,
        stages=_STAGES,
    )["neighbors"]
    return found[:, :size].reshape(batch, heads, size, plan.slots)


def _average_blocks(plan, key, real):
    """The mean unit key of each block, and its first and last real position.

    Returns:
        Array of shape `(B N, J', F)` in the dtype of `key`, 0 for a block of padding, and two int32
        arrays of shape `(B N, 1, J')`; J' is J in full steps.
    """
    batch, size, heads, _ = key.shape
    width, every = plan.width, plan.steps * plan.group * LANES
    missing = plan.blocks * width - size
    numbers = key.astype(jnp.float32)
    squares = jnp.sum(jnp.square(numbers), -1, keepdims=True)
    unit = numbers / jnp.sqrt(jnp.maximum(squares, 1e-12))
    unit = jnp.pad(unit, ((0, 0), (0, missing), (0, 0), (0, 0)))
    total = unit.reshape(batch, plan.blocks, width, heads, -1).sum(2)  # (B, J, N, H)
    real = jnp.pad(real, ((0, 0), (0, missing))).reshape(-1, plan.blocks, width)
    count = jnp.maximum(real.sum(-1), 1)[..., None, None]
    means = by_head(pad((total / count).astype(key.dtype), every, plan.head))

    position = jnp.arange(plan.blocks * width, dtype=jnp.int32).reshape(1, plan.blocks, width)
    first = jnp.where(real, position, NO_BLOCK).min(-1)
    last = jnp.where(real, position, -1).max(-1)

    def for_heads(x, nothing):
        beyond = ((0, 0), (0, every - plan.blocks))
        x = jnp.pad(x, beyond, constant_values=nothing)[:, None, None]
        return jnp.broadcast_to(x, (batch, heads, 1, every)).reshape(-1, 1, every)

    return means, for_heads(first, NO_BLOCK), for_heads(last, -1)
