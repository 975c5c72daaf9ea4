"""The guarantees of the specification, for R1 to R5, single tokens and blocks of 16."""

import functools
from dataclasses import replace

import numpy as np
import oracle
import pytest
from helpers import (
    ABLATION,
    GRANULARITY,
    GRANULARITY_TOKENS,
    IMPLEMENTATIONS,
    SECOND_EDITION,
    TOLERANCES,
    assert_close,
    attention,
    attention_gradients,
    build_graph,
    case,
    compiled,
    graph_bias,
    graph_vectors,
    numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_rwr import _reference
from keras_rwr._heads import Heads
from keras_rwr._heads import Inputs as Tensors
from keras_rwr.options import Call, Options

pytestmark = pytest.mark.costly
VECTORS = ("query", "key", "value", "graph_query", "graph_key")
CAUSAL = [
    made
    for made in SECOND_EDITION
    if made.oracle_options.is_causal and dict(made.sizes).get("tokens") != 1
]
few_examples = settings(max_examples=4, deadline=None, derandomize=True, database=None)
every_setup = pytest.mark.parametrize("step", ABLATION)
every_restart = pytest.mark.parametrize("step", [step for step in ABLATION if step != "R5"])
both_granularities = pytest.mark.parametrize("block", GRANULARITY)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
both_directions = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])


@functools.cache
def make_case(step, block, **options):
    """A step of the ablation with its window scaled to the test's length."""
    setup = {**ABLATION[step], **GRANULARITY[block], **options}
    return case(
        f"{step} {block}",
        sizes={"tokens": GRANULARITY_TOKENS[block], "heads": 2, "head_dim": 7, "value_dim": 5},
        **setup,
    )


def make_runner(step, block, implementation, **options):
    """A case and its runner."""
    made = make_case(step, block, **options)
    return made, runner_of(made, implementation)


@functools.cache
def runner_of(made, implementation):
    """A function of the case's NumPy arrays, some replaced; compiled once on jax."""
    seed = (11, 12) if made.oracle_options.dropout else None

    def run(padding_mask, **tensors):
        inner = attention(
            made.inputs,
            dict(made.options),
            implementation,
            seed=seed,
            padding_mask=padding_mask,
        )
        return inner(**tensors)

    fast = compiled(run)

    def on_arrays(**changes):
        arrays = {"padding_mask": made.inputs.real(), **made.inputs.arrays(), **changes}
        return numpy(fast(**{name: ops.convert_to_tensor(x) for name, x in arrays.items()}))

    return on_arrays


def draw_like(arrays, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(array.shape)).astype("float32")
        for name, array in arrays.items()
    }


def rows_of(inputs):
    """The arrays that have a row for each token."""
    arrays = inputs.given(*VECTORS)
    if inputs.hop_weights is not None and inputs.hop_weights.ndim == 4:
        arrays["hop_weights"] = inputs.hop_weights
    return arrays


# --- causality -----------------------------------------------------------------------------------


def assert_no_leak(run, inputs, last, seed, scale):
    """Replacing every token after `last` leaves the outputs up to `last` bitwise unchanged."""
    rows = rows_of(inputs)
    before = run(**rows)
    changed = {name: array.copy() for name, array in rows.items()}
    for name, other in draw_like(rows, seed, scale).items():
        changed[name][:, last + 1 :] = other[:, last + 1 :]
    after = run(**changed)
    np.testing.assert_array_equal(after[:, : last + 1], before[:, : last + 1])
    assert not np.array_equal(after[:, last + 1 :], before[:, last + 1 :])


@every_setup
@both_granularities
@every_implementation
def test_no_token_sees_a_later_one(step, block, implementation):
    made, run = make_runner(step, block, implementation, is_causal=True)

    @few_examples
    @given(
        last=st.integers(0, GRANULARITY_TOKENS[block] - 2),
        seed=st.integers(0, 2**31),
        scale=st.sampled_from([1e-3, 1.0, 100.0]),
    )
    def check(last, seed, scale):
        assert_no_leak(run, made.inputs, last, seed, scale)

    check()


@every_implementation
@pytest.mark.parametrize("made", CAUSAL, ids=str)
def test_no_token_sees_a_later_one_in_the_second_edition(made, implementation):
    run = runner_of(made, implementation)
    for last, seed, scale in ((0, 1, 1.0), (11, 2, 100.0), (20, 3, 1e-3)):
        assert_no_leak(run, made.inputs, last, seed, scale)


@every_implementation
def test_no_token_sees_a_later_one_with_dropout(implementation):
    made, run = make_runner("R3", 1, implementation, is_causal=True, dropout=0.4)
    assert_no_leak(run, made.inputs, 17, 3, 1.0)


def test_no_token_sees_a_later_one_in_the_softmax_fusion():
    made, run = make_runner("R3", 1, "reference", is_causal=True, fusion="softmax")
    assert_no_leak(run, made.inputs, 17, 3, 1.0)


def test_the_leak_check_notices_a_leak():
    made, run = make_runner("R1", 1, "portable", is_causal=True)

    def leaks(value, **rows):
        # The smallest leak float32 can show: the last token's value in the first token's output.
        output = run(value=value, **rows).copy()
        output[:, 0] += 1e-6 * value[:, -1, :, : output.shape[-1]]
        return output

    with pytest.raises(AssertionError):
        assert_no_leak(leaks, made.inputs, 17, 3, 1.0)
    both_ways, run = make_runner("R1", 1, "portable", is_causal=False)
    with pytest.raises(AssertionError):
        assert_no_leak(run, both_ways.inputs, 17, 3, 1.0)


# --- probability ---------------------------------------------------------------------------------


def sparse_transition(made):
    """(P, pi) of the public graph functions."""

    def matrices(query, key):
        built = build_graph(made, query, key)[-1]
        return built.to_dense(), built.degree

    transition, degree = map(numpy, compiled(matrices)(*graph_vectors(made)))
    bias = graph_bias(made)
    stationary = degree if bias is None else np.exp(bias) * degree
    return transition, np.moveaxis(stationary, 1, 2)


def dense_transition(made):
    """(P, pi) of the reference."""
    options = Options.pick(dict(made.options))
    call = Call.pick(dict(made.options))
    fixed = made.inputs.given("padding_mask", "segment_ids")

    def matrices(tensors):
        tensors |= {name: ops.convert_to_tensor(x) for name, x in fixed.items()}
        heads = Heads.create(Tensors(**tensors), options, call)
        _, log_degree, bias, step = _reference.transition_matrix(heads, options)
        return step, (log_degree + bias)[..., 0]

    tensors = {name: ops.convert_to_tensor(x) for name, x in made.inputs.arrays().items()}
    transition, logs = map(numpy, compiled(matrices)(tensors))
    return transition, np.exp(logs)


TRANSITIONS = {
    "portable": sparse_transition,
    "reference": dense_transition,
}


@every_setup
@both_granularities
@every_implementation
@both_directions
def test_transition_rows_sum_to_one(step, block, implementation, is_causal):
    transition, _ = TRANSITIONS[implementation](make_case(step, block, is_causal=is_causal))
    assert (transition >= 0.0).all()
    np.testing.assert_allclose(transition.sum(-1, dtype=np.float64), 1.0, atol=1e-6)


@pytest.mark.parametrize("made", SECOND_EDITION, ids=str)
@every_implementation
def test_transition_rows_sum_to_one_in_the_second_edition(made, implementation):
    transition, _ = TRANSITIONS[implementation](made)
    assert (transition >= 0.0).all()
    # The reference subtracts logarithms of degrees, of which float32 keeps fewer decimals.
    np.testing.assert_allclose(transition.sum(-1, dtype=np.float64), 1.0, atol=4e-6)


@pytest.mark.parametrize("step", ["R2", "R3"])
@both_granularities
@every_implementation
def test_detailed_balance(step, block, implementation):
    made = make_case(step, block, is_causal=False)
    transition, stationary = TRANSITIONS[implementation](made)
    flow = stationary[..., None].astype(np.float64) * transition
    assert_close(flow, np.swapaxes(flow, -1, -2), 1e-6, "detailed balance")
    # Without `reversible` it does not hold, so the check can fail.
    plain = make_case("R1", block, is_causal=False)
    transition, stationary = TRANSITIONS[implementation](plain)
    flow = stationary[..., None].astype(np.float64) * transition
    with pytest.raises(AssertionError):
        assert_close(flow, np.swapaxes(flow, -1, -2), 1e-3)


def mass_alone(inputs, made):
    """What a token that attends to itself alone multiplies its value by, (B, S, N, 1) or less."""
    if inputs.hop_weights is not None:
        return 1.0 + inputs.hop_weights.sum(-1, keepdims=True)
    return 1.0 + inputs.lens_strength[:, None] * oracle.walk_mass(made.oracle_options)


@every_setup
@both_granularities
@every_implementation
def test_the_walk_has_its_mass(step, block, implementation):
    made, run = make_runner(step, block, implementation, is_causal=True)
    ones = np.ones_like(made.inputs.value)
    np.testing.assert_allclose(run(value=ones), mass_alone(made.inputs, made) * ones, rtol=4e-6)


# --- limits --------------------------------------------------------------------------------------


@every_restart
@both_granularities
@every_implementation
def test_restart_probability_one_adds_the_values(step, block, implementation):
    made, run = make_runner(step, block, implementation, is_causal=True, alpha=1.0)
    local = run(lens_strength=0 * made.inputs.lens_strength)
    expected = local + made.inputs.lens_strength[:, None] * made.inputs.value
    assert_close(run(), expected, TOLERANCES["output"])


@every_restart
@both_granularities
@every_implementation
def test_many_steps_approach_the_resolvent(step, block, implementation):
    alpha, steps = 0.9, 5  # what is missing weighs 0.1^6
    made, run = make_runner(step, block, implementation, is_causal=False, alpha=alpha, steps=steps)
    gamma = made.inputs.lens_strength
    walked = (run() - run(lens_strength=0 * gamma)) / gamma[:, None]
    transition, stationary = TRANSITIONS[implementation](made)
    values = np.asarray(made.inputs.value, np.float64)
    expected = np.zeros_like(values)
    options = made.oracle_options
    for b, n in np.ndindex(*transition.shape[:2]):
        tokens = transition.shape[-1]
        resolvent = np.linalg.inv(
            np.eye(tokens) - (1 - alpha) * transition[b, n].astype(np.float64)
        )
        walk = alpha * resolvent
        if options.reversible:
            walk = oracle.reciprocal_matrix(
                walk, stationary[b, n].astype(np.float64), 1.0, options.reciprocal_beta
            )
        expected[b, :, n] = walk @ values[b, :, n]
    assert_close(walked, expected, TOLERANCES["output"])


@every_restart
@both_directions
@every_implementation
def test_a_wide_window_without_walk_is_multi_head_attention(step, is_causal, implementation):
    made = make_case(step, 1, is_causal=is_causal, window=29)
    inputs = made.inputs
    run = attention(inputs, dict(made.options), implementation)
    # Stock attention wants values of the keys' size.
    value = np.roll(inputs.key, 1, axis=-1)
    tensors = [ops.convert_to_tensor(x) for x in (inputs.query, inputs.key, value)]
    output = compiled(run)(*tensors, lens_strength=ops.zeros(2))
    logits = np.einsum("binh,bjnh->bnij", inputs.query, inputs.key, dtype=np.float64)
    logits = logits / np.sqrt(inputs.query.shape[-1])
    if is_causal:
        logits = np.where(np.tri(logits.shape[-1], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    expected = np.einsum("bnij,bjnh->binh", weights, value)
    assert_close(numpy(output), expected, TOLERANCES["output"])
    stock = ops.dot_product_attention(*tensors, is_causal=is_causal)
    assert_close(numpy(output), numpy(stock), TOLERANCES["backends"])


# --- padding and degenerate inputs ---------------------------------------------------------------


def padding_patterns(batch, tokens):
    right = np.ones((batch, tokens), dtype=bool)
    right[0, -tokens // 3 :] = False
    holes = np.random.default_rng(8).uniform(size=(batch, tokens)) > 0.35
    return {"right": right, "left": right[:, ::-1].copy(), "holes": holes}


@every_setup
@both_granularities
@every_implementation
@both_directions
def test_padding_content_changes_nothing(step, block, implementation, is_causal):
    made, run = make_runner(step, block, implementation, is_causal=is_causal)
    inputs = made.inputs
    patterns = padding_patterns(*inputs.query.shape[:2])
    for (name, mask), scale in zip(patterns.items(), (0.0, 100.0, np.nan), strict=True):
        before = run(padding_mask=mask)
        assert not before[~mask].any(), name
        rows = rows_of(inputs)
        changed = {which: array.copy() for which, array in rows.items()}
        for which, other in draw_like(rows, 6, scale).items():
            changed[which][~mask] = other[~mask]
        np.testing.assert_array_equal(run(**changed, padding_mask=mask), before, err_msg=name)


@every_setup
@both_granularities
@every_implementation
def test_degenerate_inputs_stay_finite(step, block, implementation):
    # One batch of the awkward sequences: nothing but padding, nothing but zeros, a single real
    # token, zeros among ordinary tokens.
    made = make_case(step, block, is_causal=True)
    tokens = GRANULARITY_TOKENS[block]
    arrays = {}
    for name in (*rows_of(made.inputs), "cotangent"):
        array = np.concatenate([getattr(made.inputs, name)] * 2)
        if name != "hop_weights":
            array[1] = 0.0
            array[3, ::2] = 0.0
        arrays[name] = array
    arrays["cotangent"] = np.ones_like(arrays["cotangent"])
    mask = np.ones((4, tokens), dtype=bool)
    mask[0] = False
    mask[2, 1:] = False
    inputs = replace(made.inputs, padding_mask=mask, **arrays)
    run = attention(inputs, dict(made.options), implementation)
    output, gradients = attention_gradients(run, inputs)
    assert np.isfinite(output).all()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
    assert not output[0].any() and not output[1].any() and not output[2, 1:].any()
    assert not gradients["query"][0].any() and not gradients["value"][0].any()
    # A single token attends to itself and walks to itself.
    alone = mass_alone(inputs, made) * np.ones_like(output)
    expected = alone * oracle.repeat_heads(inputs.value, 2)
    assert_close(output[2, 0], expected[2, 0], TOLERANCES["output"])


@every_setup
@every_implementation
@both_directions
def test_one_token(step, implementation, is_causal):
    made = make_case(step, 1, is_causal=is_causal)
    arrays = {
        name: getattr(made.inputs, name)[:, :1] for name in (*rows_of(made.inputs), "cotangent")
    }
    inputs = replace(made.inputs, **arrays)
    run = attention(inputs, dict(made.options), implementation)
    output, gradients = attention_gradients(run, inputs)
    alone = mass_alone(inputs, made)
    assert_close(output, alone * inputs.value, TOLERANCES["output"])
    assert_close(gradients["value"], alone * inputs.cotangent, TOLERANCES["gradient"])
    for name in {*gradients} - {"value", "lens_strength", "hop_weights"}:
        assert np.abs(gradients[name]).max() < 1e-5, name


@every_implementation
def test_the_same_inputs_give_the_same_bits(implementation):
    _, run = make_runner("R3", 1, implementation, is_causal=True)
    np.testing.assert_array_equal(run(), run())


def test_dropout_is_the_seeds_alone():
    made = make_case("R1", 1, is_causal=True, dropout=0.4)
    inputs = made.inputs
    arrays = {name: ops.convert_to_tensor(array) for name, array in inputs.arrays().items()}

    def output(seed, implementation):
        run = attention(inputs, dict(made.options), implementation, seed=seed)
        return numpy(compiled(run)(**arrays))

    first = output((5, 6), "portable")
    np.testing.assert_array_equal(output((5, 6), "portable"), first)
    assert_close(output((5, 6), "reference"), first, TOLERANCES["output"])
    assert not np.allclose(output((5, 7), "portable"), first)
    assert not np.allclose(output((6, 6), "portable"), first)
