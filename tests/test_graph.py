"""The public graph functions, and a graph that serves several calls."""

import helpers
import numpy as np
import oracle
import pytest
from helpers import (
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    attention,
    attention_gradients,
    build_graph,
    by_name,
    compiled,
    graph_vectors,
    numpy,
)
from keras import ops

from keras_rwr import _far, _select, graph
from keras_rwr.ops import attention_scores, rwr_attention, token_importance

CASES = [
    "R1 causal",
    "R2 causal",
    "R2 bidirectional",
    "R1 causal sixteens",
    "R3 bidirectional fours",
    "padding holes reversible",
    "exponential threshold",
    "negative threshold",
    "no neighbours",
    "one token",
    "R5 causal",
    "R5 bidirectional",
    "R5 segments",
    "R5 one token",
    "discoverable graph",
    "grouped heads",
    "no self edges reversible",
    "isolated tokens",
    "window 0 without self edges",
    "extreme graph",
    "extreme reversible",
]


@pytest.mark.parametrize("name", CASES)
def test_matrices_equal_the_oracles(name):
    case = by_name(name)

    # As arguments: XLA folds the products of constants of 1e25 wrongly.
    def matrices(query, key):
        weight, symmetric, transition = build_graph(case, query, key)
        return {
            "weight": weight.to_dense(),
            "symmetric": symmetric.to_dense(),
            "transition": transition.to_dense(),
            "degree": ops.transpose(transition.degree, (0, 2, 1)),
            "neighbors": weight.neighbors,
        }

    # A logit of 72, rounded to float32, is off by up to 4e-6, and its weight by that share.
    tolerance = 4e-5 if case.extreme else TOLERANCES["output"]
    for field, actual in compiled(matrices)(*graph_vectors(case)).items():
        expected = helpers.stack(case.graphs, field)
        if field == "neighbors":
            assert_same_blocks(numpy(actual), expected)
        else:
            assert_close(numpy(actual), expected, tolerance, field)


def assert_same_blocks(chosen, expected):
    """The same blocks for each query, in any order; slots beyond the candidates are -1."""
    slots = max(chosen.shape[-1], expected.shape[-1])

    def ordered(blocks):
        missing = np.full((*blocks.shape[:-1], slots - blocks.shape[-1]), -1)
        return np.sort(np.concatenate([blocks, missing], axis=-1), axis=-1)

    np.testing.assert_array_equal(ordered(chosen), ordered(expected))


def test_ties_go_to_the_lower_block():
    same = np.ones((1, 23, 1, 3), "float32")
    for topk, block in ((2, 1), (7, 1), (8, 4)):
        options = {"window": 3, "topk": topk, "neighbor_block": block, "is_causal": True}
        neighbors = compiled(lambda: graph.build_sparse_w(same, same, **options).neighbors)  # noqa: B023
        chosen = numpy(neighbors())[0, 0]
        assert sorted(chosen[22]) == list(range(topk // block))
        assert (chosen[:4] == -1).all()
        # Token 4 has one token outside its window: token 0.
        assert sorted(chosen[4]) == sorted([0] + [-1] * (topk // block - 1))


@pytest.mark.parametrize("name", ["R2 causal", "R3 bidirectional fours", "R4 causal sixteens"])
def test_products_equal_the_dense_matrix(name):
    case = by_name(name)
    rng = np.random.default_rng(2)
    values = rng.standard_normal((*case.inputs.query.shape[:3], 3)).astype("float32")

    def products():
        return [
            (made.to_dense(), graph.sparse_mm(made, values), graph.sparse_mm(made, values, True))
            for made in build_graph(case)
        ]

    for dense, product, transposed in compiled(products)():
        dense = numpy(dense).astype(np.float64)
        forward = np.einsum("bnij,bjnf->binf", dense, values)
        backward = np.einsum("bnji,bjnf->binf", dense, values)
        assert_close(numpy(product), forward, TOLERANCES["output"])
        assert_close(numpy(transposed), backward, TOLERANCES["output"])


SHARED = ["R3 causal", "padding holes", "R2 causal sixteens", "R5 causal", "grouped heads"]


@pytest.mark.parametrize("name", SHARED)
def test_one_graph_serves_several_calls(name):
    case = by_name(name)
    inputs, options = case.inputs, dict(case.options)
    arguments = case.tensor_arguments()
    own = {name: x for name, x in arguments.items() if name != "lens_strength"}
    shared = {name: x for name, x in own.items() if not name.startswith("graph_")}
    arguments = {name: x for name, x in arguments.items() if not name.startswith("graph_")}
    forward = {key: value for key, value in options.items() if key != "reciprocal_beta"}

    def calls(query, key, value, **rest):
        _, _, made = build_graph(case)
        portable = attention(inputs, options, "portable", graph=made)
        dense = attention(inputs, options, "reference", graph=made)
        return {
            "portable": portable(query, key, value, **rest),
            "again": portable(query, key, 2.0 * value, **rest) / 2.0,
            "reference": dense(query, key, value, **rest),
            "scores": attention_scores(query, key, graph=made, **arguments, **options),
            "shared": token_importance(query, key, graph=made, **shared, **forward),
            "own": token_importance(query, key, **own, **forward),
        }

    tensors = {name: ops.convert_to_tensor(array) for name, array in inputs.arrays().items()}
    tensors = {name: x for name, x in tensors.items() if not name.startswith("graph_")}
    found = {key: numpy(value) for key, value in compiled(calls)(**tensors).items()}
    for which in ("portable", "again", "reference"):
        assert_close(found[which], case.expected, TOLERANCES["output"], which)
    value = oracle.repeat_heads(inputs.value, inputs.query.shape[2])
    product = np.einsum("bnij,bjnh->binh", found["scores"], value)
    assert_close(product, case.expected, TOLERANCES["output"])
    assert_close(found["shared"], found["own"], TOLERANCES["output"])


@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("name", ["R2 bidirectional", "R5 causal"])
def test_tiles_of_any_size_give_the_same_result(name, block_size):
    case = by_name(name)
    options = {**dict(case.options), "block_size": block_size}
    arrays = case.inputs.arrays().items()
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays}
    run = compiled(attention(case.inputs, options, "portable"))
    assert_close(numpy(run(**tensors)), case.expected, TOLERANCES["output"])


@pytest.mark.parametrize("name", ["R3 causal", "padding holes reversible", "R5 padding holes"])
def test_chunks_of_queries_give_the_same_result(name, monkeypatch):
    # Long sequences are worked on in chunks. Chunks of a few queries show it on a short one.
    monkeypatch.setattr(_select, "_ROWS", 7)
    monkeypatch.setattr(_far, "_GATHERED", 500)
    case = by_name(name)
    run = attention(case.inputs, dict(case.options), "portable")
    output, gradients = attention_gradients(run, case.inputs)
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


def test_a_graph_tells_what_it_is():
    weight, symmetric, transition = build_graph(by_name("R2 causal"))
    assert "W of 29 tokens" in repr(weight)
    assert "S of 29 tokens" in repr(symmetric)
    assert "P of 29 tokens" in repr(transition)
    assert weight.degree is None


def test_bad_graphs_are_refused():
    case = by_name("R2 causal")
    weight, symmetric, transition = build_graph(case)
    query, key, value = case.inputs.query, case.inputs.key, case.inputs.value
    with pytest.raises(ValueError, match=r"neither symmetrised.*Received: graph="):
        graph.reversible(symmetric)
    with pytest.raises(ValueError, match=r"neither symmetrised.*Received: graph="):
        graph.reversible(transition)
    with pytest.raises(ValueError, match=r"not be normalised already.*Received: graph="):
        graph.normalize_to_p(transition)
    with pytest.raises(TypeError, match=r"SparseGraph. Received: graph="):
        graph.normalize_to_p(numpy(weight.to_dense()))
    with pytest.raises(ValueError, match=r"`key_bias`.*Received: key_bias of shape"):
        graph.normalize_to_p(weight, np.zeros((2, 2, 29), "float32"))
    with pytest.raises(ValueError, match=r"`values`.*Received: values of shape"):
        graph.sparse_mm(transition, value[:, 1:])
    options = dict(case.options)
    with pytest.raises(ValueError, match=r"`graph` must be normalised.*Received: graph="):
        rwr_attention(query, key, value, graph=symmetric, **options)
    with pytest.raises(TypeError, match=r"`graph` must be a SparseGraph. Received: graph="):
        rwr_attention(query, key, value, graph="graph", **options)
    with pytest.raises(ValueError, match=r"`graph`.*Received: window=3 in the graph, window=4"):
        rwr_attention(query, key, value, graph=transition, **{**options, "window": 4})
    with pytest.raises(ValueError, match=r"`graph`.*Received: graph of"):
        rwr_attention(query[:1], key[:1], value[:1], graph=transition, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": -1}, ValueError, "`window`.*Received: window=-1"),
        ({"topk": 24}, ValueError, "`topk`.*multiple.*Received: topk=24, neighbor_block=16"),
        ({"concentration": 65.0}, ValueError, "`concentration`.*Received: concentration=65.0"),
        ({"edge_weight": "dot"}, ValueError, "`edge_weight`.*Received: edge_weight='dot'"),
        (
            {"padding_mask": np.ones((2, 3), bool)},
            ValueError,
            r"`padding_mask`.*Received: padding_mask of shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments_of_the_builder(changes, error, message):
    inputs = by_name("R1 causal").inputs
    with pytest.raises(error, match=message):
        graph.build_sparse_w(inputs.query, inputs.key, **changes)
