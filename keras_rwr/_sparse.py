"""A sparse matrix of edges between tokens: a band along the diagonal and a few far edges a row."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_rwr._far import NEGATIVE, far_gather, far_max, far_scatter, far_sum
from keras_rwr._tensors import maximum
from keras_rwr._tiling import Tiling

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class SparseMatrix:
    """An S×S matrix for each batch entry and graph, in O(S) memory.

    A vector of it has shape `(B, G, padded_size, 1)`, and features `(B, G, padded_size, F)`.

    Attributes:
        tiling: `Tiling` of the positions.
        neighbors: `None` or int tensor `(B, G, padded_size, K / block)`, the key blocks that each
            row has far edges to; -1 for none.
        block: Int. Tokens in a block of keys.
        local: Tensor of shape `(B, G, C, M, L)`: entries within the window, by tiles.
        far: `None` or tensor `(B, G, padded_size, K)`: entries at the tokens of the key blocks.
        back: `None` or tensor `(B, G, padded_size, K)`: entries of these edges from key to query.
        lists: `None`, or the far edges in the order of their keys, as kernels made it.
    """

    tiling: Tiling
    neighbors: Tensor
    block: int
    local: Tensor
    far: Tensor = None
    back: Tensor = None
    lists: Any = None

    def map(self, function: Callable, *others: "SparseMatrix") -> "SparseMatrix":
        """Applies a function to the entries of matrices of the same edges."""

        def apply(part: str) -> Tensor:
            entries = [getattr(x, part) for x in (self, *others)]
            return None if entries[0] is None else function(*entries)

        return dataclasses.replace(self, local=apply("local"), far=apply("far"), back=apply("back"))

    def rows(self, x: Tensor) -> "SparseMatrix":
        """The matrix whose entries in row i are all `x_i`, of a vector x."""
        return dataclasses.replace(
            self,
            local=self.tiling.split(x),
            far=None if self.far is None else x,
            back=None if self.back is None else self._gather(x),
        )

    def columns(self, x: Tensor) -> "SparseMatrix":
        """The matrix whose entries in column j are all `x_j`, of a vector x."""
        return dataclasses.replace(
            self,
            local=ops.swapaxes(self.tiling.band(x), -1, -2),
            far=None if self.far is None else self._gather(x),
            back=None if self.back is None else x,
        )

    def row_max(self) -> Tensor:
        """The largest entry of each row, `NEGATIVE` at least, as a vector."""
        largest = self.tiling.join(ops.amax(self.local, -1, keepdims=True))
        if self.far is not None:
            largest = maximum(largest, ops.amax(self.far, -1, keepdims=True))
        if self.back is not None:
            largest = maximum(largest, far_max(self.back, self.neighbors, self.block))
        return maximum(largest, NEGATIVE)

    def row_sum(self) -> Tensor:
        """The sum of each row, as a vector."""
        total = self.tiling.join(ops.sum(self.local, -1, keepdims=True))
        if self.far is not None:
            total = total + ops.sum(self.far, -1, keepdims=True)
        if self.back is not None:
            total = total + self._scatter(self.back, ops.ones_like(total))
        return total

    def matmul(self, x: Tensor) -> Tensor:
        """`sum_j matrix_ij x_j` of features x."""
        product = self.tiling.join(self.local @ self.tiling.band(x))
        if self.far is not None:
            product = product + self._gather_sum(self.far, x)
        if self.back is not None:
            product = product + self._scatter(self.back, x)
        return product

    def transposed_matmul(self, x: Tensor) -> Tensor:
        """`sum_i matrix_ij x_i` of features x."""
        parts = ops.swapaxes(self.local, -1, -2) @ self.tiling.split(x)
        product = self.tiling.unband(parts)
        if self.far is not None:
            product = product + self._scatter(self.far, x)
        if self.back is not None:
            product = product + self._gather_sum(self.back, x)
        return product

    def to_dense(self) -> Tensor:
        """All entries, `(B, G, S, S)`."""
        identity = ops.eye(self.tiling.padded_size, dtype=self.local.dtype)
        identity = ops.broadcast_to(identity, (*ops.shape(self.local)[:2], *identity.shape))
        size = self.tiling.size
        return self.matmul(identity)[..., :size, :size]

    def _gather(self, x: Tensor) -> Tensor:
        return far_gather(self.neighbors, x, self.block)

    def _gather_sum(self, weights: Tensor, x: Tensor) -> Tensor:
        return far_sum(weights, self.neighbors, x, self.block)

    def _scatter(self, weights: Tensor, x: Tensor) -> Tensor:
        return far_scatter(weights, self.neighbors, x, self.block)
