"""The kernels, interpreted: each against its portable stage, and as torch takes them."""

import dataclasses
import functools
import itertools

import keras
import pytest
import torch
from helpers import (
    SUM_CASES,
    TOLERANCES,
    assert_close,
    attention,
    build_graph,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from keras_rwr import _far, _local, _select
from keras_rwr._select import select
from keras_rwr._sparse import SparseMatrix
from keras_rwr._tensors import unit
from keras_rwr._tokens import Tokens
from keras_rwr._weigh import weigh
from keras_rwr.backends.torch import local, product, vectors
from keras_rwr.backends.torch import select as select_kernels
from keras_rwr.ops import rwr_attention
from keras_rwr.options import Options

BY_NAME = {made.name: made for made in SUM_CASES}
# Three tiles of 64 tokens, the last one not full.
TOKENS = 150
GENERATOR = torch.Generator().manual_seed(1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_tokens(kind, size=TOKENS):
    """Tokens of two sequences: all real, padding on the left, or packed documents."""
    positions = torch.arange(size)[None]
    if kind == "padding":
        return Tokens.create(size, True, positions >= torch.tensor([[0], [71]]))
    if kind == "segments":
        return Tokens.create(size, True, None, positions // torch.tensor([[40], [90]]))
    return Tokens.create(size, kind == "causal")


KINDS = ("causal", "both ways", "padding", "segments")


def take_scores(queries, keys, chosen, block):
    """The scores of chosen blocks, in their order; 0 for none."""
    means = _select.block_means(keys, torch.ones(1, 1, TOKENS, 1), block)
    scores = queries @ means.transpose(-1, -2)
    return torch.where(chosen >= 0, scores.gather(-1, chosen.clamp(min=0).long()), 0.0)


@pytest.mark.parametrize(
    ("kind", "slots", "block"),
    [(kind, 5, 1) for kind in KINDS] + [(kind, 3, 4) for kind in KINDS[:3]] + [("segments", 20, 1)],
)
def test_the_best_blocks(kind, slots, block):
    """Of vectors of one length and whole numbers, so that there are many ties."""
    # Two ones among eight numbers: a cosine is a half of a whole number, in any precision.
    shape = 2, 2, 2 if slots < 20 else 1, TOKENS, 8
    places = draw(*shape).argsort(-1) < 2
    queries, keys = torch.where(draw(*shape) > 0, 1.0, -1.0) * places
    tokens = make_tokens(kind)
    options = Options(window=20, topk=slots * block, neighbor_block=block)
    found = select_kernels.select(vectors.unit(queries), vectors.unit(keys), tokens, options)
    expected = select(queries, keys, tokens, options)  # whose products are exact
    if block == 1:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:  # means of unit vectors are rounded: of equal scores, either may be the larger
        taken, best = (take_scores(queries, keys, x, block) for x in (found, expected))
        torch.testing.assert_close(taken, best)
    assert (found >= 0).any() and ((found == -1).any() or kind == "both ways")


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-7, 1e-3, 1.0, 1e20, 1e37])
def test_unit_vectors(length):
    x = length * draw(1, 2, 9, 5)

    def run(unit):
        return gradients(unit, x)

    def dense(x):
        made = vectors.unit(x)
        rows = made.rows.float() * made.scales[..., :1]
        return rows.transpose(1, 2)

    (found, _), (expected, _) = run(dense), run(unit)
    assert_close(found.detach().numpy(), expected.detach().numpy(), 1e-6)
    # Gradients of rows are those of the unit vectors.
    slope = torch.cos(torch.arange(x.numel())).reshape(x.shape)
    leaf = x.clone().requires_grad_()
    rows = vectors.unit(leaf).rows
    (one,) = torch.autograd.grad(rows, leaf, slope.transpose(1, 2))
    (other,) = torch.autograd.grad(unit(leaf), leaf, slope)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=max(1e-5 / max(length, 0.1), 1e-37))


def gradients(run, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = run(*leaves)
    slope = torch.cos(torch.arange(output.numel())).reshape(output.shape)
    return output, *torch.autograd.grad(output, leaves, slope)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 20, 100])
def test_local(kind, window):
    tensors = draw(2, 4, TOKENS, 6), draw(2, 2, TOKENS, 6), draw(2, 2, TOKENS, 5)
    tensors = (*tensors, draw(2, 4, TOKENS, 1))
    tokens, seed = make_tokens(kind), torch.tensor([3, 4], dtype=torch.int32)

    def run(module):
        def attend(query, key, value, bias):
            return module.attend_locally(query, key, value, tokens, window, bias, 0.2, seed)

        return gradients(attend, *tensors)

    for found, expected in zip(run(local), run(_local), strict=True):
        assert_close(found.detach().numpy(), expected.detach().numpy(), 2e-5)


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("causal", 1), ("both ways", 4), ("both ways", 8)])
def test_the_product(kind, block, reversible):
    vectors = [unit(x) for x in draw(2, 2, 2, 70, 6)]
    tokens = make_tokens(kind, 70)
    options = Options(window=20, topk=max(4, block), neighbor_block=block, reversible=reversible)
    neighbors = select(*vectors, tokens, options)
    graph = weigh(*vectors, neighbors, tokens, options, torch.ones(1, 1, 1))
    x = graph.tiling.pad(draw(2, 2, 70, 20))
    chosen = torch.repeat_interleave(graph.transition.neighbors >= 0, block, -1)

    def run(matmul):
        matrix = graph.transition
        parts = [x for x in ("local", "far", "back") if getattr(matrix, x) is not None]

        def multiply(x, *entries):
            return matmul(dataclasses.replace(matrix, **dict(zip(parts, entries, strict=True))), x)

        product, *rest = gradients(multiply, x, *(getattr(matrix, part) for part in parts))
        # The entry of a neighbour that is none has no gradient, whatever stands in it.
        far = [torch.where(chosen, y, 0.0) for y in rest[2:]]
        return [product, *rest[:2], *far]

    portable = run(SparseMatrix.matmul)
    found = run(product.make_matmul())
    again = run(product.make_matmul())
    for one, other, expected in zip(found, again, portable, strict=True):
        assert torch.equal(one, other)
        assert_close(one.detach().numpy(), expected.detach().numpy(), 1e-5)


def test_a_hub_is_collected_once_an_edge():
    """All tokens link to the first one: its list is as long as the sequence."""
    neighbors = torch.zeros((1, 1, 70, 1), dtype=torch.int32)
    neighbors[:, :, :3] = -1
    edges, starts = product.list_edges(neighbors, 1)
    assert starts.tolist() == [0] + [67] * 70
    assert edges[:67].tolist() == list(range(3, 70))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("size", [37, 12000])  # few lists, whose numbers have 16 bits, and many
def test_lists_hold_the_edges_of_each_block(size, block):
    shape, count = (2, 3, size, 2), -(-size // block)
    generator = torch.Generator().manual_seed(2)
    neighbors = torch.randint(-1, count, shape, generator=generator, dtype=torch.int32)
    neighbors[0, 1] = -1
    neighbors[1, 2, 5:] = count - 1
    edges, starts = product.list_edges(neighbors, block)
    assert edges.dtype == starts.dtype == torch.int32
    lists = [[] for _ in range(2 * 3 * count + 1)]  # the last one of no block
    for edge, chosen in enumerate(neighbors.flatten().tolist()):
        graph = edge // (2 * size)
        lists[-1 if chosen < 0 else graph * count + chosen].append(edge)
    assert edges.tolist() == list(itertools.chain(*lists))
    assert starts.tolist() == list(itertools.accumulate(map(len, lists[:-1]), initial=0))


@pytest.mark.parametrize("block", [1, 4, 8])
def test_far_products(block):
    query, key = draw(2, 1, 2, 70, 6)
    neighbors = torch.randint(-1, -(-70 // block), (1, 2, 70, 3), generator=GENERATOR)
    neighbors = neighbors.sort(-1).values.to(torch.int32)
    # A block may not be chosen twice.
    again = torch.nn.functional.pad(neighbors[..., 1:] == neighbors[..., :-1], (1, 0))
    neighbors = torch.where(again, -1, neighbors)
    keys = neighbors[..., None] * block + torch.arange(block)
    is_edge = ((neighbors[..., None] >= 0) & (keys < 70)).flatten(-2)

    def run(dot):
        def products(query, key):
            return torch.where(is_edge, dot(query, neighbors, key, block), 0.0)

        return gradients(products, query, key)

    def kernel(query, neighbors, key, block):
        rows, columns = (vectors.token_major(x) for x in (query, key))
        return product.FarDot.apply(rows, columns, neighbors, block)

    for found, expected in zip(run(kernel), run(_far.far_dot), strict=True):
        assert_close(found.detach().numpy(), expected.detach().numpy(), 1e-5)


def test_a_graph_made_before_the_call():
    case = BY_NAME["R3 causal"]
    *_, made = build_graph(case)
    tensors = {name: torch.tensor(x) for name, x in case.inputs.arrays().items()}
    attend = attention(case.inputs, dict(case.options), "triton", graph=made)
    assert_close(attend(**tensors).numpy(), case.expected, TOLERANCES["output"])


def test_a_launch_may_begin_without_a_tensor(monkeypatch):
    """As that of far edges alone; a machine with CUDA asks the first tensor where to launch."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    x, neighbors = draw(1, 1, 16, 16), torch.zeros((1, 1, 16, 1), dtype=torch.int32)
    x = vectors.token_major(x)
    ones = torch.ones(1, 1, 16, 1)
    gathered = product.multiply(None, ones, None, x, neighbors, None, None, 0, 1, False)
    assert torch.equal(gathered, x[:, :1].expand(1, 16, 1, 16))


def test_no_number_is_copied_to_the_device(monkeypatch):
    """Each such copy waits for the GPU, and none can be part of a CUDA graph."""
    case = BY_NAME["R5 causal"]
    inputs, options = case.inputs, dict(case.options)
    tensors = {name: torch.tensor(x).requires_grad_() for name, x in inputs.arrays().items()}
    attend = attention(inputs, options, "triton")
    convert = torch.as_tensor

    def refuse(x, *arguments, **options):
        assert isinstance(x, torch.Tensor), f"copied: {x}"
        return convert(x, *arguments, **options)

    monkeypatch.setattr(torch, "as_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    attend(**tensors).sum().backward()
    with pytest.raises(AssertionError, match=r"copied: 1\.0"):
        keras.ops.convert_to_tensor(1.0)


class Recorder(TorchDispatchMode):
    """Notes the calls of the package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "keras_rwr":
            self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))

    @property
    def names(self):
        return [function._opname for function, _ in self.calls]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def make_call(name):
    """The call of a case as a function of tensors, and these."""
    case = BY_NAME[name]
    seed = case.seed if "dropout" in dict(case.options) else None
    attend = attention(case.inputs, dict(case.options), "triton", seed=seed)
    names, arrays = zip(*case.inputs.arrays().items(), strict=True)
    leaves = [torch.tensor(x) for x in arrays]

    def run(*leaves):
        return attend(**dict(zip(names, leaves, strict=True)))

    return run, leaves


# Dynamo itself makes an instance of each traced autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["R5 causal", "R3 causal", "grouped heads dropout"])
def test_compiled_whole(name):
    run, leaves = make_call(name)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, *leaves), gradients(run, *leaves))
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), run(*leaves))


@pytest.mark.parametrize("name", ["R5 segments", "discoverable graph", "two graphs for four heads"])
def test_operators_keep_torchs_contract(name):
    run, leaves = make_call(name)
    with Recorder() as recorder:
        gradients(run, *leaves)
    names = {"unit", "select", "local", "local_gradients", "list_edges"}
    if name == "discoverable graph":  # reversible: its steps are products
        names |= {"multiply", "band_dot", "far_dot"}
    else:
        names |= {"unit_gradients", "weigh", "weigh_gradients", "walk", "walk_gradients"}
    assert names <= set(recorder.names)
    for function, arguments in recorder.calls:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))


def test_checkpointed():
    run, leaves = make_call("grouped heads dropout")
    again = functools.partial(checkpoint, run, use_reentrant=False)
    with Recorder() as recorder:
        found = gradients(again, *leaves)
    assert recorder.names.count("walk") == 2
    assert_same(found, gradients(run, *leaves))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets the kernels
@pytest.mark.parametrize(
    ("name", "poison"),
    [
        ("R5 causal", float("nan")),
        ("R5 padding left", float("inf")),
        ("hop weights reciprocal", float("nan")),
    ],
)
def test_a_poisoned_token_changes_no_earlier_one(name, poison):
    run, leaves = make_call(name)
    clean, at = run(*leaves), 19
    for which, x in enumerate(leaves[:5]):
        if x.shape[:2] != leaves[0].shape[:2]:
            continue
        other = [y.clone() for y in leaves]
        other[which][0, at, 0, 2] = poison
        found = run(*other)
        assert torch.equal(found[0, :at], clean[0, :at]) and torch.equal(found[1], clean[1])
        assert found[0, at].isnan().any(), which


@pytest.mark.parametrize("name", ["R5 causal", "R3 causal"])
def test_second_derivatives_are_refused(name):
    run, leaves = make_call(name)
    leaves[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(*leaves).sum(), leaves[0], create_graph=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets the kernels
def test_a_graph_made_before_the_call_lets_no_poison_pass():
    case = BY_NAME["R5 causal"]
    inputs, options = case.inputs, dict(case.options)
    *_, made = build_graph(case)
    values = inputs.given("query", "key", "value", "hop_weights")
    tensors = {name: torch.tensor(x) for name, x in values.items()}
    attend = attention(inputs, options, "triton", graph=made)
    clean = attend(**tensors)
    tensors["value"][0, 19, 0, 2] = float("nan")
    found = attend(**tensors)
    assert torch.equal(found[0, :19], clean[0, :19]) and torch.equal(found[1], clean[1])
    assert found[0, 19:].isnan().all()


def test_tensors_whose_numbers_are_apart():
    """Hop weights and concentrations may be views of larger tensors."""
    vectors = draw(3, 1, 40, 2, 6)
    graph = draw(2, 1, 40, 2, 6)
    theta = draw(3, 1, 40, 2).permute(1, 2, 3, 0)
    kappa = torch.tensor([5.0, 1.0, 30.0, 1.0])[::2]

    def run(theta, kappa):
        return rwr_attention(
            *vectors,
            graph_query=graph[0],
            graph_key=graph[1],
            hop_weights=theta,
            concentration=kappa,
            edge_weight="exponential",
            topk=2,
            neighbor_block=1,
            window=5,
            is_causal=True,
            implementation="triton",
        )

    assert not theta.is_contiguous() and not kappa.is_contiguous()
    assert torch.equal(run(theta, kappa), run(theta.contiguous(), kappa.contiguous()))


def test_the_reciprocal_walk_of_heads_that_share_a_graph():
    tensors = [*draw(3, 2, 40, 4, 6), *draw(2, 2, 40, 2, 5), 0.5 + 0.1 * draw(4, 3)]

    def run(implementation):
        def attend(query, key, value, graph_query, graph_key, hop_weights):
            return rwr_attention(
                query,
                key,
                value,
                graph_query=graph_query,
                graph_key=graph_key + 0.7 * graph_query,
                hop_weights=hop_weights,
                reversible=True,
                steps=2,
                topk=4,
                neighbor_block=1,
                window=5,
                is_causal=True,
                implementation=implementation,
            )

        return gradients(attend, *tensors)

    for found, expected in zip(run("triton"), run("portable"), strict=True):
        assert_close(found.detach().numpy(), expected.detach().numpy(), 2e-5)
