"""Packing documents into rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rwr.data import pack


@given(st.lists(st.lists(st.integers(0, 99), max_size=40), max_size=30), st.integers(1, 16))
def test_every_token_is_predicted_once_from_its_document(documents, length):
    x, y, sample_weight = pack(documents, length)
    tokens, numbers = x["token_ids"], x["padding_mask"]
    assert tokens.shape == numbers.shape == y.shape == sample_weight.shape
    np.testing.assert_array_equal(sample_weight, numbers > 0)
    pieces = []
    for row in range(len(tokens)):
        # The documents of a row stand side by side, in order, with padding behind them.
        real = numbers[row][numbers[row] > 0]
        np.testing.assert_array_equal(numbers[row][: len(real)], real)
        assert (np.diff(real) >= 0).all() and set(real) == set(range(1, max(real) + 1))
        for number in range(1, max(real) + 1):
            chosen = numbers[row] == number
            np.testing.assert_array_equal(tokens[row][chosen][1:], y[row][chosen][:-1])
            pieces.append([*tokens[row][chosen], y[row][chosen][-1]])
    expected = [
        document[start : start + length + 1]
        for document in documents
        for start in range(0, len(document) - 1, length)
    ]
    assert sorted(pieces) == sorted(expected)
    # No two rows could be one.
    filled = np.sort((numbers > 0).sum(-1))
    assert len(filled) < 2 or filled[:2].sum() > length


@pytest.mark.parametrize(
    ("documents", "length", "error", "message"),
    [
        ([[1, 2]], 0, ValueError, "Received: sequence_length=0"),
        ([[1, 2]], 2.0, TypeError, "`sequence_length` must be an int"),
        ([[1, 2], 3], 4, ValueError, r"Received: documents\[1\] of shape \(\)"),
        ([[0.5, 2.0]], 4, ValueError, r"documents\[0\] of shape \(2,\) and type float64"),
        (["text"], 4, ValueError, "`documents` must be sequences of ints"),
    ],
)
def test_bad_arguments(documents, length, error, message):
    with pytest.raises(error, match=message):
        pack(documents, length)
