"""The tasks of `retrieval.py`: sequences whose answers stand somewhere before the question.

Both begin with pairs of a key and what belongs to it, one after the other. Later each key comes
once more, as a question, at a random position between fillers; there the model has to name the
answer, and only there it is scored.
"""

import keras
import numpy as np

FILLER = 0


def draw_recall(rng, batch, tokens, pairs, symbols):
    """Multi-query associative recall (Arora et al., https://arxiv.org/abs/2312.04927).

    Keys and values are of two alphabets of `symbols` each. The answer is the key's value.

    Args:
        rng: NumPy generator.
        batch: Int. Number of sequences.
        tokens: Int. Length of each.
        pairs: Int. Pairs, and questions.
        symbols: Int. Keys, and values, to draw from.

    Returns:
        Int32 arrays of shape `(batch, tokens)`: tokens, answers, and 1 where there is a question.
    """
    keys = 1 + rng.random((batch, symbols)).argsort(1)[:, :pairs]
    values = 1 + symbols + rng.integers(0, symbols, (batch, pairs))
    return ask(rng, tokens, keys, values, values)


def draw_pointers(rng, batch, tokens, pairs, hops):
    """Pointer chasing: keys point to one another in a ring.

    The answer is what one reaches from the key in `hops` steps; one hop is recall within one
    alphabet, of which there are as many as pairs.

    Args: as for `draw_recall`; `hops` is an int >= 1.

    Returns: as `draw_recall`.
    """
    ring = 1 + rng.random((batch, pairs)).argsort(1)
    order = rng.random((batch, pairs)).argsort(1)

    def reached(steps):
        return np.take_along_axis(np.roll(ring, -steps, 1), order, 1)

    return ask(rng, tokens, reached(0), reached(1), reached(hops))


def ask(rng, tokens, keys, values, answers):
    """Sequences of pairs, then of questions among fillers; see `draw_recall`."""
    batch, pairs = keys.shape
    told = 2 * pairs
    sequences = np.full((batch, tokens), FILLER, "int32")
    sequences[:, 0:told:2], sequences[:, 1:told:2] = keys, values
    places = told + rng.random((batch, tokens - told)).argsort(1)[:, :pairs]
    targets, asked = np.zeros_like(sequences), np.zeros_like(sequences)
    np.put_along_axis(sequences, places, keys, 1)
    np.put_along_axis(targets, places, answers, 1)
    np.put_along_axis(asked, places, 1, 1)
    return sequences, targets, asked


class Task:
    """A task at one size.

    Args:
        name: `"recall"` or `"pointers"`.
        tokens: Int. Length of a sequence, at least three times the pairs.
        pairs: Int >= 2.
        symbols: Int, at least `pairs`. The alphabet of recall.
        hops: Int >= 1, of pointers.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    def __init__(self, name, tokens, pairs, symbols, hops):
        rules = {
            "pairs": (pairs >= 2, "at least 2"),
            "tokens": (tokens >= 3 * pairs, "at least three times `pairs`"),
            "symbols": (symbols >= pairs, "at least `pairs`"),
            "hops": (1 <= hops < pairs, "at least 1 and less than `pairs`"),
        }
        received = {"tokens": tokens, "pairs": pairs, "symbols": symbols, "hops": hops}
        for argument, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"`{argument}` must be {rule}. Received: "
                    + ", ".join(f"{key}={value}" for key, value in received.items())
                )
        self.name, self.tokens, self.pairs = name, tokens, pairs
        self.symbols, self.hops = symbols, hops

    @property
    def vocabulary_size(self):
        """Fillers, keys and values."""
        return 1 + (2 * self.symbols if self.name == "recall" else self.pairs)

    @property
    def chance(self):
        """Accuracy of guessing among the answers."""
        return 1.0 / (self.symbols if self.name == "recall" else self.pairs)

    def draw(self, seed, batch):
        """One batch; a seed, which may be a tuple of ints, always gives the same one."""
        rng = np.random.default_rng(seed)
        if self.name == "recall":
            return draw_recall(rng, batch, self.tokens, self.pairs, self.symbols)
        return draw_pointers(rng, batch, self.tokens, self.pairs, self.hops)


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
        return sequences, targets, asked.astype("float32")
