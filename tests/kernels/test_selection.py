"""Which key blocks the kernels choose for each query, and the lists of queries for each block."""

import itertools

import numpy as np
import pytest
import torch
from precision import portable_neighbors

from keras_rwr._dispatch import KernelCall
from keras_rwr.backends.torch import select_neighbors, selection

# How far a choice may fall short of the best score in cosines. Float32: roundings of sums of 29
# terms. Float16: a block's mean is rounded to 11 bits, which moves a score by at most 2^-11 of the
# mean's length; two blocks are compared, and 2^-15 of a score may give way to the step's number.
SHORT = {torch.float32: 1e-6, torch.float16: 2 * 2**-11 + 2**-15}


def draw(size, heads=2, head_size=16, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, size, heads, head_size)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def draw_mask(size, batch=2):
    """Holes, a block without a real token, padding at the end, and one sequence of padding."""
    mask = torch.rand((batch, size), generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, size // 4 : size // 2] = False
    mask[0, -3:] = False
    mask[1] = False
    return mask


def options(**changed):
    changed = {"window": 5, "neighbor_block": 4, "slots": 2, "is_causal": True, **changed}
    return KernelCall(topk=changed.pop("slots") * changed["neighbor_block"], **changed)


def scores(query, key, mask, config):
    """Scores of all blocks in float64, (B, N, S, J); -inf for a block that is no candidate."""
    query, key = (
        torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-6).transpose(1, 2).numpy()
        for x in (query, key)
    )
    size, block = query.shape[2], config.neighbor_block
    real = np.ones((len(query), size), bool) if mask is None else mask.numpy()
    result = np.full((*query.shape[:3], -(-size // block)), -np.inf)
    for entry, row, column in itertools.product(*map(range, (len(query), size, result.shape[-1]))):
        tokens = np.arange(column * block, min(column * block + block, size))
        tokens = tokens[real[entry, tokens]]
        ahead = tokens - row
        outside = ahead < -config.window
        if not config.is_causal:
            outside |= ahead > config.window
        if real[entry, row] and outside.any():
            mean = key[entry][:, tokens].mean(1)  # (N, H)
            result[entry, :, row, column] = np.einsum("nh,nh->n", query[entry, :, row], mean)
    return result


def assert_best(query, key, mask, config):
    """Each slot's block scores what the slot's rank promises, and no block comes twice."""
    chosen = select_neighbors(query, key, config, mask).numpy()
    expected = scores(query, key, mask, config)
    expected = np.pad(expected, [(0, 0)] * 3 + [(0, config.slots)], constant_values=-np.inf)
    found = np.take_along_axis(expected, chosen, -1)  # the last column stands for no block
    best = -np.sort(-expected, -1)[..., : config.slots]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(best))
    real = np.isfinite(best)
    assert np.abs(found[real] - best[real]).max() <= SHORT[query.dtype]
    ordered = np.sort(chosen, -1)
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] == -1)).all()
    return chosen


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "head_size", "changed"),
    [
        (67, 16, {}),
        (53, 29, {"slots": 1, "window": 4}),
        (41, 96, {"slots": 5, "neighbor_block": 3}),
        (83, 16, {"neighbor_block": 1, "window": 0}),
        (61, 16, {"neighbor_block": 24, "window": 23}),
    ],
    ids=["two", "one", "five", "tokens", "large blocks"],
)
def test_best_blocks(size, head_size, changed, dtype, padded, is_causal):
    query, key = draw(size, head_size=head_size, dtype=dtype)
    mask = draw_mask(size) if padded else None
    assert_best(query, key, mask, options(is_causal=is_causal, **changed))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("slots", [1, 2])
def test_groups_of_blocks(slots, padded, is_causal, monkeypatch):
    """Many blocks are compared by groups; here in tiles of which a short sequence has several."""
    tile = {"ROWS": 16, "LANES": 16, "GROUP": 2, "STAGES": 1}
    monkeypatch.setattr(selection, "_tile", lambda *_: dict(tile))
    query, key = draw(109, heads=1, dtype=torch.float16)
    mask = draw_mask(109) if padded else None
    assert_best(query, key, mask, options(neighbor_block=1, slots=slots, is_causal=is_causal))


@pytest.mark.parametrize("blocks", [1, 1025, 2**17 + 1])
def test_tiles_hold_the_number_of_a_step(blocks):
    tile = selection._tile(torch.float16, 64, blocks, 2)
    assert ("GROUP" in tile) == (blocks <= 2**17)
    assert "GROUP" not in selection._tile(torch.float16, 64, blocks, 3)
    assert "GROUP" not in selection._tile(torch.float32, 64, blocks, 2)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("slots", "block"), [(2, 4), (7, 1)])
def test_ties_go_to_the_lower_block_in_float32(slots, block, is_causal):
    """Keys of one feature: unit keys, block means and scores are exact, and few of them differ."""
    generator = torch.Generator().manual_seed(2)
    size, features = 59, 3
    number, sign = torch.randint(features, (2, 1, size, 2), generator=generator)
    key = torch.nn.functional.one_hot(number, features) * (1 - 2 * (sign % 2))[..., None]
    query = torch.nn.functional.one_hot(number.flip(1), features)
    query[:, ::5] = 0
    query, key = query.float(), key.float()
    config = options(slots=slots, neighbor_block=block, is_causal=is_causal)
    chosen = select_neighbors(query, key, config)
    expected = portable_neighbors(query, key, config)
    # The reference does not order them.
    assert torch.equal(chosen.sort().values, expected.to(torch.int32).sort().values)
    blocks = -(-size // block)
    order = [J for J in range(blocks) if is_causal or J * block + block - 1 > 5]
    assert chosen[0, 0, 55 if is_causal else 0].tolist() == order[:slots]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_short_sequences_have_no_neighbours(dtype):
    query, key = draw(6, dtype=dtype)
    assert select_neighbors(query, key, options()) is None
    assert (selection.select_neighbors(query, key, None, 2, 4, 5, True) == -1).all()
    query, key = draw(7, dtype=dtype)
    (row,) = select_neighbors(query[:1, :, :1], key[:1, :, :1], options())[0]
    assert row.tolist() == [[-1, -1]] * 6 + [[0, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_and_later_tokens_change_nothing(dtype):
    query, key = draw(47, dtype=dtype)
    mask = draw_mask(47)
    chosen = select_neighbors(query, key, options(), mask)
    assert (chosen[~mask[:, None].expand(chosen.shape[:3])] == -1).all()

    disturbed = [torch.where(mask[..., None, None], x, torch.nan) for x in (query, key)]
    torch.testing.assert_close(select_neighbors(*disturbed, options(), mask), chosen)

    chosen = select_neighbors(query, key, options())
    for x in (query, key):
        x[:, 30:] = 100.0 * x[:, 30:].flip(0)
    torch.testing.assert_close(
        select_neighbors(query, key, options())[:, :, :30], chosen[:, :, :30]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides_and_tiles_change_nothing(dtype):
    query, key = draw(43, dtype=dtype)
    chosen = select_neighbors(query, key, options(is_causal=False))
    together = torch.stack([key, query], 2)  # (B, S, 2, N, H)
    across = query.mT.contiguous().mT, together[:, :, 0]
    torch.testing.assert_close(select_neighbors(*across, options(is_causal=False)), chosen)
    small = options(is_causal=False, block_size=9)
    torch.testing.assert_close(select_neighbors(query, key, small), chosen)


@pytest.mark.parametrize("lists_are_many", [False, True])
def test_reverse_lists(lists_are_many):
    batch, heads, size, slots, blocks = 2, 3, 37, 2, 12000 if lists_are_many else 5
    generator = torch.Generator().manual_seed(3)
    shape = (batch, heads, size, slots)
    neighbors = torch.randint(-1, blocks, shape, generator=generator, dtype=torch.int32)
    neighbors[0, 1] = -1
    neighbors[1, 2, 5:] = blocks - 1
    entries, starts = selection.reverse_lists(neighbors, blocks)
    assert entries.dtype == starts.dtype == torch.int32
    flat = neighbors.flatten().tolist()
    lists = [[] for _ in range(batch * heads * blocks + 1)]
    for entry, block in enumerate(flat):
        head = entry // (size * slots)
        lists[-1 if block < 0 else head * blocks + block].append(entry)
    assert entries.tolist() == list(itertools.chain(*lists))
    assert starts.tolist() == np.cumsum([0, *map(len, lists[:-1])]).tolist()
