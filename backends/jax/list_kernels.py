"""Far edges: their weights, products with them, and their gradients, one key block a program.

The queries that chose a block are listed, and worked on by chunks of `entries`; see
`lists.reverse_lists`. A place that is there for padding's sake has the position -1.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_rwr.backends.jax.tiles import (
    block_rows,
    bounded,
    chunks_of,
    dot,
    features,
    listed_rows,
    listed_rows_of_step,
    outside_window,
    places_of,
    row_positions,
    rows_of_step,
    scale_of_gradients,
    share_of_gradients,
    slope,
    sum_over_steps,
    weigh,
)


def link(plan, refs, places, block):
    """Pairs of a chunk's entries and the block's keys that a far edge links."""
    positions = refs["positions"][places, :]
    keys = row_positions(block * plan.width, plan.keys)
    linked = outside_window(positions, keys, plan) & (refs["block_scales"][...] > 0)
    return linked & (positions >= 0)


def weigh_far_edges(plan, refs, out):
    """Weights of the far edges to one block, their sum for each entry, and for each key.

    Where the walk's first step is taken at once, it spreads the values too, as `spread` does.
    """
    block = pl.program_id(1)
    here = block_rows(plan, block)
    key = refs["keys"][here, :]
    value = refs["values"][here, :] if plan.walks_at_once else None
    key_scale = refs["block_scales"][...]

    def go(chunk, back_sums):
        places = places_of(plan, chunk)
        query = listed_rows(plan, refs, "query", places)
        cosine = dot(query, key.T) * listed_rows(plan, refs, "query_scale", places) * key_scale
        weight = weigh(cosine, refs["sharpness"][...], plan)
        weight = jnp.where(link(plan, refs, places, block), weight, 0.0)
        if plan.reversible:
            weight = 0.5 * weight
        out["weights"][places, :] = weight.astype(out["weights"].dtype)
        if plan.mutual:
            back = weight * listed_rows(plan, refs, "gain", places) if plan.biased else weight
            back_sums += jnp.sum(back, 0, keepdims=True)
        if plan.biased:
            weight *= refs["block_gains"][...]
        out["sums"][places, :] = jnp.sum(weight, 1, keepdims=True)
        if plan.walks_at_once:
            product = dot(weight.astype(value.dtype), value)
            out["spread"][places, :] = product.astype(out["spread"].dtype)
        return back_sums

    back_sums = jnp.zeros((1, plan.keys), jnp.float32)
    back_sums = jax.lax.fori_loop(*chunks_of(plan, refs), go, back_sums)
    if plan.mutual:
        out["back_sums"][...] = back_sums


def scaled_weights(plan, refs, places):
    """A chunk's weights times the scales of its entries and of the keys, where they are given."""
    weight = refs["weights"][places, :].astype(jnp.float32)
    if refs["entry_scale"] is not None:
        weight *= listed_rows(plan, refs, "entry_scale", places)
    if refs["key_scale"] is not None:
        weight *= refs["key_scale"][...]
    return weight


def spread(plan, refs, out):
    """A state from keys to entries: `sum_j weight_ej state_j` over the keys j of e's block."""
    block = pl.program_id(1)
    here = block_rows(plan, block)

    def go(chunk, nothing):
        places = places_of(plan, chunk)
        weight = scaled_weights(plan, refs, places).astype(out["entries"].dtype)
        for part in range(plan.state_parts):
            columns = features(plan, part)
            product = dot(weight, refs["states"][here, columns])
            out["entries"][places, columns] = product.astype(out["entries"].dtype)
        return nothing

    jax.lax.fori_loop(*chunks_of(plan, refs), go, ())


def collect(plan, refs, out):
    """A state from entries to keys: `sum_e weight_ej state_i(e)` over the entries of its block."""

    def go(chunk, totals):
        places = places_of(plan, chunk)
        weight = scaled_weights(plan, refs, places).astype(out["keys"].dtype).T
        return tuple(
            total + dot(weight, listed_rows(plan, refs, "states", places, features(plan, part)))
            for part, total in enumerate(totals)
        )

    zeros = jnp.zeros((plan.keys, plan.values), jnp.float32)
    totals = jax.lax.fori_loop(*chunks_of(plan, refs), go, (zeros,) * plan.state_parts)
    for part, total in enumerate(totals):
        out["keys"][:, features(plan, part)] = total.astype(out["keys"].dtype)


def far_edge_gradients(plan, refs, out):
    """Gradients of the far edges to one block, for their queries by entry and for the keys.

    "Radial" is the sum of `dc_ij c_ij`, by which a vector's gradient along itself is taken away.
    """
    block = pl.program_id(1)
    here = block_rows(plan, block)
    key = refs["keys"][here, :]
    key_scale = refs["block_scales"][...]
    sharpness = refs["sharpness"][...]

    def products(listed, own, places):
        """`sum_m x^m y^m^T` of the entries' adjoint states and the keys' states, or conversely."""
        left = functools.partial(listed_rows_of_step, plan, refs, listed, places=places)
        right = functools.partial(rows_of_step, plan, refs, own, rows=here)
        return sum_over_steps(plan, left, right, (plan.entries, plan.keys))

    def go(chunk, carry):
        gradient, radial, bias = carry
        places = places_of(plan, chunk)
        query = listed_rows(plan, refs, "query", places)
        query_scale = listed_rows(plan, refs, "query_scale", places)
        cosine = dot(query, key.T) * query_scale * key_scale
        linked = link(plan, refs, places, block)
        weight = jnp.where(linked, weigh(cosine, sharpness, plan), 0.0)

        slack = plan.keep_walking * products("adjoint", "state", places)
        along = slack - listed_rows(plan, refs, "delta", places)
        share = listed_rows(plan, refs, "share", places)
        if plan.reversible:
            along = 0.5 * along
        if plan.biased:
            along *= refs["block_gains"][...]
            bias += jnp.sum(weight * along * share, 0, keepdims=True)
        along *= share_of_gradients(share, plan)
        if plan.mutual:
            slack = plan.keep_walking * products("state", "adjoint", places)
            back = 0.5 * (slack - refs["block_deltas"][...])
            if plan.biased:
                back *= listed_rows(plan, refs, "gain", places)
                shared = weight * back * refs["block_shares"][...]
                out["entry_bias"][places, :] = jnp.sum(shared, 1, keepdims=True)
            along += back * share_of_gradients(refs["block_shares"][...], plan)
        change = jnp.where(linked, along * slope(cosine, sharpness, plan), 0.0)
        out["entry_radial"][places, :] = jnp.sum(change * cosine, 1, keepdims=True)
        radial += jnp.sum(change * cosine, 0, keepdims=True)
        to_query = bounded(change * scale_of_gradients(query_scale) * key_scale, key.dtype)
        out["entry_gradient"][places, :] = dot(to_query, key).astype(out["entry_gradient"].dtype)
        to_key = bounded(change * query_scale * scale_of_gradients(key_scale), key.dtype)
        return gradient + dot(to_key.T, query), radial, bias

    zeros = jnp.zeros((1, plan.keys), jnp.float32)
    gradient, radial, bias = jax.lax.fori_loop(
        *chunks_of(plan, refs),
        go,
        (jnp.zeros((plan.keys, plan.head), jnp.float32), zeros, zeros),
    )
    out["key_gradient"][...] = gradient.astype(out["key_gradient"].dtype)
    out["key_radial"][...] = radial
    if plan.biased:
        out["key_bias"][...] = bias
