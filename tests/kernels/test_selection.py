"""Which key blocks the kernels choose for each query; test_stages.py has ties and documents."""

import itertools

import numpy as np
import pytest
import torch

from keras_rwr._tokens import Tokens
from keras_rwr.backends.torch import vectors
from keras_rwr.backends.torch.select import select
from keras_rwr.options import Options

# How far a choice may fall short of the best score in cosines: of sums of up to 96 products, each
# rounded to 21 bits or more.
SHORT = 2e-6


def draw(size, heads=2, head_size=16, batch=2, dtype=torch.float32, seed=0):
    """Queries and keys, (B, N, S, H)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, heads, size, head_size)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def draw_mask(size, batch=2):
    """Holes, a block without a real token, padding at the end, and one sequence of padding."""
    mask = torch.rand((batch, size), generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, size // 4 : size // 2] = False
    mask[0, -3:] = False
    mask[1] = False
    return mask


def made_options(slots=2, neighbor_block=4, window=5):
    return Options(window=window, topk=slots * neighbor_block, neighbor_block=neighbor_block)


def choose(query, key, options, is_causal=True, mask=None):
    tokens = Tokens.create(query.shape[2], is_causal, mask)
    (query, key, *_), tokens, _ = vectors.contain([query, key, key, None, None], tokens, options)
    return select(vectors.unit(query), vectors.unit(key), tokens, options)


def scores(query, key, mask, options, is_causal):
    """Scores of all blocks in float64, (B, N, S, J); -inf for a block that is no candidate."""
    query, key = (
        torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-6).numpy() for x in (query, key)
    )
    size, block = query.shape[2], options.neighbor_block
    real = np.ones((len(query), size), bool) if mask is None else mask.numpy()
    result = np.full((*query.shape[:3], -(-size // block)), -np.inf)
    for entry, row, column in itertools.product(*map(range, (len(query), size, result.shape[-1]))):
        tokens = np.arange(column * block, min(column * block + block, size))
        tokens = tokens[real[entry, tokens]]
        ahead = tokens - row
        outside = ahead < -options.window
        if not is_causal:
            outside |= ahead > options.window
        if real[entry, row] and outside.any():
            mean = key[entry][:, tokens].mean(1)  # (N, H)
            result[entry, :, row, column] = np.einsum("nh,nh->n", query[entry, :, row], mean)
    return result


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
def test_each_slot_has_the_score_of_its_rank(size, head_size, changed, dtype, padded, is_causal):
    query, key = draw(size, head_size=head_size, dtype=dtype)
    mask, options = draw_mask(size) if padded else None, made_options(**changed)
    chosen = choose(query, key, options, is_causal, mask).numpy()
    expected = scores(query, key, mask, options, is_causal)
    expected = np.pad(expected, [(0, 0)] * 3 + [(0, options.slots)], constant_values=-np.inf)
    found = np.take_along_axis(expected, chosen, -1)  # the last column stands for no block
    best = -np.sort(-expected, -1)[..., : options.slots]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(best))
    real = np.isfinite(best)
    assert np.abs(found[real] - best[real]).max() <= SHORT
    ordered = np.sort(chosen, -1)  # no block comes twice
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] == -1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_short_sequences_have_no_neighbours(dtype):
    query, key = draw(6, dtype=dtype)
    assert choose(query, key, made_options()) is None
    query, key = draw(7, dtype=dtype)
    (row,) = choose(query[:1, :1], key[:1, :1], made_options())[0]
    assert row.tolist() == [[-1, -1]] * 6 + [[0, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_and_later_tokens_change_nothing(dtype):
    query, key = draw(47, dtype=dtype)
    mask, options = draw_mask(47), made_options()
    chosen = choose(query, key, options, True, mask)
    assert (chosen[~mask[:, None].expand(chosen.shape[:3])] == -1).all()

    disturbed = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (query, key)]
    assert torch.equal(choose(*disturbed, options, True, mask), chosen)

    chosen = choose(query, key, options)
    for x in (query, key):
        x[:, :, 30:] = 100.0 * x[:, :, 30:].flip(0)
    assert torch.equal(choose(query, key, options)[:, :, :30], chosen[:, :, :30])


def test_strides_change_nothing():
    query, key = draw(43)
    chosen = choose(query, key, made_options(), is_causal=False)
    together = torch.stack([key, query], 2)  # (B, N, 2, S, H)
    across = query.mT.contiguous().mT, together[:, :, 0]
    assert torch.equal(choose(*across, made_options(), is_causal=False), chosen)
