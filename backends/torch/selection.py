"""Chooses each query's key blocks, and lists the queries that chose a block.

Letters: B batch, S positions, N heads, H head size, J key blocks, E entries `B * N * S * slots`.
"""

import torch
import triton

from keras_rwr.backends.torch import selection_kernels as kernels
from keras_rwr.backends.torch.plan import LEAST_FEATURES
from keras_rwr.backends.torch.run import run

_LARGEST_INT = 2**31 - 1
# Numbers in a tile of keys that a program averages at once.
_AVERAGED = 16384
# Entries that a program labels with their lists.
_LABELED = 1024
# Queries in a tile that compares the members of groups.
_MEMBER_ROWS = 32
# Tiles of `select_two` by the padded head size, for few and for many blocks.
_FEW_BLOCKS = 2048
_TILES = {
    (64, False): {"ROWS": 128, "LANES": 32, "GROUP": 1, "STAGES": 3, "num_warps": 4},
    (64, True): {"ROWS": 128, "LANES": 32, "GROUP": 2, "STAGES": 3, "num_warps": 4},
    (128, False): {"ROWS": 128, "LANES": 32, "GROUP": 1, "STAGES": 3, "num_warps": 4},
    (128, True): {"ROWS": 128, "LANES": 32, "GROUP": 2, "STAGES": 3, "num_warps": 8},
    (256, False): {"ROWS": 64, "LANES": 32, "GROUP": 1, "STAGES": 2, "num_warps": 4},
    (256, True): {"ROWS": 64, "LANES": 32, "GROUP": 2, "STAGES": 2, "num_warps": 4},
}


def select_neighbors(query, key, padding_mask, slots, block, window, causal, block_size=None):
    """The best key blocks outside each query's window, by the mean of a block's unit keys.

    Args:
        query: Tensor of shape `(B, S, N, H)`, its last axis contiguous.
        key: Tensor of shape `(B, S, N, H)` of the same dtype, its last axis contiguous.
        padding_mask: `None` or contiguous bool tensor of shape `(B, S)`, true at real tokens.
        slots: Int >= 1. Blocks for each query.
        block: Int >= 1. Tokens in a block.
        window: Int >= 0. A block needs a real token farther from the query than this.
        causal: Bool. Only tokens before the query count.
        block_size: `None` or int. Queries in a tile, at most as many as without it.

    Returns:
        Int32 tensor of shape `(B, N, S, slots)` of block numbers, best first, -1 for none. Ties go
        to the lower block. In half precision and for at most two slots, blocks whose scores agree
        in 15 fraction bits may count as tied, in any order.
    """
    batch, size, heads, head_size = query.shape
    blocks = triton.cdiv(size, block)
    head = _padded(head_size)
    if query.dtype != torch.float32:
        head = max(head, LEAST_FEATURES)
    tile = _tile(query.dtype, head, blocks, slots)
    if block_size is not None:
        tile["ROWS"] = min(max(triton.next_power_of_2(block_size), 16), tile["ROWS"])
    means, first, last = average_blocks(key, padding_mask, block)

    def launch(kernel, source, **tile):
        chosen = query.new_empty((batch, heads, size, slots), dtype=torch.int32)
        run(
            kernel,
            (triton.cdiv(size, tile["ROWS"]) * batch * heads,),
            query,
            source,
            means,
            first,
            last,
            chosen,
            *query.stride()[:3],
            size,
            heads,
            batch * heads,
            blocks,
            min(window, size),
            SLOTS=slots,
            WIDTH=block,
            CAUSAL=causal,
            HEAD=head,
            HEAD_SIZE=head_size,
            **tile,
        )
        return chosen

    if "GROUP" not in tile:
        return launch(kernels.select_all, padding_mask, **tile)
    chosen = launch(kernels.select_two, padding_mask, **tile)
    if tile["GROUP"] > 1:
        members = {name: tile[name] for name in ("LANES", "GROUP")}
        chosen = launch(kernels.select_members, chosen, ROWS=_MEMBER_ROWS, **members)
    return chosen


def average_blocks(key, padding_mask, block):
    """The mean unit key of each block, and the block's first and last real position.

    Args:
        key: Tensor of shape `(B, S, N, H)`, its last axis contiguous.
        padding_mask: `None` or contiguous bool tensor of shape `(B, S)`, true at real tokens.
        block: Int >= 1. Tokens in a block.

    Returns:
        Tensor of shape `(B N, J, H)` in the dtype of `key`, 0 for a block of padding; and two int32
        tensors of shape `(B, J)`, or `None` twice without a mask.
    """
    batch, size, heads, head_size = key.shape
    blocks = triton.cdiv(size, block)
    means = key.new_empty((batch * heads, blocks, head_size))
    first = last = None
    if padding_mask is not None:
        first, last = key.new_empty((2, batch, blocks), dtype=torch.int32)
    head = _padded(head_size)
    tokens = min(triton.next_power_of_2(block), _AVERAGED // head)
    tile = min(_AVERAGED // (head * tokens), triton.next_power_of_2(blocks))
    run(
        kernels.average_blocks,
        (batch * heads * triton.cdiv(blocks, tile),),
        key,
        padding_mask,
        means,
        first,
        last,
        *key.stride()[:3],
        size,
        heads,
        blocks,
        WIDTH=block,
        TOKENS=tokens,
        BLOCKS=tile,
        HEAD=head,
        HEAD_SIZE=head_size,
        num_warps=4,
    )
    return means, first, last


def reverse_lists(neighbors, blocks):
    """Lists the queries that chose a block.

    Args:
        neighbors: Int32 tensor of shape `(B, N, S, slots)`, block numbers or -1.
        blocks: Int. J, the number of key blocks.

    Returns:
        Int32 tensor of shape `(E,)`: the entries `((batch * N + head) * S + query) * slots + slot`,
        ordered by batch entry, head and block, ascending for each block, and those without a block
        behind all others. And an int32 tensor of shape `(B * N * J + 1,)`: where the list of each
        block begins, and where the last one ends.

    Raises:
        ValueError: If there are 2**31 entries or more.
    """
    batch, heads, size, slots = neighbors.shape
    entries, lists = neighbors.numel(), batch * heads * blocks
    if entries > _LARGEST_INT:
        raise ValueError(
            f"`neighbors` must have at most {_LARGEST_INT} elements. "
            f"Received: neighbors of shape {tuple(neighbors.shape)}"
        )
    # Torch sorts by radix: numbers of half the bytes take half the passes.
    dtype, first = (torch.int16, -(2**15)) if lists < 2**16 - 1 else (torch.int32, 0)
    labels = torch.empty_like(neighbors, dtype=dtype).flatten()
    run(
        kernels.label_entries,
        (triton.cdiv(entries, _LABELED),),
        neighbors.contiguous(),
        labels,
        entries,
        size * slots,
        blocks,
        lists,
        first,
        ENTRIES=_LABELED,
        num_warps=4,
    )
    labels, order = torch.sort(labels, stable=True)
    borders = torch.arange(first, first + lists + 1, dtype=dtype, device=neighbors.device)
    return order.to(torch.int32), torch.searchsorted(labels, borders, out_int32=True)


def _tile(dtype, head, blocks, slots):
    """Tile sizes and warps; without a GROUP those of `select_all`."""
    if dtype == torch.float32:
        return {"ROWS": 32, "LANES": 32, "PART": min(head, 32), "num_warps": 4}
    tile = dict(_TILES[head, blocks > _FEW_BLOCKS])
    if slots <= 2 and blocks <= kernels.STEPS.value * tile["GROUP"] * tile["LANES"]:
        return tile
    return {"ROWS": 64, "LANES": 32, "PART": min(head, 128), "num_warps": 4}


def _padded(head_size):
    """The features of a tile."""
    return max(16, triton.next_power_of_2(head_size))
