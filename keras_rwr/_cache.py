"""The cache of decoding: what a layer keeps of earlier tokens.

Letters: B batch, M key/value heads, G graphs, C heads that are walked (M, or N query heads where
each has its own graph), R rows, H, V, F sizes, J blocks.
"""

import dataclasses
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rwr._checks import compatible, has_values, is_tensor
from keras_rwr.options import Options

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class WalkCache:
    """What one attention layer keeps of the tokens before, made by `RWRAttention.empty_cache`.

    Attributes:
        key: Tensor of shape `(B, M, R, H)`.
        walks: Tensor of shape `(B, C, R, T V)`: `Z^0 = V` to `Z^(T - 1)` of each token.
        graph_key: `None` or tensor of shape `(B, G, R, F)`, with `graph_heads`.
        plain_key: `None` or tensor of shape `(B, G, R, F)`: the same before the convolution.
        graph_query: `None` or tensor of shape `(B, G, R, F)`, for reversible graphs.
        means: `None` or tensor of shape `(B, G, J, F)`, the mean unit key of each block.
        log_sums: `None` or tensor of shape `(B, G, R, T)`: `log D` and `log B^t 1` of the backward
            walk, t = 1 … T - 1, for the reciprocal mix.
        back_walks: `None` or tensor of shape `(B, C, R, (T - 1) V)`: rows of the backward walk.
        owner: `None` or int that tells the layer that made it.
    """

    key: Tensor
    walks: Tensor
    graph_key: Tensor = None
    plain_key: Tensor = None
    graph_query: Tensor = None
    means: Tensor = None
    log_sums: Tensor = None
    back_walks: Tensor = None
    owner: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for loops that carry the cache."""
        found = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        return {name: x for name, x in found.items() if x is not None and name != "owner"}

    def __repr__(self) -> str:
        shapes = (f"{name}: {tuple(x.shape)}" for name, x in self.tensors().items())
        return f"<WalkCache {', '.join(shapes)}>"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a layer's heads.

    Attributes:
        heads: Int, N.
        kv_heads: Int, M.
        key_dim: Int, H.
        value_dim: Int, V.
        graphs: Int, G.
        graph_dim: Int, F.
        has_graph: Bool. Whether the graph has queries and keys of its own.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    graphs: int
    graph_dim: int
    has_graph: bool

    @property
    def walked(self) -> int:
        """C."""
        return self.kv_heads if self.has_graph else self.heads


def empty_cache(
    options: Options, sizes: Sizes, batch: Any, length: int, dtype: str, owner: int | None = None
) -> WalkCache:
    """An empty cache.

    Args:
        options: `Options`.
        sizes: `Sizes`.
        batch: Int, or scalar tensor.
        length: Int. Number of positions, prompt included.
        dtype: String, the layer's compute dtype. What enters exponentials is float32 at least.
        owner: `None` or int that tells the layer.
    """
    full = "float64" if dtype == "float64" else "float32"
    block = options.neighbor_block
    rows = -(-length // block) * block
    shapes = cache_shapes(options, sizes, rows)
    exact = ("means", "log_sums", "back_walks")
    return WalkCache(
        **{
            name: ops.zeros((batch, *shape), dtype=full if name in exact else dtype)
            for name, shape in shapes.items()
        },
        owner=owner,
    )


def cache_shapes(options: Options, sizes: Sizes, rows: Any) -> dict[str, tuple]:
    """The shape of each tensor of a cache, without the batch."""
    states = max(1, options.steps)
    graph = (sizes.graphs, rows, sizes.graph_dim)
    shapes: dict[str, tuple] = {
        "key": (sizes.kv_heads, rows, sizes.key_dim),
        "walks": (sizes.walked, rows, states * sizes.value_dim),
    }
    if options.fusion != "sum":
        # That fusion computes everything anew, from queries, keys and values.
        return {
            **shapes,
            "walks": (sizes.walked, rows, sizes.value_dim),
            "graph_query": graph,
        }
    if sizes.has_graph:
        shapes |= {"graph_key": graph, "plain_key": graph}
    if options.steps == 0:
        return shapes
    if options.reversible:
        shapes["graph_query"] = graph
    if options.slots and (rows is None or rows > options.window + 1):
        blocks = None if rows is None else rows // options.neighbor_block
        shapes["means"] = (sizes.graphs, blocks, sizes.graph_dim)
    if options.is_reciprocal:
        shapes["log_sums"] = (sizes.graphs, rows, options.steps)
        if options.steps > 1:
            shapes["back_walks"] = (sizes.walked, rows, (options.steps - 1) * sizes.value_dim)
    return shapes


def check_cache(cache: Any, options: Options, sizes: Sizes, batch: Any, owner: int) -> None:
    """Checks that a cache was made by a layer of these options and sizes.

    Raises:
        TypeError: If `cache` is no `WalkCache`.
        ValueError: If it was made by another layer or for other options or shapes.
    """
    if not isinstance(cache, WalkCache):
        raise TypeError(
            "`cache` must be a WalkCache, made by `RWRAttention.empty_cache`. "
            f"Received: cache={type(cache).__name__}"
        )
    rule = "`cache` must be made by `empty_cache` of this layer"
    if cache.owner not in (None, owner):
        raise ValueError(f"{rule}. Received: the cache of another layer, {cache}")
    found, rows = cache.tensors(), cache.key.shape[2] if len(cache.key.shape) == 4 else None
    expected = cache_shapes(options, sizes, rows)
    shapes = {name: (batch, *shape) for name, shape in expected.items()}
    fits = set(found) == set(shapes) and all(
        len(x.shape) == 4 and compatible(x.shape, shapes[name]) for name, x in found.items()
    )
    if not fits:
        raise ValueError(f"{rule}, with tensors of the shapes {shapes}. Received: {cache}")


def check_index(index: Any, length: int, rows: int) -> Any:
    """The position of the first new token: an int, or an int32 tensor where it is not known yet.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it leaves no room for `length` tokens.
    """
    if isinstance(index, np.ndarray) and index.dtype.kind in "iu":
        index = ops.convert_to_tensor(index)
    if is_tensor(index) and keras.backend.is_int_dtype(index.dtype):
        if tuple(index.shape) != ():
            raise ValueError(
                "`cache_update_index` must be one number. "
                f"Received: cache_update_index of shape {tuple(index.shape)}"
            )
        index = ops.convert_to_tensor(index)
        if not has_values(index):
            return ops.cast(index, "int32")
        index = int(ops.convert_to_numpy(index))
    if not isinstance(index, numbers.Integral) or isinstance(index, bool):
        raise TypeError(
            "`cache_update_index` must be an integer or an integer tensor. "
            f"Received: cache_update_index={index!r}"
        )
    index = int(index)
    if not 0 <= index <= rows - length:
        raise ValueError(
            f"`cache_update_index` must leave room for {length} tokens in a cache of {rows} "
            f"positions. Received: cache_update_index={index}"
        )
    return index


def write_rows(cache: WalkCache, rows: dict[str, Tensor], index: Any) -> WalkCache:
    """Replaces rows of the tensors that a cache has."""
    found = cache.tensors()
    return dataclasses.replace(
        cache, **{name: write(found[name], x, index) for name, x in rows.items() if name in found}
    )


def write(x: Tensor, update: Tensor, index: Any) -> Tensor:
    """Replaces rows of `(B, n, R, F)` from `index` on."""
    update = ops.cast(update, x.dtype)
    is_torch = keras.backend.backend() == "torch"
    if is_torch and not (x.requires_grad or update.requires_grad):
        # `slice_update` would copy the whole cache there for each token. A sampler may repeat the
        # cache of one prompt as a view, which has to become a copy once.
        x = x.contiguous()
        x[:, :, index : index + update.shape[2]] = update
        return x
    return ops.slice_update(x, corner(index), update)


def corner(index: Any) -> tuple[Any, ...]:
    """Where the rows of `(B, n, R, F)` from `index` on begin; JAX takes indices of one dtype."""
    index = ops.convert_to_tensor(index, dtype="int32")
    zero = ops.zeros_like(index)
    return zero, zero, index, zero
