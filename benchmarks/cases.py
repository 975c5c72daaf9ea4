"""What is measured: one attention call, its options and its inputs."""

import dataclasses
from typing import Any

import numpy as np

from keras_rwr.options import Options

LEVELS = ("layer", "op")
SEED = 20061
SMALL_BATCH = 2
LEANING = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call.

    Args:
        tokens: Int, sequence length S.
        level: String. `"layer"` measures a layer with its projections, `(B, S, N H)` in and out;
            `"op"` measures attention of given queries, keys and values, `(B, S, N, H)`.
        batch: Int, B.
        heads: Int, N.
        head_size: Int, H.
        dtype: String, what attention gets and returns. Layers keep their weights in float32.
        is_causal: Bool.
        gradients: Bool. Whether the backward pass takes part.
        options: Dict of the options of `keras_rwr.RWRAttention`; dense peers do not look at it.
        leaning: Float. How much of an op's key is added to its query. Where it is 0, tokens with
            few edges may have a degree near 0, which amplifies every rounding.
    """

    tokens: int
    level: str = "layer"
    batch: int = 1
    heads: int = 4
    head_size: int = 64
    dtype: str = "float32"
    is_causal: bool = True
    gradients: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    leaning: float = 0.0

    @property
    def width(self):
        """Features of a layer's input, N H."""
        return self.heads * self.head_size

    @property
    def shape(self):
        """`(B, S, N, H)`."""
        return (self.batch, self.tokens, self.heads, self.head_size)

    def small(self):
        """The same call on few tokens to check, still with most of them outside the window.

        They are no multiple of a tile, but even: cuDNN trains on no other number.
        """
        window = self.options.get("window", 128)
        batch = min(self.batch, SMALL_BATCH)
        return dataclasses.replace(self, tokens=3 * window + 6, batch=batch, leaning=LEANING)


def normal_numbers():
    """A function of a shape that draws float32 arrays of independent normal numbers."""
    rng = np.random.default_rng(SEED)
    return lambda *shape: rng.standard_normal(shape).astype("float32")


def make_inputs(case, draw=None):
    """Inputs by name, as float32 arrays of order 1, the same for all peers.

    Args:
        case: `Case`.
        draw: `None`, or what to draw with instead of `normal_numbers()`, perhaps on a device.

    Returns:
        A dict with "query", "key", "value" of shape `(B, S, N, H)` and what the options need
        besides for an op; "x" of shape `(B, S, N H)` and the projections' weights, named as
        `keras.layers.MultiHeadAttention` names them, for a layer; "cotangent" of the shape of the
        output for both.
    """
    draw = normal_numbers() if draw is None else draw

    def normal(*shape, scale=1.0):
        return draw(*shape) * scale

    if case.level == "op":
        inputs = {name: normal(*case.shape) for name in ("query", "key", "value", "cotangent")}
        inputs["query"] = inputs["query"] + case.leaning * inputs["key"]
        return inputs | graph_inputs(case, normal)
    inputs = {name: normal(case.batch, case.tokens, case.width) for name in ("x", "cotangent")}
    scale = case.width**-0.5
    for name in ("query", "key", "value"):
        inputs[f"{name}/kernel"] = normal(case.width, case.heads, case.head_size, scale=scale)
        inputs[f"{name}/bias"] = normal(case.heads, case.head_size, scale=0.1)
    inputs["attention_output/kernel"] = normal(case.heads, case.head_size, case.width, scale=scale)
    inputs["attention_output/bias"] = normal(case.width, scale=0.1)
    return inputs


def graph_inputs(case, normal):
    """What the options of a layer bring to an op: vectors of the graph, u and hop weights."""
    options, inputs = Options.pick(case.options), {}
    graphs, features = case.heads, case.head_size
    if options.graph_heads is not None:
        graphs, features = options.graph_heads, options.graph_dim
        for name in ("graph_query", "graph_key"):
            inputs[name] = normal(case.batch, case.tokens, graphs, features)
    if options.use_discoverability:
        inputs["discoverability"] = normal(graphs, features, scale=0.1)
    if options.stopping != "restart":
        shape = (case.batch, case.tokens, case.heads, options.steps + 1)
        inputs["hop_weights"] = 0.5 + normal(*shape, scale=0.1)
    return inputs
