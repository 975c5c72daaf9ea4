"""What attention layers that replace Keras's have in common."""

from typing import Any

import keras
from keras import ops

from keras_rwr._attend import attend, attention_matrix
from keras_rwr._cache import WalkCache
from keras_rwr._checks import check_bool, check_int, is_tensor
from keras_rwr._core import WalkCore
from keras_rwr._tokens import Masks, check_sequences, read_masks
from keras_rwr.graph import SparseGraph, check_fits
from keras_rwr.options import Call, Options, Tuning

Tensor = Any


class WithWalk(keras.layers.Layer):
    """A layer of Keras or KerasHub with the weights of a walk besides its own.

    Attributes:
        options: `Options`.
        tuning: `Tuning`.
        walk: `WalkCore`.
    """

    options: Options
    tuning: Tuning
    walk: WalkCore

    def save_own_variables(self, store: Any) -> None:
        if self.walk.weights:
            # A stock layer refuses what it has no place for. (Keras forgets that where it meets the
            # layer a second time: a file then loads without the walk.)
            store["walk_weights"] = ops.convert_to_numpy(len(self.walk.weights))

    def load_own_variables(self, store: Any) -> None:
        """Its own weights are those of its sublayers."""

    @property
    def extra_weights(self) -> list[keras.Variable]:
        """The weights that the stock layer has not."""
        return self.walk.weights


class SelfAttention(WithWalk):
    """RWR attention with the projections and arguments of an attention layer of Keras.

    It stands in front of that layer's class, and gives it another `call`.
    """

    def _add_walk(
        self,
        options: Options,
        tuning: Tuning,
        *,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dropout: float,
        kernel_initializer: Any,
    ) -> None:
        """Gives the layer its walk, at the end of its constructor."""
        self.options, self.tuning = options, tuning
        self._kv_heads, self._size_of_values, self._dropout_rate = kv_heads, value_dim, dropout
        initializer = keras.initializers.get(kernel_initializer)
        self.walk = WalkCore(
            options, heads, key_dim, initializer, dtype=self.dtype_policy, name="walk"
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.options.to_config(), **self.tuning.to_config()}

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        check_sequences(query_shape, value_shape, key_shape)
        super().build(query_shape, value_shape, key_shape)
        # The projections see inputs that may carry a Keras mask, and keep their positions.
        for name in ("query", "key", "value", "gate"):
            if hasattr(self, f"_{name}_dense"):
                getattr(self, f"_{name}_dense").supports_masking = True
        self.walk.build(query_shape)

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Tensor = None,
        graph: SparseGraph | None = None,
        cache: WalkCache | None = None,
        cache_update_index: Any = None,
    ) -> Any:
        if value is None:
            raise TypeError("`value` must be a tensor. Received: value=None")
        key = value if key is None else key
        check_sequences(query.shape, value.shape, key.shape)
        check_bool("return_attention_scores", return_attention_scores)
        masks = read_masks(
            query,
            use_causal_mask,
            attention_mask,
            segment_ids,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
        )
        call = Call(masks.is_causal, self._dropout_rate if training else 0.0)
        call.check(self.options, masks.segment_ids is not None)
        heads = (
            self._query_dense(query),  # (B, S, N, H)
            self._key_dense(key),  # (B, S, M, H)
            self._value_dense(value),  # (B, S, M, value_dim)
        )
        if cache is None:
            _check_no_index(cache_update_index)
            if graph is not None:
                check_fits(graph, heads[0], self.walk.num_heads, self.options, call)
            seed = self._dropout_layer.seed_generator.next() if call.dropout > 0 else None
            inputs = self.walk.inputs(query, *heads, masks, seed, graph)
            output = attend(inputs, self.options, call, self.tuning)  # (B, S, N, value_dim)
        else:
            _check_cached_call(call, masks, cache_update_index, return_attention_scores, graph)
            output, cache = self.walk.attend_cached(query, *heads, cache, cache_update_index)
        if hasattr(self, "_gate_dense"):
            output = ops.multiply(output, self._gate_dense(query))
        output = self._output_dense(output)
        if cache is not None:
            return output, cache
        if not return_attention_scores:
            return output
        scores = attention_matrix(inputs, self.options, Call(call.is_causal))  # (B, N, S, S)
        return output, ops.cast(scores, self.compute_dtype)

    def empty_cache(self, batch_size: Any, length: int) -> WalkCache:
        """A cache for decoding, without tokens.

        Args:
            batch_size: Int, or scalar tensor.
            length: Int >= 1. Number of positions, prompt included.

        Returns:
            A `WalkCache`, for the call argument `cache`.

        Raises:
            ValueError: If a size is too small.
            TypeError: If a size is no int.
        """
        check_int("length", length, minimum=1)
        if not is_tensor(batch_size):
            check_int("batch_size", batch_size, minimum=0)
        return self.walk.empty_cache(
            batch_size, length, self._kv_heads, self._size_of_values, self.compute_dtype
        )

    def compute_output_shape(
        self, query_shape: Any, value_shape: Any, key_shape: Any = None
    ) -> Any:
        check_sequences(query_shape, value_shape, key_shape)
        return super().compute_output_shape(query_shape, value_shape, key_shape)

    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Tensor = None,
        graph: SparseGraph | None = None,
        cache: WalkCache | None = None,
        cache_update_index: Any = None,
    ) -> Any:
        if cache is not None:
            raise ValueError(
                f"`cache` must be `None` in a symbolic call. Received: cache={type(cache).__name__}"
            )
        _check_no_index(cache_update_index)
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        read_masks(query, use_causal_mask, attention_mask, segment_ids, **masks)
        Call(use_causal_mask).check(self.options, segment_ids is not None)
        return super().compute_output_spec(
            query, value, key, return_attention_scores=return_attention_scores
        )


def check_stock_arguments(arguments: dict[str, Any], sizes: tuple[str, ...]) -> None:
    """Checks the arguments that a layer of Keras takes and RWR attention not.

    Args:
        arguments: Dict of all arguments.
        sizes: The names of those that are ints >= 1.
    """
    for name in sizes:
        check_int(name, arguments[name], minimum=1)
    Call(dropout=arguments["dropout"])
    rules = {
        "attention_axes": ((None, 1, (1,), [1]), "be `None` or 1, the sequence axis"),
        "sliding_window": ((None,), "be `None`: pass `window`, which is `sliding_window - 1`"),
        "flash_attention": ((None, False), "be `None` or `False`: `implementation` chooses"),
    }
    for name, (allowed, rule) in rules.items():
        if arguments.get(name) not in allowed:
            raise ValueError(f"`{name}` must {rule}. Received: {name}={arguments[name]}")


def _check_no_index(cache_update_index: Any) -> None:
    """Checks a call without a cache."""
    if cache_update_index is not None:
        raise ValueError(
            "`cache_update_index` must be `None` without `cache`. "
            f"Received: cache_update_index={cache_update_index}"
        )


def _check_cached_call(
    call: Call, masks: Masks, index: Any, return_attention_scores: bool, graph: Any
) -> None:
    """Checks the arguments beside `cache`."""
    rules = {
        "use_causal_mask": (call.is_causal, "be true"),
        "cache_update_index": (index is not None, "be the position of the first new token"),
        "training": (call.dropout == 0.0, "be false"),
        "return_attention_scores": (not return_attention_scores, "be false"),
        "attention_mask": (masks.padding_mask is None, "be `None`: all that is cached is real"),
        "segment_ids": (masks.segment_ids is None, "be `None`: a cache holds one document"),
        "graph": (graph is None, "be `None`: the cache is the graph"),
    }
    values = {"use_causal_mask": call.is_causal, "cache_update_index": index, "graph": graph}
    for name, (holds, rule) in rules.items():
        if not holds:
            received = values.get(name, "a value")
            raise ValueError(
                f"`{name}` must {rule} in cached decoding. Received: {name}={received}"
            )
