"""Lists of the queries that chose each key block.

Letters: B batch, S positions, N heads, J key blocks, L places of a head's lists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """Lists of a call, in the order of the blocks.

    Block J's list begins at the place `entries * (starts[J] // entries + J)`, so that chunks of
    `entries` places never hold entries of two blocks and no list's place depends on how those
    before it were padded.
    """

    starts: jax.Array  # (B N, J + 1) int32, how many entries of a head belong to blocks before
    positions: jax.Array  # (B N, L, 1) int32, the entry's query, -1 at padding
    places: jax.Array  # (B N, S, slots) int32, where a query's entries are, -1 for none


def reverse_lists(plan, neighbors):
    """Lists the queries that chose a block, ascending.

    Args:
        plan: `Plan`.
        neighbors: Int32 array of shape `(B N, S, slots)`, block numbers or -1.

    Returns:
        `Lists`.
    """
    heads, blocks, entries = plan.batch_heads, plan.blocks, plan.entries
    per_head = plan.size * plan.slots
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    # Numbers of half the bytes take half the passes of a radix sort.
    dtype = jnp.uint16 if heads * (blocks + 1) <= 2**16 else jnp.uint32
    flat = neighbors.reshape(heads, per_head)
    labels = head * (blocks + 1) + jnp.where(flat < 0, blocks, flat)  # (B N, S slots)
    entry = jnp.arange(heads * per_head, dtype=jnp.int32)
    labels, order = jax.lax.sort(
        (labels.reshape(-1).astype(dtype), entry), num_keys=1, is_stable=True
    )
    borders = head * (blocks + 1) + jnp.arange(blocks + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(
        labels, borders.reshape(-1).astype(dtype), method="scan_unrolled"
    ).astype(jnp.int32)
    starts = starts.reshape(heads, blocks + 1) - head * per_head

    block = labels.astype(jnp.int32) % (blocks + 1)
    listed_head = entry // per_head
    start = starts.reshape(-1)[labels.astype(jnp.int32)]
    place = entries * (start // entries + block) + entry - listed_head * per_head - start
    is_listed = block < blocks
    # Entries without a block go to places of their own behind the end, where they are dropped.
    place = jnp.where(is_listed, listed_head * plan.listed + place, heads * plan.listed + entry)
    positions = jnp.full((heads * plan.listed,), -1, jnp.int32)
    positions = positions.at[place].set(
        order % per_head // plan.slots, mode="drop", unique_indices=True
    )
    place = jnp.where(is_listed, place - listed_head * plan.listed, -1)
    places = jnp.zeros((heads * per_head,), jnp.int32).at[order].set(place, unique_indices=True)
    return Lists(
        starts,
        positions.reshape(heads, plan.listed, 1),
        places.reshape(heads, plan.size, plan.slots),
    )
