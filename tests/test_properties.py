"""The guarantees of the specification, for R1 to R4, single tokens and blocks of 16."""

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
    TOLERANCES,
    assert_close,
    attention,
    attention_gradients,
    case,
    compiled,
    numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_rwr import graph as graphs
from keras_rwr import reference
from keras_rwr.config import RWRConfig

few_examples = settings(max_examples=4, deadline=None, derandomize=True, database=None)
every_setup = pytest.mark.parametrize("step", ABLATION)
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


@functools.cache
def make_runner(step, block, implementation, **options):
    """A function of NumPy query, key, value, padding mask and gamma; compiled once on jax."""
    made = make_case(step, block, **options)
    names = ("discoverability", "concentration")
    u, kappa = (ops.convert_to_tensor(getattr(made.inputs, name)) for name in names)
    if not made.discoverability:
        u = ops.zeros_like(u)
    seed = (11, 12) if options.get("dropout") else None

    def run(query, key, value, padding_mask, lens_strength):
        inner = attention(
            made.inputs,
            dict(made.options),
            implementation,
            seed=seed,
            padding_mask=padding_mask,
        )
        return inner(query, key, value, u, kappa, lens_strength)

    fast = compiled(run)

    def on_arrays(query=None, key=None, value=None, padding_mask=None, lens_strength=None):
        inputs = made.inputs
        given_or_own = {
            "query": inputs.query if query is None else query,
            "key": inputs.key if key is None else key,
            "value": inputs.value if value is None else value,
            "padding_mask": inputs.real() if padding_mask is None else padding_mask,
            "lens_strength": inputs.lens_strength if lens_strength is None else lens_strength,
        }
        return numpy(fast(*(ops.convert_to_tensor(array) for array in given_or_own.values())))

    return made, on_arrays


def draw_like(inputs, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    arrays = (inputs.query, inputs.key, inputs.value)
    return [(scale * rng.standard_normal(array.shape)).astype("float32") for array in arrays]


# --- causality -----------------------------------------------------------------------------------


def assert_no_leak(run, inputs, last, seed, scale):
    """Replacing every token after `last` leaves the outputs up to `last` bitwise unchanged."""
    before = run(inputs.query, inputs.key, inputs.value)
    changed = [array.copy() for array in (inputs.query, inputs.key, inputs.value)]
    for array, other in zip(changed, draw_like(inputs, seed, scale), strict=True):
        array[:, last + 1 :] = other[:, last + 1 :]
    after = run(*changed)
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
def test_no_token_sees_a_later_one_with_dropout(implementation):
    made, run = make_runner("R3", 1, implementation, is_causal=True, dropout=0.4)
    assert_no_leak(run, made.inputs, 17, 3, 1.0)


def test_no_token_sees_a_later_one_in_the_softmax_fusion():
    made, run = make_runner("R3", 1, "reference", is_causal=True, fusion="softmax")
    assert_no_leak(run, made.inputs, 17, 3, 1.0)


def test_the_leak_check_notices_a_leak():
    made, run = make_runner("R1", 1, "portable", is_causal=True)

    def leaks(query, key, value):
        # The smallest leak float32 can show: the last token's value in the first token's output.
        output = run(query, key, value).copy()
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
    options = dict(made.options)
    symmetric = options.pop("reversible", False)
    inputs = made.inputs
    kept = ("window", "topk", "neighbor_block", "threshold", "edge_weight", "is_causal")
    built = graphs.build_sparse_w(
        inputs.query,
        inputs.key,
        concentration=inputs.concentration,
        padding_mask=inputs.padding_mask,
        **{key: value for key, value in options.items() if key in kept},
    )
    if symmetric:
        built = graphs.reversible(built)
    bias = np.zeros(inputs.query.shape[:3], "float32")
    if made.discoverability:
        bias = np.einsum("bjnh,nh->bjn", inputs.key, inputs.discoverability).clip(-8, 8)
    built = graphs.normalize_to_p(built, bias)
    stationary = np.exp(bias) * numpy(built.degree)
    return numpy(built.to_dense()), np.moveaxis(stationary, 1, 2)


def dense_transition(made):
    """(P, pi) of the reference."""
    inputs = made.inputs
    step, stationary = reference.transition_matrix(
        ops.convert_to_tensor(inputs.query),
        ops.convert_to_tensor(inputs.key),
        RWRConfig(**dict(made.options)),
        concentration=inputs.concentration,
        discoverability=inputs.discoverability if made.discoverability else None,
        padding_mask=inputs.padding_mask,
    )
    return numpy(step), numpy(stationary)


def stepped_transition(made):
    """(P, pi) of the XLA implementation: its step, taken from each token alone."""
    import tensorflow as tf

    from keras_rwr.backends.tensorflow import as_options, operation
    from keras_rwr.backends.tensorflow.band import Band
    from keras_rwr.backends.tensorflow.lists import Lists
    from keras_rwr.backends.tensorflow.walk import Edges

    inputs, config = made.inputs, RWRConfig(**dict(made.options))
    query, key = (ops.convert_to_tensor(x) for x in (inputs.query, inputs.key))
    mask = None if inputs.padding_mask is None else ops.convert_to_tensor(inputs.padding_mask)
    neighbors = graphs.select_neighbors(query, key, config, mask)
    batch, size, heads, _ = query.shape
    groups = batch * heads
    real = np.repeat(inputs.real()[:, None], heads, 1).reshape(groups, size, 1)
    bias = np.zeros((groups, size, 1), "float32")
    if made.discoverability:
        bias = np.einsum("bjnh,nh->bnj", inputs.key, inputs.discoverability).clip(-8, 8)
        bias = bias.reshape(groups, size, 1)
    units = [operation.unit(operation.head_major(x)) for x in (query, key)]
    edges = Edges(
        *units,
        tf.constant(bias),
        tf.tile(ops.convert_to_tensor(inputs.concentration), [batch])[:, None, None],
        tf.constant(real, "float32"),
        Band(units[0], as_options(config, is_dropped=False)),
        Lists(tf.reshape(neighbors, (groups, size, -1)), config.neighbor_block),
    )
    steps = edges.step(tf.eye(size, batch_shape=[groups]))
    stationary = 1.0 / edges.inverse_stationary()
    return numpy(steps).reshape(batch, heads, size, size), numpy(stationary).reshape(
        batch, heads, size
    )


TRANSITIONS = {
    "portable": sparse_transition,
    "reference": dense_transition,
    "xla": stepped_transition,
}


@every_setup
@both_granularities
@every_implementation
@both_directions
def test_transition_rows_sum_to_one(step, block, implementation, is_causal):
    transition, _ = TRANSITIONS[implementation](make_case(step, block, is_causal=is_causal))
    assert (transition >= 0.0).all()
    np.testing.assert_allclose(transition.sum(-1, dtype=np.float64), 1.0, atol=1e-6)


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


@every_setup
@both_granularities
@every_implementation
def test_the_walk_has_its_mass(step, block, implementation):
    made, run = make_runner(step, block, implementation, is_causal=True)
    ones = np.ones_like(made.inputs.value)
    gamma = made.inputs.lens_strength[:, None]
    mass = oracle.walk_mass(made.oracle_options)
    np.testing.assert_allclose(run(value=ones), 1.0 + gamma * mass + 0 * ones, rtol=2e-6)


# --- limits --------------------------------------------------------------------------------------


@every_setup
@both_granularities
@every_implementation
def test_restart_probability_one_adds_the_values(step, block, implementation):
    made, run = make_runner(step, block, implementation, is_causal=True, alpha=1.0)
    local = run(lens_strength=np.zeros_like(made.inputs.lens_strength))
    expected = local + made.inputs.lens_strength[:, None] * made.inputs.value
    assert_close(run(), expected, TOLERANCES["output"])


@every_setup
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


@every_setup
@both_directions
@every_implementation
def test_a_wide_window_without_walk_is_multi_head_attention(step, is_causal, implementation):
    made = make_case(step, 1, is_causal=is_causal, window=29)
    inputs = made.inputs
    run = attention(inputs, dict(made.options), implementation)
    # Stock attention wants values of the keys' size.
    value = np.roll(inputs.key, 1, axis=-1)
    tensors = [ops.convert_to_tensor(x) for x in (inputs.query, inputs.key, value)]
    output = compiled(run)(*tensors, None, inputs.concentration, np.zeros(2, "float32"))
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
        changed = [array.copy() for array in (inputs.query, inputs.key, inputs.value)]
        for array, other in zip(changed, draw_like(inputs, 6, scale), strict=True):
            array[~mask] = other[~mask]
        np.testing.assert_array_equal(run(*changed, padding_mask=mask), before, err_msg=name)


@every_setup
@both_granularities
@every_implementation
def test_degenerate_inputs_stay_finite(step, block, implementation):
    # One batch of the awkward sequences: nothing but padding, nothing but zeros, a single real
    # token, zeros among ordinary tokens.
    made = make_case(step, block, is_causal=True)
    tokens = GRANULARITY_TOKENS[block]
    arrays = {}
    for name in ("query", "key", "value", "cotangent"):
        array = np.concatenate([getattr(made.inputs, name)] * 2)
        array[1] = 0.0
        array[3, ::2] = 0.0
        arrays[name] = array
    arrays["cotangent"] = np.ones_like(arrays["cotangent"])
    mask = np.ones((4, tokens), dtype=bool)
    mask[0] = False
    mask[2, 1:] = False
    inputs = replace(made.inputs, padding_mask=mask, **arrays)
    run = attention(inputs, dict(made.options), implementation)
    output, gradients = attention_gradients(run, inputs, made.discoverability)
    assert np.isfinite(output).all()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
    assert not output[0].any() and not output[1].any() and not output[2, 1:].any()
    assert not gradients["query"][0].any() and not gradients["value"][0].any()
    # A single token attends to itself and walks to itself.
    alone = 1.0 + inputs.lens_strength[:, None] * oracle.walk_mass(made.oracle_options)
    assert_close(output[2, 0], alone * inputs.value[2, 0], TOLERANCES["output"])


@every_setup
@every_implementation
@both_directions
def test_one_token(step, implementation, is_causal):
    made = make_case(step, 1, is_causal=is_causal)
    arrays = {
        name: getattr(made.inputs, name)[:, :1] for name in ("query", "key", "value", "cotangent")
    }
    inputs = replace(made.inputs, **arrays)
    run = attention(inputs, dict(made.options), implementation)
    output, gradients = attention_gradients(run, inputs, made.discoverability)
    alone = 1.0 + inputs.lens_strength[:, None] * oracle.walk_mass(made.oracle_options)
    assert_close(output, alone * inputs.value, TOLERANCES["output"])
    assert_close(gradients["value"], alone * inputs.cotangent, TOLERANCES["gradient"])
    for name in ("query", "key", "discoverability", "concentration"):
        assert np.abs(gradients[name]).max() < 1e-5, name


@every_implementation
def test_the_same_inputs_give_the_same_bits(implementation):
    _, run = make_runner("R3", 1, implementation, is_causal=True)
    np.testing.assert_array_equal(run(), run())


def test_dropout_is_the_seeds_alone():
    made = make_case("R1", 1, is_causal=True, dropout=0.4)
    inputs = made.inputs
    arrays = [ops.convert_to_tensor(array) for array in inputs.arrays().values()]

    def output(seed, implementation):
        run = attention(inputs, dict(made.options), implementation, seed=seed)
        return numpy(compiled(run)(*arrays))

    first = output((5, 6), "portable")
    np.testing.assert_array_equal(output((5, 6), "portable"), first)
    assert_close(output((5, 6), "reference"), first, TOLERANCES["output"])
    assert not np.allclose(output((5, 7), "portable"), first)
    assert not np.allclose(output((6, 6), "portable"), first)
