"""The oracle against hand-worked numbers, its identities and a second formula."""

import math
from dataclasses import replace

import helpers
import numpy as np
import oracle
import oracle_gradients
import pytest
from helpers import ALL_CASES, HAND_CHOSEN, TOLERANCES, assert_close, by_name

# --- known values --------------------------------------------------------------------------------


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
    walk = oracle.walk_matrix(graph.transition, [1 / 2, 1 / 4])
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
    labels = np.ones(7)
    options = oracle.Options(topk=4, neighbor_block=2, window=1)
    chosen = oracle.select_neighbors(oracle.unit_rows(query), key, labels, options)
    # Scores: block 0 (0.1 + 0) / 2, block 1 (0.9 + 0) / 2, block 2 (0.3 + 1) / 2 (token 4 is
    # outside), block 3 none.
    assert chosen[6].tolist() == [2, 1]
    assert oracle.neighbor_tokens(6, chosen, labels, options) == {2, 3, 4}
    # Zero queries score every block 0: ties go to the lower block.
    assert chosen[3].tolist() == [0, 2]


def test_oracle_breaks_ties_towards_the_lower_block():
    same = np.ones((9, 3)) / math.sqrt(3)
    options = oracle.Options(topk=2, neighbor_block=1, window=1, is_causal=True)
    chosen = oracle.select_neighbors(same, same, np.ones(9), options)
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


def test_the_convolution_by_hand():
    keys = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape(1, 6, 1, 1)
    kernel = np.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)

    def convolve(**masks):
        return oracle.convolve(keys, kernel, **masks)[0, :, 0, 0].tolist()

    assert convolve() == [1, 12, 124, 248, 496, 992]
    holes = np.array([[1, 1, 0, 1, 1, 1]])
    assert convolve(padding_mask=holes) == [1, 12, 0, 208, 96, 992]
    assert convolve(segment_ids=[[7, 7, 7, 2, 2, 7]]) == [1, 12, 124, 8, 96, 32]
    # Each graph and feature has numbers of its own.
    wide = np.arange(24.0).reshape(1, 3, 2, 4)
    kernel = np.arange(16.0).reshape(2, 2, 4)
    expected = kernel[0] * wide[0, 2] + kernel[1] * wide[0, 1]
    np.testing.assert_array_equal(oracle.convolve(wide, kernel)[0, 2], expected)


def test_an_induction_graph_links_a_token_to_what_followed_tokens_like_it():
    words = np.array([0, 1, 2, 3, 4, 5, 6, 7, 1, 8, 3])
    tokens = np.eye(9)[words][None, :, None]
    shift = np.zeros((4, 1, 9))
    shift[1] = 1.0
    options = oracle.Options(
        topk=1, neighbor_block=1, window=0, edge_weight="exponential", self_edges=False
    )
    options = replace(options, is_causal=True)
    ((graph,),) = oracle.graphs(
        tokens, tokens, options, graph_query=tokens, graph_key=oracle.convolve(tokens, shift)
    )
    # Word 1 at positions 1 and 8, word 3 at positions 3 and 10.
    assert graph.neighbors[8].tolist() == [2] and graph.transition[8, 2] == 1.0
    assert graph.neighbors[10].tolist() == [4] and graph.transition[10, 4] == 1.0


def test_a_walk_without_self_edges_by_hand():
    query = key = np.ones((1, 4, 1, 1))
    options = oracle.Options(topk=0, window=2, is_causal=True, self_edges=False)
    ((graph,),) = oracle.graphs(query, key, options)
    # The first token is isolated: it stays, and its degree is 1.
    np.testing.assert_array_equal(
        graph.transition, [[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]]
    )
    np.testing.assert_array_equal(graph.degree, [1, 1, 2, 2])
    # LOCAL keeps the token itself.
    local = oracle.attention_scores(query, key, options, lens_strength=0.0)[0, 0]
    np.testing.assert_allclose(local[1], [0.5, 0.5, 0, 0])


def test_hop_weights_by_hand():
    value = np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    options = oracle.Options(topk=0, window=1, is_causal=True, self_edges=False, steps=2)
    theta = np.zeros((1, 3, 1, 3))
    theta[0, :, 0] = [[2, 3, 4], [2, 3, 4], [-1, 5, 7]]
    # P leads each token to the one before it, and the first to itself.
    ones = np.ones((1, 3, 1, 1))
    local = oracle.rwr_attention(ones, ones, value, options, lens_strength=0.0)
    output = oracle.rwr_attention(ones, ones, value, options, hop_weights=theta)
    walked = [2 + 3 + 4, 20 + 3 + 4, -100 + 50 + 7]
    np.testing.assert_allclose((output - local)[0, :, 0, 0], walked)


# --- what is the same ----------------------------------------------------------------------------


def scores(inputs, options, **changes):
    """The oracle's matrix A for inputs with changes; `None` takes a tensor away."""
    inputs = replace(inputs, **changes)
    arguments = {**inputs.graph_arguments(), **inputs.given("lens_strength", "hop_weights")}
    return oracle.attention_scores(inputs.query, inputs.key, options, **arguments)


@pytest.mark.parametrize("name", ["R3 causal", "R4 bidirectional", "softmax R3"])
def test_hop_weights_of_a_restart(name):
    made = by_name(name)
    gamma = made.inputs.lens_strength.astype("float64")
    if made.oracle_options.fusion == "softmax":
        gamma = np.ones_like(gamma)
    expected = scores(made.inputs, made.oracle_options, lens_strength=gamma)
    theta = gamma[:, None] * oracle.restart_weights(made.oracle_options)
    for shape in (theta.shape, (*made.inputs.query.shape[:3], theta.shape[-1])):
        found = scores(
            made.inputs,
            made.oracle_options,
            lens_strength=None,
            hop_weights=np.broadcast_to(theta, shape),
        )
        np.testing.assert_allclose(found, expected, atol=1e-14)


def test_grouped_heads_are_repeated_heads():
    for name in ("grouped heads", "two graphs for four heads"):
        made = by_name(name)
        inputs, heads = made.inputs, made.inputs.query.shape[2]
        for n in range(heads):
            np.testing.assert_array_equal(
                oracle.repeat_heads(inputs.key, heads)[:, :, n], inputs.key[:, :, n // 2]
            )
        changes = {"key": oracle.repeat_heads(inputs.key, heads)}
        if inputs.graph_query is not None:
            for name in ("graph_query", "graph_key"):
                changes[name] = oracle.repeat_heads(getattr(inputs, name), heads)
            for name in ("discoverability", "concentration"):
                changes[name] = np.repeat(getattr(inputs, name), 2, axis=0)
        found = scores(inputs, made.oracle_options, **changes)
        np.testing.assert_array_equal(found, scores(inputs, made.oracle_options))


def test_a_graph_of_its_own_may_be_that_of_the_heads():
    made = by_name("R4 causal")
    inputs = made.inputs
    found = scores(inputs, made.oracle_options, graph_query=inputs.query, graph_key=inputs.key)
    np.testing.assert_array_equal(found, scores(inputs, made.oracle_options))


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_documents_are_documents_by_themselves(is_causal):
    made = by_name("R5 causal")
    inputs, options = made.inputs, replace(made.oracle_options, is_causal=is_causal, topk=2)
    parts = [slice(0, 9), slice(9, 20), slice(20, 29)]
    segments = np.repeat([4, -1, 3], [9, 11, 9])[None].repeat(2, 0)
    packed = scores(inputs, options, segment_ids=segments)
    for part in parts:
        names = ("query", "key", "graph_query", "graph_key", "hop_weights")
        alone = scores(inputs, options, **{x: getattr(inputs, x)[:, part] for x in names})
        np.testing.assert_allclose(packed[:, :, part, part], alone, atol=1e-14)
        packed[:, :, part, part] = 0.0
    assert not packed.any()


# --- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_oracle_keeps_the_identities(case):
    options = case.oracle_options
    heads, graphs = case.inputs.query.shape[2], len(case.graphs[0])
    value = oracle.repeat_heads(case.inputs.value, heads)
    theta = oracle.hop_weights_of_tokens(
        options, case.inputs.hop_weights, case.inputs.query.shape[:3]
    )
    if case.inputs.hop_weights is None:
        np.testing.assert_allclose(theta.sum(-1), oracle.walk_mass(options), atol=1e-14)
    for b, n in np.ndindex(len(value), heads):
        graph = case.graphs[b][n * graphs // heads]
        weights = theta[b, :, n]
        mass = weights.sum(-1)
        np.testing.assert_allclose(graph.transition.sum(-1), 1.0, atol=1e-13)
        walk, mixed = oracle.forward_and_mixed_walk(graph, options, weights)
        np.testing.assert_allclose(walk.sum(-1), mass, atol=1e-13)
        np.testing.assert_allclose(mixed.sum(-1), mass, atol=1e-13)
        # One product a step is the same walk.
        state, walked = value[b, :, n], weights[:, :1] * value[b, :, n]
        for t in range(1, options.steps + 1):
            state = graph.transition @ state
            walked = walked + weights[:, t : t + 1] * state
        np.testing.assert_allclose(walk @ value[b, :, n], walked, atol=1e-12)
        if options.reversible and not options.is_causal:
            flow = graph.stationary[:, None] * graph.transition
            np.testing.assert_allclose(flow, flow.T, atol=1e-12 * flow.max())
            # The backward walk is the transpose of the forward one, row-normalised.
            back = walk.T / walk.T.sum(-1, keepdims=True)
            claimed = oracle.reciprocal_matrix(walk, graph.stationary, mass, 0.0)
            np.testing.assert_allclose(claimed, mass[:, None] * back, atol=1e-12)
        if options.is_causal:
            assert not np.triu(graph.transition, 1).any()
    if case.far:
        outside = np.abs(np.subtract.outer(*2 * [np.arange(value.shape[1])])) > options.window
        weights = helpers.stack(case.graphs, "symmetric")
        assert (weights * outside).any(), "the case promises edges outside the window"


def test_the_cases_show_what_they_are_for():
    graphs = by_name("isolated tokens").graphs
    step = helpers.stack(graphs, "transition")
    isolated = ~helpers.stack(graphs, "symmetric").any(-1)
    arriving = (step * isolated[..., None, :]).sum(-2) > isolated
    assert arriving[..., 1:].any(), "no token links to an isolated one"
    for name in ("extreme graph", "extreme reversible"):
        bias = helpers.stack(by_name(name).graphs, "bias")
        assert bias.min() == -8.0 and bias.max() == 8.0 and (np.abs(bias) < 7.0).any()
    length = np.linalg.norm(by_name("extreme graph").inputs.graph_key.astype("float64"), axis=-1)
    assert length.min() == 0.0 and length.max() > 1e28
    length = np.linalg.norm(by_name("extreme reversible").inputs.query, axis=-1)
    assert length.min() < 0.05
    assert helpers.stack(by_name("no self edges").graphs, "degree").min() < 0.5


# --- the second formula --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_two_oracles_agree(case):
    output, gradients = case.expected_gradients
    scale = max(1.0, np.abs(case.expected).max())
    np.testing.assert_allclose(output, case.expected, rtol=0, atol=1e-12 * scale)
    assert set(gradients) == set(case.inputs.arrays())
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    "name",
    [
        "R3 causal",
        "R4 bidirectional",
        "softmax R3",
        "R5 segments",
        "grouped heads",
        "two graphs for four heads",
        "hop weights reciprocal",
        "discoverable graph",
        "isolated tokens",
    ],
)
def test_autograd_of_the_second_oracle_agrees_with_differences_of_the_first(name, monkeypatch):
    # Differences know nothing of bounds.
    monkeypatch.setattr(oracle_gradients, "scale_gradient", lambda x, factor: x)
    case = replace(by_name(name))
    _, gradients = case.expected_gradients
    rng = np.random.default_rng(5)
    arrays = {key: np.asarray(array, np.float64) for key, array in case.inputs.arrays().items()}
    masks = case.inputs.given("padding_mask", "segment_ids")

    def loss(moved):
        output = oracle.rwr_attention(
            **moved, **masks, options=case.oracle_options, neighbors=case.neighbors, seed=case.seed
        )
        return (output * case.inputs.cotangent).sum()

    for key, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        step = 1e-6
        ahead = loss({**arrays, key: array + step * direction})
        behind = loss({**arrays, key: array - step * direction})
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose((gradients[key] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["R5 causal", "R5 padding holes", "two graphs for four heads", "extreme graph"]
)
def test_autograd_agrees_with_the_specification(name):
    """The formulas of the walk's gradients, with their bounds, for a graph of its own."""
    case = by_name(name)
    _, gradients = case.expected_gradients
    for key, expected in walk_gradients(case).items():
        assert_close(gradients[key], expected, 1e-12, key)


def walk_gradients(case):
    """Gradients by name of what only the walk takes."""
    inputs, options = case.inputs, case.oracle_options
    heads, graphs = inputs.query.shape[2], len(case.graphs[0])
    names = ("graph_query", "graph_key", "concentration", "discoverability", "hop_weights")
    found = {x: np.zeros(y.shape) for x, y in inputs.given(*names).items()}
    value = oracle.repeat_heads(inputs.value, heads)
    cotangent = np.where(inputs.real()[..., None, None], inputs.cotangent.astype("float64"), 0.0)
    theta = oracle.hop_weights_of_tokens(options, inputs.hop_weights, inputs.query.shape[:3])
    if inputs.hop_weights is None:
        theta = theta * inputs.lens_strength[:, None]
    for b, g in np.ndindex(len(value), graphs):
        graph = case.graphs[b][g]
        step = graph.transition
        slope = np.zeros(step.shape)  # dP - delta
        for n in range(g * heads // graphs, (g + 1) * heads // graphs):
            states = [value[b, :, n]]
            for _ in range(options.steps):
                states.append(step @ states[-1])
            arriving = np.zeros(states[0].shape)  # G
            for t in range(options.steps, -1, -1):
                arriving = theta[b, :, n, t, None] * cotangent[b, :, n] + step.T @ arriving
                if t > 0:
                    slope += arriving @ states[t - 1].T
                    slope -= (arriving * states[t]).sum(-1, keepdims=True)
                if inputs.hop_weights is not None:
                    moved = (cotangent[b, :, n] * states[t]).sum(-1)
                    if inputs.hop_weights.ndim == 4:
                        found["hop_weights"][b, :, n, t] += moved
                    else:
                        found["hop_weights"][n, t] += moved.sum()
        query = inputs.graph_query[b, :, g].astype("float64")
        key = inputs.graph_key[b, :, g].astype("float64")
        query_unit, key_unit = oracle.unit_rows(query), oracle.unit_rows(key)
        edges = graph.symmetric > 0
        flow = np.where(edges, step * slope, 0.0)
        if options.edge_weight == "exponential":
            cosine_slope = inputs.concentration[g] * flow
            found["concentration"][g] += (flow * (query_unit @ key_unit.T)).sum()
        else:
            degree = np.maximum(graph.degree, 1.0)[:, None]
            cosine_slope = np.where(edges, slope * np.exp(graph.bias) / degree, 0.0)
        bias_slope = np.where(np.abs(graph.bias) < 8.0, flow.sum(0), 0.0)
        key_slope = radial_free(cosine_slope.T @ query_unit, key_unit, key)
        if inputs.discoverability is not None:
            found["discoverability"][g] += bias_slope @ key
            key_slope += bias_slope[:, None] * inputs.discoverability[g]
        found["graph_key"][b, :, g] = key_slope
        found["graph_query"][b, :, g] = radial_free(cosine_slope @ key_unit, query_unit, query)
    return found


def radial_free(slope, units, vectors):
    """(dq^ - q^ (q^ . dq^)) / max(|q|, 0.1)"""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    radial = (units * slope).sum(-1, keepdims=True)
    return (slope - units * radial) / np.maximum(length, 0.1)


# --- the comparison ------------------------------------------------------------------------------


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
