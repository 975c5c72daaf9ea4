"""The forward pass along the band: LOCAL with the walk's first step, and further steps.

The band holds `S_ij g_j` by tiles: of a tile of queries and each of the `spans` tiles of keys that
it faces. A step of the walk multiplies a state, one vector of features a token, with the transition
matrix P, which is the band and the far edges divided by the degrees, or with its transpose.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_rwr.backends.jax.tiles import (
    LOG2E,
    NEVER,
    aligned,
    column_positions,
    dot,
    faced_by,
    facing,
    far_sum,
    keep_pairs,
    locate,
    row_positions,
    rows_of,
    weigh,
    within_window,
)


def attend_locally(plan, refs, out):
    """LOCAL with online softmax, the weights of local edges, degrees, and Z^1 where it is asked."""
    tile = pl.program_id(1)
    rows = column_positions(tile * plan.tile, plan.tile)
    query_scale = refs["query_scale"][...]
    real = query_scale > 0
    query = refs["query"][...]
    width = plan.columns("local")

    def face(piece, carry):
        peak, total, local, degree, walked = carry
        span, lanes, there = locate(plan, tile, piece, width)
        columns = row_positions(there, width)
        there = aligned(there, width)
        key, value = refs["keys"][there, :], refs["values"][there, :]
        key_scale = refs["key_scales"][:, there]
        near = within_window(rows, columns, plan.window, True, not plan.causal)
        near = near & real & (key_scale > 0)
        product = dot(query, key.T)
        logits = product * plan.logit_scale
        if plan.biased:
            bias = refs["biases"][:, there] * LOG2E
            logits += bias

        if plan.steps:
            sharpness = refs["sharpness"][...]
            weight = weigh(product * query_scale * key_scale, sharpness, plan)
            if plan.reversible:
                cosine = dot(refs["key"][...], refs["queries"][there, :].T)
                cosine *= refs["key_scale"][...] * refs["query_scales"][:, there]
                weight = 0.5 * (weight + weigh(cosine, sharpness, plan))
            weight = jnp.where(near, weight, 0.0)
            if plan.biased:
                weight *= jnp.exp2(bias)
            degree += jnp.sum(weight, 1, keepdims=True)
            out["band"][span, :, lanes] = weight.astype(out["band"].dtype)
            if plan.walks_at_once:
                walked += dot(weight.astype(value.dtype), value)

        logits = jnp.where(near, logits, NEVER)
        highest = jnp.maximum(peak, jnp.max(logits, 1, keepdims=True))
        correction = jnp.exp2(peak - highest)
        probability = jnp.where(near, jnp.exp2(logits - highest), 0.0)
        total = total * correction + jnp.sum(probability, 1, keepdims=True)
        if plan.dropout:
            keep = keep_pairs(refs["word"][...], rows, columns, plan.dropout)
            probability = jnp.where(keep, probability / (1.0 - plan.dropout), 0.0)
        local = local * correction + dot(probability.astype(value.dtype), value)
        return highest, total, local, degree, walked

    zeros = jnp.zeros((plan.tile, 1), jnp.float32)
    state = jnp.zeros((plan.tile, plan.values), jnp.float32)
    peak, total, local, degree, walked = jax.lax.fori_loop(
        *facing(plan, tile, plan.spans, width), face, (zeros + NEVER, zeros, state, zeros, state)
    )
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out["local"][...] = (local / total).astype(out["local"].dtype)
    out["lse"][...] = jnp.where(some, peak + jnp.log2(total), 0.0)
    if not plan.steps:
        return

    if plan.slots:
        degree += far_sum(plan, refs, "sums")
    if plan.mutual:
        degree += refs["back_sums"][...]
    linked = degree > plan.isolated
    share = jnp.where(linked, 1.0 / jnp.where(linked, degree, 1.0), 0.0)
    out["share"][...] = share
    if plan.walks_at_once:
        if plan.slots:
            walked += far_sum(plan, refs, "spread")
        if plan.mutual:
            walked += refs["collected"][...].astype(jnp.float32)
        start = refs["value"][...].astype(jnp.float32)
        walked = jnp.where(linked, walked * share, start)
        out["state"][...] = (start + plan.keep_walking * walked).astype(out["state"].dtype)


def step_along_band(plan, refs, out):
    """`start + (1 - alpha) P state`."""
    tile = pl.program_id(1)
    share = refs["share"][...]

    def face(span, total):
        state = refs["states"][rows_of(plan, tile + span - plan.before), :]
        weight = refs["band"][span, :, :]
        if plan.is_wide:  # and becomes half precision as a part of P, which is at most 1
            weight = weight * share
        return total + dot(weight.astype(state.dtype), state)

    total = jnp.zeros((plan.tile, plan.values), jnp.float32)
    total = jax.lax.fori_loop(*facing(plan, tile, plan.spans, plan.tile), face, total)
    if not plan.is_wide:
        total *= share
    if plan.slots:
        total += far_sum(plan, refs, "spread")
    if plan.mutual:
        total += refs["collected"][...].astype(jnp.float32)
    total = plan.keep_walking * (total + _stay(refs, share))
    out["state"][...] = (total + refs["start"][...].astype(jnp.float32)).astype(out["state"].dtype)


def step_back_along_band(plan, refs, out):
    """`(1 - alpha) P^T state`."""
    tile = pl.program_id(1)

    def face(span, total):
        there = tile + plan.before - span
        weight = refs["band"][there, span, :, :].astype(jnp.float32)
        there = rows_of(plan, there)
        weight *= refs["shares"][there, :]
        state = refs["states"][there, :]
        return total + dot(weight.astype(state.dtype).T, state)

    total = jnp.zeros((plan.tile, plan.values), jnp.float32)
    total = jax.lax.fori_loop(*faced_by(plan, tile, plan.spans), face, total)
    if plan.slots:
        total += refs["collected"][...].astype(jnp.float32)
    if plan.mutual:
        total += far_sum(plan, refs, "spread")
    total = plan.keep_walking * (total + _stay(refs, refs["share"][...]))
    out["state"][...] = total.astype(out["state"].dtype)


def _stay(refs, share):
    """The states of isolated tokens, from which a step leads to themselves."""
    isolated = (share == 0) & (refs["query_scale"][...] > 0)
    return jnp.where(isolated, refs["state"][...].astype(jnp.float32), 0.0)
