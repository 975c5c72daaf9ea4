"""What the scripts of this folder share: a small GPT-2 with RWR attention, and tokens for it."""

import keras
import numpy as np

from keras_rwr.models import RWRGPT2Backbone, RWRGPT2CausalLM

VOCABULARY = 96
LENGTH = 32


def make_model(**options):
    """A model with the same weights in every process; put your own model here.

    Args:
        **options: Arguments of `RWRGPT2Backbone` to use instead of those below.

    Returns:
        A `RWRGPT2CausalLM`.
    """
    keras.utils.set_random_seed(20)
    defaults = {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "max_sequence_length": LENGTH,
        "dropout": 0.0,
        "window": 7,
        "topk": 8,
        "neighbor_block": 4,
        "edge_weight": "exponential",
    }
    return RWRGPT2CausalLM(RWRGPT2Backbone(**{**defaults, **options}))


def make_batch(batch_size=8):
    """Sequences that repeat themselves, and their next tokens; put your own data here.

    Args:
        batch_size: Int. Number of sequences B.

    Returns:
        Tuple of the model's inputs, a dict of `"token_ids"` and `"padding_mask"`, and the targets,
        int arrays of shape `(B, LENGTH)`.
    """
    motifs = np.random.default_rng(24).integers(VOCABULARY, size=(batch_size, LENGTH // 4 + 1))
    tokens = np.tile(motifs, (1, 4))[:, : LENGTH + 1].astype("int32")
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    return inputs, tokens[:, 1:]


def continue_sequence(model, number=4):
    """Generates the second half of some sequences by greedy search.

    Args:
        model: What `make_model` returned.
        number: Int. How many sequences; a multiple of the devices that divide a batch.

    Returns:
        List of the new tokens, `LENGTH // 2` for each sequence.
    """
    inputs, _ = make_batch(number)
    prompt = {
        "token_ids": inputs["token_ids"],
        "padding_mask": np.broadcast_to(np.arange(LENGTH) < LENGTH // 2, (number, LENGTH)),
    }
    model.compile(sampler="greedy", optimizer=None, loss=None, weighted_metrics=None)
    output = model.generate(prompt, stop_token_ids=None)
    return np.asarray(output["token_ids"])[:, LENGTH // 2 :].tolist()
