"""Causal decoding with a cache: the pass that begins a sequence, and the step to the next token.

A causal P is lower triangular, so row i of each `Z^t = P^t V` is final once token i is known. The
cache has one row a token with its key, its walks, and what its edges need; a new token takes one
product of its row of P with the rows of its window and of its chosen blocks. That is O(steps
(window + topk)) work, whatever the context, besides one score for each block.

Letters: B batch, N query heads, M key/value heads, G graphs, C heads that are walked (M, or N where
each query head has its own graph), R rows, H, V, F sizes, J blocks, K columns: the tokens that the
new one has edges to.
"""

import dataclasses
import math
from typing import Any

from keras import ops

from keras_rwr import _reference, _sharding
from keras_rwr._attend import transition_matrix
from keras_rwr._cache import Sizes, WalkCache, corner, write, write_rows
from keras_rwr._far import NEGATIVE, best_columns, block_rows
from keras_rwr._heads import Heads, Inputs
from keras_rwr._local import attend_locally
from keras_rwr._select import block_means
from keras_rwr._tensors import (
    contain,
    head_major,
    key_bias,
    log_add,
    repeat_heads,
    softmax,
    unit,
    where,
)
from keras_rwr._walk import backward_states, combine, walk_states
from keras_rwr._weigh import ISOLATED, log_weight
from keras_rwr.options import Call, Options, Tuning

Tensor = Any


def attend(
    inputs: Inputs,
    plain_key: Tensor,
    options: Options,
    sizes: Sizes,
    cache: WalkCache,
    index: Any,
) -> tuple[Tensor, WalkCache]:
    """RWR attention of new tokens to themselves and to the cached ones.

    Args:
        inputs: `Inputs` of the new tokens, without masks, seed and graph.
        plain_key: `None` or tensor of shape `(B, T, G, F)`: the graph's key before the convolution.
        options: `Options`.
        sizes: `Sizes`.
        cache: `WalkCache`. On torch, where no gradient is recorded, it is updated in place.
        index: Int or int tensor, the position of the first new token. The int 0 starts a new
            sequence in one forward pass, and `T` may be any number; otherwise it is 1.

    Returns:
        Tensor of shape `(B, T, N, V)` in the dtype of the query, and the updated `WalkCache`.
    """
    is_start = isinstance(index, int) and index == 0
    function = _prefill if is_start else _step if options.fusion == "sum" else _dense_step
    tensors = {name: x for name, x in inputs.tensors().items() if name not in _WITHOUT_CACHE}
    tensors["plain_key"] = plain_key
    if not _sharding.is_active():
        return _run(function, options, sizes, tensors, cache, index)
    for name in ("concentration", "lens_strength"):
        tensors[name] = ops.reshape(ops.convert_to_tensor(tensors[name]), (-1,))
    tensors, rows = _for_devices(tensors, sizes), cache.tensors()
    names, cached = tuple(tensors), tuple(rows)
    layouts = tuple(_LAYOUTS.get(name, "bsnh") for name in names)
    if tensors["hop_weights"] is not None and len(tensors["hop_weights"].shape) < 4:
        theta = "nt" if len(tensors["hop_weights"].shape) == 2 else "t"
        layouts = tuple(
            theta if name == "hop_weights" else x for name, x in zip(names, layouts, strict=True)
        )
    # What all heads share is the same on every device.
    of_cached = tuple("b1rf" if x.shape[1] == 1 else "bnrf" for x in rows.values())
    run = _sharding.over_devices(
        _on_device,
        (*layouts, *of_cached, ""),
        ("bsnh", *of_cached),
        function,
        options,
        sizes,
        names,
        cached,
    )
    output, *updated = run(*tensors.values(), *rows.values(), index)
    return output, dataclasses.replace(cache, **dict(zip(cached, updated, strict=True)))


_WITHOUT_CACHE = ("padding_mask", "segment_ids", "seed", "graph")
_LAYOUTS = {"concentration": "n", "lens_strength": "n", "discoverability": "nh"}


def _for_devices(tensors: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Refuses what devices cannot divide by heads."""
    if sizes.heads != sizes.kv_heads or sizes.graphs not in (1, sizes.heads):
        raise NotImplementedError(
            "Cached decoding over several devices needs one graph, or one for each head, and as "
            f"many key/value heads as query heads. Received: {sizes}"
        )
    return tensors


def _on_device(
    function: Any, options: Any, sizes: Any, names: Any, cached: Any, *arrays: Tensor
) -> tuple:
    tensors = dict(zip(names, arrays[: len(names)], strict=True))
    cache = WalkCache(**dict(zip(cached, arrays[len(names) : -1], strict=True)))
    heads = tensors["query"].shape[2]
    sizes = dataclasses.replace(
        sizes, heads=heads, kv_heads=heads, graphs=1 if sizes.graphs == 1 else heads
    )
    output, cache = _run(function, options, sizes, tensors, cache, arrays[-1])
    return output, *cache.tensors().values()


def _run(
    function: Any, options: Options, sizes: Sizes, tensors: dict, cache: WalkCache, index: Any
) -> tuple[Tensor, WalkCache]:
    plain_key = tensors.pop("plain_key")
    inputs = Inputs(**tensors)
    heads = Heads.create(inputs, options, Call(is_causal=True))
    if plain_key is not None:
        plain_key = head_major(plain_key, heads.query.dtype)
    output, cache = function(heads, inputs, plain_key, options, sizes, cache, index)
    return heads.finish(output, inputs.query.dtype), cache


def _prefill(
    heads: Heads,
    inputs: Inputs,
    plain_key: Tensor,
    options: Options,
    sizes: Sizes,
    cache: WalkCache,
    index: int,
) -> tuple[Tensor, WalkCache]:
    """Attention of the first tokens, all at once."""
    if options.fusion != "sum":
        output = _reference.rwr_attention(heads, options, Call(is_causal=True))
        rows = {"key": heads.key, "walks": repeat_heads(heads.value, sizes.walked)}
        rows["graph_query"] = _vectors(inputs.query, heads)
        return output, write_rows(cache, rows, 0)
    output = attend_locally(
        heads.query, heads.key, heads.value, heads.tokens, options.window, heads.local_bias
    )
    value = repeat_heads(heads.value, sizes.walked)
    states, backward = [value], None
    if options.steps > 0:
        transition = transition_matrix(heads, options, Tuning())
        states = list(walk_states(transition, value, options.steps))
        if options.is_reciprocal:
            backward = list(backward_states(transition, value, options.steps))
            log_degree = transition.tiling.cut(transition.log_degree)
    if options.walks:
        output = output + combine(states, backward, heads.hop_weights, options, sizes.heads)
    rows = {"key": heads.key, "walks": ops.concatenate(states[: max(1, options.steps)], axis=-1)}
    if sizes.has_graph:
        rows |= {"graph_key": _vectors(inputs.graph_key, heads), "plain_key": plain_key}
    if "graph_query" in cache.tensors():
        rows["graph_query"] = _vectors(
            inputs.graph_query if sizes.has_graph else inputs.query, heads
        )
    if backward is not None:
        log_sums = [log_degree, *(x for _, x in backward[1:-1])]
        rows["log_sums"] = ops.concatenate(log_sums, axis=-1)
        if options.steps > 1:
            rows["back_walks"] = ops.concatenate([x for x, _ in backward[1:-1]], axis=-1)
    if cache.means is not None:
        rows["means"] = block_means(
            heads.graph_key,
            ops.ones((1, 1, heads.graph_key.shape[2], 1), heads.graph_key.dtype),
            options.neighbor_block,
        )
    return output, write_rows(cache, rows, 0)


def _step(
    heads: Heads,
    inputs: Inputs,
    plain_key: Tensor,
    options: Options,
    sizes: Sizes,
    cache: WalkCache,
    index: Tensor,
) -> tuple[Tensor, WalkCache]:
    """Attention of the token at `index`, given the cached rows before it."""
    dtype, window = heads.query.dtype, options.window
    near = _Near.create(cache.key.shape[2], window, index)
    output = _local_step(heads, near, cache, sizes, inputs.discoverability)
    value = repeat_heads(heads.value, sizes.walked)  # (B, C, 1, V)
    rows = {"key": heads.key}
    if options.steps == 0:
        if options.walks:
            output = output + combine([value], None, heads.hop_weights, options, sizes.heads)
        rows["walks"] = value
        if sizes.has_graph:
            rows |= {"graph_key": _vectors(inputs.graph_key, heads), "plain_key": plain_key}
        return output, write_rows(cache, rows, index)

    # The columns: the window before the token, the chosen blocks, and the token itself. Positions
    # are -1 where there is no edge.
    blocks, far_positions = None, None
    if cache.means is not None:
        blocks, far_positions = _choose(heads.graph_query, cache.means, options, index)

    def columns(x: Tensor, new: Tensor) -> Tensor:
        """Rows of the columns: `(B, G or C, R, F)` and `(B, G or C, 1, F)` to `(…, K, F)`."""
        found = [near.take(x)]
        if blocks is not None:
            chosen = repeat_heads(blocks[..., None], x.shape[1])[..., 0]
            found.append(block_rows(chosen, x, options.neighbor_block))
        return ops.concatenate([*(ops.cast(y, dtype) for y in found), new], axis=2)

    batch, graphs = ops.shape(heads.graph_key)[:2]
    positions = [ops.broadcast_to(near.positions, (batch, graphs, 1, near.width))]
    if far_positions is not None:
        positions.append(far_positions)
    positions.append(ops.broadcast_to(index, (batch, graphs, 1, 1)))
    positions = ops.concatenate(positions, axis=-1)  # (B, G, 1, K)
    itself, in_window = positions == index, positions >= ops.maximum(index - window, 0)
    edges = positions >= 0
    if not options.self_edges:
        edges, in_window = (ops.logical_and(x, ops.logical_not(itself)) for x in (edges, in_window))

    new_key = _vectors(inputs.graph_key if sizes.has_graph else inputs.key, heads)
    new_key = repeat_heads(new_key, graphs)
    stored = cache.graph_key if sizes.has_graph else repeat_heads(cache.key, graphs)
    keys = columns(stored, new_key)  # (B, G, K, F)
    weights = log_weight(
        _dots(heads.graph_query, unit(keys)), edges, options, heads.concentration
    )  # log W, (B, G, 1, K)
    if options.reversible:
        new_query = _vectors(inputs.graph_query if sizes.has_graph else inputs.query, heads)
        rows["graph_query"] = new_query
        queries = unit(columns(cache.graph_query, new_query))
        mirrored = _dots(heads.graph_key, queries)
        mirrored = log_weight(mirrored, in_window, options, heads.concentration)
        weights = log_add(weights, mirrored) - math.log(2.0)
    bias = _column_bias(keys, inputs.discoverability)  # (B, G, 1, K)
    own_bias = bias[..., -1:]
    if options.edge_weight == "cosine":
        isolated = ops.logsumexp(weights + bias, axis=-1, keepdims=True) <= math.log(ISOLATED)
    else:
        isolated = ops.amax(weights, axis=-1, keepdims=True) <= 0.5 * NEGATIVE
    weights = where(isolated, where(itself, -own_bias, NEGATIVE), weights)  # log S
    log_degree = ops.logsumexp(weights + bias, axis=-1, keepdims=True)
    transition = repeat_heads(ops.exp(weights + bias - log_degree), sizes.walked)

    size = sizes.value_dim
    states = [value]
    for t in range(options.steps):
        before = columns(cache.walks[..., t * size : (t + 1) * size], states[-1])
        states.append(transition @ before)
    rows["walks"] = ops.concatenate(states[: options.steps], axis=-1)
    backward = None
    if options.is_reciprocal:
        backward = [(value, ops.zeros_like(log_degree))]
        degrees = columns(cache.log_sums[..., :1], log_degree)
        for t in range(options.steps):
            state, log_sum = backward[-1]
            if t == 0:
                before, sums = columns(cache.walks[..., :size], state), ops.zeros_like(degrees)
            else:
                before = columns(cache.back_walks[..., (t - 1) * size : t * size], state)
                sums = columns(cache.log_sums[..., t : t + 1], log_sum)
            logits = weights + ops.swapaxes(sums - degrees, -1, -2)
            row = repeat_heads(softmax(logits), sizes.walked)
            log_sum = own_bias + ops.logsumexp(logits, axis=-1, keepdims=True)
            backward.append((row @ before, log_sum))
        log_sums = [log_degree, *(x for _, x in backward[1:-1])]
        rows["log_sums"] = ops.concatenate(log_sums, axis=-1)
        if options.steps > 1:
            rows["back_walks"] = ops.concatenate([x for x, _ in backward[1:-1]], axis=-1)
    output = output + combine(states, backward, heads.hop_weights, options, sizes.heads)

    if sizes.has_graph:
        rows |= {"graph_key": new_key, "plain_key": plain_key}
    cache = write_rows(cache, rows, index)
    if cache.means is not None:
        # From the columns: XLA copies a cache that is read again behind its update.
        block = index // options.neighbor_block
        in_block = positions >= block * options.neighbor_block
        in_block = ops.cast(ops.logical_and(in_block, positions >= 0), dtype)
        mean = (in_block @ unit(keys)) / ops.sum(in_block, axis=-1, keepdims=True)
        cache = dataclasses.replace(cache, means=write(cache.means, mean, block))
    return output, cache


@dataclasses.dataclass(frozen=True, eq=False)
class _Near:
    """The rows of the window before a token.

    Attributes:
        start: Scalar tensor, the first row.
        width: Int. Number of rows.
        positions: Int tensor of shape `(1, 1, 1, width)`, -1 for rows from the token on.
    """

    start: Tensor
    width: int
    positions: Tensor

    @classmethod
    def create(cls, rows: int, window: int, index: Tensor) -> "_Near":
        width = min(window, rows)
        start = ops.clip(index - width, 0, rows - width)
        positions = start + ops.arange(width, dtype="int32")
        positions = where(positions < index, positions, -1)
        return cls(start, width, ops.reshape(positions, (1, 1, 1, width)))

    def take(self, x: Tensor) -> Tensor:
        """`(B, n, R, F)` to `(B, n, width, F)`."""
        batch, heads, _, features = ops.shape(x)
        return ops.slice(x, corner(self.start), (batch, heads, self.width, features))


def _local_step(
    heads: Heads, near: _Near, cache: WalkCache, sizes: Sizes, discoverability: Tensor
) -> Tensor:
    """LOCAL of the new token, `(B, N, 1, V)`."""
    dtype, number = heads.query.dtype, sizes.heads

    def columns(x: Tensor, new: Tensor) -> Tensor:
        found = ops.concatenate([ops.cast(near.take(x), dtype), new], axis=2)
        return repeat_heads(found, number)

    keys = columns(cache.key, heads.key)
    first = cache.walks[..., : sizes.value_dim]
    values = columns(first, repeat_heads(heads.value, sizes.walked))
    logits = _dots(heads.query * sizes.key_dim**-0.5, keys)  # (B, N, 1, W + 1)
    if heads.local_bias is not None:
        logits = logits + _column_bias(keys, discoverability)
    real = ops.concatenate([near.positions >= 0, ops.ones((1, 1, 1, 1), "bool")], axis=-1)
    return softmax(where(real, logits, NEGATIVE)) @ values


def _choose(
    graph_query: Tensor, means: Tensor, options: Options, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Chosen blocks `(B, G, K / b)` and positions of their tokens `(B, G, 1, K)`, -1 for none."""
    block = options.neighbor_block
    scores = _dots(graph_query, ops.cast(means, graph_query.dtype))  # (B, G, 1, J)
    first = block * ops.arange(ops.shape(scores)[-1], dtype="int32")
    scores = where(first < index - options.window, scores, NEGATIVE)
    chosen = best_columns(scores, options.slots)  # (B, G, 1, K / b)
    positions = chosen[..., None] * block + ops.arange(block, dtype="int32")
    positions = ops.reshape(positions, (*ops.shape(chosen)[:3], options.topk))
    # A block that was not chosen is -1, and its positions are negative.
    is_far = positions < index - options.window
    return ops.squeeze(chosen, axis=2), where(is_far, ops.maximum(positions, -1), -1)


def _dense_step(
    heads: Heads,
    inputs: Inputs,
    plain_key: Tensor,
    options: Options,
    sizes: Sizes,
    cache: WalkCache,
    index: Tensor,
) -> tuple[Tensor, WalkCache]:
    """Attention of the token at `index` for fusion "softmax": the whole dense computation."""
    rows = {"key": heads.key, "walks": heads.value, "graph_query": heads.query}
    cache = write_rows(cache, rows, index)
    everything = dataclasses.replace(
        inputs,
        **{
            name: ops.transpose(ops.cast(x, heads.query.dtype), (0, 2, 1, 3))
            for name, x in (
                ("query", cache.graph_query),
                ("key", cache.key),
                ("value", cache.walks),
            )
        },
    )
    call = Call(is_causal=True)
    output = _reference.rwr_attention(Heads.create(everything, options, call), options, call)
    batch, number, _, features = ops.shape(output)
    return ops.slice(output, corner(index), (batch, number, 1, features)), cache


def _vectors(x: Tensor, heads: Heads) -> Tensor:
    """Plain vectors `(B, T, n, F)` with heads first; 0 where not finite, as in `Heads`."""
    return contain(head_major(x, heads.query.dtype))[0]


def _column_bias(keys: Tensor, discoverability: Tensor) -> Tensor:
    """`clip(k_j u, -8, 8)` of keys `(B, n, K, F)`, of shape `(B, n, 1, K)`; 0 without u."""
    if discoverability is None:
        return ops.zeros_like(keys[..., 0])[:, :, None]
    return ops.swapaxes(key_bias(keys, discoverability), -1, -2)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return a @ ops.swapaxes(b, -1, -2)
