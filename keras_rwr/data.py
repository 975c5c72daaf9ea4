"""Documents packed into rows of one length, for training."""

import bisect
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_rwr._checks import check_int

__all__ = ["pack"]


def pack(
    documents: Iterable[Any], sequence_length: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Packs tokenized documents into rows, several to a row, for training a causal language model.

    Each document goes into the row that it fills best, the longest documents first. One that is
    longer than a row is cut into several. The result is what KerasHub's preprocessors make,
    inputs, labels and sample weights, but for the padding mask: it numbers the documents of a row.
    A model with `rwr_packed=True` then gives each token of a packed row what it gives it in the
    document by itself. (Where positions are embeddings added to tokens, as in GPT-2, they count
    from the row's beginning.)

    Args:
        documents: Iterable of sequences of ints, the tokens of one document each.
        sequence_length: Int >= 1. Length of a row S.

    Returns:
        Tuple `(x, y, sample_weight)`. `x` is a dict of `"token_ids"`, an int32 array of shape
        `(rows, S)`, and `"padding_mask"`, of the same shape: the number of a token's document in
        its row from 1 on, and 0 at padding. `y` is an int32 array of that shape, the next token of
        each. `sample_weight` is a float32 array of that shape: 1 where there is a next token.

    Raises:
        ValueError: If `sequence_length` is less than 1, or a document is no sequence of ints.
        TypeError: If `sequence_length` is no int.

    Example:

    ```python
    x, y, sample_weight = keras_rwr.data.pack(tokenizer(texts), sequence_length=1024)
    model = keras_rwr.models.convert(stock, packed=True)
    model.fit(x, y, sample_weight=sample_weight)
    ```
    """
    check_int("sequence_length", sequence_length, minimum=1)
    pieces = []
    for number, document in enumerate(documents):
        tokens = np.asarray(document)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(
                "`documents` must be sequences of ints. Received: "
                f"documents[{number}] of shape {tokens.shape} and type {tokens.dtype}"
            )
        # A piece has one token more than it has inputs: its last is a label only.
        starts = range(0, max(len(tokens) - 1, 0), sequence_length)
        pieces += [tokens[start : start + sequence_length + 1] for start in starts]
    pieces.sort(key=len, reverse=True)
    rows: list[list[np.ndarray]] = []
    room: list[tuple[int, int]] = []  # of each row with some left: how much, and its number
    for piece in pieces:
        size = len(piece) - 1
        place = bisect.bisect_left(room, (size, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = sequence_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > size:
            bisect.insort(room, (left - size, row))
    shape = (len(rows), sequence_length)
    inputs, labels, numbers = (np.zeros(shape, "int32") for _ in range(3))
    for row, members in enumerate(rows):
        start = 0
        for number, piece in enumerate(members, 1):
            stop = start + len(piece) - 1
            inputs[row, start:stop], labels[row, start:stop] = piece[:-1], piece[1:]
            numbers[row, start:stop] = number
            start = stop
    x = {"token_ids": inputs, "padding_mask": numbers}
    return x, labels, (numbers > 0).astype("float32")
