"""What is measured: one attention call, its options and its inputs."""

import dataclasses
from typing import Any

import numpy as np

from keras_rwr import ablation
from keras_rwr.options import Options

LEVELS = ("layer", "op")
MODES = ("forward", "forward+backward")
# Options by name: the ablation's steps, R5 with one step of the walk, and LOCAL alone.
STEPS = {name: dict(step.options) for name, step in ablation.STEPS.items() if step.options}
STEPS["R5-1"] = {**STEPS["R5"], "steps": 1}
STEPS["LOCAL"] = {"window": 128, "topk": 0, "steps": 0, "lens_strength": 0.0}
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
        step: String, a key of `STEPS`: what `options` began as.
        options: Dict of the options of `keras_rwr.RWRAttention`; dense peers do not look at it.
        leaning: Float. How much of an op's key is added to its query, of the graph's too. Where it
            is 0, tokens with few edges may have a degree near 0, which amplifies every rounding.
    """

    tokens: int
    level: str = "layer"
    batch: int = 1
    heads: int = 4
    head_size: int = 64
    dtype: str = "float32"
    is_causal: bool = True
    gradients: bool = False
    step: str = "R1"
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
        A dict with "query", "key", "value" of shape `(B, S, N, H)` and what the options bring to
        an op; "x" of shape `(B, S, N H)` and a layer's weights, named by the last two parts of
        their paths, for a layer; "cotangent" of the shape of the output for both.
    """
    draw = normal_numbers() if draw is None else draw

    def normal(*shape, scale=1.0):
        return draw(*shape) * scale

    options, heads, width = Options.pick(case.options), case.heads, case.width
    has_graph = options.graph_heads is not None
    graphs = (options.graph_heads, options.graph_dim) if has_graph else (heads, case.head_size)
    hops = (heads, options.steps + 1)
    if case.level == "op":
        tokens = (case.batch, case.tokens)
        inputs = {name: normal(*case.shape) for name in ("query", "key", "value", "cotangent")}
        inputs["query"] = inputs["query"] + case.leaning * inputs["key"]
        if has_graph:
            inputs["graph_key"] = normal(*tokens, *graphs)
            inputs["graph_query"] = normal(*tokens, *graphs) + case.leaning * inputs["graph_key"]
        if options.use_discoverability:
            inputs["discoverability"] = normal(*graphs, scale=0.1)
        if options.stopping != "restart":
            each = tokens if options.stopping == "gated" else ()
            inputs["hop_weights"] = 0.5 + normal(*each, *hops, scale=0.1)
        return inputs
    inputs = {name: normal(case.batch, case.tokens, width) for name in ("x", "cotangent")}
    scale = width**-0.5
    for name in ("query", "key", "value"):
        inputs[f"{name}/kernel"] = normal(width, heads, case.head_size, scale=scale)
        inputs[f"{name}/bias"] = normal(heads, case.head_size, scale=0.1)
    inputs["attention_output/kernel"] = normal(heads, case.head_size, width, scale=scale)
    inputs["attention_output/bias"] = normal(width, scale=0.1)
    if has_graph:
        for name in ("graph_query", "graph_key"):
            inputs[f"walk/{name}"] = normal(width, *graphs, scale=scale)
    if options.stopping == "gated":
        inputs["walk/hop_gate"] = normal(width, *hops, scale=0.1 * scale)
    return inputs
