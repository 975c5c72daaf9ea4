"""RWR attention of one call: select → weigh → walk, beside attend_locally.

output = LOCAL + sum_t theta_t P^t V
"""

import dataclasses
from typing import Any

from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_rwr import _dispatch, _reference, _sharding
from keras_rwr._heads import Heads, Inputs
from keras_rwr._tensors import autocast_dtype, repeat_heads, where, without_autocast
from keras_rwr._weigh import SparseGraph
from keras_rwr.options import Call, Options, Tuning

Tensor = Any


def attend(inputs: Inputs, options: Options, call: Call, tuning: Tuning) -> Tensor:
    """Runs a call by the fastest implementation that supports it, `(B, S, N, V)`."""
    if in_symbolic_scope() or 0 in inputs.query.shape or 0 in inputs.value.shape:
        shape = (*ops.shape(inputs.query)[:3], inputs.value.shape[-1])
        return ops.zeros(shape, dtype=inputs.query.dtype)
    dtype = autocast_dtype(inputs.query)
    if dtype is not None:  # it would round each product inside
        with without_autocast(inputs.query):
            return attend(inputs.cast(dtype), options, call, tuning)
    if inputs.graph is None and _sharding.is_active():
        return _sharding.attend_over_devices(attend, inputs, options, call, tuning)
    spec = _dispatch.CallSpec.of(inputs, options, call, tuning)
    implementation = _dispatch.choose(spec, tuning.implementation)
    if _dispatch.runs_whole(implementation):
        return _dispatch.run_kernel(implementation, inputs, spec.config)
    stages = _dispatch.stages(implementation)
    heads = Heads.create(inputs, options, call, stages.contain, stages.unit)
    if implementation == "reference":
        output = _reference.rwr_attention(heads, options, call, inputs.seed)
    else:
        output = attend_heads(heads, options, call, tuning, inputs.seed, stages)
    return heads.finish(output, inputs.query.dtype)


def attend_heads(
    heads: Heads,
    options: Options,
    call: Call,
    tuning: Tuning,
    seed: Tensor = None,
    stages: _dispatch.Stages = _dispatch.PORTABLE,
) -> Tensor:
    """The operation in O(S) memory: `(B, N, S, V)`."""
    local = stages.attend_locally(
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
        return local
    if options.steps == 0:
        return local + heads.hop_weights * repeat_heads(heads.value, local.shape[1])
    transition = transition_matrix(heads, options, tuning, stages)
    value, shared = heads.value, heads.value.shape[1] % transition.graphs == 0
    if not shared:  # each query head has a graph of its own
        value = repeat_heads(value, local.shape[1])
    return stages.walk(transition, value, heads.hop_weights, options, local)


def transition_matrix(
    heads: Heads,
    options: Options,
    tuning: Tuning,
    stages: _dispatch.Stages = _dispatch.PORTABLE,
) -> SparseGraph:
    """The transition matrix: the caller's, with the tokens of this call, or a new one."""
    if heads.graph is not None:
        return dataclasses.replace(heads.graph, tokens=heads.tokens)
    neighbors = stages.select(heads.graph_query, heads.graph_key, heads.tokens, options)
    return stages.weigh(
        heads.graph_query,
        heads.graph_key,
        neighbors,
        heads.tokens,
        options,
        heads.concentration,
        heads.graph_bias,
        tuning.block_size,
    )


def attention_matrix(inputs: Inputs, options: Options, call: Call) -> Tensor:
    """The dense matrix A with the output `A v`, `(B, N, S, S)`, without dropout; 0 at padding."""
    heads = Heads.create(inputs, options, call)
    matrix = _reference.attention_matrix(heads, options, call)
    return where(heads.tokens.real, matrix + heads.poison, 0.0)
