"""Causal decoding with a cache: what a layer keeps of earlier tokens, and the step to the next one.

A causal P is lower triangular, so row i of each iterate of Horner's scheme, `Z^m = V + (1 - alpha)
P Z^(m-1)`, is final once token i is known. The cache has one row a token with its key, its value
and its iterates; a new token takes one product of its row of P with the rows of its window and of
its chosen blocks. That is O(steps (window + topk)) work, whatever the context, besides one score
for each block.

Letters: B batch, N heads, H head size, V value size, R rows, F features of a row, J blocks,
C columns: the tokens that the new one has edges to.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_rwr import portable, reference, sharding
from keras_rwr.blocks import NEGATIVE, best_columns, block_rows
from keras_rwr.graph import block_means, isolate, select_neighbors, weigh
from keras_rwr.tensors import compatible, head_major, key_bias, per_head, unit

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class WalkCache:
    """What one attention layer keeps of the tokens before, made by `RWRAttention.empty_cache`.

    Attributes:
        rows: Tensor of shape `(B, N, R, F)`: for each token its key, its query if the options need
            it, and its walks, `Z^0 = V` to `Z^(steps - 1)`. With a reciprocal mix a walk also
            carries the walks of `V / pi` and `1 / pi`.
        means: `None` or tensor of shape `(B, N, J, H)`, the mean unit key of each block.
    """

    rows: Tensor
    means: Tensor = None

    def tensors(self):
        """The tensors by name, for loops that carry the cache."""
        return {name: x for name, x in vars(self).items() if x is not None}

    def __repr__(self):
        shapes = (f"{name}: {tuple(x.shape)}" for name, x in self.tensors().items())
        return f"<WalkCache {', '.join(shapes)}>"


def empty_cache(config, batch_size, length, num_heads, key_dim, value_dim, dtype):
    """An empty cache.

    Args:
        config: `RWRConfig`.
        batch_size: Int, or scalar tensor.
        length: Int. Number of positions, prompt included.
        num_heads: Int.
        key_dim: Int. Size of query and key, H.
        value_dim: Int. Size of the value, V.
        dtype: String, the layer's compute dtype. The rows of a reciprocal mix are never in less
            than float32: `1 / pi` needs its range.

    Returns:
        A `WalkCache`.
    """
    full = "float64" if dtype == "float64" else "float32"
    _, walks = _features(config, key_dim, value_dim)
    size = -(-length // config.neighbor_block) * config.neighbor_block
    rows = ops.zeros(
        (batch_size, num_heads, size, walks.stop), full if config.is_reciprocal else dtype
    )
    if config.fusion != "sum" or config.slots == 0 or size <= config.window + 1:
        return WalkCache(rows)
    blocks = size // config.neighbor_block
    return WalkCache(rows, ops.zeros((batch_size, num_heads, blocks, key_dim), full))


def attend(
    query, key, value, config, cache, index, *, lens_strength, concentration, discoverability=None
):
    """RWR attention of new tokens to themselves and to the cached ones.

    Args:
        query: Tensor of shape `(B, T, N, H)`, of the new tokens.
        key: Tensor of shape `(B, T, N, H)`.
        value: Tensor of shape `(B, T, N, V)`.
        config: `RWRConfig` of a causal call.
        cache: `WalkCache`. On torch, where no gradient is recorded, it is updated in place.
        index: Int or int tensor, the position of the first new token. The int 0 starts a new
            sequence in one forward pass; otherwise the tokens go one by one.
        lens_strength: Scalar or tensor of shape `(N,)`, gamma.
        concentration: Scalar or tensor of shape `(N,)`, kappa.
        discoverability: `None` or tensor of shape `(N, H)`, u.

    Returns:
        Tensor of shape `(B, T, N, V)` in the dtype of `query`, and the updated `WalkCache`.

    Raises:
        TypeError: If `cache` is no `WalkCache`.
        ValueError: If `cache` was made for other options or shapes, or has no room.
    """
    check_cache(cache, config, query, value)
    length, size = query.shape[1], cache.rows.shape[2]
    if length is None:
        raise ValueError(
            "`query` must have a known length in cached decoding. "
            f"Received: query of shape {tuple(query.shape)}"
        )
    if isinstance(index, int) and not 0 <= index <= size - length:
        raise ValueError(
            f"`cache_update_index` must leave room for {length} tokens in a cache of {size} "
            f"positions. Received: cache_update_index={index}"
        )
    tensors = {
        "lens_strength": lens_strength,
        "concentration": concentration,
        "discoverability": discoverability,
    }
    if isinstance(index, int) and index == 0:
        return _over_devices(_prefill, query, key, value, config, cache, **tensors)
    step = _step if config.fusion == "sum" else _dense_step
    outputs = []
    for token in range(length):
        new = (x[:, token : token + 1] for x in (query, key, value))
        position = ops.convert_to_tensor(index + token, dtype="int32")
        output, cache = _over_devices(step, *new, config, cache, position, **tensors)
        outputs.append(output)
    return ops.concatenate(outputs, axis=1), cache


def check_cache(cache, config, query, value):
    """Checks that a cache fits the options and shapes of a call; see `attend`."""
    if not isinstance(cache, WalkCache):
        raise TypeError(
            "`cache` must be a WalkCache, made by `RWRAttention.empty_cache`. "
            f"Received: cache={type(cache).__name__}"
        )
    batch, _, heads, key_dim = query.shape
    _, walks = _features(config, key_dim, value.shape[-1])
    expected = (batch, heads, None, walks.stop)
    shape = tuple(cache.rows.shape)
    if len(shape) != 4 or not compatible(shape, expected):
        raise ValueError(
            "`cache` must be made by `RWRAttention.empty_cache` of a layer with the same options, "
            f"with rows of shape (B, N, R, F) = {expected}. Received: rows of shape {shape}"
        )


def _over_devices(function, query, key, value, config, cache, *index, **tensors):
    """`_prefill` or a step. Devices that share the work have a part of the cache each."""
    if not sharding.is_active():
        return function(query, key, value, config, cache, *index, **tensors)
    run = sharding.over_devices(
        _on_device,
        ("bsnh", "bsnh", "bsnh", "bnrf", "bnjh", "n", "n", "nh", *("" for _ in index)),
        ("bsnh", "bnrf", "bnjh")[: 2 if cache.means is None else 3],
        function,
        config,
    )
    numbers = [
        ops.reshape(ops.convert_to_tensor(tensors[name]), (-1,))
        for name in ("lens_strength", "concentration")
    ]
    others = (*numbers, tensors["discoverability"], *index)
    output, *cache = run(query, key, value, cache.rows, cache.means, *others)
    return output, WalkCache(*cache)


def _on_device(function, config, query, key, value, rows, means, *others):
    lens_strength, concentration, discoverability, *index = others
    output, cache = function(
        query,
        key,
        value,
        config,
        WalkCache(rows, means),
        *index,
        lens_strength=lens_strength,
        concentration=concentration,
        discoverability=discoverability,
    )
    return output, *cache.tensors().values()


def _features(config, key_dim, value_dim):
    """Where a row has the query, if at all, and the walks, as slices; the key comes first."""
    query, start = None, key_dim
    if config.reversible or config.fusion != "sum":
        query, start = slice(key_dim, 2 * key_dim), 2 * key_dim
    # Fusion "softmax" recomputes the walk, from the value.
    walks = value_dim
    if config.fusion == "sum":
        walks = max(1, config.steps) * portable.walk_features(config, value_dim)
    return query, slice(start, start + walks)


def _prefill(query, key, value, config, cache, **tensors):
    """Attention of the first tokens, all at once."""
    walks = []
    if config.fusion == "sum":
        neighbors = select_neighbors(query, key, config)
        output = portable.rwr_attention(
            query, key, value, config, neighbors=neighbors, trace=walks, **tensors
        )
        walks = [x[:, :, : query.shape[1]] for x in walks[: max(1, config.steps)]]
    else:
        output = reference.rwr_attention(query, key, value, config, **tensors)
        walks = [head_major(value)]
    query, key = head_major(query), head_major(key)
    where, _ = _features(config, key.shape[-1], value.shape[-1])
    row = ops.concatenate([key, *([] if where is None else [query]), *walks], axis=-1)
    means = cache.means
    if means is not None:
        real = ops.ones((1, 1, key.shape[2], 1), key.dtype)
        means = _write(means, block_means(unit(key), real, config.neighbor_block), 0)
    return output, WalkCache(_write(cache.rows, row, 0), means)


def _step(
    query, key, value, config, cache, index, *, lens_strength, concentration, discoverability
):
    """Attention of the token at `index`, given the cached rows before it."""
    dtype = query.dtype
    query, key, value = head_major(query), head_major(key), head_major(value)  # (B, N, 1, ...)
    query_slice, walk_slice = _features(config, key.shape[-1], value.shape[-1])

    # The columns: the window before the token, the chosen blocks, and the token itself. Their
    # positions are -1 where there is no edge.
    near, near_positions = _window(cache.rows, config, index)
    rows, positions = [near], [near_positions]
    if cache.means is not None:
        far, far_positions = _far(query, cache, config, index)
        rows.append(far)
        positions.append(far_positions)
    positions.append(ops.broadcast_to(index, (*ops.shape(key)[:2], 1, 1)))
    columns = ops.cast(ops.concatenate(rows, axis=2), key.dtype)  # (B, N, C - 1, F)
    positions = ops.concatenate(positions, axis=-1)  # (B, N, 1, C)
    edges, local = positions >= 0, positions >= ops.maximum(index - config.window, 0)
    keys = ops.concatenate([columns[..., : key.shape[-1]], key], axis=2)  # (B, N, C, H)
    values = columns[..., walk_slice]  # (B, N, C - 1, walks)
    bias = _bias(keys, discoverability)  # (B, N, 1, C)

    logits = _dots(query * query.shape[-1] ** -0.5, keys) + bias
    probabilities = ops.softmax(ops.where(local, logits, -1e30), axis=-1)  # (B, N, 1, C)
    output = _combine(probabilities, values[..., : value.shape[-1]], value)

    kappa = per_head(concentration, key.dtype)
    unit_keys = unit(keys)
    weights = weigh(_dots(unit(query), unit_keys), edges, config, kappa)
    if config.reversible:
        queries = ops.concatenate([columns[..., query_slice], query], axis=2)
        back = weigh(_dots(unit(key), unit(queries)), local, config, kappa)
        weights = 0.5 * (weights + back)
    weights = weights * ops.exp(bias)
    degree, isolated = isolate(ops.sum(weights, axis=-1, keepdims=True), config)
    itself = ops.cast(positions == index, weights.dtype)
    transition = ops.where(isolated, itself, weights / degree)

    start = portable.walk_start(value, degree * ops.exp(bias[..., -1:]), config)
    walks = [start]
    size = start.shape[-1]
    for step in range(config.steps):
        reached = _combine(transition, values[..., step * size : (step + 1) * size], walks[-1])
        walks.append(start + (1.0 - config.alpha) * reached)
    gamma = per_head(lens_strength, key.dtype)
    output = output + gamma * portable.walk_end(walks[-1], config)

    row = [key, *([] if query_slice is None else [query]), *walks[: max(1, config.steps)]]
    cache_rows, means = _write(cache.rows, ops.concatenate(row, axis=-1), index), cache.means
    if means is not None:
        # From the columns: XLA copies a cache that is read again behind its update.
        block = index // config.neighbor_block
        in_block = ops.cast(positions >= block * config.neighbor_block, keys.dtype)
        mean = ops.matmul(in_block, unit_keys) / ops.sum(in_block, axis=-1, keepdims=True)
        means = _write(means, mean, block)
    output = ops.transpose(output, (0, 2, 1, 3))
    return ops.cast(output, dtype), WalkCache(cache_rows, means)


def _dense_step(query, key, value, config, cache, index, **tensors):
    """Attention of the token at `index` for fusion "softmax": the whole dense computation."""
    row = ops.concatenate([head_major(x) for x in (key, query, value)], axis=-1)
    cache = WalkCache(_write(cache.rows, row, index))
    rows = ops.transpose(cache.rows, (0, 2, 1, 3))  # (B, R, N, F)
    size = key.shape[-1]
    output = reference.rwr_attention(
        rows[..., size : 2 * size], rows[..., :size], rows[..., 2 * size :], config, **tensors
    )
    batch, _, heads, features = ops.shape(value)
    output = ops.slice(output, (0, index, 0, 0), (batch, 1, heads, features))
    return ops.cast(output, query.dtype), cache


def _window(rows, config, index):
    """Rows of the `window` tokens before `index`, `(B, N, W, F)`, and positions `(B, N, 1, W)`."""
    batch, heads, size, features = ops.shape(rows)
    width = min(config.window, size)
    start = ops.clip(index - width, 0, size - width)
    near = ops.slice(rows, (0, 0, start, 0), (batch, heads, width, features))
    positions = start + ops.arange(width, dtype="int32")
    positions = ops.where(positions < index, positions, -1)
    return near, ops.broadcast_to(positions, (batch, heads, 1, width))


def _far(query, cache, config, index):
    """Rows of the tokens in the chosen blocks, `(B, N, K, F)`, and positions `(B, N, 1, K)`."""
    block = config.neighbor_block
    scores = _dots(unit(query), cache.means)  # (B, N, 1, J)
    first = block * ops.arange(ops.shape(scores)[-1], dtype="int32")
    scores = ops.where(first < index - config.window, scores, NEGATIVE)
    chosen = best_columns(scores, config.slots)  # (B, N, 1, K / b)
    positions = chosen[..., None] * block + ops.arange(block, dtype="int32")
    positions = ops.reshape(positions, (*ops.shape(chosen)[:3], config.topk))
    # A block that was not chosen is -1, and its positions are negative.
    positions = ops.where(positions < index - config.window, ops.maximum(positions, -1), -1)
    return block_rows(ops.squeeze(chosen, axis=2), cache.rows, block), positions


def _write(x, update, index):
    """Replaces rows of `(B, N, R, F)` from `index` on."""
    update = ops.cast(update, x.dtype)
    is_torch = keras.backend.backend() == "torch"
    if is_torch and not (x.requires_grad or update.requires_grad):
        # `slice_update` would copy the whole cache there for each token. A sampler may repeat the
        # cache of one prompt as a view, which has to become a copy once.
        x = x.contiguous()
        x[:, :, index : index + update.shape[2]] = update
        return x
    return ops.slice_update(x, (0, 0, index, 0), update)


def _bias(keys, discoverability):
    """`clip(k_j u, -8, 8)` of keys `(B, N, C, H)`, of shape `(B, N, 1, C)`."""
    if discoverability is None:
        return ops.zeros_like(keys[..., 0])[:, :, None]
    bias = key_bias(ops.transpose(keys, (0, 2, 1, 3)), discoverability)
    return ops.transpose(bias, (0, 2, 1))[:, :, None]


def _dots(a, b):
    return ops.matmul(a, ops.swapaxes(b, -1, -2))


def _combine(weights, values, last):
    """`sum_j weights_j values_j` where the last column has the value `last`."""
    return ops.matmul(weights[..., :-1], values) + weights[..., -1:] * last
