"""What is known of a sparse matrix and of features when kernels are compiled."""

import math
from typing import NamedTuple

from keras_rwr.backends.torch.run import next_power_of_2

_UNROLLED = 4
_ENTRIES = 128


class Shape(NamedTuple):
    """One constant of kernels.

    Attributes:
        tile: Rows of a tile of the band.
        rows: A power of two, of at least `tile` rows.
        spans: Tiles of columns in the band.
        before: Spans before a tile's own.
        slots: Key blocks that a row has far edges to.
        block: Keys in a block.
        unrolled: Far edges of a row whose loads are in flight together, a divisor of their number.
        entries: Entries of lists in one product.
        features: Features of a head.
        columns: A power of two, how many of them are loaded at once.
    """

    tile: int
    rows: int
    spans: int
    before: int
    slots: int
    block: int
    unrolled: int
    entries: int
    features: int
    columns: int


def shape_of(local, neighbors, before, block, size, features):
    """The `Shape` of a matrix with or without a band and far edges, all features at once."""
    tile = min(size, 64) if local is None else local.shape[3]
    slots = 0 if neighbors is None else neighbors.shape[3]
    return Shape(
        tile=tile,
        rows=max(next_power_of_2(tile), 16),
        spans=0 if local is None else local.shape[4] // tile,
        before=before,
        slots=slots,
        block=block,
        unrolled=math.gcd(slots * block, _UNROLLED),
        entries=_ENTRIES,
        features=features,
        columns=max(next_power_of_2(features), 16),
    )


def warps_of(shape, itemsize):
    """Warps for products with all features of a head, numbers of so many bytes."""
    return 4 if shape.features * itemsize <= 256 else 8
