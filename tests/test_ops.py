"""`keras_rwr.ops` as users meet it: bad input, symbolic and compiled calls, dtypes, memory."""

import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    DEFAULT,
    IMPLEMENTATIONS,
    TOLERANCES,
    assert_close,
    compiled,
    numpy,
    value_and_gradients,
)
from keras import ops

import keras_rwr
from keras_rwr.ops import attention_scores, rwr_attention, token_importance

SMALL = {"window": 3, "topk": 8, "neighbor_block": 4, "is_causal": True}
SHAPE = (2, 29, 2, 7)


def draw(shape=SHAPE, count=3, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype("float32") for _ in range(count)]
    return [ops.cast(ops.convert_to_tensor(array), dtype) for array in arrays]


# --- bad input -----------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"alpha": 0.0}, ValueError, "alpha=0.0"),
    ({"alpha": 1.2}, ValueError, "alpha=1.2"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan"),
    ({"alpha": "a fifth"}, TypeError, "alpha='a fifth'"),
    ({"alpha": True}, TypeError, "alpha=True"),
    ({"steps": -1}, ValueError, "steps=-1"),
    ({"steps": 2.0}, TypeError, "steps=2.0"),
    ({"steps": None}, TypeError, "steps=None"),
    ({"topk": -16}, ValueError, "topk=-16"),
    ({"topk": 24}, ValueError, "topk=24, neighbor_block=16"),
    ({"topk": "all"}, TypeError, "topk='all'"),
    ({"neighbor_block": 0}, ValueError, "neighbor_block=0"),
    ({"neighbor_block": 1.5}, TypeError, "neighbor_block=1.5"),
    ({"window": -1}, ValueError, "window=-1"),
    ({"window": None}, TypeError, "window=None"),
    ({"window": 14, "is_causal": True}, ValueError, "neighbor_block=16, window=14"),
    ({"threshold": 1.0}, ValueError, "threshold=1.0"),
    ({"threshold": -1.5}, ValueError, "threshold=-1.5"),
    ({"threshold": "none"}, TypeError, "threshold='none'"),
    ({"edge_weight": "dot"}, ValueError, "edge_weight='dot'"),
    ({"edge_weight": None}, TypeError, "edge_weight=None"),
    ({"concentration": 0.5}, ValueError, "concentration=0.5"),
    ({"concentration": 65}, ValueError, "concentration=65"),
    ({"concentration": [20.0, 65.0]}, ValueError, r"concentration=\[20.0, 65.0\]"),
    ({"concentration": [20.0, 20.0, 20.0]}, ValueError, r"concentration=\[20.0, 20.0, 20.0\]"),
    ({"concentration": None}, TypeError, "concentration=None"),
    ({"reversible": 1}, TypeError, "reversible=1"),
    ({"reciprocal_beta": 1.5}, ValueError, "reciprocal_beta=1.5"),
    ({"reciprocal_beta": -0.1}, ValueError, "reciprocal_beta=-0.1"),
    ({"lens_strength": "strong"}, TypeError, "lens_strength='strong'"),
    ({"lens_strength": float("inf")}, ValueError, "lens_strength=inf"),
    ({"lens_strength": (0.3, 0.3, 0.3)}, ValueError, r"lens_strength=\(0.3, 0.3, 0.3\)"),
    ({"fusion": "product"}, ValueError, "fusion='product'"),
    ({"is_causal": "yes"}, TypeError, "is_causal='yes'"),
    ({"dropout": 1.0}, ValueError, "dropout=1.0"),
    ({"dropout": -0.1}, ValueError, "dropout=-0.1"),
    ({"dropout": 0.1}, ValueError, "seed=None"),
    ({"dropout": 0.1, "seed": 0.5}, ValueError, "seed=0.5"),
    ({"dropout": 0.1, "seed": np.zeros(3, "int32")}, ValueError, r"seed of shape \(3,\)"),
    ({"block_size": 0}, ValueError, "block_size=0"),
    ({"block_size": 1.0}, TypeError, "block_size=1.0"),
    ({"head_dim_pad": 0}, ValueError, "head_dim_pad=0"),
    ({"implementation": "cuda"}, ValueError, "implementation='cuda'"),
    ({"discoverability": np.zeros((3, 7))}, ValueError, r"discoverability of shape \(3, 7\)"),
    ({"discoverability": np.zeros((2, 5))}, ValueError, r"discoverability of shape \(2, 5\)"),
    ({"padding_mask": np.ones((2, 28))}, ValueError, r"padding_mask of shape \(2, 28\)"),
    ({"padding_mask": np.ones((2, 29, 29))}, ValueError, r"padding_mask of shape \(2, 29, 29\)"),
]


@pytest.mark.parametrize(("changes", "error", "received"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options(changes, error, received):
    query, key, value = draw()
    (named, *_) = [name for name in changes if name not in ("is_causal",)] or list(changes)
    named = "seed" if "seed" in received else named
    named = "neighbor_block" if "window=14" in received else named
    with pytest.raises(error, match=received) as caught:
        rwr_attention(query, key, value, **changes)
    message = str(caught.value)
    assert f"`{named}`" in message
    assert "Received: " in message


@pytest.mark.parametrize(
    ("shapes", "named", "received"),
    [
        ([(29, 2, 7)] * 3, "query", r"query of shape \(29, 2, 7\)"),
        ([SHAPE, (2, 29, 7), SHAPE], "key", r"key of shape \(2, 29, 7\)"),
        ([SHAPE, SHAPE, (2, 29, 14)], "value", r"value of shape \(2, 29, 14\)"),
        # T and S differ: cross-attention.
        ([(2, 5, 2, 7), SHAPE, SHAPE], "key", r"key of shape \(2, 29, 2, 7\)"),
        ([SHAPE, (2, 29, 1, 7), SHAPE], "value", r"value of shape \(2, 29, 2, 7\)"),
        ([SHAPE, (2, 29, 3, 7), (2, 29, 3, 7)], "key", r"key of shape \(2, 29, 3, 7\)"),
        ([SHAPE, (2, 29, 2, 5), SHAPE], "key", r"key of shape \(2, 29, 2, 5\)"),
        ([SHAPE, SHAPE, (2, 28, 2, 7)], "value", r"value of shape \(2, 28, 2, 7\)"),
        ([SHAPE, SHAPE, (2, 29, 3, 7)], "value", r"value of shape \(2, 29, 3, 7\)"),
        ([SHAPE, SHAPE, (1, 29, 2, 7)], "value", r"value of shape \(1, 29, 2, 7\)"),
    ],
)
def test_bad_shapes(shapes, named, received):
    tensors = [ops.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=received) as caught:
        rwr_attention(*tensors)
    assert f"`{named}`" in str(caught.value)
    # The same without any data.
    with pytest.raises(ValueError, match=f"`{named}`"):
        rwr_attention(*(keras.KerasTensor(shape) for shape in shapes))


def test_bad_dtypes():
    query, key, value = draw()
    with pytest.raises(TypeError, match=r"`query` must be of a float dtype. Received: query of"):
        rwr_attention(ops.cast(query, "int32"), key, value)


def test_the_analysis_functions_check_too():
    query, key = draw(count=2)
    for function in (attention_scores, token_importance):
        with pytest.raises(ValueError, match=r"`alpha`.*Received: alpha=2"):
            function(query, key, alpha=2)
        with pytest.raises(ValueError, match="Received: key of shape"):
            function(query[:, :5], key)
        with pytest.raises(ValueError, match=r"`concentration`.*Received: concentration=0"):
            function(query, key, concentration=0)


# --- dispatch ------------------------------------------------------------------------------------

KERNELS = {"triton": "torch", "pallas": "jax"}


def refusal(name):
    """Why the kernels, which are not the default here, cannot run."""
    if KERNELS[name] == BACKEND:
        return "kernels run on a GPU"
    return f"needs the {KERNELS[name]} backend"


@pytest.mark.parametrize("name", [name for name in KERNELS if name != DEFAULT])
def test_a_named_implementation_never_falls_back(name):
    with pytest.raises(NotImplementedError, match=rf"{refusal(name)}.*Received: ") as caught:
        rwr_attention(*draw(), implementation=name, **SMALL)
    assert f'implementation="{name}"' in str(caught.value)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_only_the_reference_takes_the_softmax_fusion(name):
    with pytest.raises(NotImplementedError, match='fusion "softmax" needs the dense rows'):
        rwr_attention(*draw(), implementation=name, fusion="softmax", **SMALL)


def test_explain():
    told = str(keras_rwr.explain((1, 4096, 12, 64), is_causal=True))
    first, *others = told.splitlines()
    assert first.startswith(f"{DEFAULT} runs float32 (1, 4096, 12, 64) on ")
    assert first.endswith(f"({BACKEND} backend)")
    assert len(others) == 3
    for name in (*KERNELS, "portable"):
        if name == DEFAULT:
            continue
        (line,) = [line for line in others if line.strip().startswith(f"{name}:")]
        assert ("can run, slower" if name == "portable" else refusal(name)) in line
    for name, backend in KERNELS.items():
        if backend == BACKEND:
            told = keras_rwr.explain((1, 4096, 12, 64), dtype="bfloat16", device="gpu")
            assert told.implementation == name
            assert str(told).startswith(f"{name} runs bfloat16 (1, 4096, 12, 64) on gpu")
    told = keras_rwr.explain((None, 64, 2, 8), dtype="bfloat16", fusion="softmax")
    assert told.implementation == "reference"
    assert "dense rows" in told.refusals["portable"]
    assert str(told).startswith("reference runs bfloat16 (None, 64, 2, 8)")


def test_explain_checks_its_arguments():
    with pytest.raises(ValueError, match=r"`query_shape`.*Received: query_shape=\(3, 4\)"):
        keras_rwr.explain((3, 4))
    with pytest.raises(ValueError, match=r"`alpha`.*Received: alpha=0"):
        keras_rwr.explain((1, 64, 2, 8), alpha=0)


# --- symbolic calls ------------------------------------------------------------------------------


def test_a_functional_model_with_unknown_batch():
    inputs = [keras.Input(SHAPE[1:]) for _ in range(3)]
    mask = keras.Input((29,), dtype="bool")
    outputs = rwr_attention(*inputs, padding_mask=mask, **SMALL)
    assert tuple(outputs.shape) == (None, *SHAPE[1:])
    model = keras.Model([*inputs, mask], outputs)
    tensors = draw()
    real = np.ones((2, 29), dtype=bool)
    real[1, 20:] = False
    expected = rwr_attention(*tensors, padding_mask=real, **SMALL)
    output = model([*tensors, ops.convert_to_tensor(real)])
    assert_close(numpy(output), numpy(expected), TOLERANCES["output"])


def test_symbolic_shapes_and_dtypes():
    query = keras.KerasTensor((None, None, 4, 8), dtype="bfloat16")
    value = keras.KerasTensor((None, None, 4, 5), dtype="bfloat16")
    output = rwr_attention(query, query, value)
    assert tuple(output.shape) == (None, None, 4, 5)
    assert output.dtype == "bfloat16"


def test_compute_output_spec_runs_nothing():
    query = keras.KerasTensor((3, 4096, 2, 8))
    attend = keras.layers.Lambda(lambda x: rwr_attention(x, x, x, reversible=True, is_causal=True))
    spec = attend.compute_output_spec(query)
    assert tuple(spec.shape) == (3, 4096, 2, 8)


# --- compiled calls ------------------------------------------------------------------------------


def compilations(fn):
    """`fn` compiled in each way that the backend has, by name."""
    if BACKEND == "torch":
        import torch

        # Captured as one graph, forward and backward, without needing a C++ compiler.
        return {"fullgraph": torch.compile(fn, fullgraph=True, backend="aot_eager")}
    if BACKEND == "jax":
        import jax

        return {"jit": jax.jit(fn)}
    import tensorflow as tf

    unknown_batch = [tf.TensorSpec((None, *SHAPE[1:]))] * 3
    return {
        "function": tf.function(fn, input_signature=unknown_batch),
        "xla": tf.function(fn, jit_compile=True),
    }


@pytest.mark.parametrize("edge_weight", ["cosine", "exponential"])
def test_compiled_calls_equal_eager_ones(edge_weight):
    def attend(query, key, value):
        return rwr_attention(
            query,
            key,
            value,
            edge_weight=edge_weight,
            dropout=0.2,
            seed=5,
            reversible=edge_weight == "cosine",
            **SMALL,
        )

    def loss(query, key, value):
        output = attend(query, key, value)
        return ops.sum(output * output), output

    arrays = [numpy(tensor) for tensor in draw()]
    expected, expected_gradients = value_and_gradients(loss, *arrays)
    for name, fast in compilations(attend).items():

        def fast_loss(query, key, value, fast=fast):
            output = fast(query, key, value)
            return ops.sum(output * output), output

        output, gradients = value_and_gradients(fast_loss, *arrays)
        assert_close(output, expected, TOLERANCES["output"], name)
        for gradient, eager in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient, eager, TOLERANCES["gradient"], name)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_in_half_precision_out(dtype, implementation):
    tensors = draw(dtype=dtype)

    def attend(*tensors):
        return rwr_attention(*tensors, implementation=implementation, **SMALL)

    output = compiled(attend)(*tensors)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    # The arithmetic is in float32: the only error is the last rounding.
    exact = compiled(attend)(*(ops.cast(tensor, "float32") for tensor in tensors))
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert_close(numpy(ops.cast(output, "float32")), numpy(exact), 1.1 * rounding)


def test_masks_of_any_kind():
    query, key, value = draw()
    mask = np.ones((2, 29), dtype=bool)
    mask[0, 20:] = False
    expected = numpy(rwr_attention(query, key, value, padding_mask=mask, **SMALL))
    for dtype in ("int32", "uint8", "float32"):
        output = rwr_attention(query, key, value, padding_mask=mask.astype(dtype), **SMALL)
        np.testing.assert_array_equal(numpy(output), expected)


def test_seeds_of_every_kind():
    tensors = draw()

    def drop(seed):
        return numpy(rwr_attention(*tensors, dropout=0.3, seed=seed, **SMALL))

    np.testing.assert_array_equal(drop(7), drop(np.array([7, 0], "int32")))
    generator = keras.random.SeedGenerator(3)
    first = drop(generator)
    assert not np.array_equal(first, drop(generator))
    # Without dropout a seed changes nothing.
    plain = numpy(rwr_attention(*tensors, **SMALL))
    np.testing.assert_array_equal(numpy(rwr_attention(*tensors, seed=9, **SMALL)), plain)


# --- memory --------------------------------------------------------------------------------------


def largest_buffer(fn, *tensors):
    """Numbers in the largest tensor that `fn` makes, its own results included."""
    if BACKEND == "torch":
        return largest_in_torch(fn, *tensors)
    if BACKEND == "jax":
        import jax

        return largest_in_jaxpr(jax.make_jaxpr(fn)(*tensors).jaxpr)
    import tensorflow as tf

    return largest_in_graph(tf.function(fn).get_concrete_function(*tensors).graph)


def largest_in_torch(fn, *tensors):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs if kwargs is not None else {}))
            for result in tree_leaves(results):
                if hasattr(result, "untyped_storage"):
                    size = result.untyped_storage().nbytes() // result.element_size()
                    Watch.largest = max(Watch.largest, size)
            return results

    with Watch():
        fn(*tensors)
    return Watch.largest


def largest_in_jaxpr(jaxpr):
    import jax

    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            largest = max(largest, int(np.prod(variable.aval.shape, dtype=np.int64)))
        for parameter in jax.tree.leaves(
            dict(equation.params), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_in_jaxpr(inner))
    return largest


def largest_in_graph(graph):
    largest = 0
    for operation in graph.get_operations():
        for tensor in operation.outputs:
            if tensor.shape.is_fully_defined():
                largest = max(largest, tensor.shape.num_elements())
    for name in graph._functions:
        largest = max(largest, largest_in_graph(graph._get_function(name).graph))
    return largest


@pytest.mark.parametrize("reversible", [False, True])
def test_portable_makes_no_quadratic_buffer(reversible):
    tokens, head_dim, topk = 4096, 16, 32
    tensors = draw((1, tokens, 1, head_dim))
    options = {"window": 31, "topk": topk, "neighbor_block": 16, "is_causal": True}

    def attend(query, key, value):
        return rwr_attention(
            query, key, value, reversible=reversible, implementation="portable", **options
        )

    largest = largest_buffer(attend, *tensors)
    assert largest >= tokens * head_dim, "the watch saw nothing"
    assert largest < tokens * tokens / 8
    assert largest < tokens * topk * head_dim
    # Twice the length, at most twice the buffer.
    longer = largest_buffer(attend, *draw((1, 2 * tokens, 1, head_dim)))
    assert longer <= 2 * largest


def test_the_watch_notices_a_quadratic_buffer():
    tensors = draw((1, 257, 1, 16))

    def attend(query, key, value):
        return rwr_attention(query, key, value, implementation="reference", **SMALL)

    assert largest_buffer(attend, *tensors) >= 257 * 257
