"""What a call of the kernels is about: its options, sizes and tiles, all static.

Letters: B batch, S positions, N heads, H head size, V value size, F walked features.
"""

import dataclasses
import math

import jax.numpy as jnp

# Below every cosine, its rounding included: no cut.
_NO_CUT = -2.0
# Entries of a list that are worked on at once.
_ENTRIES = 16
# Products over a walk's steps for which one factor is kept, in at most so many bytes; products that
# stand in one piece of code.
_KEPT, _KEPT_BYTES = 4, 64 * 1024
_PRODUCTS, _SINGLE_PRECISION_PRODUCTS = 24, 8
# Warps and stages of a kernel on GPUs, for features of at most `_WIDE`.
_TUNING = {
    "weigh": (1, 3),
    "spread": (1, 3),
    "collect": (1, 3),
    "far_gradients": (1, 3),
    "local": (4, 3),
    "step": (4, 2),
    "step_back": (4, 3),
    "finish": (4, 1),
    "query_gradients": (4, 2),
    "key_gradients": (4, 2),
}
# Keys that a tile of queries faces at a time, where that is less than a tile of them.
_COLUMNS = {"local": 32, "query_gradients": 32}
# Tokens in a tile by dtype; half precision with features beyond `_WIDE` takes the other one's.
_TILE, _SINGLE_PRECISION_TILE, _TPU_TILE = 64, 32, 128
_WIDE = 128
# Of tiles of more features, or of more states, shared memory has no room for a second stage.
_SLIM = 64
# Features of a TPU's tile are a multiple of this many.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call.

    Positions are padded to tiles of `tile`, features to powers of two. The band of a tile of
    queries is the `spans` tiles of keys from `before` tiles before its own on.
    """

    batch: int  # B
    size: int  # S
    heads: int  # N
    head_size: int  # H
    value_size: int  # V
    dtype: str
    target: str  # "gpu", "tpu" or "interpreter"
    tile: int
    head: int  # padded H
    values: int  # padded V
    alpha: float
    steps: int
    window: int
    cut: float
    exponential: bool
    reversible: bool
    reciprocal_beta: float
    causal: bool
    dropout: float
    biased: bool
    slots: int  # 0 without far edges
    width: int  # keys in a block

    @classmethod
    def create(
        cls, query_shape, value_size, dtype, config, target, *, slots=0, dropped=False, biased=False
    ):
        """The plan of a call; the arguments are those of `rwr_attention`, or facts of them."""
        batch, size, heads, head_size = query_shape
        dtype = jnp.dtype(dtype)
        head = padded(head_size, config.head_dim_pad)
        values = padded(value_size, config.head_dim_pad)
        tile = _TPU_TILE
        if target == "tpu":
            head, values = max(head, _LANES), max(values, _LANES)
        else:
            doublings = (dtype == jnp.float32) + (max(head, values) > _WIDE)
            tile = _SINGLE_PRECISION_TILE if doublings else _TILE
            if config.block_size is not None:
                largest = _SINGLE_PRECISION_TILE if doublings == 2 else _TILE
                tile = min(padded(config.block_size), largest)
            tile = min(tile, padded(size))
        return cls(
            batch=batch,
            size=size,
            heads=heads,
            head_size=head_size,
            value_size=value_size,
            dtype=dtype.name,
            target=target,
            tile=tile,
            head=head,
            values=values,
            alpha=config.alpha,
            steps=config.steps,
            window=min(config.window, size),
            cut=_NO_CUT if config.cut is None else float(config.cut),
            exponential=config.edge_weight == "exponential",
            reversible=config.reversible,
            # Without steps, the walk and its reversal are the same.
            reciprocal_beta=config.reciprocal_beta if config.reversible and config.steps else 1.0,
            causal=config.is_causal,
            dropout=config.dropout if dropped else 0.0,
            biased=biased,
            slots=slots if config.steps else 0,
            width=config.neighbor_block,
        )

    @property
    def batch_heads(self):
        return self.batch * self.heads

    @property
    def reciprocal(self):
        return self.reciprocal_beta < 1.0

    @property
    def mutual(self):
        """Whether far edges link both of their ends."""
        return self.slots > 0 and self.reversible and not self.causal

    @property
    def both(self):
        """Whether gradients of a tile's queries come from tiles of keys on both sides."""
        return self.reversible or not self.causal

    @property
    def keep_walking(self):
        return 1.0 - self.alpha

    @property
    def isolated(self):
        """The largest degree of an isolated token."""
        return 0.0 if self.exponential else 1e-6

    @property
    def logit_scale(self):
        return self.head_size**-0.5 * math.log2(math.e)

    def tuning(self, kernel):
        """Warps and stages of a kernel on GPUs."""
        warps, stages = _TUNING[kernel]
        if self.is_large:
            warps, stages = max(warps, 4), 1
        fits = self.is_short and (kernel == "far_gradients" or self.features <= _SLIM)
        if kernel in ("far_gradients", "query_gradients") and not fits:
            stages = 1
        return {"warps": warps, "stages": stages}

    def columns(self, kernel):
        """Keys that a tile of queries faces at a time."""
        return self.tile if self.target == "tpu" else min(_COLUMNS[kernel], self.tile)

    @property
    def features(self):
        """The most features of a tile."""
        return max(self.head, self.values)

    @property
    def is_large(self):
        """Whether a program's tiles take the room of twice as many in half precision."""
        return self.dtype == "float32" or self.features > _WIDE

    # --- tiles

    @property
    def keys(self):
        """Keys in a block, padded."""
        return padded(self.width)

    @property
    def blocks(self):
        return ceil_div(self.size, self.width)

    @property
    def tiles(self):
        needed = self.size
        if self.slots:
            needed = max(needed, (self.blocks - 1) * self.width + self.keys)
        return ceil_div(needed, self.tile)

    @property
    def padded_size(self):
        return self.tiles * self.tile

    @property
    def before(self):
        return ceil_div(min(self.window, self.size - 1), self.tile)

    @property
    def spans(self):
        return self.before + 1 if self.causal else 2 * self.before + 1

    @property
    def edge_spans(self):
        return 2 * self.before + 1 if self.both else self.before + 1

    # --- walk

    @property
    def state_parts(self):
        """Parts of a state: V, or V, V / pi and 1 / pi, each of `values` features."""
        return 3 if self.reciprocal else 1

    @property
    def state(self):
        """Features of a state, padded."""
        return self.state_parts * self.values

    @property
    def products(self):
        """Products that the gradient of an edge takes."""
        return self.steps * self.state_parts * (2 if self.reversible else 1)

    @property
    def is_short(self):
        """Whether a tile's states of all steps find room beside the work on them."""
        size = self.tile * self.values * jnp.dtype(self.dtype).itemsize
        return self.products <= _KEPT and self.products * size <= _KEPT_BYTES

    @property
    def is_long(self):
        """Whether products over all steps are a loop, and not one piece of code.

        A product in float32 is no instruction of its own: there, compiling takes long.
        """
        return self.products > (
            _SINGLE_PRECISION_PRODUCTS if self.dtype == "float32" else _PRODUCTS
        )

    @property
    def is_wide(self):
        """Whether weights, before the division by the degree, leave the range of the dtype."""
        return self.dtype == "float16" and (self.exponential or self.biased)

    @property
    def weight_dtype(self):
        return "float32" if self.is_wide else self.dtype

    @property
    def walks_at_once(self):
        """Whether the walk's first step is taken together with LOCAL."""
        return self.steps > 0 and not self.reciprocal and not self.is_wide

    @property
    def mass(self):
        return 1.0 - (1.0 - self.alpha) ** (self.steps + 1)

    # --- lists

    @property
    def entries(self):
        return _ENTRIES

    @property
    def listed(self):
        """Places in a head's lists; see `lists.reverse_lists`."""
        return (self.size * self.slots // self.entries + self.blocks) * self.entries


def most_places(query_shape, config):
    """At most so many places do all lists of a call have; see `Plan.listed`."""
    batch, size, heads, _ = query_shape
    entries = size * config.slots
    return batch * heads * (2 * entries + (ceil_div(size, config.neighbor_block) + 1) * _ENTRIES)


def padded(size, multiple=None):
    """The features of a tile: a power of two of at least 16, and of at least `multiple`."""
    if multiple is not None:
        size = math.ceil(size / multiple) * multiple
    return max(16, 1 << (size - 1).bit_length())


def ceil_div(x, y):
    return (x + y - 1) // y
