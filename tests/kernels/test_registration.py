"""What torch and Keras make of the kernels: derivatives, autocast, the choice, and training."""

import functools

import keras
import numpy as np
import pytest
import torch
import triton
from gpt2_models import ONE_LAYER, VOCABULARY
from helpers import TOLERANCES, assert_close
from test_stages import Recorder
from torch.autograd.gradcheck import GradcheckError, gradcheck

import keras_rwr
from keras_rwr import _dispatch as dispatch
from keras_rwr import backends
from keras_rwr.backends.torch.run import is_watched
from keras_rwr.models import RWRGPT2Backbone, RWRGPT2CausalLM
from keras_rwr.ops import rwr_attention

R3 = {"reversible": True, "reciprocal_beta": 0.7}
R4 = {"edge_weight": "exponential"}
SMALL = {"window": 2, "topk": 4, "neighbor_block": 2, "steps": 2, "is_causal": True}
SHAPE = (1, 11, 2, 5)
WEIGHTS = {"discoverability": (2, 5), "concentration": (2,), "lens_strength": (2,)}


def draw(seed=0, dtype=torch.float32):
    """Query, key and value, and the trained vectors by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn((3, *SHAPE), generator=generator).to(dtype).unbind()
    weights = {
        name: torch.rand(shape, generator=generator) + (5.0 if name == "concentration" else 0.2)
        for name, shape in WEIGHTS.items()
    }
    return [*tensors, *weights.values()]


def attend(query, key, value, u, kappa, gamma, **options):
    return rwr_attention(
        query,
        key,
        value,
        discoverability=u,
        concentration=kappa,
        lens_strength=gamma,
        implementation="triton",
        **{**SMALL, **options},
    )


def with_gradients(run, tensors=None):
    leaves = [x.detach().requires_grad_() for x in (draw() if tensors is None else tensors)]
    output = run(*leaves)
    found = torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
    return [output.detach(), *(x for x in found if x is not None)]


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
@pytest.mark.parametrize("reversible", [False, True])
def test_gradients_are_those_of_the_function(reversible):
    # Exponential edges have no kinks, and every earlier token is a neighbour.
    run = functools.partial(attend, reversible=reversible, topk=8, neighbor_block=1, **R4)
    check = functools.partial(gradcheck, eps=0.03, atol=5e-5, rtol=5e-3, fast_mode=True)
    leaves = [x.requires_grad_() for x in draw()]
    assert check(run, leaves)
    # Few numbers in and out: gradcheck explains a failure at length.
    *fixed, gamma = leaves
    with pytest.raises(GradcheckError):
        check(lambda gamma: run(*fixed, 1.5 * gamma - 0.5 * gamma.detach()).sum(), gamma)


# Dynamo itself makes an instance of each traced autograd function.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def vector_dtypes(recorder):
    """The dtypes of what LOCAL and the graph are made of."""
    return {
        arguments[0].dtype
        for function, arguments in recorder.calls
        if function._opname in ("local", "unit")
    }


def test_autocast():
    layer = keras_rwr.RWRAttention(num_heads=2, key_dim=5, implementation="triton", **small_layer())
    x = torch.randn((1, 11, 6), generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = layer(x, x, use_causal_mask=True)
    with Recorder() as recorder, torch.autocast("cpu", torch.float16):
        output = layer(x, x, use_causal_mask=True)
    assert vector_dtypes(recorder) == {torch.float16}
    assert_close(output.detach().float(), exact.detach(), 5e-3)
    (gradient,) = torch.autograd.grad(output.float().sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    assert_close(gradient, expected, 2e-2)


def test_float32_inside_autocast_computes_in_the_casts_dtype():
    with Recorder() as recorder, torch.autocast("cpu", torch.float16):
        output = attend(*draw())
    assert output.dtype == torch.float16
    assert vector_dtypes(recorder) == {torch.float16}


@pytest.mark.parametrize("options", [R3, R4], ids=["R3", "R4"])
def test_autocast_rounds_vectors_alone(options):
    """Weights of edges, and biases, are what they are outside of it."""
    tensors = draw()
    with torch.autocast("cpu", torch.float16):
        found = attend(*tensors, **options)
    half = [x.half() for x in tensors[:3]]
    assert torch.equal(found, attend(*half, *tensors[3:], **options))


def test_only_what_needs_a_gradient_gets_one():
    tensors = draw()
    value = tensors[2].requires_grad_()
    (found,) = torch.autograd.grad(attend(*tensors).sum(), value)
    expected = with_gradients(lambda *leaves: attend(*leaves), tensors)[3]
    assert torch.equal(found, expected)
    with torch.no_grad(), Recorder() as recorder:
        assert not attend(*tensors).requires_grad
    assert "walk" in recorder.names and "list_edges" not in recorder.names


def test_launches_are_watched_by_hooks_alone():
    assert not is_watched()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    assert is_watched()
    hooks.remove(print)
    assert not is_watched()


# --- Keras ---------------------------------------------------------------------------------------


def small_layer():
    return {name: value for name, value in SMALL.items() if name != "is_causal"}


def test_explain():
    told = keras_rwr.explain(SHAPE, is_causal=True)
    assert told.implementation == "triton"
    assert str(told).startswith(f"triton runs float32 {SHAPE} on cpu (torch backend)")


@pytest.mark.parametrize(
    ("call", "options", "reason"),
    [
        ({"dtype": "float64"}, {}, "compute in"),
        ({"dtype": "bfloat16"}, {}, "compute in"),
        ({}, {"fusion": "softmax"}, "dense rows"),
        ({"device": "gpu"}, {}, "TRITON_INTERPRET=1"),
        ({"value_shape": (1, 11, 2, 257)}, {}, "value size of at most 256"),
        ({}, {"graph_heads": 1, "graph_dim": 257}, "graph_dim of at most 256"),
    ],
)
def test_what_the_kernels_refuse(call, options, reason):
    told = keras_rwr.explain(SHAPE, **call, **options)
    assert told.implementation != "triton"
    assert reason in told.refusals["triton"]


def test_a_named_implementation_never_falls_back():
    tensors = [x.double() for x in draw()]
    with pytest.raises(NotImplementedError, match=r"compute in.*Received: float64 query of shape"):
        attend(*tensors)


def test_the_default_choice():
    tensors = draw()
    with torch.no_grad(), Recorder() as recorder:
        output = rwr_attention(*tensors[:3], **SMALL)
    assert recorder.calls
    portable = rwr_attention(*tensors[:3], implementation="portable", **SMALL)
    assert dispatch.load("triton") is backends.torch
    assert_close(output, portable, TOLERANCES["output"])


@pytest.fixture
def quick_compilation(monkeypatch):
    """Keras has `torch.compile` trace its own code too, minutes with the defaults."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


def train(model, inputs, targets, loss, jit_compile=False):
    """Losses of two epochs of one batch, and the weights after them."""
    model.compile(keras.optimizers.SGD(0.2), loss=loss, jit_compile=jit_compile)
    fitted = model.fit(inputs, targets, batch_size=2, epochs=2, shuffle=False, verbose=0)
    return fitted.history["loss"], np.concatenate([x.ravel() for x in model.get_weights()])


def test_training_a_gpt2_with_kernels_and_with_the_reference():
    """Two steps; tests/test_gpu_kernels.py takes fifty."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, 13)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.arange(13)[None] < 11}
    results = []
    for implementation in ("reference", "triton"):
        keras.utils.set_random_seed(2)
        sizes = {**ONE_LAYER, "dropout": 0.0}
        backbone = RWRGPT2Backbone(**sizes, **small_layer(), **R4, implementation=implementation)
        model = RWRGPT2CausalLM(backbone, preprocessor=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        results.append(train(model, inputs, np.roll(tokens, -1, 1), loss))
    (losses, weights), (found_losses, found_weights) = results
    assert losses[1] < losses[0]
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert_close(found_weights, weights, 1e-5)


@traced
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("quick_compilation")
def test_compiled_training_with_kernels_and_training_with_the_reference():
    x, y = np.random.default_rng(0).normal(size=(2, 2, 11, 6)).astype("float32")
    results = []
    for implementation, jit_compile in (("reference", False), ("triton", True)):
        keras.utils.set_random_seed(2)
        layer = keras_rwr.RWRAttention(2, 5, implementation=implementation, **R4, **small_layer())
        inputs = keras.Input(x.shape[1:])
        model = keras.Model(inputs, inputs + layer(inputs, inputs, use_causal_mask=True))
        results.append(train(model, x, y, loss="mse", jit_compile=jit_compile))
    (losses, weights), (found_losses, found_weights) = results
    assert losses[1] < losses[0] - 0.01
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert_close(found_weights, weights, 1e-5)
