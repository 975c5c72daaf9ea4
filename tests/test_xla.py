"""The XLA implementation: cases against float64, ways to run it, memory, determinism."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import oracle
import oracle_gradients
import pytest
import tensorflow as tf
from helpers import (
    ABLATION,
    SUM_CASES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    attention,
    attention_gradients,
    case,
    numpy,
    run_case,
)

import keras_rwr
from keras_rwr.backends.tensorflow import as_options, lists, operation
from keras_rwr.config import RWRConfig
from keras_rwr.ops import rwr_attention

SMALL = {"window": 3, "topk": 8, "neighbor_block": 4, "is_causal": True}
SHAPE = (2, 29, 2, 7)
# One of each kind: plain, mutual edges with every option, single tokens with dropout.
KINDS = ["R1 causal sixteens", "R3 bidirectional fours", "dropout"]


def by_name(name):
    (found,) = [case for case in SUM_CASES if case.name == name]
    return found


def draw(shape=SHAPE, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.standard_normal(shape), tf.float32) for _ in range(count)]


def results(made, **options):
    """(output, gradients by name) of a case, not from a cache."""
    options = {**dict(made.options), **options}
    seed = made.seed if options.get("dropout") else None
    run = attention(made.inputs, options, "xla", seed=seed)
    return attention_gradients(run, made.inputs, made.discoverability)


def assert_right(made, found):
    output, gradients = found
    assert_close(output, made.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, made.expected_gradients[1])


@pytest.fixture
def uncompiled(monkeypatch, fresh):
    """Leaves XLA out, where it takes its time and adds nothing to what a test looks at."""
    monkeypatch.setattr(operation, "IS_COMPILED", False)


@pytest.fixture
def fresh():
    """Functions that are compiled during the test are forgotten, as those of others are in it."""
    operation.compiled_attention.cache_clear()
    yield
    operation.compiled_attention.cache_clear()


# --- against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_cases(case):
    assert_right(case, run_case(case, "xla"))


def test_float64_is_exact_to_float64(uncompiled):
    made = by_name("R3 bidirectional fours")
    arrays = {name: np.asarray(x, np.float64) for name, x in made.inputs.arrays().items()}
    options = {**dict(made.options), "implementation": "xla"}
    leaves = {name: tf.constant(array) for name, array in arrays.items()}
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        output = rwr_attention(**leaves, **options)
    gradients = tape.gradient(output, leaves, tf.constant(made.inputs.cotangent, tf.float64))
    expected, expected_gradients = made.expected_gradients
    assert output.dtype == tf.float64
    assert_close(numpy(output), expected, 1e-13)
    for name, gradient in gradients.items():
        assert_close(numpy(gradient), expected_gradients[name], 1e-12, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_half_precision(dtype, uncompiled):
    made = by_name("R3 causal")
    inputs = made.inputs
    halved = ("query", "key", "value")
    exact = {
        name: tf.cast(tf.cast(x, dtype if name in halved else "float32"), "float32")
        for name, x in inputs.arrays().items()
    }
    found = []
    for cast in (dtype, "float32"):
        leaves = {
            name: tf.cast(x, cast if name in halved else x.dtype) for name, x in exact.items()
        }
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            output = rwr_attention(**leaves, implementation="xla", **dict(made.options))
        gradients = tape.gradient(output, leaves, tf.cast(inputs.cotangent, cast))
        assert [x.dtype for x in gradients.values()] == [x.dtype for x in leaves.values()]
        found.append({"output": output, **gradients})
    # The arithmetic is in float32. What is left is the rounding of the cotangent and of a result.
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for name, x in found[0].items():
        assert_close(numpy(tf.cast(x, "float32")), numpy(found[1][name]), 2.5 * rounding, name)


def test_a_block_that_every_query_chooses():
    made = case(
        "hub", is_causal=True, sizes={"batch": 1, "tokens": 97}, window=5, topk=4, neighbor_block=4
    )
    # One direction for all queries and for the keys of the first block, others for other keys.
    inputs = made.inputs
    inputs.query[..., 0] += 20.0
    inputs.key[:, :4, :, 0] += 20.0
    chosen = made.neighbors[:, :, 16:, 0]
    assert (chosen == 0).mean() > 0.9
    assert_right(made, results(made))


@pytest.mark.parametrize("name", ["R3 bidirectional fours", "R1 bidirectional"])
def test_chunks_change_nothing(name, monkeypatch, uncompiled):
    made = by_name(name)
    whole = results(made)
    operation.compiled_attention.cache_clear()
    monkeypatch.setattr(lists, "_GATHERED", 2**9)
    looped = results(made)
    assert_close(looped[0], whole[0], 1e-6)
    assert_right(made, looped)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_tiles_of_any_size(block_size, uncompiled):
    made = by_name("padding holes reversible")
    assert_right(made, results(made, block_size=block_size))


# --- ways to run it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_without_xla(name, uncompiled):
    made = by_name(name)
    assert_right(made, results(made))


def test_functions_run_eagerly(fresh):
    made = by_name("R2 causal sixteens")
    tf.config.run_functions_eagerly(True)
    try:
        assert_right(made, results(made))
    finally:
        tf.config.run_functions_eagerly(False)


def test_the_environment_switches_xla_off(monkeypatch):
    for value in ("0", "1"):
        monkeypatch.setenv("KERAS_RWR_XLA", value)
        assert runpy.run_path(operation.__file__)["IS_COMPILED"] is (value == "1")


def loss_and_gradients(*tensors):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = rwr_attention(*tensors, implementation="xla", reversible=True, **SMALL)
        loss = tf.reduce_sum(output * output)
    return [output, *tape.gradient(loss, tensors)]


@pytest.mark.parametrize("jit_compile", [True, False])
def test_unknown_sizes(jit_compile):
    """Batch, and batch and length, unknown while a caller is traced."""
    tensors = draw()
    expected = loss_and_gradients(*tensors)
    for shape, part in (((None, *SHAPE[1:]), slice(None)), ((None, None, 2, 7), slice(1, 2))):
        run = tf.function(
            loss_and_gradients,
            jit_compile=jit_compile,
            input_signature=[tf.TensorSpec(shape)] * 3,
        )
        found = run(*(x[part] for x in tensors))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(numpy(ours), numpy(theirs[part]), TOLERANCES["gradient"])


def test_a_short_sequence_of_unknown_length():
    run = tf.function(loss_and_gradients, input_signature=[tf.TensorSpec((None, None, 2, 7))] * 3)
    tensors = draw((2, 2, 2, 7))
    for ours, theirs in zip(run(*tensors), loss_and_gradients(*tensors), strict=True):
        assert_close(numpy(ours), numpy(theirs), TOLERANCES["gradient"])


def test_it_compiles_anew_for_new_shapes_only(fresh):
    function = operation.compiled_attention(as_options(RWRConfig(**SMALL), is_dropped=False))

    def run(seed, batch):
        rwr_attention(*draw((batch, *SHAPE[1:]), seed=seed), **SMALL)
        return function.experimental_get_tracing_count()

    assert [run(0, 2), run(1, 2), run(2, 3), run(3, 2), run(4, 3)] == [1, 1, 2, 2, 2]


def compiled_calls(graph):
    """The operations of a graph that XLA compiles as a whole."""
    found = []
    for node in graph.get_operations():
        if node.type in ("PartitionedCall", "StatefulPartitionedCall"):
            function = graph._get_function(node.get_attr("f").name)
            if function.cached_definition.attr["_XlaMustCompile"].b:
                found.append(node)
    return found


def test_no_list_crosses_the_border_of_xla():
    graph = tf.function(loss_and_gradients).get_concrete_function(*draw()).graph
    calls = compiled_calls(graph)
    assert len(calls) == 2  # forward and backward
    crossing = [x.dtype for call in calls for x in (*call.inputs, *call.outputs)]
    assert len(crossing) > 20
    assert tf.variant not in crossing


def test_inputs_of_a_compiled_caller_are_no_constants():
    """Else it would be compiled for each query, for minutes; see `operation.attention`."""
    run = tf.function(loss_and_gradients, jit_compile=True)
    program = run.experimental_get_compiler_ir(*draw())(stage="hlo")
    (entry,) = [line for line in program.splitlines() if line.startswith("ENTRY")]
    assert entry.count("f32[2,29,2,7]") >= 6, entry  # three inputs, and four results


def test_an_eager_gradient_after_one_in_a_graph(fresh):
    """Then TensorFlow differentiates what the compiled function handed to its backward pass."""
    unknown_batch = [tf.TensorSpec((None, *SHAPE[1:]))] * 3
    tensors = draw()
    expected = tf.function(loss_and_gradients, input_signature=unknown_batch)(*tensors)
    for ours, theirs in zip(loss_and_gradients(*tensors), expected, strict=True):
        assert_close(numpy(ours), numpy(theirs), 1e-6)


def test_second_derivatives_are_refused(uncompiled):
    tensors = draw()
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        with pytest.raises(NotImplementedError, match=r"first order only.*Received: \d gradients"):
            loss_and_gradients(*tensors)


# --- determinism and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("step", ["R1", "R3"])
def test_the_same_inputs_give_the_same_bits(step):
    made = case(f"bits {step}", sizes={"tokens": 61}, window=5, topk=8, neighbor_block=4,
                is_causal=True, **ABLATION[step])  # fmt: skip
    (first, gradients), (second, again) = results(made), results(made)
    np.testing.assert_array_equal(first, second)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, again[name], err_msg=name)


BUFFERS = """
import sys
import tensorflow as tf
from keras_rwr.ops import rwr_attention

tokens, implementation = int(sys.argv[1]), sys.argv[2]

@tf.function(jit_compile=True)
def run(query, key, value):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        output = rwr_attention(
            query, key, value, window=31, topk=32, neighbor_block=int(sys.argv[3]),
            is_causal=True, implementation=implementation, reversible=True,
        )
    return tape.gradient(output, [query, key, value])

run(*(tf.random.normal((1, tokens, 1, 16)) for _ in range(3)))
"""


def buffers(tokens, implementation, folder, block=16):
    """Bytes of the buffers that XLA assigns to a forward and backward pass."""
    folder = folder / f"{implementation}-{tokens}-{block}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    subprocess.run(
        [sys.executable, "-c", BUFFERS, str(tokens), implementation, str(block)],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        check=True,
    )
    assigned = max(folder.glob("*run*buffer-assignment.txt"), key=lambda x: x.stat().st_size)
    text = assigned.read_text()
    sizes = [int(x) for x in re.findall(r"^ *value: .* size=(\d+)", text, re.MULTILINE)]
    sizes += [int(x) for x in re.findall(r"size=(\d+),offset=", text)]
    total = sum(int(x) for x in re.findall(r"^allocation \d+: size (\d+)", text, re.MULTILINE))
    return max(sizes), total


def test_buffers_grow_with_the_length_alone(tmp_path):
    tokens = 4096
    largest, total = buffers(tokens, "xla", tmp_path)
    assert largest >= 4 * tokens * 16, "the watch saw nothing"
    assert largest < 4 * tokens * tokens / 8
    longer, more = buffers(2 * tokens, "xla", tmp_path)
    assert longer <= 2.1 * largest
    assert more <= 2.1 * total


def test_the_watch_notices_a_quadratic_buffer(tmp_path):
    largest, _ = buffers(512, "reference", tmp_path)
    assert largest >= 4 * 512 * 512


# --- what it takes -------------------------------------------------------------------------------


def test_explain():
    told = keras_rwr.explain((None, None, 12, 64), dtype="bfloat16", is_causal=True)
    assert told.implementation == "xla"
    assert str(told).startswith("xla runs bfloat16 (None, None, 12, 64) on ")
    for device in ("cpu", "gpu", "tpu"):
        assert keras_rwr.explain((2, 64, 2, 8), device=device).implementation == "xla"
    for arguments, reason in (
        ({"has_graph": True}, "cannot walk on a graph built earlier"),
        ({"fusion": "softmax"}, "needs the dense rows"),
        ({"value_shape": (1, 64, 2, None)}, "size of their vectors"),
        ({"dtype": "float8_e4m3fn"}, "it computes in bfloat16, float16"),
    ):
        told = keras_rwr.explain((1, 64, 2, 8), **arguments)
        assert told.implementation != "xla"
        assert reason in told.refusals["xla"]


def test_a_graph_built_earlier_goes_to_the_portable_implementation():
    query, key, value = draw()
    built = keras_rwr.graph.build_sparse_w(query, key, **SMALL)
    built = keras_rwr.graph.normalize_to_p(built)
    output = rwr_attention(query, key, value, graph=built, **SMALL)
    assert_close(numpy(output), numpy(rwr_attention(query, key, value, **SMALL)), 1e-5)
    with pytest.raises(NotImplementedError, match=r"graph built earlier.*Received: float32 query"):
        rwr_attention(query, key, value, graph=built, implementation="xla", **SMALL)


def test_the_names_of_gradients():
    """`attention_gradients` passes what the oracle's formula differentiates."""
    assert set(run_case(SUM_CASES[0], "xla")[1]) == set(oracle_gradients.NAMES)
    assert by_name("R1 causal").neighbors.min() == oracle.NO_BLOCK
