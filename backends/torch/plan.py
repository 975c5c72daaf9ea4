"""What a call of the kernels is about: its options and tensors, tiles, and the sizes that follow.

Letters: B batch, S positions, N heads, H head size, V value size, F walked features, E entries
`B * N * S * slots`.
"""

import math
from typing import NamedTuple

import torch

# Below every cosine, its rounding included: no cut.
_NO_CUT = -2.0


class Options(NamedTuple):
    """The options of a call that are not tensors; see `keras_rwr._dispatch.KernelCall`."""

    alpha: float
    steps: int
    neighbor_block: int
    window: int
    cut: float | None
    exponential: bool
    reversible: bool
    reciprocal_beta: float
    causal: bool
    dropout: float
    block_size: int | None
    head_dim_pad: int | None

    @property
    def reciprocal(self):
        return self.reversible and self.reciprocal_beta < 1.0

    @property
    def mutual(self):
        """Whether a far edge links both of its ends."""
        return self.reversible and not self.causal

    @property
    def shares(self):
        """Factors of Z1 and of Z2 / Z3 in RWR."""
        if not self.reciprocal:
            return self.alpha, 0.0
        mass = 1.0 - (1.0 - self.alpha) ** (self.steps + 1)
        return self.reciprocal_beta * self.alpha, (1.0 - self.reciprocal_beta) * mass


class Inputs(NamedTuple):
    """The tensors of a call."""

    query: torch.Tensor  # (B, S, N, H)
    key: torch.Tensor  # (B, S, N, H)
    value: torch.Tensor  # (B, S, N, V)
    bias: torch.Tensor | None  # (B, N, S) float32, the logarithm of the discoverability
    concentration: torch.Tensor  # (N,) float32
    lens_strength: torch.Tensor  # (N,) float32
    padding_mask: torch.Tensor | None  # (B, S) bool
    neighbors: torch.Tensor | None  # (B, N, S, slots) int32
    seed: torch.Tensor | None  # (4,) int32


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    output: torch.Tensor  # (B, S, N, V)
    states: torch.Tensor  # (B, N, steps, S, F), Z^1 to Z^steps
    start: torch.Tensor | None  # (B, N, S, F), Z^0 unless that is the value
    scales: torch.Tensor  # (2, B, N, S), of query and key
    band: torch.Tensor  # (B, N, S, breadth), weights of local edges
    lse: torch.Tensor  # (B, N, S), log2 of LOCAL's sum
    share: torch.Tensor  # (B, N, S), 1 / D, 0 where isolated
    entries: torch.Tensor | None  # (E,), of all heads of the call
    starts: torch.Tensor | None  # (B * N * blocks + 1,)
    weights: torch.Tensor | None  # (B, N, S, slots, neighbor_block)


class Tile(NamedTuple):
    """Rows of a kernel's tile, and how it goes over the columns that they face."""

    rows: int
    columns: int
    warps: int
    stages: int


# By kernel and padded head size, in half precision; those of 64 and 128 measured on an H200.
_TILES = {
    ("local", 64): Tile(64, 16, 4, 4),
    ("local", 128): Tile(64, 32, 4, 3),
    ("local", 256): Tile(64, 32, 8, 1),
    ("step", 64): Tile(64, 32, 4, 4),
    ("step", 128): Tile(64, 32, 4, 4),
    ("step", 256): Tile(64, 64, 8, 2),
    ("edges", 64): Tile(64, 32, 4, 2),
    ("edges", 128): Tile(64, 32, 4, 2),
    ("edges", 256): Tile(64, 32, 8, 1),
    ("keys", 64): Tile(64, 64, 4, 2),
    ("keys", 128): Tile(64, 64, 4, 2),
    ("keys", 256): Tile(64, 64, 8, 1),
}
_SINGLE_PRECISION_TILE = Tile(32, 32, 4, 1)
# Hopper's own products have at least 64 rows. In those of fewer than 64 features Triton 3.6 reads
# beyond the end of shared memory.
LEAST_ROWS, LEAST_FEATURES = 64, 64

# Features of states side by side.
_JOINED = 512

# Entries at a time and warps of a kernel that goes over lists, for blocks of at most 16 keys in
# half precision; measured on an H200.
_LISTS = {
    ("weigh", 64): (16, 1),
    ("weigh", 128): (16, 1),
    ("spread", 64): (16, 1),
    ("spread", 128): (16, 1),
    ("collect", 64): (16, 1),
    ("collect", 128): (32, 1),
    ("gradients", 64): (16, 1),
    ("gradients", 128): (16, 2),
}
_OTHER_LIST = (32, 4)


class Plan:
    """Sizes and constants of one call, for its launches and for the shapes of its results.

    A call may be a piece of another one: `first_head` counts the heads before it.
    """

    def __init__(self, inputs, options, first_head=0):
        self.inputs, self.options = inputs, options
        query, value = inputs.query, inputs.value
        self.batch, self.size, self.heads, self.head_size = query.shape
        self.value_size = value.shape[-1]
        self.batch_heads = self.batch * self.heads
        self.dtype = query.dtype
        self.head = padded(self.head_size, options.head_dim_pad)
        self.values = padded(self.value_size, options.head_dim_pad)
        self.rows = None if options.block_size is None else min(padded(options.block_size), 128)
        if self.dtype != torch.float32 and (self.rows or 0) >= LEAST_ROWS:
            self.head, self.values = (max(x, LEAST_FEATURES) for x in (self.head, self.values))
        self.walked = 2 * self.value_size + 1 if options.reciprocal else self.value_size
        self.width = options.neighbor_block
        self.blocks = ceil_div(self.size, self.width)
        self.slots = 1 if inputs.neighbors is None else inputs.neighbors.shape[-1]
        self.first_entry = first_head * self.size * self.slots
        self.logit_scale = self.head_size**-0.5 * math.log2(math.e)
        self.keep_walking = 1.0 - options.alpha
        # Before the division by D, weights may leave the range of half precision.
        is_wide = self.dtype == torch.float16 and (options.exponential or inputs.bias is not None)
        self.weight_dtype = torch.float32 if is_wide else self.dtype
        self.kept_scale = 1.0 / (1.0 - options.dropout)
        self.edges = {
            "CUT": _NO_CUT if options.cut is None else float(options.cut),
            "EXPONENTIAL": options.exponential,
            "REVERSIBLE": options.reversible,
            "WINDOW": min(options.window, self.size),
            "PADDED": inputs.padding_mask is not None,
        }
        self.dropped = int(options.dropout * 2**31)
        self.lists = {
            "SLOTS": self.slots,
            "WIDTH": self.width,
            "KEYS": padded(self.width),
        }
        self.heads_of = {"HEAD": self.head, "HEAD_SIZE": self.head_size}
        self.values_of = {"VALUE": self.values, "VALUE_SIZE": self.value_size}
        self.state_of = {"STATE": self.values, "STATE_SIZE": self.walked}
        # Steps whose states stand side by side, for one product of concatenated factors. Registers
        # hold those of one direction.
        joined = self.values if options.reversible else _JOINED
        self.group = min(next_power_of_2(max(options.steps, 1)), max(joined // self.values, 1))
        self.state_parts = ceil_div(self.walked, self.values)

    def tile(self, kernel):
        """How a kernel goes over its rows, for the head size and dtype."""
        tile = _SINGLE_PRECISION_TILE
        if self.dtype != torch.float32:
            tile = _TILES[kernel, min(max(self.head, self.values, 64), 256)]
            if min(self.head, self.values) < LEAST_FEATURES:
                tile = tile._replace(rows=LEAST_ROWS // 2)
        if self.rows is not None:
            tile = tile._replace(rows=self.rows)
        if self.edges["PADDED"]:
            # There, loads decide which others are made. Triton 3.6 prefetches such a load into the
            # place of the one before, which other warps may not have read yet.
            tile = tile._replace(stages=1)
        return tile._replace(columns=min(tile.columns, tile.rows))

    def listing(self, kernel):
        """How a kernel goes over lists of entries, for the head size and dtype."""
        entries, warps = _OTHER_LIST
        if self.dtype != torch.float32 and self.width <= 16:
            head = max(self.head, self.values, 64)
            entries, warps = _LISTS.get((kernel, head), _OTHER_LIST)
        # Entries say where to load from: what `tile` says of padding holds for several warps.
        return {"ENTRIES": entries, "num_warps": warps, "num_stages": 3 if warps == 1 else 1}

    def band(self, both):
        """Sizes of what is stored for each pair of the band, for one or both directions.

        See `tiles.locate_in_band`.
        """
        reach = ceil_div(self.edges["WINDOW"], 8) * 8
        return self.batch, self.heads, self.size, (2 if both else 1) * reach + 8

    def grid(self, rows, parts=1):
        return (ceil_div(self.size, rows) * self.batch_heads, parts)

    def numbers(self):
        """An empty float32 tensor of one number a token."""
        return self.empty(self.batch, self.heads, self.size, dtype=torch.float32)

    def empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.inputs.query.device)

    def allocate(self, keep, lists=None):
        """Room for all that a forward pass makes, with `keep` for the backward pass.

        Args:
            keep: Bool. Whether to keep all states of the walk, not the last two.
            lists: `None` for room, or entries and starts.

        Returns:
            `Saved`.
        """
        options = self.options
        start = entries = starts = weights = None
        if options.reciprocal:
            start = self.empty(self.batch, self.heads, self.size, self.walked)
        if self.inputs.neighbors is not None:
            shape = self.batch, self.heads, self.size, self.slots
            entries, starts = lists or (
                self.empty(math.prod(shape), dtype=torch.int32),
                self.empty(self.batch_heads * self.blocks + 1, dtype=torch.int32),
            )
            weights = self.empty(*shape, self.width, dtype=self.weight_dtype)
        # A walk whose states are not kept goes back and forth between two of them.
        states = max(options.steps if keep else min(options.steps, 2), 1)
        return Saved(
            output=self.empty(self.batch, self.size, self.heads, self.value_size),
            states=self.empty(self.batch, self.heads, states, self.size, self.walked),
            start=start,
            scales=self.empty(2, self.batch, self.heads, self.size, dtype=torch.float32),
            band=self.empty(*self.band(not options.causal), dtype=self.weight_dtype),
            lse=self.numbers(),
            share=self.numbers(),
            entries=entries,
            starts=starts,
            weights=weights,
        )


def padded(size, multiple=None):
    """The features of a tile: a power of two of at least 16, and of at least `multiple`."""
    if multiple is not None:
        size = math.ceil(size / multiple) * multiple
    return max(16, next_power_of_2(size))


def next_power_of_2(x):
    return 1 << (x - 1).bit_length()


def ceil_div(x, y):
    return (x + y - 1) // y


def seed_words(seed, device):
    """A seed as four int32 words, see `keras_rwr._dropout`."""
    if isinstance(seed, int):
        seed = torch.full((1,), (seed + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    seed = seed.to(device=device, dtype=torch.int32)
    return torch.nn.functional.pad(seed, (0, 4 - seed.shape[0]))
