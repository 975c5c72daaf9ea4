"""Calls that nobody should make: each raises an error that names the argument."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_rwr
from keras_rwr import graph
from keras_rwr.ablation import build_backbone, step_options
from keras_rwr.ops import attention_scores, rwr_attention, token_importance
from keras_rwr.options import Call, Options, Tuning

pytestmark = pytest.mark.costly  # all together

NAN, INFINITE = float("nan"), float("inf")
REFUSALS = (ValueError, TypeError, NotImplementedError)

# What is not an integer, a number in a range, a bool, a string of a list, a number a head.
NO_INTEGERS = ["3", 1.0, 2**31, 10**30, None, True, [3], (1, 2), NAN, {}, np.ones(2), 2 + 1j]
NO_NUMBERS = ["0.5", None, True, [0.5], NAN, INFINITE, {}, np.ones(2), 1j, -7.0, 70.0]
NO_BOOLS = ["yes", None, 1, 0.0, [], np.ones(2)]
NO_CHOICES = ["dot", "", "Cosine", None, 1, True, ["sum"], b"cosine"]
NO_TENSORS = ["tensor", [["a"]], 1.0, 3, {}, object(), np.array(["a"]), [[1], [1, 2]], np.ones(2)]
PER_HEAD = ["20", None, True, NAN, INFINITE, [NAN, 1.0], [1.0] * 3, [], ["2", 3], {}, [[2.0, 2.0]]]

OPTIONS = {
    "alpha": [*NO_NUMBERS, 0, 1.0001],
    "steps": [*NO_INTEGERS, -1],
    "topk": [*NO_INTEGERS, -16, 17],
    "neighbor_block": [*NO_INTEGERS, -1, 0],
    "window": [*NO_INTEGERS, -1],
    "threshold": [x for x in NO_NUMBERS if x is not None] + [1.0, -1.01],
    "edge_weight": NO_CHOICES,
    "concentration": [*PER_HEAD, 0.5, 64.5, -1, [20.0, 65.0]],
    "reversible": NO_BOOLS,
    "reciprocal_beta": [*NO_NUMBERS, 1.1, -0.1],
    "lens_strength": PER_HEAD,
    "fusion": NO_CHOICES,
    "self_edges": NO_BOOLS,
}
TRAINED = {
    "trainable_lens": NO_BOOLS,
    "use_discoverability": NO_BOOLS,
    "graph_heads": [x for x in NO_INTEGERS if x is not None] + [0, -1],
    "graph_dim": [*NO_INTEGERS, 0],
    "graph_convolution": [*NO_INTEGERS, 1],
    "stopping": NO_CHOICES,
}
TUNING = {
    "block_size": [x for x in NO_INTEGERS if x is not None] + [0, -4],
    "head_dim_pad": [x for x in NO_INTEGERS if x is not None] + [0],
    "implementation": [x for x in NO_CHOICES if x is not None] + ["xla", "cuda"],
}
CALL = {"is_causal": NO_BOOLS, "dropout": [*NO_NUMBERS, 1.0, -0.1]}
FOUR = [*NO_TENSORS, None, np.ones((2, 5, 2, 4), "int32"), np.ones((2, 5, 2, 4), "complex64")]
TENSORS = {
    "query": FOUR,
    "key": [*FOUR, np.ones((2, 4, 2, 4)), np.ones((2, 5, 2, 3))],
    "value": [*FOUR, np.ones((2, 4, 2, 4)), np.ones((1, 5, 2, 4)), np.ones((2, 5, 1, 4))],
    "discoverability": [*NO_TENSORS, np.ones((2, 3)), np.ones((2, 4), "int32")],
    "padding_mask": [*NO_TENSORS, np.ones((2, 4)), np.ones((2, 1, 1, 5))],
    "graph_query": [*NO_TENSORS, np.ones((2, 5, 1, 3))],
    "graph_key": [*NO_TENSORS, np.ones((2, 5, 1, 3))],
    "hop_weights": [x for x in NO_TENSORS if not isinstance(x, np.ndarray) or x.dtype != float]
    + [np.ones((3, 5)), np.ones((2, 5, 2)), np.ones(0), np.ones((2, 5, 2, 0))],
    "segment_ids": [*NO_TENSORS, np.ones((2, 4), "int32"), np.ones((2, 5), "float32")],
    "graph": ["graph", 1, np.ones((2, 2, 5, 5)), {}, object()],
}
SINGLE = {"window": 1, "topk": 1, "neighbor_block": 1}


def rows(**tables):
    return [
        pytest.param(function, name, value, id=f"{function}-{name}-{i}")
        for function, table in tables.items()
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


def without(table, *names):
    return {name: values for name, values in table.items() if name not in names}


def tensor(*shape):
    return ops.convert_to_tensor(np.random.default_rng(0).standard_normal(shape).astype("float32"))


def refused(name, run):
    """`run` raises an error that names the argument and says more than that."""
    with pytest.raises(REFUSALS) as caught:
        run()
    message = str(caught.value)
    assert name in message, message
    assert not isinstance(caught.value, UnicodeError)
    return message


# --- functions -----------------------------------------------------------------------------------

FUNCTIONS = {
    "rwr_attention": rwr_attention,
    "attention_scores": attention_scores,
    "token_importance": token_importance,
    "build_sparse_w": graph.build_sparse_w,
}
SCORES = without({**OPTIONS, **TENSORS, "is_causal": NO_BOOLS}, "value")
OF_GRAPHS = ("alpha", "steps", "reversible", "reciprocal_beta", "lens_strength", "fusion")
BUILDER = {
    **without(SCORES, *OF_GRAPHS, *(x for x in TENSORS if x not in ("query", "key"))),
    "padding_mask": TENSORS["padding_mask"],
    "segment_ids": TENSORS["segment_ids"],
    "block_size": TUNING["block_size"],
}


@pytest.mark.parametrize(
    ("function", "name", "value"),
    rows(
        rwr_attention={**OPTIONS, **TENSORS, **TUNING, **CALL},
        attention_scores=SCORES,
        token_importance=without(SCORES, "reciprocal_beta", "lens_strength", "fusion"),
        build_sparse_w=BUILDER,
    ),
)
def test_functions(function, name, value):
    x = tensor(2, 5, 2, 4)
    arguments = {"query": x, "key": x}
    if function == "rwr_attention":
        arguments["value"] = x
    if name == "neighbor_block":
        arguments["topk"] = 16
    elif name not in ("topk", "window"):
        arguments.update(SINGLE)
    refused(name, lambda: FUNCTIONS[function](**{**arguments, name: value}))
    if name in OPTIONS or name in TUNING or name in CALL:
        # The same without any data.
        for tensor_name in arguments.keys() & {"query", "key", "value"}:
            arguments[tensor_name] = keras.KerasTensor((2, 5, 2, 4))
        if function == "rwr_attention":
            refused(name, lambda: FUNCTIONS[function](**{**arguments, name: value}))


def test_unknown_keywords():
    x = tensor(2, 5, 2, 4)
    for name, function in FUNCTIONS.items():
        arguments = [x, x, x] if name == "rwr_attention" else [x, x]
        refused("windows", lambda: function(*arguments, windows=3))  # noqa: B023
    for kind in (Options, Tuning, Call):
        refused("windows", lambda: kind(windows=3))  # noqa: B023
    refused("windows", lambda: keras_rwr.RWRAttention(2, 4, windows=3))
    refused("windows", lambda: keras_rwr.explain((1, 64, 2, 8), windows=3))
    assert set(OPTIONS) | set(TRAINED) == set(Options.names())
    assert set(TUNING) == set(Tuning.names())


def test_what_does_not_fit_together():
    x, more = tensor(2, 5, 2, 4), {**SINGLE, "is_causal": True}

    def call(**arguments):
        return lambda: rwr_attention(x, x, x, **{**more, **arguments})

    g = tensor(2, 5, 1, 3)
    refused("`graph_key`", call(graph_query=g))
    refused("`graph_query`", call(graph_key=g))
    refused("`graph_query`", call(graph_query=tensor(2, 5, 3, 3), graph_key=tensor(2, 5, 3, 3)))
    refused("`graph_query`", call(graph_query=tensor(2, 5, 0, 3), graph_key=tensor(2, 5, 0, 3)))
    refused("`graph_key`", call(graph_query=g, graph_key=tensor(2, 5, 1, 4)))
    refused("`discoverability`", call(graph_query=g, graph_key=g, discoverability=tensor(2, 4)))
    refused("`concentration`", call(graph_query=g, graph_key=g, concentration=[20.0, 20.0]))
    refused("`concentration`", call(concentration=tensor(3)))
    refused("`lens_strength`", call(lens_strength=tensor(3)))
    theta = tensor(4)
    refused("`alpha`", call(hop_weights=theta, alpha=0.5))
    refused("`lens_strength`", call(hop_weights=theta, lens_strength=0.5))
    refused("`lens_strength`", call(hop_weights=theta, lens_strength=[0.3, 0.3]))
    refused("`steps`", call(hop_weights=theta, steps=2))
    refused("`fusion`", call(hop_weights=theta, fusion="softmax"))
    refused("`reciprocal_beta`", call(hop_weights=tensor(2, 5, 2, 4), reversible=True))
    refused("`self_edges`", call(fusion="softmax", self_edges=False))
    refused("graph", call(fusion="softmax", graph_query=g, graph_key=g))
    refused("`segment_ids`", call(segment_ids=np.ones((2, 5), "int32"), topk=4, neighbor_block=2))
    refused("`neighbor_block`", call(topk=4, neighbor_block=4))
    refused("`seed`", call(dropout=0.1))
    for seed in (
        1.5,
        "seed",
        True,
        [1.0, 2.0],
        np.zeros(3, "int32"),
        {},
        np.zeros((2, 2), "int32"),
    ):
        refused("`seed`", call(dropout=0.1, seed=seed))


# --- options, the layer --------------------------------------------------------------------------

CLASSES = {
    "Options": Options,
    "Tuning": Tuning,
    "Call": Call,
    "explain": lambda **arguments: keras_rwr.explain((1, 64, 2, 8), **arguments),
    "RWRAttention": lambda **arguments: keras_rwr.RWRAttention(
        **{"num_heads": 2, "key_dim": 4, **arguments}
    ),
}
# Options do not know the number of heads.
ALONE = {
    name: [x for x in values if not (isinstance(x, list) and len(x) in (0, 3) and name in LISTS)]
    for LISTS in [("concentration", "lens_strength")]
    for name, values in {**OPTIONS, **TRAINED}.items()
}
LAYER = {
    "num_heads": [*NO_INTEGERS, 0, -2],
    "key_dim": [*NO_INTEGERS, 0, -2],
    "value_dim": [x for x in NO_INTEGERS if x is not None] + [0],
    "dropout": [*NO_NUMBERS, 1.0],
    "attention_axes": [0, 2, (1, 2), "1", 1.5],
    "sliding_window": [1, 128, "4", False],
    "flash_attention": [True, "yes", 3],
    **OPTIONS,
    **TRAINED,
    **TUNING,
    "graph_heads": [*TRAINED["graph_heads"], 3, 4],
}
EXPLAIN = {
    **ALONE,
    **TUNING,
    **CALL,
    "query_shape": [(3, 4), "1234", None, 4, (1, 64, 2, 8.0), (1, 64, 2, True), {}, (1,) * 5],
    "value_shape": [(3, 4), "1234", 4, (1, 64, 2, 8.0), {}, (1,) * 5],
    "device": ["cuda", 0, True, ["gpu"]],
    "dtype": ["int32", "float", 3, "string", ["float32"]],
    "has_graph": NO_BOOLS,
    "has_segments": NO_BOOLS,
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    rows(Options=ALONE, Tuning=TUNING, Call=CALL, RWRAttention=LAYER, explain=EXPLAIN),
)
def test_options(kind, name, value):
    if kind == "explain" and name == "query_shape":
        refused(name, lambda: keras_rwr.explain(value))
        return
    more = {"topk": 16} if name == "neighbor_block" and kind in ("Options", "RWRAttention") else {}
    refused(name, lambda: CLASSES[kind](**more, **{name: value}))


def test_options_that_do_not_fit_together():
    for kind in (Options, CLASSES["RWRAttention"], CLASSES["explain"]):
        for stopping in ("learned", "gated"):
            for changed in ({"alpha": 0.5}, {"lens_strength": 0.5}, {"trainable_lens": True}):
                (name,) = changed
                refused(f"`{name}`", lambda: kind(stopping=stopping, **changed))  # noqa: B023
            refused("`stopping`", lambda: kind(stopping=stopping, fusion="softmax"))  # noqa: B023
        refused("`reciprocal_beta`", lambda: kind(stopping="gated", reversible=True))  # noqa: B023
        refused("`graph_heads`", lambda: kind(graph_heads=1, fusion="softmax"))  # noqa: B023
        refused("`self_edges`", lambda: kind(self_edges=False, fusion="softmax"))  # noqa: B023
    refused("`concentration`", lambda: CLASSES["RWRAttention"](concentration=[20.0] * 3))
    refused(
        "`concentration`", lambda: CLASSES["RWRAttention"](graph_heads=1, concentration=[20.0] * 2)
    )
    refused("`lens_strength`", lambda: CLASSES["RWRAttention"](lens_strength=[0.3]))


CALLS = {
    "query": [np.ones((2, 5, 2, 8), "float32"), np.ones((5, 8), "float32")],
    "value": [np.ones((2, 4, 8), "float32"), np.ones((5, 8), "float32"), None],
    "key": [np.ones((2, 4, 8), "float32"), np.ones((5, 8), "float32")],
    "query_mask": [np.ones((2, 4), bool), np.ones((2, 5, 5), bool), "mask"],
    "value_mask": [np.ones((2, 4), bool), np.ones((2, 5, 5), bool), "mask"],
    "key_mask": [np.ones((2, 4), bool), np.ones((2, 5, 5), bool), "mask"],
    "attention_mask": [
        np.ones((2, 4), bool),
        np.ones((2, 5, 4), bool),
        np.ones((2, 2, 5, 5), bool),
        np.triu(np.ones((2, 5, 5), bool)),
        np.tri(5, 5, 1, bool)[None] & np.ones((2, 1, 1), bool),
        "mask",
        1.0,
        True,
        NAN,
        [1],
    ],
    "return_attention_scores": NO_BOOLS,
    "use_causal_mask": NO_BOOLS,
    "segment_ids": [np.ones((2, 4), "int32"), np.ones((2, 5), "float32"), "ids", 1],
    "graph": TENSORS["graph"],
}


@pytest.mark.parametrize(("function", "name", "value"), rows(call=CALLS))
def test_calls_of_the_layer(function, name, value):
    layer = keras_rwr.RWRAttention(2, 4, **SINGLE)
    x = tensor(2, 5, 8)
    refused(name, lambda: layer(**{"query": x, "value": x, name: value}))


# --- the rest ------------------------------------------------------------------------------------

MADE = ["graph", None, 1, np.ones((2, 2, 5, 5)), {}]


@pytest.mark.parametrize("value", MADE, ids=range(len(MADE)))
def test_functions_of_a_graph(value):
    refused("`graph`", lambda: graph.reversible(value))
    refused("`graph`", lambda: graph.normalize_to_p(value))
    refused("`graph`", lambda: graph.sparse_mm(value, tensor(2, 5, 2, 3)))


def test_arguments_beside_a_graph():
    x = tensor(2, 5, 2, 4)
    made = graph.build_sparse_w(x, x, **SINGLE)
    for bias in [*NO_TENSORS, tensor(2, 2, 5), np.ones((2, 5, 2), "int32")]:
        refused("key_bias", lambda: graph.normalize_to_p(made, bias))  # noqa: B023
    for values in [*FOUR, tensor(2, 4, 2, 3), tensor(2, 5, 1, 3)]:
        refused("values", lambda: graph.sparse_mm(made, values))  # noqa: B023
    for transpose in NO_BOOLS:
        refused("transpose", lambda: graph.sparse_mm(made, x, transpose))  # noqa: B023
    refused("graph", lambda: rwr_attention(x, x, x, graph=made, **SINGLE))
    step = graph.normalize_to_p(made)
    refused("graph", lambda: graph.normalize_to_p(step))
    refused("graph", lambda: graph.reversible(step))
    for changed in ({"window": 2}, {"self_edges": False}, {"reversible": True}, {"threshold": 0.1}):
        (name,) = changed
        arguments = {**SINGLE, "graph": step, **changed}
        assert name in refused("`graph`", lambda: rwr_attention(x, x, x, **arguments))  # noqa: B023
    shorter = tensor(2, 4, 2, 4)
    refused("`graph`", lambda: rwr_attention(shorter, shorter, shorter, graph=step, **SINGLE))
    refused("`graph`", lambda: rwr_attention(x, x, x, graph=step, is_causal=True, **SINGLE))


@pytest.mark.parametrize("step", ["R6", "r1", "", None, 1, NAN, ["R1"], {}])
def test_steps_of_the_ablation(step):
    refused("`step`", lambda: step_options(step))
    refused("`step`", lambda: build_backbone(step))


def test_overrides_of_the_ablation():
    refused("`overrides`", lambda: step_options("R0", {"alpha": 0.5}))
    for value in (3, "window", ["window"]):
        refused("`overrides`", lambda: step_options("R1", value))  # noqa: B023
