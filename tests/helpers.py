"""What the tests share: cases, tolerances, and the few things that differ between backends."""

import dataclasses
import functools
import os
import zlib

import keras
import numpy as np
import oracle
import oracle_gradients
from keras import ops

from keras_rwr.ops import rwr_attention

BACKEND = keras.backend.backend()

# What runs a call of fusion "sum" on a CPU, and what the package takes there by default.
IMPLEMENTATIONS = ("reference", "portable", *(("xla",) if BACKEND == "tensorflow" else ()))
DEFAULT = "xla" if BACKEND == "tensorflow" else "portable"

# Norm-wise relative error and largest error as a share of the largest value, both in float32
# against float64.
TOLERANCES = {
    # A few dozen float32 roundings (6e-8 each), amplified at most 100 times by 1 / degree (see
    # `Case.draw`).
    "output": 1e-5,
    # Backward repeats the forward pass and divides by degree and norm once more each.
    "gradient": 2e-5,
    # A sum over every pair with signs that nearly cancel: the error is that of the terms, the
    # value is smaller.
    "gradient_of_a_sum": 1e-4,
    # Two float32 computations of the same thing on two backends.
    "backends": 1e-5,
}
SUMMED = ("discoverability", "concentration", "lens_strength")

# All inputs are of order 1. Gradients far below this are exact zeros plus roundings of terms that
# cancel.
SMALLEST_SCALE = 0.1

CASE_DEFAULTS = {
    "batch": 2,
    "tokens": 29,
    "heads": 2,
    "head_dim": 7,
    "value_dim": 5,
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one case, float32 as the package gets them."""

    query: np.ndarray  # (B, S, N, H)
    key: np.ndarray  # (B, S, N, H)
    value: np.ndarray  # (B, S, N, Hv)
    discoverability: np.ndarray  # (N, H)
    concentration: np.ndarray  # (N,)
    lens_strength: np.ndarray  # (N,)
    padding_mask: np.ndarray | None  # (B, S) bool
    cotangent: np.ndarray  # (B, S, N, Hv)

    def arrays(self):
        """The differentiable arrays, in `oracle_gradients.NAMES` order."""
        return {name: getattr(self, name) for name in oracle_gradients.NAMES}

    def real(self):
        return oracle.real_tokens(self.query, self.padding_mask)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: sizes, options and which tensors take part."""

    name: str
    options: tuple = ()
    sizes: tuple = ()
    padding: str | None = None
    discoverability: bool = False
    seed: tuple = (0, 0)
    far: bool = False  # whether the case promises edges outside the window

    def __str__(self):
        return self.name

    @property
    def oracle_options(self):
        return oracle.Options(**dict(self.options))

    @functools.cached_property
    def inputs(self):
        return self.draw()

    def draw(self):
        """The first seeded draw that float32 can decide as float64 does.

        A cosine within 1e-5 of the threshold may fall on either side of it, a block's score within
        1e-5 of another's may win or lose, and a degree under 0.01 amplifies every rounding more
        than 100 times. None of them says anything about the code.
        """
        sizes = {**CASE_DEFAULTS, **dict(self.sizes)}
        for attempt in range(100):
            rng = np.random.default_rng([zlib.crc32(self.name.encode()), attempt])
            inputs = draw_inputs(rng, padding=self.padding, **sizes)
            if is_well_conditioned(inputs, self):
                return inputs
        raise RuntimeError(f"No well-conditioned inputs in 100 draws. Received: case={self.name}")

    def tensor_arguments(self, inputs=None):
        """The tensor-valued options as NumPy, for the package's functions."""
        inputs = self.inputs if inputs is None else inputs
        return {
            "discoverability": inputs.discoverability if self.discoverability else None,
            "concentration": inputs.concentration,
            "lens_strength": inputs.lens_strength,
            "padding_mask": inputs.padding_mask,
        }

    @functools.cached_property
    def graphs(self):
        """The oracle's graphs, [batch][head]."""
        arguments = self.tensor_arguments()
        del arguments["lens_strength"]
        return oracle.graphs(self.inputs.query, self.inputs.key, self.oracle_options, **arguments)

    @functools.cached_property
    def neighbors(self):
        """The oracle's neighbour blocks, (B, N, S, topk / neighbor_block)."""
        return stack(self.graphs, "neighbors")

    @functools.cached_property
    def expected(self):
        """The oracle's output."""
        return oracle.rwr_attention(
            self.inputs.query,
            self.inputs.key,
            self.inputs.value,
            self.oracle_options,
            neighbors=self.neighbors,
            seed=self.seed,
            **self.tensor_arguments(),
        )

    @functools.cached_property
    def expected_gradients(self):
        """Gradients by name from the independent formula."""
        arrays = self.inputs.arrays()
        if not self.discoverability:
            arrays["discoverability"] = np.zeros_like(arrays["discoverability"])
        output, gradients = oracle_gradients.gradients(
            arrays,
            self.inputs.cotangent,
            options=self.oracle_options,
            real=self.inputs.real(),
            neighbors=self.neighbors,
            seed=self.seed,
        )
        return output, gradients


def stack(graphs, field):
    """One field of the oracle's nested graphs as (B, N, ...)."""
    return np.stack([np.stack([getattr(graph, field) for graph in row]) for row in graphs])


def draw_inputs(rng, *, batch, tokens, heads, head_dim, value_dim, padding):
    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    key = normal(batch, tokens, heads, head_dim)
    return Inputs(
        # Queries lean on keys, as they do in a trained model, so that degrees differ from token to
        # token.
        query=(normal(batch, tokens, heads, head_dim) + 0.7 * key).astype("float32"),
        key=key,
        value=normal(batch, tokens, heads, value_dim),
        discoverability=(0.5 * normal(heads, head_dim)).astype("float32"),
        concentration=rng.uniform(2.0, 25.0, heads).astype("float32"),
        lens_strength=rng.uniform(0.2, 0.8, heads).astype("float32"),
        padding_mask=draw_padding(rng, padding, batch, tokens),
        cotangent=normal(batch, tokens, heads, value_dim),
    )


def draw_padding(rng, padding, batch, tokens):
    if padding is None:
        return None
    mask = np.ones((batch, tokens), dtype=bool)
    if padding == "right":
        mask[0, tokens - tokens // 3 :] = False
    elif padding == "left":
        mask[0, : tokens // 3] = False
    elif padding == "holes":
        mask = rng.uniform(size=mask.shape) > 0.3
    elif padding == "row":
        mask[0] = False
    else:
        raise ValueError(f"Unknown kind of padding. Received: padding={padding}")
    return mask


def is_well_conditioned(inputs, case):
    options = case.oracle_options
    threshold = oracle.edge_threshold(options)
    real = inputs.real()
    query, key = np.asarray(inputs.query, np.float64), np.asarray(inputs.key, np.float64)
    for b in range(query.shape[0]):
        for n in range(query.shape[2]):
            query_unit = oracle.unit_rows(query[b, :, n])
            key_unit = oracle.unit_rows(key[b, :, n])
            if np.isfinite(threshold) and np.abs(query_unit @ key_unit.T - threshold).min() < 1e-5:
                return False
            if options.topk and selection_margin(query_unit, key_unit, real[b], options) < 1e-5:
                return False
    if options.edge_weight == "exponential":
        return True
    arguments = case.tensor_arguments(inputs)
    del arguments["lens_strength"]
    graphs = oracle.graphs(inputs.query, inputs.key, options, **arguments)
    return stack(graphs, "degree").min() > 1e-2


def selection_margin(query_unit, key_unit, real, options):
    """Smallest gap between the last block taken and the first one left."""
    slots = options.topk // options.neighbor_block
    margin = np.inf
    for i in range(len(query_unit)):
        candidates = oracle.block_candidates(i, query_unit, key_unit, real, options)
        scores = sorted((score for score, _ in candidates), reverse=True)
        if len(scores) > slots:
            margin = min(margin, scores[slots - 1] - scores[slots])
    return margin


# --- the cases -----------------------------------------------------------------------------------


def case(
    name, *, sizes=None, padding=None, discoverability=False, seed=(0, 0), far=True, **options
):
    return Case(
        name=name,
        options=tuple(sorted(options.items())),
        sizes=tuple(sorted((sizes or {}).items())),
        padding=padding,
        discoverability=discoverability,
        seed=seed,
        far=far,
    )


SINGLE = {"window": 3, "topk": 5, "neighbor_block": 1}
FOURS = {"window": 5, "topk": 8, "neighbor_block": 4}
SIXTEENS = {"window": 17, "topk": 32, "neighbor_block": 16}
LONG = {"batch": 1, "tokens": 97, "heads": 1}
MEDIUM = {"batch": 1, "tokens": 53}

HAND_CHOSEN = [
    case("R1 causal", is_causal=True, **SINGLE),
    case("R1 bidirectional", **SINGLE),
    case("R1 causal sixteens", is_causal=True, sizes=LONG, **SIXTEENS),
    case("R1 bidirectional sixteens", sizes=LONG, **SIXTEENS),
    case("R2 causal", is_causal=True, reversible=True, **SINGLE),
    case("R2 bidirectional", reversible=True, **SINGLE),
    case("R2 causal sixteens", is_causal=True, reversible=True, sizes=LONG, **SIXTEENS),
    case(
        "R3 causal",
        is_causal=True,
        reversible=True,
        reciprocal_beta=0.7,
        discoverability=True,
        **SINGLE,
    ),
    case(
        "R3 bidirectional fours",
        reversible=True,
        reciprocal_beta=0.7,
        discoverability=True,
        sizes=MEDIUM,
        **FOURS,
    ),
    case("R4 causal", is_causal=True, edge_weight="exponential", **SINGLE),
    case("R4 bidirectional", edge_weight="exponential", **SINGLE),
    case("R4 causal sixteens", is_causal=True, edge_weight="exponential", sizes=LONG, **SIXTEENS),
    case(
        "exponential reversible discoverable",
        edge_weight="exponential",
        reversible=True,
        discoverability=True,
        **SINGLE,
    ),
    case(
        "exponential threshold",
        edge_weight="exponential",
        threshold=-0.2,
        is_causal=True,
        **SINGLE,
    ),
    case("positive threshold", threshold=0.15, **SINGLE),
    case("negative threshold", threshold=-0.3, is_causal=True, reversible=True, **SINGLE),
    case("lowest threshold", threshold=-1.0, **SINGLE),
    case("forward only", reversible=True, reciprocal_beta=1.0, discoverability=True, **SINGLE),
    case("backward only", reversible=True, reciprocal_beta=0.0, is_causal=True, **SINGLE),
    case("padding right", padding="right", discoverability=True, is_causal=True, **SINGLE),
    case("padding left", padding="left", is_causal=True, reversible=True, **SINGLE),
    case("padding holes", padding="holes", sizes=MEDIUM, **FOURS),
    case(
        "padding holes reversible",
        padding="holes",
        sizes=MEDIUM,
        reversible=True,
        edge_weight="exponential",
        **FOURS,
    ),
    case("padding whole row", padding="row", reversible=True, discoverability=True, **SINGLE),
    case("dropout", dropout=0.3, seed=(1234567, 89), is_causal=True, **SINGLE),
    case("no walk", steps=0, **SINGLE),
    case("long walk", alpha=0.07, steps=9, **SINGLE),
    case("no neighbours", window=4, topk=0, neighbor_block=16, is_causal=True, far=False),
    case("window 0", window=0, topk=3, neighbor_block=1, reversible=True, threshold=-1.0),
    case("window 0 causal", window=0, topk=3, neighbor_block=1, is_causal=True, threshold=-1.0),
    case("window past the end", window=50, topk=16, neighbor_block=16, reversible=True, far=False),
    case("more slots than blocks", window=3, topk=64, neighbor_block=4, is_causal=True),
    case("blocks wider than the window", window=2, topk=16, neighbor_block=8),
    case(
        "one token",
        sizes={"tokens": 1, "head_dim": 16},
        threshold=-1.0,
        far=False,
        is_causal=True,
        reversible=True,
        **SINGLE,
    ),
    case("three tokens", sizes={"tokens": 3}, threshold=-1.0, far=False, **SINGLE),
    case(
        "three heads of 16",
        sizes={"batch": 1, "heads": 3, "head_dim": 16, "value_dim": 16},
        is_causal=True,
        **SINGLE,
    ),
]

SOFTMAX = [
    case("softmax causal", fusion="softmax", is_causal=True, **SINGLE),
    case("softmax R3", fusion="softmax", reversible=True, discoverability=True, **SINGLE),
    case(
        "softmax padding",
        fusion="softmax",
        padding="holes",
        edge_weight="exponential",
        sizes=MEDIUM,
        **FOURS,
    ),
    case("softmax dropout", fusion="softmax", dropout=0.2, seed=(7, 0), **SINGLE),
]


def random_cases(count):
    """Seeded combinations of every option, for what nobody thought of combining."""
    rng = np.random.default_rng(20240607)
    cases = []

    def pick(choices):
        return choices[rng.integers(len(choices))]

    while len(cases) < count:
        block = pick([1, 4, 16])
        window = pick([block - 1, block, block + 2, 2 * block + 3])
        options = {
            "alpha": round(float(rng.uniform(0.05, 1.0)), 3),
            "steps": pick([1, 2, 3, 5]),
            "topk": block * pick([1, 2, 3]),
            "neighbor_block": block,
            "window": window,
            "threshold": pick([None, None, -0.4, 0.05]),
            "edge_weight": pick(["cosine", "exponential"]),
            "reversible": pick([False, True]),
            "reciprocal_beta": pick([0.0, 0.3, 0.5, 1.0]),
            "is_causal": pick([False, True]),
            "dropout": pick([0.0, 0.0, 0.25]),
        }
        cases.append(
            case(
                f"random {len(cases)}",
                sizes={"tokens": 53 if block == 16 else 29, "batch": 1, "head_dim": 16},
                padding=pick([None, "right", "left", "holes"]),
                discoverability=pick([False, True]),
                seed=(int(rng.integers(2**31)), int(rng.integers(2**31))),
                far=False,
                **options,
            )
        )
    return cases


RANDOM = random_cases(8)
SUM_CASES = HAND_CHOSEN + RANDOM
ALL_CASES = SUM_CASES + SOFTMAX

# The ablation steps with their windows scaled down to the tests' lengths.
ABLATION = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "discoverability": True},
    "R4": {"edge_weight": "exponential"},
}
GRANULARITY = {1: SINGLE, 16: SIXTEENS}
GRANULARITY_TOKENS = {1: 29, 16: 61}


# --- comparing -----------------------------------------------------------------------------------


def numpy(tensor):
    """A tensor as NumPy; half precision, which NumPy lacks in part, as float32."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = ops.cast(tensor, "float32")
    if BACKEND == "torch":
        return tensor.detach().cpu().numpy()
    return np.asarray(ops.convert_to_numpy(tensor))


def errors(actual, expected):
    """(norm-wise relative error, largest error as a share of the largest value)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {expected.shape}")
    difference = np.abs(actual - expected)
    if not np.isfinite(difference).all():
        return np.inf, np.inf
    if not expected.size or not difference.any():
        return 0.0, 0.0
    norm = max(np.linalg.norm(expected), SMALLEST_SCALE * expected.size**0.5)
    largest = max(np.abs(expected).max(), SMALLEST_SCALE)
    return np.linalg.norm(difference) / norm, difference.max() / largest


def assert_close(actual, expected, tolerance, what=""):
    relative, largest = errors(actual, expected)
    if max(relative, largest) > tolerance:
        raise AssertionError(
            f"{what}: relative error {relative:.2e}, "
            f"largest error over largest value {largest:.2e}, tolerance {tolerance:.0e}"
        )


def assert_gradients_close(actual, expected):
    """Every gradient, each by its name."""
    if set(actual) != set(expected):
        raise AssertionError(f"gradients differ in kind: {sorted(actual)} and {sorted(expected)}")
    for name, gradient in actual.items():
        kind = "gradient_of_a_sum" if name in SUMMED else "gradient"
        assert_close(gradient, expected[name], TOLERANCES[kind], f"gradient of {name}")


# --- what differs between backends ---------------------------------------------------------------


def compiled(fn):
    """`fn` as the backend runs it best on many small shapes: jitted on jax, eager elsewhere."""
    if BACKEND == "jax":
        import jax

        # Like the flag in conftest.py, and only with it, this halves the time to compile.
        quick = "XLA_FLAGS" in os.environ and jax.default_backend() == "cpu"
        options = {"xla_cpu_use_fusion_emitters": False} if quick else None
        return jax.jit(fn, compiler_options=options)
    return fn


@functools.lru_cache(maxsize=1)
def jax_gradients(fn, count):
    """One compilation for several calls of the same function."""
    import jax

    return compiled(jax.value_and_grad(fn, argnums=tuple(range(count)), has_aux=True))


def value_and_gradients(fn, *arrays):
    """(output, list of d scalar / d array) as NumPy, of `fn(*tensors) = (scalar, output)`."""
    if BACKEND == "torch":
        import torch

        leaves = [
            ops.convert_to_tensor(array).detach().clone().requires_grad_() for array in arrays
        ]
        scalar, output = fn(*leaves)
        found = torch.autograd.grad(scalar, leaves, allow_unused=True)
        found = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        ]
        return output.detach().cpu().numpy(), [grad.cpu().numpy() for grad in found]
    if BACKEND == "jax":
        run = jax_gradients(fn, len(arrays))
        (_, output), found = run(*(ops.convert_to_tensor(array) for array in arrays))
        return np.asarray(output), [np.asarray(grad) for grad in found]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        leaves = [tf.convert_to_tensor(array) for array in arrays]
        with tf.GradientTape() as tape:
            for leaf in leaves:
                tape.watch(leaf)
            scalar, output = fn(*leaves)
        found = tape.gradient(scalar, leaves, unconnected_gradients="zero")
        return output.numpy(), [tf.convert_to_tensor(grad).numpy() for grad in found]
    raise NotImplementedError(f"No gradients on this backend. Received: backend={BACKEND}")


def attention_gradients(run, inputs, discoverability=True):
    """Output and gradients by name of `run(query, key, value, u, kappa, gamma)`."""
    arrays = inputs.arrays()
    if not discoverability:
        arrays["discoverability"] = np.zeros_like(arrays["discoverability"])

    def scalar(*tensors):
        output = run(*tensors)
        return ops.sum(output * ops.convert_to_tensor(inputs.cotangent)), output

    output, gradients = value_and_gradients(scalar, *arrays.values())
    return output, dict(zip(arrays, gradients, strict=True))


# --- running the package -------------------------------------------------------------------------


def attention(inputs, options, implementation, *, seed=None, padding_mask=None, graph=None):
    """`keras_rwr.ops.rwr_attention` as a function of `oracle_gradients.NAMES`' tensors."""
    if seed is not None:
        seed = ops.convert_to_tensor(np.array(seed, "int32"))
    if padding_mask is None:
        padding_mask = inputs.padding_mask
    if padding_mask is not None:
        padding_mask = ops.convert_to_tensor(padding_mask)

    def run(query, key, value, discoverability, concentration, lens_strength):
        return rwr_attention(
            query,
            key,
            value,
            discoverability=discoverability,
            concentration=concentration,
            lens_strength=lens_strength,
            padding_mask=padding_mask,
            seed=seed,
            graph=graph,
            implementation=implementation,
            **options,
        )

    return run


@functools.cache
def run_case(case, implementation):
    """(output, gradients by name) of one case: made once, looked at by several tests."""
    options = dict(case.options)
    seed = case.seed if options.get("dropout") else None
    run = attention(case.inputs, options, implementation, seed=seed)
    return attention_gradients(run, case.inputs, case.discoverability)
