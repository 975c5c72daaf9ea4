"""The backward pass in pieces, each of some heads."""

import itertools

import numpy as np
import pytest
import torch
from helpers import FOURS, attention, attention_gradients, case

from keras_rwr.backends.torch import backward, pieces
from keras_rwr.backends.torch.plan import Inputs, Options, Plan

MADE = case(
    "pieces",
    sizes={"batch": 2, "heads": 3, "tokens": 17},
    padding="right",
    discoverability=True,
    reversible=True,
    dropout=0.3,
    **FOURS,
)


def results():
    run = attention(MADE.inputs, dict(MADE.options), "triton", seed=(3, 4))
    output, gradients = attention_gradients(run, MADE.inputs)
    return {"output": output, **gradients}


def test_pieces_give_the_same_bits(monkeypatch):
    counted = []

    def divide(plan, tokens):
        divided = pieces.divide(plan, tokens)
        counted.append(len(divided))
        return divided

    monkeypatch.setattr(backward, "divide", divide)
    whole = results()
    for tokens in (1, 2 * 17, 4 * 17):  # one head, two of three heads, one entry
        monkeypatch.setattr(backward, "PIECE", tokens)
        for name, array in results().items():
            np.testing.assert_array_equal(array, whole[name], err_msg=f"{name}, {tokens}")
    assert counted == [1, 6, 4, 2]


@pytest.mark.parametrize("tokens", [1, 100, 350, 800, 10**9])
@pytest.mark.parametrize(("batch", "heads"), [(1, 12), (5, 7), (3, 1)])
def test_every_head_is_in_one_piece(batch, heads, tokens):
    size = 100
    query, key, value = torch.empty((3, batch, size, heads, 4), device="meta")
    one = torch.empty((heads,), device="meta")
    inputs = Inputs(query, key, value, None, one, one, None, None, None)
    options = Options(0.2, 4, 16, 128, 0.0, False, False, 0.5, True, 0.0, None, None)
    numbers = np.arange(batch * heads).reshape(batch, heads)
    found = []
    for piece in pieces.divide(Plan(inputs, options), tokens):
        held = piece.of_heads(numbers).ravel()
        assert held[0] == piece.first_head and len(held) == piece.head_count
        assert len(held) == 1 or len(held) * size <= tokens
        found.append(held)
    assert list(itertools.chain(*found)) == list(range(batch * heads))
