"""The tensors of a call: as it gives them, and as the stages take them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from keras import ops

from keras_rwr._tensors import (
    contain,
    key_bias,
    per_head,
    precision,
    repeat_heads,
    unit,
    where,
)
from keras_rwr._tokens import Tokens
from keras_rwr._walk import restart_weights
from keras_rwr._weigh import SparseGraph
from keras_rwr.options import Call, Options

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a call, checked; see `keras_rwr.ops.rwr_attention` for shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    graph_query: Tensor = None
    graph_key: Tensor = None
    concentration: Tensor = 20.0
    lens_strength: Tensor = 0.3
    discoverability: Tensor = None
    hop_weights: Tensor = None
    padding_mask: Tensor = None
    segment_ids: Tensor = None
    seed: Tensor = None
    graph: SparseGraph | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all tensors, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {name: getattr(self, name) for name in self.names()}

    def cast(self, dtype: str) -> Self:
        """The same with queries, keys and values of a dtype, but for those of float64."""
        names = ("query", "key", "value", "graph_query", "graph_key")
        vectors = {name: x for name, x in self.tensors().items() if name in names}
        return dataclasses.replace(
            self,
            **{
                name: ops.cast(x, dtype)
                for name, x in vectors.items()
                if x is not None and precision(x) != "float64"
            },
        )


def contain_vectors(
    vectors: list[Tensor], tokens: Tokens, options: Options
) -> tuple[list[Tensor], Tokens, Tensor]:
    """Keeps what stands at padding, and what is not finite, from other tokens.

    Args:
        vectors: Tensors of shape `(B, *, S, F)`, as the caller gave them; some may be `None`.
        tokens: `Tokens`.
        options: `Options`.

    Returns:
        The vectors in the arithmetic's dtype, the tokens, and the poison of `Heads`.
    """
    dtype = precision(*vectors)
    given = [ops.cast(x, dtype) for x in vectors if x is not None]
    if tokens.has_padding:
        given = [where(tokens.real, x, 0.0) for x in given]
    poison: Tensor = 0.0
    if tokens.is_causal:
        *given, poison = contain(*given)
    return [None if x is None else given.pop(0) for x in vectors], tokens, poison


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The tensors of a call as the stages take them: heads first.

    Attributes:
        query: Tensor of shape `(B, N, S, H)`.
        key: Tensor of shape `(B, M, S, H)`.
        value: Tensor of shape `(B, M, S, V)`.
        graph_query: Unit vectors, of shape `(B, G, S, F)`.
        graph_key: Unit vectors, of shape `(B, G, S, F)`.
        hop_weights: Tensor of shape `(B or 1, N or 1, S or 1, T + 1)`, theta.
        concentration: Tensor of shape `(G or 1, 1, 1)`, kappa.
        local_bias: `None` or tensor of shape `(B, N, S, 1)`, b of LOCAL's logits.
        graph_bias: `None` or tensor of shape `(B, G, S, 1)`, b of the walk's weights.
        tokens: `Tokens`.
        graph: `None` or the caller's `SparseGraph`.
        poison: `None`, or a tensor of shape `(B, 1, S, 1)` to add to the output; see `contain`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    graph_query: Tensor
    graph_key: Tensor
    hop_weights: Tensor
    concentration: Tensor
    local_bias: Tensor
    graph_bias: Tensor
    tokens: Tokens
    graph: SparseGraph | None = None
    poison: Tensor = None

    @classmethod
    def create(
        cls,
        inputs: Inputs,
        options: Options,
        call: Call,
        contain: Callable = contain_vectors,
        unit: Callable = unit,
    ) -> Self:
        """Prepares the tensors of a call.

        Args:
            inputs: `Inputs`.
            options: `Options`.
            call: `Call`.
            contain: Function, as `contain_vectors`.
            unit: Function, as `keras_rwr._tensors.unit`.
        """
        vectors = [inputs.query, inputs.key, inputs.value, inputs.graph_query, inputs.graph_key]
        tokens = Tokens.create(
            ops.shape(inputs.query)[1], call.is_causal, inputs.padding_mask, inputs.segment_ids
        )
        dtype = precision(*vectors)
        vectors = [None if x is None else ops.transpose(x, (0, 2, 1, 3)) for x in vectors]
        vectors, tokens, poison = contain(vectors, tokens, options)
        query, key, value, graph_query, graph_key = vectors
        shared = graph_query is not None
        # Without a graph of its own, each query head has one from its query and key.
        if not shared:
            graph_query, graph_key = query, repeat_heads(key, query.shape[1])
        bias = None
        if inputs.discoverability is not None:
            bias = key_bias(ops.cast(graph_key, dtype), inputs.discoverability)
        if options.steps > 0:  # without a step nobody looks at them
            graph_query, graph_key = unit(graph_query), unit(graph_key)
        return cls(
            query=query,
            key=key,
            value=value,
            graph_query=graph_query,
            graph_key=graph_key,
            hop_weights=_hop_weights(inputs, options, dtype),
            concentration=per_head(inputs.concentration, dtype),
            local_bias=None if shared else bias,
            graph_bias=bias,
            tokens=tokens,
            graph=inputs.graph,
            poison=poison,
        )

    def finish(self, output: Tensor, dtype: str) -> Tensor:
        """`(B, N, S, V)` to the call's output `(B, S, N, V)`, 0 at padding."""
        if self.poison is not None:
            output = where(self.tokens.real, output + self.poison, 0.0)
        return ops.cast(ops.transpose(output, (0, 2, 1, 3)), dtype)


def _hop_weights(inputs: Inputs, options: Options, dtype: str) -> Tensor:
    """theta as a tensor of shape `(B or 1, N or 1, S or 1, T + 1)`."""
    if inputs.hop_weights is None:
        return restart_weights(options, inputs.lens_strength, dtype)
    weights = ops.cast(inputs.hop_weights, dtype)
    if len(weights.shape) == 4:
        return ops.transpose(weights, (0, 2, 1, 3))
    return ops.reshape(weights, (1, -1, 1, weights.shape[-1]))
