"""RWR attention of one call: select → weigh → walk, beside attend_locally.

output = LOCAL + sum_t theta_t P^t V
"""

import dataclasses
from typing import Any, Self

import keras
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_rwr import _dispatch, _reference, _sharding
from keras_rwr._select import select
from keras_rwr._tensors import (
    contain,
    head_major,
    key_bias,
    per_head,
    precision,
    repeat_heads,
    unit,
    where,
)
from keras_rwr._tokens import Tokens
from keras_rwr._walk import restart_weights, walk
from keras_rwr._weigh import SparseGraph, weigh
from keras_rwr.options import Call, Options, Tuning

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


def attend(inputs: Inputs, options: Options, call: Call, tuning: Tuning) -> Tensor:
    """Runs a call by the fastest implementation that supports it, `(B, S, N, V)`."""
    if in_symbolic_scope() or 0 in inputs.query.shape or 0 in inputs.value.shape:
        shape = (*ops.shape(inputs.query)[:3], inputs.value.shape[-1])
        return ops.zeros(shape, dtype=inputs.query.dtype)
    if inputs.graph is None and _sharding.is_active():
        return _sharding.attend_over_devices(attend, inputs, options, call, tuning)
    spec = _dispatch.CallSpec.of(inputs, options, call, tuning)
    implementation = _dispatch.choose(spec, tuning.implementation)
    if _dispatch.runs_whole(implementation, spec):
        return _dispatch.run_kernel(implementation, inputs, spec.config)
    stages = _dispatch.stages(implementation)
    heads = Heads.create(inputs, options, call, stages.keep_half)
    if implementation == "reference":
        output = _reference.rwr_attention(heads, options, call, inputs.seed)
    else:
        output = attend_heads(heads, options, call, tuning, inputs.seed, stages)
    return heads.finish(output, inputs.query.dtype)


def attend_heads(
    heads: "Heads",
    options: Options,
    call: Call,
    tuning: Tuning,
    seed: Tensor = None,
    stages: _dispatch.Stages = _dispatch.PORTABLE,
) -> Tensor:
    """The operation in O(S) memory: `(B, N, S, V)`."""
    output = stages.attend_locally(
        heads.query,
        heads.key,
        heads.value,
        heads.tokens,
        options.window,
        heads.local_bias,
        call.dropout,
        seed,
        tuning.block_size,
    )
    if not options.walks:
        return output
    number = heads.query.shape[1]
    if options.steps == 0:
        return output + heads.hop_weights * repeat_heads(heads.value, number)
    transition = heads.transition(options, tuning, stages)
    value = heads.walked_value(transition)
    matmul = stages.make_matmul(transition)
    return output + walk(transition, value, heads.hop_weights, options, number, matmul)


def attention_matrix(inputs: Inputs, options: Options, call: Call) -> Tensor:
    """The dense matrix A with the output `A v`, `(B, N, S, S)`, without dropout; 0 at padding."""
    heads = Heads.create(inputs, options, call)
    matrix = _reference.attention_matrix(heads, options, call)
    return where(heads.tokens.real, matrix + heads.poison, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The tensors of a call as the stages take them: heads first, in the arithmetic's dtype.

    Attributes:
        query: Tensor of shape `(B, N, S, H)`.
        key: Tensor of shape `(B, M, S, H)`.
        value: Tensor of shape `(B, M, S, V)`.
        graph_query: Tensor of shape `(B, G, S, F)`, unit vectors.
        graph_key: Tensor of shape `(B, G, S, F)`, unit vectors.
        hop_weights: Tensor of shape `(B or 1, N or 1, S or 1, T + 1)`, theta.
        concentration: Tensor of shape `(G or 1, 1, 1)`, kappa.
        local_bias: `None` or tensor of shape `(B, N, S, 1)`, b of LOCAL's logits.
        graph_bias: `None` or tensor of shape `(B, G, S, 1)`, b of the walk's weights.
        tokens: `Tokens`.
        poison: 0, or a tensor of shape `(B, 1, S, 1)` to add to the output; see `contain`.
        graph: `None` or the caller's `SparseGraph`.
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
    poison: Tensor
    graph: SparseGraph | None

    @classmethod
    def create(cls, inputs: Inputs, options: Options, call: Call, keep_half: bool = False) -> Self:
        """Prepares the tensors of a call.

        With `keep_half`, queries, keys and values stay in half precision where they all are.
        """
        query, key, value = inputs.query, inputs.key, inputs.value
        tokens = Tokens.create(
            ops.shape(query)[1], call.is_causal, inputs.padding_mask, inputs.segment_ids
        )
        shared = inputs.graph_query is not None
        dtype = precision(query, key, value, inputs.graph_query, inputs.graph_key)
        kinds = {keras.backend.standardize_dtype(x.dtype) for x in (query, key, value)}
        stored = kinds.pop() if keep_half and len(kinds) == 1 else dtype
        vectors = [head_major(x, stored) for x in (query, key, value)]
        if shared:
            vectors += [head_major(x, dtype) for x in (inputs.graph_query, inputs.graph_key)]
        if inputs.padding_mask is not None:
            vectors = [where(tokens.real, x, 0.0) for x in vectors]
        poison = 0.0
        if call.is_causal:
            *vectors, poison = contain(*vectors)
        query, key, value, *graph = vectors
        # Without a graph of its own, each query head has one from its query and key.
        if not shared:
            graph = [ops.cast(x, dtype) for x in (query, repeat_heads(key, query.shape[1]))]
        graph_query, graph_key = graph
        bias = None
        if inputs.discoverability is not None:
            bias = key_bias(graph_key, inputs.discoverability)
        return cls(
            query=query,
            key=key,
            value=value,
            graph_query=unit(graph_query),
            graph_key=unit(graph_key),
            hop_weights=_hop_weights(inputs, options, dtype),
            concentration=per_head(inputs.concentration, dtype),
            local_bias=None if shared else bias,
            graph_bias=bias,
            tokens=tokens,
            poison=poison,
            graph=inputs.graph,
        )

    def transition(
        self, options: Options, tuning: Tuning, stages: _dispatch.Stages = _dispatch.PORTABLE
    ) -> SparseGraph:
        """The transition matrix: the caller's, or a new one."""
        if self.graph is not None:
            return self.graph
        neighbors = select(
            self.graph_query, self.graph_key, self.tokens, options, stages.best_blocks
        )
        return weigh(
            self.graph_query,
            self.graph_key,
            neighbors,
            self.tokens,
            options,
            self.concentration,
            self.graph_bias,
            tuning.block_size,
            stages.far_dot,
        )

    def walked_value(self, transition: SparseGraph) -> Tensor:
        """Values of the heads that are walked: those of key/value heads if they share graphs."""
        graphs = transition.log_weights.local.shape[1]
        shared = self.value.shape[1] % graphs == 0
        return self.value if shared else repeat_heads(self.value, self.query.shape[1])

    def finish(self, output: Tensor, dtype: str) -> Tensor:
        """`(B, N, S, V)` to the call's output `(B, S, N, V)`, 0 at padding."""
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
