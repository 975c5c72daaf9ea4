"""Positions in tiles and the band of keys that each tile of queries faces."""

import dataclasses
from typing import Any, Self

from keras import ops

from keras_rwr._tokens import PADDING, Tokens

Tensor = Any


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
    def create(cls, tokens: Tokens, window: int, block_size: int | None = None) -> Self:
        """Chooses the tile for a window: half of it, so that a band is about 1.5 windows wide."""
        size, tile, reach = tokens.size, block_size, window
        if tile is None:
            tile = 16
            while tile < 512 and 4 * tile <= window:
                tile *= 2
        if isinstance(size, int):
            tile = min(tile, size)
            reach = min(reach, size - 1)
        before = -(-reach // tile)
        return cls(size, tile, before, 0 if tokens.is_causal else before)

    @property
    def tiles(self) -> Any:
        return -(-self.size // self.tile)

    @property
    def padded_size(self) -> Any:
        return self.tiles * self.tile

    def pad(self, x: Tensor, fill: float = 0) -> Tensor:
        """Fills positions behind the last: `(B, N, S, F)` to `(B, N, padded_size, F)`."""
        extra = self.padded_size - self.size
        if isinstance(extra, int) and extra == 0:
            return x
        filled = ops.zeros((*ops.shape(x)[:-2], extra, x.shape[-1]), dtype=x.dtype) + fill
        return ops.concatenate([x, filled], axis=-2)

    def cut(self, x: Tensor) -> Tensor:
        """Undoes `pad`."""
        return x[..., : self.size, :]

    def split(self, x: Tensor) -> Tensor:
        """`(B, N, padded_size, F)` to `(B, N, C, M, F)`."""
        return ops.reshape(x, (*ops.shape(x)[:2], self.tiles, self.tile, x.shape[-1]))

    def join(self, x: Tensor) -> Tensor:
        """Undoes `split`."""
        return ops.reshape(x, (*ops.shape(x)[:2], self.padded_size, x.shape[-1]))

    def band(self, x: Tensor, fill: float = 0) -> Tensor:
        """What each tile faces: `(B, N, padded_size, F)` to `(B, N, C, L, F)`."""
        x = ops.pad(
            self.split(x),
            ((0, 0), (0, 0), (self.before, self.after), (0, 0), (0, 0)),
            constant_values=fill,
        )
        shifts = range(self.before + 1 + self.after)
        return ops.concatenate([x[:, :, s : s + self.tiles] for s in shifts], axis=-2)

    def unband(self, x: Tensor) -> Tensor:
        """Transpose of `band`: sums what each tile was faced with, `(B, N, padded_size, F)`."""
        total = self.before + 1 + self.after
        received = 0
        for s in range(total):
            part = x[..., s * self.tile : (s + 1) * self.tile, :]
            part = ops.pad(part, ((0, 0), (0, 0), (s, total - 1 - s), (0, 0), (0, 0)))
            received = received + part[:, :, self.before : self.before + self.tiles]
        return self.join(received)

    def offsets(self) -> Tensor:
        """Key position minus query position, `(M, L)`."""
        length = (self.before + 1 + self.after) * self.tile
        keys = ops.arange(length, dtype="int32") - self.before * self.tile
        return keys[None, :] - ops.arange(self.tile, dtype="int32")[:, None]

    def local_mask(self, tokens: Tokens, window: int, self_edges: bool = True) -> Tensor:
        """Pairs within the window that may see each other, bool `(B or 1, 1, C, M, L)`."""
        offsets = self.offsets()
        near = ops.abs(offsets) <= window
        if tokens.is_causal:
            near = ops.logical_and(near, offsets <= 0)
        if not self_edges:
            near = ops.logical_and(near, offsets != 0)
        labels = self.pad(tokens.labels, PADDING)
        rows = self.split(labels)  # (B or 1, 1, C, M, 1)
        columns = ops.swapaxes(self.band(labels, PADDING), -1, -2)  # (B or 1, 1, C, 1, L)
        same = ops.logical_and(rows == columns, rows != PADDING)
        return ops.logical_and(near, same)
