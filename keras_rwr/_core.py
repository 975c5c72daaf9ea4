"""What attention layers share: the weights of the graph and of the walk."""

import math
from typing import Any

import keras
from keras import ops

from keras_rwr import _cache, _decoding
from keras_rwr._cache import Sizes, WalkCache
from keras_rwr._checks import check_per_head
from keras_rwr._heads import Inputs
from keras_rwr._tokens import Masks
from keras_rwr.options import CONCENTRATION_RANGE, Options

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_rwr")
class ClipToRange(keras.constraints.Constraint):
    """Keeps a weight inside a closed interval.

    Args:
        minimum: Float. Smallest value allowed.
        maximum: Float. Largest value allowed.
    """

    def __init__(self, minimum: float, maximum: float):
        self.minimum = minimum
        self.maximum = maximum

    def __call__(self, w: Tensor) -> Tensor:
        return ops.clip(w, self.minimum, self.maximum)

    def get_config(self) -> dict[str, float]:
        return {"minimum": self.minimum, "maximum": self.maximum}


class WalkCore(keras.layers.Layer):
    """The trained part of the walk, for a layer that projects queries, keys and values itself.

    Its weights are never cast to the compute dtype by Keras: most are a few numbers a head that act
    through exponentials and sums over the whole sequence.

    - `log_concentration` `(G,)`: the logarithm of kappa, for exponential edges.
    - `discoverability` `(G, F)`: u, with `use_discoverability`, zeros at first.
    - `lens_strength` `(N,)`: gamma, with `trainable_lens`.
    - `hop_weights` `(N, steps + 1)`: theta, with `stopping="learned"`, and what gates add to with
      `"gated"`. It begins as 0.5 of the own value, 1 of one step and 0.5 of each further one.
    - `hop_gate` `(dim, N, steps + 1)`: gates of theta, zeros at first.
    - `graph_query`, `graph_key` `(dim, G, F)` and `graph_convolution` `(width, G, F)`: the graph's
      own projections, with `graph_heads`. The key's begins as a copy of the query's and the
      convolution as a shift by one token, so that a token links to the tokens that followed tokens
      like it: an induction graph.

    Without `graph_heads` G is N and F the size of a head.

    Args:
        options: `Options`.
        num_heads: Int. Query heads N.
        key_dim: Int. Size of a head's query and key.
        kernel_initializer: Initializer of `graph_query`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `graph_heads` does not divide `num_heads`, or an option that is one number a
            head or a graph has another length.
    """

    def __init__(
        self,
        options: Options,
        num_heads: int,
        key_dim: int,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        graphs = num_heads if options.graph_heads is None else options.graph_heads
        if num_heads % graphs:
            raise ValueError(
                "`graph_heads` must divide the number of query heads. "
                f"Received: graph_heads={options.graph_heads}, {num_heads} query heads"
            )
        check_per_head("concentration", options.concentration, graphs)
        check_per_head("lens_strength", options.lens_strength, num_heads)
        self.options = options
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.has_graph = options.graph_heads is not None and options.steps > 0
        self.graphs: int = (options.graph_heads if self.has_graph else None) or num_heads
        self.graph_size = options.graph_dim if self.has_graph else key_dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.log_concentration: Tensor = None
        self.discoverability: Tensor = None
        self.lens_strength: Tensor = None
        self.hop_weights: Tensor = None
        self.hop_gate: Tensor = None
        self.graph_query: Tensor = None
        self.graph_key: Tensor = None
        self.graph_convolution: Tensor = None
        self._failed_load: tuple[Any, str] | None = None

    def build(self, input_shape: Any) -> None:
        options, graphs, heads = self.options, self.graphs, self.num_heads
        if self.has_graph:
            shape = (input_shape[-1], graphs, self.graph_size)
            self.graph_query = self._add("graph_query", shape, self.kernel_initializer)
            self.graph_key = self._add(
                "graph_key", shape, lambda shape, dtype=None: ops.copy(self.graph_query.value)
            )
            self.graph_convolution = self._add(
                "graph_convolution", (options.graph_convolution, graphs, self.graph_size), _shift
            )
        if options.use_discoverability:
            self.discoverability = self._add("discoverability", (graphs, self.graph_size), "zeros")
        if options.edge_weight == "exponential" and options.steps > 0:
            self.log_concentration = self._add(
                "log_concentration",
                (graphs,),
                keras.initializers.Constant(_map(math.log, options.concentration)),
                ClipToRange(*(math.log(x) for x in CONCENTRATION_RANGE)),
            )
        if options.trainable_lens:
            self.lens_strength = self._add(
                "lens_strength", (heads,), keras.initializers.Constant(options.lens_strength)
            )
        if options.stopping != "restart":
            self.hop_weights = self._add("hop_weights", (heads, options.steps + 1), _begin_alive)
        if options.stopping == "gated":
            shape = (input_shape[-1], heads, options.steps + 1)
            self.hop_gate = self._add("hop_gate", shape, "zeros")

    def inputs(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: Masks,
        seed: Tensor = None,
        graph: Any = None,
    ) -> Inputs:
        """The tensors of a call of RWR attention.

        Args:
            x: Tensor of shape `(B, S, dim)`, the layer's input.
            query: Tensor of shape `(B, S, N, H)`.
            key: Tensor of shape `(B, S, M, H)`.
            value: Tensor of shape `(B, S, M, V)`.
            masks: `Masks`.
            seed: `None` or int tensor: dropout's.
            graph: `None` or a `SparseGraph` to walk on.
        """
        graph_key = None
        if self.has_graph and graph is None:
            plain_key = self._project(x, self.graph_key)
            padding_mask, segment_ids = masks.padding_mask, masks.segment_ids
            graph_key = convolve(plain_key, self.graph_convolution, padding_mask, segment_ids)
        return self._inputs(x, query, key, value, graph_key, masks, seed, graph)

    def attend_cached(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: WalkCache,
        index: Any,
    ) -> tuple[Tensor, WalkCache]:
        """RWR attention of the next tokens of sequences; arguments as `inputs`.

        Args:
            cache: `WalkCache`.
            index: Int or int tensor, the position of the first of these tokens.

        Returns:
            Tensor of shape `(B, T, N, V)` and the updated cache.
        """
        sizes = self.sizes(key.shape[2], value.shape[-1])
        _cache.check_cache(cache, self.options, sizes, query.shape[0], id(self))
        length = query.shape[1]
        if not length:
            raise ValueError(
                "`query` must have a known length, of one token at least, in cached decoding. "
                f"Received: query of shape {tuple(x.shape)}"
            )
        index = _cache.check_index(index, length, cache.key.shape[2])
        masks = Masks(None, None, True)
        plain_key = self._project(x, self.graph_key) if self.has_graph else None

        def attend(tokens: slice, cache: WalkCache, index: Any) -> tuple[Tensor, WalkCache]:
            plain = graph_key = None
            if plain_key is not None:
                plain = plain_key[:, tokens]
                graph_key = self._convolve_cached(plain, cache.plain_key, index)
            new = [y[:, tokens] for y in (x, query, key, value)]
            inputs = self._inputs(new[0], new[1], new[2], new[3], graph_key, masks)
            return _decoding.attend(inputs, plain, self.options, sizes, cache, index)

        if isinstance(index, int) and index == 0:
            return attend(slice(None), cache, 0)
        outputs = []
        for token in range(length):
            position = ops.convert_to_tensor(index + token, dtype="int32")
            output, cache = attend(slice(token, token + 1), cache, position)
            outputs.append(output)
        return ops.concatenate(outputs, axis=1), cache

    def sizes(self, kv_heads: int, value_dim: int) -> Sizes:
        """The sizes of a layer's heads, for its cache."""
        return Sizes(
            heads=self.num_heads,
            kv_heads=kv_heads,
            key_dim=self.key_dim,
            value_dim=value_dim,
            graphs=self.graphs,
            graph_dim=self.graph_size,
            has_graph=self.has_graph,
        )

    def empty_cache(
        self, batch_size: Any, length: int, kv_heads: int, value_dim: int, dtype: str
    ) -> WalkCache:
        """A cache without tokens; see `keras_rwr.RWRAttention.empty_cache`."""
        sizes = self.sizes(kv_heads, value_dim)
        return _cache.empty_cache(self.options, sizes, batch_size, length, dtype, id(self))

    def _inputs(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        graph_key: Tensor,
        masks: Masks,
        seed: Tensor = None,
        graph: Any = None,
    ) -> Inputs:
        return Inputs(
            query=query,
            key=key,
            value=value,
            graph_query=None if graph_key is None else self._project(x, self.graph_query),
            graph_key=graph_key,
            hop_weights=self._theta(x),
            discoverability=None if self.has_graph and graph is not None else self.discoverability,
            concentration=self.concentration,
            lens_strength=_first(self.lens_strength, self.options.lens_strength),
            padding_mask=masks.padding_mask,
            segment_ids=masks.segment_ids,
            seed=seed,
            graph=graph,
        )

    @property
    def concentration(self) -> Tensor:
        """kappa as it is now: a number or a tensor of shape `(G,)`."""
        if self.log_concentration is None:
            return self.options.concentration
        return ops.exp(self.log_concentration)

    def _project(self, x: Tensor, kernel: Tensor) -> Tensor:
        """`(B, S, dim)` to `(B, S, G, F)`."""
        return ops.einsum("bsd,dgf->bsgf", x, ops.cast(kernel, x.dtype))

    def _theta(self, x: Tensor) -> Tensor:
        """theta: `None` for the restart's, `(N, steps + 1)` or `(B, S, N, steps + 1)`."""
        if self.hop_gate is None:
            return self.hop_weights
        gate = ops.einsum("bsd,dnt->bsnt", x, ops.cast(self.hop_gate, x.dtype))
        return ops.cast(gate, self.variable_dtype) + self.hop_weights

    def _convolve_cached(self, plain_key: Tensor, cached: Tensor, index: Any) -> Tensor:
        """The convolution of new keys `(B, T, G, F)`, given those before them `(B, G, R, F)`."""
        if isinstance(index, int) and index == 0:
            return convolve(plain_key, self.graph_convolution)
        before = self.graph_convolution.shape[0] - 1
        positions = index - before + ops.arange(before, dtype="int32")
        recent = ops.take(cached, ops.maximum(positions, 0), axis=2)
        recent = ops.where((positions >= 0)[:, None], recent, ops.cast(0.0, recent.dtype))
        recent = ops.cast(ops.transpose(recent, (0, 2, 1, 3)), plain_key.dtype)
        joined = ops.concatenate([recent, plain_key], axis=1)
        return convolve(joined, self.graph_convolution)[:, before:]

    def save_own_variables(self, store: Any) -> None:
        for weight in self.weights:
            store[weight.name] = weight

    def load_own_variables(self, store: Any) -> None:
        stored = {name: tuple(store[name].shape) for name in list(store.keys())}
        if stored:
            self._failed_load = None
        elif self._failed_load is not None and store is self._failed_load[0]:
            # Keras asks again after a failure, with an empty view of the same file.
            raise ValueError(self._failed_load[1])
        else:
            return  # a file of `MultiHeadAttention`, which has nothing for this layer
        expected = {weight.name: tuple(weight.shape) for weight in self.weights}
        if stored != expected:
            message = (
                f"Layer '{self.path}' has the weights {expected} of the walk, and can load these "
                f"or none. The options must be those of the saved layer. Received: {stored}"
            )
            self._failed_load = store, message
            raise ValueError(message)
        for weight in self.weights:
            weight.assign(store[weight.name])

    def _add(self, name: str, shape: Any, initializer: Any, constraint: Any = None) -> Tensor:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            constraint=constraint,
            autocast=False,
        )


def convolve(
    x: Tensor, kernel: Tensor, padding_mask: Tensor = None, segment_ids: Tensor = None
) -> Tensor:
    """Depthwise causal convolution, `y_j = sum_m a_m x_(j - m)`.

    Positions before the start, of padding or of another segment count as 0.

    Args:
        x: Tensor of shape `(B, S, G, F)`.
        kernel: Tensor of shape `(width, G, F)`, a.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        segment_ids: `None` or int tensor of shape `(B, S)`.

    Returns:
        Tensor of the shape of `x`.
    """
    kernel, zero = ops.cast(kernel, x.dtype), ops.cast(0.0, x.dtype)
    if padding_mask is not None:
        x = ops.where(ops.cast(padding_mask, "bool")[:, :, None, None], x, zero)
    total = kernel[0] * x
    for shift in range(1, kernel.shape[0]):
        moved = _move(x, shift)
        if segment_ids is not None:
            same = _move(segment_ids + 0, shift) == segment_ids
            moved = ops.where(same[:, :, None, None], moved, zero)
        total = total + kernel[shift] * moved
    return total


def _move(x: Tensor, shift: int) -> Tensor:
    """Moves positions `(B, S, ...)` back by `shift`, zeros in front."""
    front = ops.zeros_like(x[:, :1])
    front = ops.repeat(front, shift, axis=1)
    return ops.concatenate([front, x], axis=1)[:, : ops.shape(x)[1]]


def _shift(shape: Any, dtype: Any = None) -> Tensor:
    """A convolution that takes the token before."""
    taps = ops.arange(shape[0], dtype="int32")[:, None, None] == 1
    return ops.zeros(shape, dtype) + ops.cast(taps, dtype)


def _begin_alive(shape: Any, dtype: Any = None) -> Tensor:
    """Hop weights at first: 0.5 of the own value, 1 of one step, 0.5 of each further one."""
    weights = [1.0 if t == 1 else 0.5 for t in range(shape[-1])]
    return ops.zeros(shape, dtype) + ops.convert_to_tensor(weights, dtype=dtype)


def _map(function: Any, value: Any) -> Any:
    return [function(x) for x in value] if isinstance(value, tuple) else function(value)


def _first(variable: Tensor, value: Any) -> Any:
    return value if variable is None else variable
