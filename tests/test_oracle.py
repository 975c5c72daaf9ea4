"""The oracle against hand-worked numbers and a second formula; the package against the oracle."""

import math

import helpers
import numpy as np
import oracle
import oracle_gradients
import pytest
from helpers import (
    ALL_CASES,
    HAND_CHOSEN,
    SUM_CASES,
    TOLERANCES,
    assert_close,
    attention,
    compiled,
    numpy,
    run_case,
)
from keras import ops

from keras_rwr.ops import attention_scores, token_importance


def by_name(name):
    (found,) = [case for case in ALL_CASES if case.name == name]
    return found


# --- the oracle itself ---------------------------------------------------------------------------


def test_oracle_on_a_hand_worked_example():
    # Three one-dimensional tokens, causal, window 1, no neighbours: cosines are products of signs.
    query = np.array([1.0, 2.0, -3.0]).reshape(1, 3, 1, 1)
    key = np.array([2.0, 1.0, -1.0]).reshape(1, 3, 1, 1)
    value = np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    options = oracle.Options(alpha=0.5, steps=1, topk=0, window=1, is_causal=True)
    ((graph,),) = oracle.graphs(query, key, options)
    np.testing.assert_array_equal(graph.weight, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(graph.transition, [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])
    np.testing.assert_array_equal(graph.degree, [1, 2, 1])
    # r = I / 2 + P / 4
    walk = oracle.walk_matrix(graph.transition, options)
    np.testing.assert_array_equal(walk, [[0.75, 0, 0], [0.125, 0.625, 0], [0, 0, 0.75]])
    output = oracle.rwr_attention(query, key, value, options, lens_strength=2.0)[0, :, 0, 0]
    local = [
        1.0,
        (math.exp(4) * 1 + math.exp(2) * 10) / (math.exp(4) + math.exp(2)),
        (math.exp(-3) * 10 + math.exp(3) * 100) / (math.exp(-3) + math.exp(3)),
    ]
    far = [0.75, 0.125 * 1 + 0.625 * 10, 75.0]
    np.testing.assert_allclose(output, np.array(local) + 2.0 * np.array(far), rtol=1e-14)


def test_oracle_selects_blocks_outside_the_window():
    # Keys are unit vectors; token 6's best block outside its window |i - j| <= 1 is block 1, then
    # block 0.
    key = np.eye(7)
    query = np.zeros((7, 7))
    query[6] = [0.1, 0.0, 0.9, 0.0, 0.3, 1.0, 1.0]
    real = np.ones(7, dtype=bool)
    options = oracle.Options(topk=4, neighbor_block=2, window=1)
    chosen = oracle.select_neighbors(oracle.unit_rows(query), key, real, options)
    # Scores: block 0 (0.1 + 0) / 2, block 1 (0.9 + 0) / 2, block 2 (0.3 + 1) / 2 (token 4 is
    # outside), block 3 none.
    assert chosen[6].tolist() == [2, 1]
    assert oracle.neighbor_tokens(6, chosen, real, options) == {2, 3, 4}
    # Zero queries score every block 0: ties go to the lower block.
    assert chosen[3].tolist() == [0, 2]


def test_oracle_breaks_ties_towards_the_lower_block():
    same = np.ones((9, 3)) / math.sqrt(3)
    options = oracle.Options(topk=2, neighbor_block=1, window=1, is_causal=True)
    chosen = oracle.select_neighbors(same, same, np.ones(9, dtype=bool), options)
    assert chosen[1].tolist() == [-1, -1]
    assert chosen[2].tolist() == [0, -1]
    assert chosen[8].tolist() == [0, 1]


def test_hash_is_murmur3s_finaliser():
    assert oracle.hash_mix(0) == 0
    assert oracle.hash_mix(1) == 0x514E28B7
    assert oracle.hash_mix(0xFFFFFFFF) == 0x81F16F39


def test_dropout_keeps_the_right_share_and_is_unbiased():
    kept = [
        oracle.is_kept((3, 4), batch, head, i, j, 0.3)
        for batch in range(2)
        for head in range(2)
        for i in range(40)
        for j in range(40)
    ]
    assert abs(np.mean(kept) - 0.7) < 4 * math.sqrt(0.21 / len(kept))
    probabilities = np.full((40, 40), 1 / 40)
    dropped = oracle.drop(probabilities, (3, 4), 0, 0, 0.3)
    assert set(np.unique(dropped)) == {0.0, (1 / 40) / 0.7}


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_oracle_keeps_the_identities(case):
    options = case.oracle_options
    mass = oracle.walk_mass(options)
    value = np.asarray(case.inputs.value, np.float64)
    for b, row in enumerate(case.graphs):
        for n, graph in enumerate(row):
            np.testing.assert_allclose(graph.transition.sum(-1), 1.0, atol=1e-13)
            walk, mixed = oracle.forward_and_mixed_walk(graph, options)
            np.testing.assert_allclose(walk.sum(-1), mass, atol=1e-13)
            np.testing.assert_allclose(mixed.sum(-1), mass, atol=1e-13)
            # Horner's scheme is the same walk.
            state = value[b, :, n]
            for _ in range(options.steps):
                state = value[b, :, n] + (1 - options.alpha) * graph.transition @ state
            np.testing.assert_allclose(walk @ value[b, :, n], options.alpha * state, atol=1e-12)
            if options.reversible and not options.is_causal:
                flow = graph.stationary[:, None] * graph.transition
                np.testing.assert_allclose(flow, flow.T, atol=1e-12 * flow.max())
                # The backward walk is the transpose of the forward one, row-normalised.
                back = walk.T / walk.T.sum(-1, keepdims=True)
                claimed = oracle.reciprocal_matrix(walk, graph.stationary, mass, 0.0)
                np.testing.assert_allclose(claimed, mass * back, atol=1e-12)
            if options.is_causal:
                assert not np.triu(graph.transition, 1).any()
    if case.far:
        outside = np.abs(np.subtract.outer(*2 * [np.arange(value.shape[1])])) > options.window
        weights = helpers.stack(case.graphs, "symmetric")
        assert (weights * outside).any(), "the case promises edges outside the window"


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_two_oracles_agree(case):
    output, _ = case.expected_gradients
    arguments = case.tensor_arguments()
    expected = case.expected
    np.testing.assert_allclose(
        output, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max())
    )
    assert set(arguments) == {
        "discoverability",
        "concentration",
        "lens_strength",
        "padding_mask",
    }


@pytest.mark.parametrize("name", ["R3 causal", "R4 bidirectional", "softmax R3"])
def test_autograd_of_the_second_oracle_agrees_with_differences_of_the_first(name):
    case = by_name(name)
    _, gradients = case.expected_gradients
    rng = np.random.default_rng(5)
    arrays = {key: np.asarray(array, np.float64) for key, array in case.inputs.arrays().items()}
    if not case.discoverability:
        arrays["discoverability"] = np.zeros_like(arrays["discoverability"])

    def loss(moved):
        output = oracle.rwr_attention(
            moved["query"],
            moved["key"],
            moved["value"],
            case.oracle_options,
            lens_strength=moved["lens_strength"],
            concentration=moved["concentration"],
            discoverability=moved["discoverability"],
            padding_mask=case.inputs.padding_mask,
            neighbors=case.neighbors,
            seed=case.seed,
        )
        return (output * case.inputs.cotangent).sum()

    for key in oracle_gradients.NAMES:
        direction = rng.standard_normal(arrays[key].shape)
        step = 1e-6
        ahead = loss({**arrays, key: arrays[key] + step * direction})
        behind = loss({**arrays, key: arrays[key] - step * direction})
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose((gradients[key] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_the_comparison_can_fail():
    expected = HAND_CHOSEN[0].expected
    wrong = expected.copy()
    wrong[0, -1, 0, 0] += 3e-5 * np.abs(expected).max()
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(wrong, expected, TOLERANCES["output"])
    wrong = expected.copy()
    wrong[0, 0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(wrong, expected, TOLERANCES["output"])


# --- the package against the oracle --------------------------------------------------------------


@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_portable(case):
    output, _ = run_case(case, "portable")
    assert output.dtype == np.float32
    assert_close(output, case.expected, TOLERANCES["output"])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_reference(case):
    output, _ = run_case(case, "reference")
    assert output.dtype == np.float32
    assert_close(output, case.expected, TOLERANCES["output"])


def test_the_default_implementation_without_gradients():
    for case in (by_name("R3 causal"), by_name("softmax padding")):
        run = attention(case.inputs, dict(case.options), None)
        arrays = list(case.inputs.arrays().values())
        if not case.discoverability:
            arrays[3] = np.zeros_like(arrays[3])
        output = compiled(run)(*(ops.convert_to_tensor(array) for array in arrays))
        assert_close(numpy(output), case.expected, TOLERANCES["output"])


def test_plain_numbers_instead_of_tensors():
    case = by_name("R4 causal")
    inputs = case.inputs
    options = dict(case.options)
    expected = oracle.rwr_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        case.oracle_options,
        lens_strength=0.4,
        concentration=9.0,
        neighbors=case.neighbors,
    )
    run = attention(inputs, options, None)
    tensors = [ops.convert_to_tensor(x) for x in (inputs.query, inputs.key, inputs.value)]
    for kappa, gamma in ((9.0, 0.4), ([9.0, 9.0], (0.4, 0.4))):
        plain = compiled(lambda *x: run(*x, None, kappa, gamma))  # noqa: B023
        assert_close(numpy(plain(*tensors)), expected, TOLERANCES["output"])


def dense_arguments(case):
    """Arguments of the two analysis functions."""
    arguments = case.tensor_arguments()
    options = {key: value for key, value in case.options if key != "dropout"}
    return arguments, options


@pytest.mark.parametrize(
    "name", ["R1 causal", "R3 bidirectional fours", "padding left", "softmax R3"]
)
def test_attention_scores(name):
    case = by_name(name)
    arguments, options = dense_arguments(case)
    dense = compiled(lambda query, key: attention_scores(query, key, **arguments, **options))
    scores = numpy(dense(case.inputs.query, case.inputs.key))
    expected = oracle.attention_scores(
        case.inputs.query,
        case.inputs.key,
        case.oracle_options,
        neighbors=case.neighbors,
        **arguments,
    )
    assert_close(scores, expected, TOLERANCES["output"])


@pytest.mark.parametrize("name", ["R1 causal", "R3 causal", "padding holes", "padding whole row"])
def test_token_importance(name):
    case = by_name(name)
    arguments, options = dense_arguments(case)
    del arguments["lens_strength"]
    options.pop("reciprocal_beta", None)
    visits = compiled(lambda query, key: token_importance(query, key, **arguments, **options))
    importance = numpy(visits(case.inputs.query, case.inputs.key))
    expected = oracle.token_importance(
        case.inputs.query,
        case.inputs.key,
        case.oracle_options,
        neighbors=case.neighbors,
        **arguments,
    )
    assert_close(importance, expected, TOLERANCES["output"])
    mass = oracle.walk_mass(case.oracle_options)
    whole = case.inputs.real().any(-1)[:, None]
    np.testing.assert_allclose(
        importance.sum(1), mass * np.broadcast_to(whole, importance.sum(1).shape), rtol=1e-5
    )
