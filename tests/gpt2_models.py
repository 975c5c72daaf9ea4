"""Small GPT-2s and their inputs, for the tests of `keras_rwr.models`."""

import keras
import numpy as np
import pytest
from keras import ops

BATCH, LENGTH, VOCABULARY = 3, 19, 31
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 12,
    "intermediate_dim": 20,
    "max_sequence_length": LENGTH,
}
# Where a whole model is compiled.
ONE_LAYER = {**SIZES, "num_layers": 1}
# A window and neighbours that matter at this length.
SMALL = {"window": 3, "topk": 4, "neighbor_block": 2, "steps": 2}
# The ablation's steps at this size.
STEPS = {
    "R1": SMALL,
    "R2": {**SMALL, "reversible": True},
    "R3": {**SMALL, "reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True},
    "R4": {**SMALL, "edge_weight": "exponential"},
    "R5": {
        **SMALL,
        "neighbor_block": 1,
        "edge_weight": "exponential",
        "graph_heads": 1,
        "graph_dim": 5,
        "self_edges": False,
        "stopping": "gated",
    },
}
# The weights that R5 adds to an attention layer.
R5_WEIGHTS = (
    "graph_convolution",
    "graph_key",
    "graph_query",
    "hop_gate",
    "hop_weights",
    "log_concentration",
)
# The window holds everything and the walk is off: the stock model.
PLAIN = {"window": LENGTH, "lens_strength": 0.0, "steps": 1}
LENGTHS = np.array([LENGTH, 11, 4])
MASK = (np.arange(LENGTH) < LENGTHS[:, None]).astype("int32")
# XLA takes seconds for each function. TensorFlow can do without; jax cannot.
JIT_COMPILE = False if keras.backend.backend() == "tensorflow" else "auto"
# Warnings of Keras: of layers that it passes over, and of a transpose on torch.
QUANTIZE = pytest.mark.filterwarnings(
    "ignore:Layer .* does not have a `quantize` method", "ignore:The use of `x.T`"
)


def make_tokens(seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (BATCH, LENGTH)).astype("int32")


def make_batch(tokens=None):
    return {"token_ids": (make_tokens() if tokens is None else tokens) * MASK, "padding_mask": MASK}


def walk_paths(names, layers=(0,)):
    """The paths of the weights of the walk in some transformer layers."""
    return {f"transformer_layer_{x}/self_attention/walk/{name}" for x in layers for name in names}


def numpy(x):
    return ops.convert_to_numpy(x)


def randomize(model, seed=1):
    """Draws weights large enough that attention matters; fresh GPT-2 weights are nearly zero."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name == "gamma":
            weight.assign(1.0 + 0.1 * rng.normal(size=weight.shape))
        elif weight.name == "log_concentration":
            weight.assign(rng.uniform(np.log(5.0), np.log(25.0), weight.shape))
        else:
            weight.assign(0.3 * rng.normal(size=weight.shape))
    return model


def greedy(model, token_ids, padding_mask):
    """Greedy tokens by the plainest means: a full forward pass over the tokens so far for each.

    Behind them stand padding and zeros, not what `generate` has there: it must not matter.
    """
    tokens = token_ids.copy()
    for position in range(padding_mask.sum(-1).min(), tokens.shape[1]):
        seen = np.broadcast_to(np.arange(tokens.shape[1]) < position, tokens.shape).astype("int32")
        logits = numpy(model({"token_ids": tokens * seen, "padding_mask": seen}))
        best = logits[:, position - 1].argmax(-1)
        tokens[:, position] = np.where(padding_mask[:, position], tokens[:, position], best)
    return tokens
