"""The kernels as operators of torch, for autograd and what builds on it, and Keras around them."""

import functools

import keras
import numpy as np
import pytest
import torch
import triton
from gpt2_models import ONE_LAYER, VOCABULARY
from helpers import TOLERANCES, assert_close
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import keras_rwr
from keras_rwr import _dispatch as dispatch
from keras_rwr import backends
from keras_rwr._dispatch import KernelCall
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


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


class Recorder(TorchDispatchMode):
    """Notes the calls of the package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "keras_rwr":
            self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{**R3, "dropout": 0.3, "seed": 5}, R4], ids=["R3", "R4"])
def test_operators_keep_torchs_contract(options):
    with Recorder() as recorder:
        with_gradients(functools.partial(attend, **options))
    names = {function._opname for function, _ in recorder.calls}
    assert names == {"forward", "backward", "select_neighbors"}
    for function, arguments in recorder.calls:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_gradients_are_those_of_the_function():
    # Exponential edges have no kinks, and the neighbours stay what they are.
    config = KernelCall(reversible=True, **R4, **SMALL)
    query, key, *others = draw()
    neighbors = backends.torch.select_neighbors(query, key, config)
    assert (neighbors >= 0).any()

    def run(query, key, value, u, kappa, gamma):
        return backends.torch.rwr_attention(
            query,
            key,
            value,
            config,
            discoverability=u,
            concentration=kappa,
            lens_strength=gamma,
            neighbors=neighbors,
        )

    check = functools.partial(gradcheck, eps=0.03, atol=5e-5, rtol=5e-3, fast_mode=True)
    leaves = [x.requires_grad_() for x in (query, key, *others)]
    assert check(run, leaves)
    # Few numbers in and out: gradcheck explains a failure at length.
    *fixed, gamma = leaves
    with pytest.raises(GradcheckError):
        check(lambda gamma: run(*fixed, 1.5 * gamma - 0.5 * gamma.detach()).sum(), gamma)


def test_second_derivatives_are_refused():
    query, *others = draw()
    query.requires_grad_()
    output = attend(query, *others)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


# Dynamo itself makes an instance of each traced autograd function.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@traced
def test_compiled_whole():
    run = functools.partial(attend, dropout=0.3, seed=5, **R3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled), with_gradients(run))
    with torch.no_grad():
        assert torch.equal(compiled(*draw()), run(*draw()))


def test_checkpointed():
    run = functools.partial(attend, dropout=0.4, seed=3, **R3)
    again = functools.partial(checkpoint, run, use_reentrant=False)
    with Recorder() as recorder:
        found = with_gradients(again)
    assert [function._opname for function, _ in recorder.calls].count("forward") == 2
    assert_same(found, with_gradients(run))


def test_autocast():
    layer = keras_rwr.RWRAttention(num_heads=2, key_dim=5, implementation="triton", **small_layer())
    x = torch.randn((1, 11, 6), generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = layer(x, x, use_causal_mask=True)
    with Recorder() as recorder, torch.autocast("cpu", torch.float16):
        output = layer(x, x, use_causal_mask=True)
    dtypes = {arguments[0].dtype for _, arguments in recorder.calls}
    assert dtypes == {torch.float16}
    assert_close(output.detach().float(), exact.detach(), 5e-3)
    (gradient,) = torch.autograd.grad(output.float().sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    assert_close(gradient, expected, 2e-2)


def test_float32_inside_autocast_computes_in_the_casts_dtype():
    with Recorder() as recorder, torch.autocast("cpu", torch.float16):
        output = attend(*draw())
    assert output.dtype == torch.float16
    assert {arguments[0].dtype for _, arguments in recorder.calls} == {torch.float16}


def test_only_what_needs_a_gradient_gets_one():
    tensors = draw()
    value = tensors[2].requires_grad_()
    (found,) = torch.autograd.grad(attend(*tensors).sum(), value)
    expected = with_gradients(lambda *leaves: attend(*leaves), tensors)[3]
    assert torch.equal(found, expected)
    with torch.no_grad(), Recorder() as recorder:
        assert not attend(*tensors).requires_grad
    keep = [arguments[9] for function, arguments in recorder.calls if len(arguments) > 9]
    assert keep == [False]


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
        for block in backbone.transformer_layers:
            # The kernels know no smallest norm of gradients, and GPT-2 begins with small weights.
            for dense in (
                block._self_attention_layer._query_dense,
                block._self_attention_layer._key_dense,
            ):
                dense.kernel.assign(20.0 * dense.kernel)
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
        layer = keras_rwr.RWRAttention(2, 5, implementation=implementation, **R3, **small_layer())
        inputs = keras.Input(x.shape[1:])
        model = keras.Model(inputs, inputs + layer(inputs, inputs, use_causal_mask=True))
        results.append(train(model, x, y, loss="mse", jit_compile=jit_compile))
    (losses, weights), (found_losses, found_weights) = results
    assert losses[1] < losses[0] - 0.01
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert_close(found_weights, weights, 1e-5)
