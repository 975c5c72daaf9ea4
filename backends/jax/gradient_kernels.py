"""The backward pass along the band: the end of the adjoint walk, gradients of queries and keys.

The adjoint walk `G^(m-1) = (1 - alpha) P^T G^m` runs on `step_back_along_band`. With its states and
those of the walk, the gradient of an edge is a sum of products, `dP_ij = (1 - alpha) sum_m G^m_i
Z^(m-1)_j`, and is needed on edges only. What a tile of queries hands to the keys that it faces,
`edges`, is stored by tiles as the band is.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_rwr.backends.jax.tiles import (
    LOG2E,
    LONGEST_SCALE,
    aligned,
    bounded,
    column_positions,
    dot,
    faced_by,
    facing,
    far_sum,
    features,
    keep_pairs,
    load_states,
    locate,
    row_positions,
    rows_of,
    rows_of_step,
    scale_of_gradients,
    share_of_gradients,
    slope,
    sum_over_steps,
    within_window,
)


def finish_adjoint(plan, refs, out):
    """The values' gradient through the walk, and delta, the sum of `P_ij dP_ij` over a row.

    For the reciprocal walk, which starts from `[V, V / pi, 1 / pi]`, delta is lessened and the
    bias gradient begins with the gradient of log pi.
    """
    delta = jnp.zeros((plan.tile, 1), jnp.float32)
    log_stationary = jnp.zeros((plan.tile, 1), jnp.float32)
    gradient = jnp.zeros((plan.tile, plan.values), jnp.float32)
    for part in range(plan.state_parts):
        columns = features(plan, part)
        start = refs["state0"][:, columns].astype(jnp.float32)
        total = refs["adjoint0"][:, columns].astype(jnp.float32)
        for step in range(1, plan.steps + 1):
            adjoint = refs[f"adjoint{step}"][:, columns].astype(jnp.float32)
            state = refs[f"state{step}"][:, columns].astype(jnp.float32)
            total += adjoint
            delta += jnp.sum(adjoint * (state - start), 1, keepdims=True)
        if part == 0:
            gradient += total
        else:
            log_stationary -= jnp.sum(total * start, 1, keepdims=True)
        if part == 1:
            inverse = refs["state0"][:, pl.ds(2 * plan.values, 1)].astype(jnp.float32)
            gradient += total * inverse
    if plan.reciprocal:
        delta -= log_stationary
        if plan.biased:
            out["bias"][...] = log_stationary
    out["delta"][...] = delta
    out["value"][...] = gradient.astype(out["value"].dtype)


def query_gradients(plan, refs, out):
    """The queries' gradient, and the edges of LOCAL and of the walk that hand on to the keys."""
    tile = pl.program_id(1)
    rows = column_positions(tile * plan.tile, plan.tile)
    query_scale = refs["query_scale"][...]
    query, cotangent = refs["query"][...], refs["cotangent"][...]
    width = plan.columns("query_gradients")

    own = rows_of(plan, tile)
    adjoints = load_states(plan, refs, "adjoint", own)
    states = load_states(plan, refs, "state", own) if plan.reversible else None

    def products(own, other, there):
        """`sum_m x^m_i y^m_j` for the rows i of this tile and j of another."""
        right = functools.partial(rows_of_step, plan, refs, other, rows=there)
        return sum_over_steps(plan, own, right, (plan.tile, width))

    def face(piece, carry):
        gradient, radial = carry
        span, lanes, there = locate(plan, tile, piece, width)
        columns = row_positions(there, width)
        there = aligned(there, width)
        key, value = refs["keys"][there, :], refs["values"][there, :]
        key_scale = refs["key_scales"][:, there]
        pairs = (query_scale > 0) & (key_scale > 0)
        near = within_window(rows, columns, plan.window, True, not plan.causal) & pairs
        product = dot(query, key.T)
        logits = product * plan.logit_scale
        if plan.biased:
            bias = refs["biases"][:, there] * LOG2E
            logits += bias
        probability = jnp.where(near, jnp.exp2(logits - refs["lse"][...]), 0.0)
        change = dot(cotangent, value.T)
        if plan.dropout:
            keep = keep_pairs(refs["word"][...], rows, columns, plan.dropout)
            change = jnp.where(keep, change / (1.0 - plan.dropout), 0.0)
        edge = probability * (change - refs["local_delta"][...])
        bias_sums = edge
        edge = edge * (plan.logit_scale / LOG2E)
        query_edge = edge

        if plan.steps:
            sharpness = refs["sharpness"][...]
            cosine = product * query_scale * key_scale
            slack = plan.keep_walking * products(adjoints, "state", there)
            along, share = slack - refs["delta"][...], refs["share"][...]
            if plan.biased:
                weight = refs["band"][jnp.minimum(span, plan.spans - 1), :, lanes]
                bias_sums += jnp.where(near, weight.astype(jnp.float32) * along * share, 0.0)
                along *= jnp.exp2(bias)
            along *= share_of_gradients(share, plan)
            reach = near
            if plan.reversible:
                along = jnp.where(near, along, 0.0)
                back = plan.keep_walking * products(states, "adjoint", there)
                back -= refs["deltas"][:, there]
                back *= share_of_gradients(refs["shares"][:, there], plan)
                if plan.biased:
                    back *= jnp.exp2(refs["bias"][...] * LOG2E)
                linked = within_window(rows, columns, plan.window, not plan.causal, True) & pairs
                along = 0.5 * (along + jnp.where(linked, back, 0.0))
                reach = within_window(rows, columns, plan.window, True, True) & pairs
            along = jnp.where(reach, along * slope(cosine, sharpness, plan), 0.0)
            turning = along * cosine
            radial += jnp.sum(turning, 1, keepdims=True)
            out["key_radial"][span, :, lanes] = jnp.sum(turning, 0, keepdims=True)
            query_edge += along * scale_of_gradients(query_scale) * key_scale
            edge += along * query_scale * scale_of_gradients(key_scale)

        if plan.biased:
            out["key_bias"][span, :, lanes] = jnp.sum(bias_sums, 0, keepdims=True)
        out["edges"][span, :, lanes] = bounded(edge, query.dtype)
        return gradient + dot(bounded(query_edge, query.dtype), key), radial

    gradient = jnp.zeros((plan.tile, plan.head), jnp.float32)
    radial = jnp.zeros((plan.tile, 1), jnp.float32)
    gradient, radial = jax.lax.fori_loop(
        *facing(plan, tile, plan.edge_spans, width), face, (gradient, radial)
    )
    if plan.slots:
        gradient += far_sum(plan, refs, "entry_gradient")
        radial += far_sum(plan, refs, "entry_radial")
        if plan.mutual and plan.biased:
            out["bias"][...] = far_sum(plan, refs, "entry_bias")
    gradient -= query.astype(jnp.float32) * _along_itself(query_scale, radial)
    out["query"][...] = gradient.astype(out["query"].dtype)
    out["radial"][...] = radial


def key_gradients(plan, refs, out):
    """Gradients of keys and of their bias, and LOCAL's part of the values'."""
    tile = pl.program_id(1)
    keys = column_positions(tile * plan.tile, plan.tile)
    key_scale = refs["key_scale"][...]
    key = refs["key"][...]

    def face(span, carry):
        gradient, value_gradient, radial, bias = carry
        index = tile + plan.before - span
        rows = row_positions(index * plan.tile, plan.tile)
        there = rows_of(plan, index)
        query, cotangent = refs["queries"][there, :], refs["cotangents"][there, :]
        gradient += dot(refs["edges"][index, span, :, :].T, query)
        if plan.steps:
            radial += refs["key_radials"][index, span, 0, :][:, None]
        if plan.biased:
            bias += refs["key_biases"][index, span, 0, :][:, None]
        near = within_window(rows, keys, plan.window, True, not plan.causal)
        near = near & (key_scale > 0) & (refs["query_scales"][:, there] > 0)
        logits = dot(key, query.T) * plan.logit_scale - refs["lses"][:, there]
        if plan.biased:
            logits += refs["bias"][...] * LOG2E
        probability = jnp.where(near, jnp.exp2(logits), 0.0)
        if plan.dropout:
            keep = keep_pairs(refs["word"][...], rows, keys, plan.dropout)
            probability = jnp.where(keep, probability / (1.0 - plan.dropout), 0.0)
        value_gradient += dot(probability.astype(cotangent.dtype), cotangent)
        return gradient, value_gradient, radial, bias

    value_gradient = jnp.zeros((plan.tile, plan.values), jnp.float32)
    zeros = jnp.zeros((plan.tile, 1), jnp.float32)
    gradient, value_gradient, radial, bias = jax.lax.fori_loop(
        *faced_by(plan, tile, plan.edge_spans),
        face,
        (jnp.zeros((plan.tile, plan.head), jnp.float32), value_gradient, zeros, zeros),
    )
    if plan.steps:
        value_gradient += refs["walk_gradient"][...].astype(jnp.float32)
    if plan.slots:
        gradient += refs["far_gradient"][...].astype(jnp.float32)
        radial += refs["far_radial"][...]
    gradient -= key.astype(jnp.float32) * _along_itself(key_scale, radial)
    out["key"][...] = gradient.astype(out["key"].dtype)
    out["value"][...] = value_gradient.astype(out["value"].dtype)
    if plan.biased:
        out["bias"][...] = bias


def _along_itself(scale, radial):
    return jnp.where(scale < LONGEST_SCALE, scale * scale_of_gradients(scale) * radial, 0.0)
