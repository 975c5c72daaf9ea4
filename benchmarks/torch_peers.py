"""Attention that torch brings along: its fused kernels, and FlexAttention on tiles."""

import functools
import math

import numpy as np
from keras import ops

from benchmarks.cases import SEED
from benchmarks.peers import Peer, masked_formula, needs_half_on_gpu, op_builder, register

# FlexAttention skips tiles of this many queries by this many keys.
TILE = 128


def fused_builder(kernel):
    """`Peer.build` of `scaled_dot_product_attention` by one of its kernels alone."""

    def attention(case, query, key, value):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, kernel)):
            output = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)), is_causal=case.is_causal
            )
        return output.transpose(1, 2)

    return op_builder(attention)


# --- FlexAttention


def number_of_tiles(case):
    return math.ceil(case.tokens / TILE)


def choose_tiles(case):
    """Tiles outside the window that each tile of queries sees, as many as a query has blocks.

    Args:
        case: `Case`.

    Returns:
        Bool array of shape `(N, T, T)`, random tiles, fewer where there are not as many.
    """
    count = case.options.get("topk", 32) // case.options.get("neighbor_block", 16)
    tiles = number_of_tiles(case)
    rng = np.random.default_rng(SEED)
    chosen = np.zeros((case.heads, tiles, tiles), bool)
    for tile in range(tiles):
        candidates = max(0, tile - window_tiles(case))
        for head in range(case.heads):
            chosen[head, tile, rng.permutation(candidates)[:count]] = True
    return chosen


def window_tiles(case):
    """How many tiles before its own hold keys of a query's window."""
    return math.ceil(case.options.get("window", 128) / TILE)


def build_tiles_formula(case, inputs):
    """Explicit softmax attention over the window and the chosen tiles."""
    far = choose_tiles(case).repeat(TILE, 1).repeat(TILE, 2)[:, : case.tokens, : case.tokens]
    distance = np.arange(case.tokens)[:, None] - np.arange(case.tokens)
    near = (distance >= 0) & (distance <= case.options.get("window", 128))
    mask = ops.convert_to_tensor((far | near)[None])  # (1, N, S, S)
    return op_builder(lambda case, *arrays: masked_formula(*arrays, mask))(case, inputs)


def block_mask(case):
    """The `BlockMask` of the sequences of a batch one after the other, `(1, N, B S', B S')`.

    One shape for all lengths of as many tokens spares compiling anew. S' is S in full tiles: keys
    that fill the last one come after all queries, which do not see them.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    window, tiles = case.options.get("window", 128), number_of_tiles(case)

    def lists(sees):  # (N, T, T) of one sequence, to numbers and lists of tiles in all of them
        every = np.zeros((1, case.heads, case.batch, tiles, case.batch, tiles), bool)
        for sequence in range(case.batch):
            every[0, :, sequence, :, sequence] = sees
        every = every.reshape(1, case.heads, case.batch * tiles, case.batch * tiles)
        every = ops.convert_to_tensor(every.astype("int32"))
        # The kernels need each row to be a permutation, with the tiles that count in front.
        order = torch.argsort(every, dim=-1, descending=True, stable=True)
        return every.sum(-1, dtype=torch.int32), order.to(torch.int32)

    distance = np.arange(tiles)[:, None] - np.arange(tiles)
    near = (distance >= 0) & (distance <= window_tiles(case))
    near = np.broadcast_to(near, (case.heads, tiles, tiles))

    def in_window(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return BlockMask.from_kv_blocks(
        *lists(near), *lists(choose_tiles(case)), BLOCK_SIZE=TILE, mask_mod=in_window
    )


@functools.cache
def flex_attention():
    import torch
    from torch.nn.attention import flex_attention

    # Each head size, with and without gradients, for one sequence and for several.
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True)


def build_flex(case, inputs):
    import torch

    attend, mask = flex_attention(), block_mask(case)
    size, padded = case.tokens, number_of_tiles(case) * TILE

    def pack(x):  # (B, S, N, H) to (1, N, B S', H)
        if padded > size:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - size))
        return x.reshape(1, case.batch * padded, case.heads, case.head_size).transpose(1, 2)

    def attention(case, query, key, value):
        output = attend(pack(query), pack(key), pack(value), block_mask=mask)
        return output.transpose(1, 2).reshape(case.batch, padded, *query.shape[2:])[:, :size]

    return op_builder(attention)(case, inputs)


def flex_supports(case, device):
    if device != "gpu":
        return "it needs a GPU"
    if not case.is_causal:
        return "its tiles are chosen for causal attention"
    return None


for peer in (
    Peer(
        "torch-sdpa-flash",
        "torch scaled_dot_product_attention, its flash-attention kernels",
        *("op", "dense"),
        fused_builder("FLASH_ATTENTION"),
        needs_half_on_gpu,
        backend="torch",
        is_default=False,
    ),
    Peer(
        "torch-sdpa-cudnn",
        "torch scaled_dot_product_attention, cuDNN's kernels",
        *("op", "dense"),
        fused_builder("CUDNN_ATTENTION"),
        needs_half_on_gpu,
        backend="torch",
        is_default=False,
    ),
    Peer(
        "torch-flex",
        "torch FlexAttention on the window and, for each 128 queries, as many 128-token tiles as "
        "a query has blocks, chosen beforehand",
        *("op", "tiles"),
        build_flex,
        flex_supports,
        backend="torch",
        is_default=False,
    ),
    Peer(
        "tiles-formula",
        "softmax attention over the window and those tiles, with explicit scores",
        *("op", "tiles"),
        build_tiles_formula,
        is_default=False,
    ),
):
    register(peer)
