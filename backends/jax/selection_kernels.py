"""The kernel that chooses each query's key blocks outside its window.

A block's score is the product of the query with the mean of the block's unit keys; the query's
length does not matter. A tile holds rows, which are queries, and lanes: a step along the blocks
scores one block a lane.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_rwr.backends.jax.tiles import NEVER, aligned, column_positions, dot, row_positions

LANES = 32
NO_BLOCK = 2**31 - 1


def select_blocks(plan, refs, out):
    """The best blocks of each query, ties to the lower block, -1 for none.

    A step along the blocks scores `plan.group` blocks a lane, which count as their best one. Each
    lane keeps its two best groups. Each pass over the blocks finds the best two that no pass before
    it took; of groups, there is one pass.
    """
    # Tiles with many blocks before them start first.
    tile = plan.tiles - 1 - pl.program_id(1)
    rows = column_positions(tile * plan.tile, plan.tile)
    query = refs["query"][...]
    real = refs["real"][...] > 0
    first_row, last_row = tile * plan.tile, (tile + 1) * plan.tile - 1
    # Steps up to `whole` have blocks that are candidates of all rows.
    whole, end = 0, plan.steps
    if plan.causal:
        needed = jnp.maximum(last_row - plan.window, 0)
        end = jnp.minimum(jax.lax.div(needed + plan.span - 1, plan.span), end)
        if not plan.padded:
            reached = jnp.maximum(first_row - plan.window, 0)
            blocks = jax.lax.div(reached + plan.width - 1, plan.width)
            whole = jnp.minimum(jax.lax.div(blocks, LANES * plan.group), end)

    def score_lanes(block, is_checked):
        lanes = aligned(block, LANES)
        score = dot(query, refs["means"][lanes, :].T)
        if not is_checked:
            return score
        candidate = refs["first"][:, lanes] < rows - plan.window
        if not plan.causal:
            candidate |= refs["last"][:, lanes] > rows + plan.window
        return jnp.where(candidate, score, NEVER)

    def step_along(is_checked, taken, step, kept):
        first = step * (plan.group * LANES)
        score = score_lanes(first, is_checked)
        for member in range(1, plan.group):
            score = jnp.maximum(score, score_lanes(first + member * LANES, is_checked))
        block = row_positions(first, LANES)
        if taken is not None:
            score = jnp.where(is_better(*taken, score, block), score, NEVER)
        return keep_two(*kept, score, block, score > kept[0], score > kept[2])

    taken = None
    for slot in range(0, plan.slots, 2):
        kept = (
            jnp.full((plan.tile, LANES), NEVER, jnp.float32),
            jnp.full((plan.tile, LANES), NO_BLOCK, jnp.int32),
        ) * 2
        if plan.causal and not plan.padded:
            unchecked = functools.partial(step_along, False, taken)
            kept = jax.lax.fori_loop(0, whole, unchecked, kept)
        kept = jax.lax.fori_loop(whole, end, functools.partial(step_along, True, taken), kept)
        best, best_block, second, second_block = kept
        chosen = best_lane(best, best_block)
        is_taken = best_block == chosen[1]
        taken = best_lane(
            jnp.where(is_taken, second, best), jnp.where(is_taken, second_block, best_block)
        )
        if plan.group > 1:
            chosen, taken = choose_members(plan, refs, rows, query, (chosen, taken))
        _store(out, slot, *chosen, real)
        if slot + 1 < plan.slots:
            _store(out, slot + 1, *taken, real)


def is_better(score, block, other_score, other_block):
    """Whether the first one of two is better; of equal scores that of the lower block."""
    return (score > other_score) | ((score == other_score) & (block < other_block))


def keep_two(best, best_block, second, second_block, score, block, is_best, is_second):
    """The best two of three, where the first is better than the second."""
    second = jnp.where(is_best, best, jnp.where(is_second, score, second))
    second_block = jnp.where(is_best, best_block, jnp.where(is_second, block, second_block))
    best, best_block = jnp.where(is_best, score, best), jnp.where(is_best, block, best_block)
    return best, best_block, second, second_block


def best_lane(score, block):
    """Each row's best score and the lowest block that has it, as columns."""
    best = jnp.max(score, 1, keepdims=True)
    return best, jnp.min(jnp.where(score == best, block, NO_BLOCK), 1, keepdims=True)


def choose_members(plan, refs, rows, query, groups):
    """The best two of all the members of each row's two best groups."""
    none = jnp.full((plan.tile, 1), NEVER, jnp.float32), jnp.full_like(rows, NO_BLOCK)
    kept = none + none
    query = query.astype(jnp.float32)
    for group_score, group in groups:
        exists = group_score > 0.5 * NEVER
        for member in range(plan.group):
            block = jnp.where(exists, group + member * LANES, 0)
            places = block[:, 0]
            means = refs["means"][places, :].astype(jnp.float32)
            score = jnp.sum(query * means, 1, keepdims=True)
            candidate = refs["first"][0, places][:, None] < rows - plan.window
            if not plan.causal:
                candidate |= refs["last"][0, places][:, None] > rows + plan.window
            score = jnp.where(exists & candidate, score, NEVER)
            is_best, is_second = (is_better(score, block, *other) for other in (kept[:2], kept[2:]))
            kept = keep_two(*kept, score, block, is_best, is_second)
    return kept[:2], kept[2:]


def _store(out, slot, score, block, real):
    found = real & (score > 0.5 * NEVER)
    out["neighbors"][:, pl.ds(slot, 1)] = jnp.where(found, block, -1)
