"""The band of keys around each query, tile by tile.

Queries stand in tiles. The keys that a tile can see locally are those of a few tiles around it: its
slots, numbered by their distance. One slot of all tiles is one batched product.
"""

import numpy as np
import tensorflow as tf

from keras_rwr.backends.tensorflow.plan import ceil_div, sizes

# Slots on one side of a tile: each is written out in the program that XLA compiles.
_MOST_SLOTS = 8


class Band:
    """Tiles of a sequence and their slots.

    Args:
        like: Tensor of shape `(G, S, F)`, from whose shape sizes are taken where they are needed:
            a size that one function passes on to another would be no constant there.
        options: `Options`.

    Attributes:
        tile: Int, M.
        slots: Tuple of ints, the distances of the tiles that a tile faces, its own first.
    """

    def __init__(self, like, options):
        self.like, self.options = like, options
        size = like.shape[1]
        reach = min(options.window, size - 1) if isinstance(size, int) else options.window
        tile = options.block_size
        if tile is None:
            tile = 16
            while tile < 512 and 4 * tile <= reach:
                tile *= 2
        self.tile = max(tile, ceil_div(reach, _MOST_SLOTS))
        self.before = ceil_div(reach, self.tile)
        self.after = 0 if options.causal else self.before
        others = [d for d in range(-self.before, self.after + 1) if d != 0]
        self.slots = (0, *others)

    @property
    def size(self):
        """S: an int, or a scalar tensor."""
        return sizes(self.like)[1]

    @property
    def tiles(self):
        """C: an int, or a scalar tensor."""
        return ceil_div(self.size, self.tile)

    def split(self, x, fill=0.0):
        """`(G, S, F)` to tiles `(G, C, M, F)`, filled behind the last position."""
        groups, _, features = sizes(x)
        extra = self.tiles * self.tile - self.size
        if not (isinstance(extra, int) and extra == 0):
            x = tf.pad(x, [[0, 0], [0, extra], [0, 0]], constant_values=fill)
        return tf.reshape(x, (groups, self.tiles, self.tile, features))

    def join(self, x):
        """Undoes `split`."""
        groups, _, _, features = sizes(x)
        return tf.reshape(x, (groups, self.tiles * self.tile, features))[:, : self.size]

    def faced(self, x, fill=0.0):
        """What the tiles face, by slot: `(G, S, F)` to a dict of `(G, C, M, F)`."""
        tiles = self.split(x, fill)
        around = [[0, 0], [self.before, self.after], [0, 0], [0, 0]]
        tiles = tf.pad(tiles, around, constant_values=fill)
        return {slot: self._from(tiles, self.before + slot) for slot in self.slots}

    def received(self, parts):
        """Transpose of `faced`: a dict of `(G, C, M, F)` by slot, summed to `(G, S, F)`."""
        total = 0.0
        for slot, part in parts.items():
            around = [self.before + slot, self.after - slot]
            total += tf.pad(part, [[0, 0], around, [0, 0], [0, 0]])
        return self.join(self._from(total, self.before))

    def _from(self, tiles, first):
        return tiles[:, first : first + self.tiles]

    def near(self, slot):
        """Which pairs of a tile and a slot are local, as a constant `(M, M)`."""
        position = np.arange(self.tile)
        offset = slot * self.tile + position[None, :] - position[:, None]  # j - i
        near = np.abs(offset) <= self.options.window
        return near & (offset <= 0) if self.options.causal else near

    def keys(self, slot):
        """Positions of the keys in a slot, `(C, 1, M)`."""
        tile = tf.range(self.tiles)[:, None, None] + slot
        return tile * self.tile + tf.range(self.tile)


def dot(rows, columns):
    """`(..., M, F)` and `(..., L, F)` to the products of their vectors, `(..., M, L)`."""
    return tf.matmul(rows, columns, transpose_b=True)


def transposed(weights, rows):
    """`(..., M, L)` and `(..., M, F)` to `(..., L, F)`."""
    return tf.matmul(weights, rows, transpose_a=True)
