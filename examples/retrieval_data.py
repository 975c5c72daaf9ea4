"""The task of `retrieval.py`: sequences whose answers stand somewhere before the question.

They begin with pairs of a key and what belongs to it, one after the other: a value, or a key told
earlier, whose value is then meant. Later each key comes once more, as a question, at a random
position between fillers; there the model has to name the value, and only there it is scored.
"""

import keras
import numpy as np

FILLER = 0


class Task:
    """Multi-query associative recall (Arora et al., https://arxiv.org/abs/2312.04927), with hops.

    Pairs form chains of `hops` keys. The first key of a chain is told with its value, the others
    with the key before them. With one hop every key has a value of its own. Chains are told
    mingled, at random, each from its value on, so that a causal model can follow them.

    Args:
        tokens: Int. Length of a sequence, at least three times the pairs.
        pairs: Int >= 2, a multiple of `hops`: pairs, and questions.
        symbols: Int, at least `pairs`: keys, and values, to draw from; two alphabets.
        hops: Int >= 1. Keys of a chain.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    def __init__(self, tokens, pairs, symbols, hops):
        rules = {
            "pairs": (pairs >= 2, "at least 2"),
            "tokens": (tokens >= 3 * pairs, "at least three times `pairs`"),
            "symbols": (symbols >= pairs, "at least `pairs`"),
            "hops": (hops >= 1 and pairs % hops == 0, "at least 1 and a divisor of `pairs`"),
        }
        received = {"tokens": tokens, "pairs": pairs, "symbols": symbols, "hops": hops}
        for argument, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"`{argument}` must be {rule}. Received: "
                    + ", ".join(f"{key}={value}" for key, value in received.items())
                )
        self.tokens, self.pairs, self.symbols, self.hops = tokens, pairs, symbols, hops

    @property
    def vocabulary_size(self):
        """Fillers, keys and values."""
        return 1 + 2 * self.symbols

    @property
    def chance(self):
        """Accuracy of guessing among the values told in the sequence."""
        return self.hops / self.pairs

    def draw(self, seed, batch):
        """One batch; a seed, which may be a tuple of ints, always gives the same one.

        Returns:
            Int32 arrays of shape `(batch, tokens)`: tokens, answers, and the number of pairs on
            the way from a question to its answer, 0 where there is none.
        """
        rng = np.random.default_rng(seed)
        pairs, chains = self.pairs, self.pairs // self.hops
        keys = 1 + rng.random((batch, self.symbols)).argsort(1)[:, :pairs]
        keys = keys.reshape(batch, chains, self.hops)
        values = 1 + self.symbols + rng.integers(0, self.symbols, (batch, chains, 1))
        meanings = np.concatenate([values, keys[:, :, :-1]], 2)
        answers = np.broadcast_to(values, keys.shape)
        depths = np.broadcast_to(1 + np.arange(self.hops), keys.shape)
        order = np.sort(rng.random(keys.shape), 2).reshape(batch, pairs).argsort(1)
        keys, meanings, answers, depths = (
            np.take_along_axis(x.reshape(batch, pairs), order, 1)
            for x in (keys, meanings, answers, depths)
        )
        told = 2 * pairs
        sequences = np.full((batch, self.tokens), FILLER, "int32")
        sequences[:, 0:told:2], sequences[:, 1:told:2] = keys, meanings
        places = told + rng.random((batch, self.tokens - told)).argsort(1)[:, :pairs]
        targets, asked = np.zeros_like(sequences), np.zeros_like(sequences)
        for array, filled in ((sequences, keys), (targets, answers), (asked, depths)):
            np.put_along_axis(array, places, filled, 1)
        return sequences, targets, asked


class Batches(keras.utils.PyDataset):
    """Endless training batches, each seen once, with question marks as sample weights."""

    def __init__(self, task, batch_size, seed):
        super().__init__()
        self.task, self.batch_size, self.seed = task, batch_size, seed

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        sequences, targets, asked = self.task.draw((self.seed, 1, index), self.batch_size)
        return sequences, targets, (asked > 0).astype("float32")
