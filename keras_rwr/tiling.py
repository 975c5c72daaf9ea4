"""Positions in tiles and the band of keys that each tile of queries faces."""

import dataclasses
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Positions in tiles of `tile`, each facing the band of `before` + 1 + `after` tiles.

    Args:
        size: Int, or scalar tensor where the length is dynamic. Number of positions S.
        tile: Int. Positions in a tile, M.
        before: Int. Tiles of the band before a tile's own.
        after: Int. Tiles of the band after a tile's own.
    """

    size: Any
    tile: int
    before: int
    after: int

    @classmethod
    def create(cls, size, config):
        """Chooses the tile for a window: half of it, so that a band is about 1.5 windows wide."""
        tile = config.block_size
        if tile is None:
            tile = 16
            while tile < 512 and 4 * tile <= config.window:
                tile *= 2
        reach = config.window
        if isinstance(size, int):
            tile = min(tile, size)
            reach = min(reach, size - 1)
        before = -(-reach // tile)
        return cls(size, tile, before, 0 if config.is_causal else before)

    @property
    def tiles(self):
        return -(-self.size // self.tile)

    @property
    def padded_size(self):
        return self.tiles * self.tile

    def pad(self, x):
        """Zeros behind the last position: `(B, N, S, F)`, `(B, N, padded_size, F)`."""
        extra = self.padded_size - self.size
        if isinstance(extra, int) and extra == 0:
            return x
        return ops.concatenate(
            [x, ops.zeros((*ops.shape(x)[:-2], extra, x.shape[-1]), x.dtype)], axis=-2
        )

    def cut(self, x):
        """Undoes `pad`."""
        return x[..., : self.size, :]

    def split(self, x):
        """`(B, N, padded_size, F)` to `(B, N, C, M, F)`."""
        return ops.reshape(x, (*ops.shape(x)[:2], self.tiles, self.tile, x.shape[-1]))

    def join(self, x):
        """Undoes `split`."""
        return ops.reshape(x, (*ops.shape(x)[:2], self.padded_size, x.shape[-1]))

    def band(self, x):
        """What each tile faces: `(B, N, C, M, F)` to `(B, N, C, L, F)`, zeros beyond the ends."""
        x = ops.pad(x, ((0, 0), (0, 0), (self.before, self.after), (0, 0), (0, 0)))
        shifts = range(self.before + 1 + self.after)
        return ops.concatenate([x[:, :, s : s + self.tiles] for s in shifts], axis=-2)

    def unband(self, x):
        """Transpose of `band`: sums what each tile was faced with, back to `(B, N, C, M, F)`."""
        total = self.before + 1 + self.after
        received = 0
        for s in range(total):
            part = x[..., s * self.tile : (s + 1) * self.tile, :]
            part = ops.pad(part, ((0, 0), (0, 0), (s, total - 1 - s), (0, 0), (0, 0)))
            received = received + part[:, :, self.before : self.before + self.tiles]
        return received

    def offsets(self):
        """Key position minus query position, `(M, L)`."""
        length = (self.before + 1 + self.after) * self.tile
        keys = ops.arange(length, dtype="int32") - self.before * self.tile
        return keys[None, :] - ops.arange(self.tile, dtype="int32")[:, None]

    def diagonal(self):
        """True where a query meets its own key, `(M, L)`."""
        return self.offsets() == 0

    def local_mask(self, valid, config):
        """Local pairs of real tokens.

        Args:
            valid: Bool tensor of shape `(B or 1, 1, padded_size, 1)`, true at real tokens.
            config: `RWRConfig`.

        Returns:
            Bool tensor of shape `(B or 1, 1, C, M, L)`.
        """
        offsets = self.offsets()
        near = ops.abs(offsets) <= config.window
        if config.is_causal:
            near = ops.logical_and(near, offsets <= 0)
        tiles = self.split(ops.cast(valid, "int32"))
        keys = ops.swapaxes(self.band(tiles), -1, -2)
        return ops.logical_and(near, tiles * keys > 0)
