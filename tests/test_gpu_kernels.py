"""The Triton kernels on a GPU. Needs one, and KERAS_BACKEND=torch: `pytest -m gpu <this file>`."""

import contextlib
import functools

import keras
import numpy as np
import oracle
import oracle_gradients
import pytest
import torch
from helpers import (
    KERNEL_CASES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    run_case,
)
from precision import assert_as_exact_as_eager, assert_within, chosen_neighbors, limits

import keras_rwr
from keras_rwr._dispatch import current_device
from keras_rwr.models import RWRGPT2Backbone, RWRGPT2CausalLM
from keras_rwr.ops import rwr_attention

pytestmark = pytest.mark.gpu

R3 = {"reversible": True, "reciprocal_beta": 0.7}
R4 = {"edge_weight": "exponential"}
HALF = [torch.float16, torch.bfloat16]
TRITON = "triton"
DEVICE = "cuda"
TOKENS = 1031


@pytest.fixture(autouse=True)
def on_a_gpu():
    if current_device() != "gpu":
        pytest.fail(f"This test needs a GPU. Received: device={current_device()}")


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=torch.bfloat16, count=3, seed=0):
    """Query, key and value (B, S, N, H) that lean on one another."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    query, *others = torch.randn((count, *shape), generator=generator, device=DEVICE)
    return [x.to(dtype) for x in (query + 0.7 * others[0], *others)]


def attend(query, key, value, **options):
    options = {"is_causal": True, "implementation": TRITON, **options}
    return rwr_attention(query, key, value, **options)


def with_gradients(run, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = run(*leaves)
    slope = torch.cos(torch.arange(output.numel(), device=DEVICE)).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, slope.to(output.dtype))]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --- against the oracle --------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_float32(case):
    output, gradients = run_case(case, "triton")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_half_precision(case, dtype):
    assert_as_exact_as_eager(case, dtype)


# --- default sizes -------------------------------------------------------------------------------

# Lengths that no tile divides, and heads that no tile holds exactly.
SETUPS = {
    "R1": ({}, 64, 64),
    "R2": ({"reversible": True}, 64, 64),
    "R3 both ways": ({**R3, "is_causal": False}, 64, 64),
    "R4": (R4, 64, 64),
    "R4 both ways": ({**R4, "is_causal": False}, 80, 80),
    "R1 of 128": ({}, 128, 128),
    "R2 of 96": ({"reversible": True}, 96, 96),
    "R4 of 256": (R4, 256, 256),
    "single tokens": ({"neighbor_block": 1, "topk": 3}, 64, 48),
    "wide": ({"window": 300, "neighbor_block": 24, "topk": 72}, 64, 64),
    "tiles of 32": ({"block_size": 32, **R4}, 64, 64),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", SETUPS)
def test_default_sizes(name, dtype):
    options, head_size, value_size = SETUPS[name]
    options = {"is_causal": True, "window": 128, "topk": 32, "neighbor_block": 16, **options}
    query, key, value, cotangent = draw(2, TOKENS, 3, head_size, dtype=dtype, count=4)
    value, cotangent = value[..., :value_size], cotangent[..., :value_size]
    trained = torch.tensor([[2.0, 11.0, 25.0], [0.25, 0.5, 0.75]], device=DEVICE)
    tensors = {"query": query, "key": key, "value": value}
    tensors["concentration"], tensors["lens_strength"] = trained
    tensors["discoverability"] = 0.125 * draw(1, 1, 3, head_size, dtype=dtype, seed=5)[0][0, 0]
    real = torch.ones((2, TOKENS), dtype=torch.bool, device=DEVICE)
    real[1, 2 * TOKENS // 3 :] = False
    labels = torch.where(real, 1, oracle.PADDING)
    neighbors = chosen_neighbors({**tensors, "padding_mask": real}, options)
    has_bias = "R3" in name or "R4" in name

    def results(run, dtype=None):
        leaves = {
            key: x.detach().to(dtype or x.dtype).requires_grad_() for key, x in tensors.items()
        }
        output = run(leaves)
        found = torch.autograd.grad(
            output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=True
        )
        found = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves.values(), found, strict=True)
        ]
        found = dict(zip(("output", *leaves), (output, *found), strict=True))
        return {key: x.detach().double().cpu().numpy() for key, x in found.items()}

    def kernels(leaves):
        u = leaves["discoverability"].float() if has_bias else None
        leaves = {**leaves, "discoverability": u, "padding_mask": real}
        return rwr_attention(**leaves, implementation=TRITON, **options)

    def formula(dtype):
        kept = {name: x for name, x in options.items() if name != "block_size"}

        def run(leaves):
            if not has_bias:
                leaves = {**leaves, "discoverability": torch.zeros_like(leaves["discoverability"])}
            return oracle_gradients.rwr_attention(
                **leaves, options=oracle.Options(**kept), labels=labels, neighbors=neighbors
            )

        return results(run, dtype)

    assert_within(results(kernels), *limits(formula, dtype))


# --- repeatability and layouts -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {**R3, "dropout": 0.1, "seed": 3}, R4])
def test_the_same_inputs_give_the_same_bits(options):
    tensors = draw(2, 1500, 4, 64)
    run = functools.partial(attend, **options)
    expected = with_gradients(run, tensors)
    for _ in range(3):
        # Other work in between, so that blocks of the GPU finish in another order.
        torch.mm(*torch.randn((2, 2048, 2048), device=DEVICE))
        assert_same(with_gradients(run, tensors), expected)


def test_layouts():
    tensors = draw(2, 777, 4, 64)
    expected = with_gradients(attend, tensors)
    packed = torch.stack(tensors, 2).unbind(2)
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for layout in (packed, head_major):
        assert not layout[0].is_contiguous()
        assert_same(with_gradients(attend, layout), expected)


def test_no_token_sees_a_later_one():
    tensors, others = draw(1, 3000, 2, 64), draw(1, 3000, 2, 64, seed=1)
    for options in ({}, R3, R4):
        before = attend(*tensors, **options)
        for last in (100, 1234, 2047, 2950):
            changed = [
                torch.cat([x[:, : last + 1], y[:, last + 1 :]], 1)
                for x, y in zip(tensors, others, strict=True)
            ]
            after = attend(*changed, **options)
            assert torch.equal(after[:, : last + 1], before[:, : last + 1])
            assert not torch.equal(after, before)


def test_everybody_chooses_the_same_blocks():
    # The lists of two key blocks hold every query.
    query, key, value = draw(1, 4096, 2, 64, dtype=torch.float32)
    key[:, :32] = query.mean(1, keepdim=True) + 0.01 * key[:, :32]
    query = query + 3.0 * query.mean(1, keepdim=True)
    options = {"topk": 32, "neighbor_block": 16, "window": 128}
    found = with_gradients(functools.partial(attend, **options), (query, key, value))
    expected = with_gradients(
        functools.partial(attend, **{**options, "implementation": "portable"}), (query, key, value)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one.cpu(), other.cpu(), TOLERANCES["gradient"])


# --- beyond 2**31 --------------------------------------------------------------------------------


def test_more_than_two_to_the_31_elements():
    batch, size, heads, head_size = 33, 65536, 16, 64
    tensors = draw(batch, size, heads, head_size)
    assert tensors[0].numel() > 2**31
    with torch.no_grad():
        last = attend(*(x[-1:].clone() for x in tensors))
        whole = attend(*tensors)
    assert torch.equal(whole[-1:], last)


def test_rows_that_begin_beyond_two_to_the_31_elements():
    size, stride = 70001, 32768
    memory = torch.empty((1, size, stride), dtype=torch.bfloat16, device=DEVICE)
    assert memory.numel() > 2**31
    tensors = draw(1, size, 2, 64)
    views = [memory[..., 128 * i : 128 * (i + 1)].unflatten(-1, (2, 64)) for i in range(3)]
    for view, x in zip(views, tensors, strict=True):
        view.copy_(x)
    assert_same(with_gradients(attend, views), with_gradients(attend, tensors))


# --- around the operators ------------------------------------------------------------------------


def test_explain():
    told = keras_rwr.explain((1, 4096, 12, 64), dtype="bfloat16", is_causal=True)
    assert told.implementation == "triton"
    told = keras_rwr.explain((1, 4096, 12, 64), device="cpu", is_causal=True)
    assert told.implementation == "portable"
    assert "GPU" in told.refusals["triton"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own
@pytest.mark.parametrize("options", [{}, {**R3, "dropout": 0.1, "seed": 3}, R4])
def test_compiled_whole(options):
    run = functools.partial(attend, **options)
    compiled = torch.compile(run, fullgraph=True)
    tensors = draw(2, 389, 3, 64)
    for one, other in zip(
        with_gradients(compiled, tensors), with_gradients(run, tensors), strict=True
    ):
        # The compiler may fuse the casts around the operators.
        assert_close(one.float().cpu(), other.float().cpu(), 2.0**-7)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_cuda_graph():
    tensors = [x.requires_grad_() for x in draw(1, 1024, 2, 64)]

    def step():
        output = attend(*tensors)
        return [output, *torch.autograd.grad(output, tensors, torch.ones_like(output))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for x, other in zip(tensors, draw(1, 1024, 2, 64, seed=seed), strict=True):
                x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_same([x.detach() for x in captured], [x.detach() for x in step()])


def test_autocast():
    layer = keras_rwr.RWRAttention(num_heads=2, key_dim=64, implementation="triton")
    (x,) = draw(1, 400, 1, 96, dtype=torch.float32, count=2)[:1]
    x = x[:, :, 0].requires_grad_()
    exact = layer(x, x, use_causal_mask=True)
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(x, x, use_causal_mask=True)
    assert_close(output.detach().float().cpu(), exact.detach().cpu(), 2e-2)
    (gradient,) = torch.autograd.grad(output.float().sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    assert_close(gradient.cpu(), expected.cpu(), 1e-1)


def test_checkpointed():
    run = functools.partial(attend, dropout=0.2, seed=3, **R4)
    again = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
    tensors = draw(2, 500, 2, 64)
    assert_same(with_gradients(again, tensors), with_gradients(run, tensors))


class Block(torch.nn.Module):
    """Projections around the attention, as FSDP shards them."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(96, 3 * 96)
        self.outer = torch.nn.Linear(96, 96)

    def forward(self, x):
        query, key, value = self.inner(x).unflatten(-1, (3, 2, 48)).unbind(-3)
        return self.outer(attend(query, key, value).flatten(-2)).clone()


@contextlib.contextmanager
def one_process():
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cuda", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    plain, sharded = Block().cuda(), Block().cuda()
    sharded.load_state_dict(plain.state_dict())
    x = torch.randn((2, 300, 96), device=DEVICE)
    with one_process() as mesh:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        losses = []
        for module in (plain.bfloat16(), sharded):
            loss = module(x.bfloat16()).float().square().mean()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        found = [p.grad.full_tensor() for p in sharded.parameters()]
    for one, other in zip(found, plain.parameters(), strict=True):
        assert_close(one.float().cpu(), other.grad.float().cpu(), 2.0**-7)


# --- Keras ---------------------------------------------------------------------------------------


def train(implementation, steps, jit_compile=False):
    keras.utils.set_random_seed(7)
    backbone = RWRGPT2Backbone(
        vocabulary_size=101,
        num_layers=2,
        num_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=192,
        dropout=0.0,
        window=32,
        topk=32,
        implementation=implementation,
        **R4,
    )
    model = RWRGPT2CausalLM(backbone, preprocessor=None)
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=jit_compile)
    # What comes next follows from what came before: there is something to learn.
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, (4 * steps, 192)), 1, dtype="int32") % 101
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    targets = np.roll(tokens, -1, 1)
    losses = []
    for i in range(0, 4 * steps, 4):
        model.reset_metrics()
        batch = {name: x[i : i + 4] for name, x in inputs.items()}
        losses.append(model.train_on_batch(batch, targets[i : i + 4], return_dict=True)["loss"])
    return losses


def test_fifty_steps_with_kernels_and_with_the_reference():
    losses = [train(name, 50) for name in ("triton", "reference")]
    assert losses[1][-1] < losses[1][0] - 1.0
    np.testing.assert_allclose(*losses, rtol=2e-3)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
def test_jit_compiled_training(monkeypatch):
    # Keras has `torch.compile` trace its own code too, minutes with the default backend.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = train("triton", 3, jit_compile=True)
    np.testing.assert_allclose(compiled, train("triton", 3), rtol=1e-4)
