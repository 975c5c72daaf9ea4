"""The choice of neighbours, interpreted in Pallas, and the lists of who chose a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import portable_neighbors

from keras_rwr._dispatch import KernelCall
from keras_rwr.backends.jax import plan as plans
from keras_rwr.backends.jax import select_neighbors, selection
from keras_rwr.backends.jax.lists import reverse_lists


def draw(size, dtype="float32", batch=2, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, batch, size, 2, 16))
    return x.astype(dtype)


def draw_mask(size):
    """Holes, a block without a real token, and a sequence of padding."""
    mask = np.random.default_rng(1).uniform(size=(2, size)) > 0.3
    mask[:, size // 4 : size // 2] = False
    mask[1] = False
    return jnp.asarray(mask)


def choose(query, key, config, mask=None):
    return np.asarray(jax.jit(lambda *x: select_neighbors(*x, config, mask))(query, key))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    ("size", "slots", "block", "window"), [(67, 2, 4, 5), (41, 5, 3, 4), (383, 1, 1, 0)]
)
def test_best_blocks(size, slots, block, window, is_causal, padded):
    config = KernelCall(
        topk=slots * block, neighbor_block=block, window=window, is_causal=is_causal
    )
    query, key = draw(size)
    mask = draw_mask(size) if padded else None
    found = choose(query, key, config, mask)
    expected = np.asarray(portable_neighbors(query, key, config, mask))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))
    assert (found >= 0).any() and (found == -1).any() == (is_causal or padded)


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_groups_of_blocks(group, padded, monkeypatch):
    """Many blocks are compared by groups in half precision, but for near-ties the same ones."""
    monkeypatch.setattr(selection, "_FEW_BLOCKS", 0)
    monkeypatch.setattr(selection, "_GROUP", group)
    config = KernelCall(topk=2, neighbor_block=1, window=3, is_causal=not padded)
    query, key = draw(283, "float16")
    mask = draw_mask(283) if padded else None
    found = choose(query, key, config, mask)
    expected = np.asarray(
        portable_neighbors(query.astype("float32"), key.astype("float32"), config, mask)
    )
    assert (np.sort(found) == np.sort(expected)).mean() > 0.98
    np.testing.assert_array_equal(found >= 0, np.sort(expected)[..., ::-1] >= 0)


def test_ties_go_to_the_lower_block():
    """Keys of one feature: all scores are exact, and few of them differ."""
    rng = np.random.default_rng(2)
    key = np.eye(16, dtype="float32")[rng.integers(0, 2, (1, 59, 2))]
    query = np.eye(16, dtype="float32")[rng.integers(0, 2, (1, 59, 2))]
    config = KernelCall(topk=7, neighbor_block=1, window=5, is_causal=True)
    found = choose(jnp.asarray(query), jnp.asarray(key), config)
    for head in range(2):
        scores = query[0, 58, head] @ key[0, :53, head].T
        np.testing.assert_array_equal(found[0, head, 58], np.argsort(-scores, kind="stable")[:7])


def test_short_sequences_have_no_neighbours():
    query, key = draw(6)
    config = KernelCall(topk=8, neighbor_block=4, window=5, is_causal=True)
    assert select_neighbors(query, key, config) is None
    query, key = draw(7)
    found = choose(query, key, config)
    assert found[0, 0].tolist() == [[-1, -1]] * 6 + [[0, -1]]


@pytest.mark.parametrize("blocks", [5, 12000])  # whose numbers two bytes hold, and do not
def test_reverse_lists(blocks):
    batch, size, heads, slots = 2, 37, 3, 2
    config = KernelCall(topk=2, neighbor_block=1)
    plan = plans.Plan.create((batch, size, heads, 16), 16, "float32", config, "gpu", slots=slots)
    plan = dataclasses.replace(plan, size=size, width=1)
    neighbors = np.random.default_rng(3).integers(-1, 5, (batch * heads, size, slots))
    neighbors[1] = -1
    neighbors[4, 5:] = 4
    if blocks > size:
        # A plan with more blocks than tokens, to number many lists.
        class Wide(plans.Plan):
            blocks = 12000

        plan = Wide(**{x.name: getattr(plan, x.name) for x in dataclasses.fields(plan)})
    lists = jax.jit(lambda x: reverse_lists(plan, x))(jnp.asarray(neighbors, "int32"))
    starts, positions, places = map(np.asarray, lists)
    assert positions.shape == (batch * heads, plan.listed, 1)
    seen = np.zeros(positions.shape, bool)
    for head in range(batch * heads):
        for block in range(5):
            chosen = np.argwhere(neighbors[head] == block)
            count = starts[head, block + 1] - starts[head, block]
            assert count == len(chosen)
            first = plan.entries * (starts[head, block] // plan.entries + block)
            assert positions[head, first : first + count, 0].tolist() == chosen[:, 0].tolist()
            found = [places[head, row, slot] for row, slot in chosen]
            assert found == list(range(first, first + count))
            seen[head, first : first + count] = True
    assert (places[neighbors < 0] == -1).all() and (positions[~seen] == -1).all()
