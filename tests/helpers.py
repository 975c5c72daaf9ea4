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

from keras_rwr import graph as graphs

BACKEND = keras.backend.backend()

# What runs a call of fusion "sum" on a CPU, and what the package takes there by default.
IMPLEMENTATIONS = ("reference", "portable")
DEFAULT = "portable"

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

# All inputs are of order 1. Gradients far below this are exact zeros plus roundings of terms that
# cancel.
SMALLEST_SCALE = 0.1

CASE_DEFAULTS = {
    "batch": 2,
    "tokens": 29,
    "heads": 2,
    "kv_heads": None,  # as many as heads
    "head_dim": 7,
    "value_dim": 5,
    "graph_heads": None,  # each head has a graph of its own
    "graph_dim": 6,
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one case, float32 as the package gets them; `None` for what takes no part."""

    query: np.ndarray  # (B, S, N, H)
    key: np.ndarray  # (B, S, M, H)
    value: np.ndarray  # (B, S, M, V)
    cotangent: np.ndarray  # (B, S, N, V)
    concentration: np.ndarray  # (N,) or (G,)
    graph_query: np.ndarray | None = None  # (B, S, G, F)
    graph_key: np.ndarray | None = None  # (B, S, G, F)
    discoverability: np.ndarray | None = None  # (N, H) or (G, F)
    lens_strength: np.ndarray | None = None  # (N,), unless there are hop weights
    hop_weights: np.ndarray | None = None  # (T + 1,), (N, T + 1) or (B, S, N, T + 1)
    padding_mask: np.ndarray | None = None  # (B, S) bool
    segment_ids: np.ndarray | None = None  # (B, S) int32

    def arrays(self):
        """The differentiable arrays by name, in `oracle_gradients.NAMES` order."""
        return self.given(*oracle_gradients.NAMES)

    def given(self, *names):
        """Those of the named arrays that take part, by name."""
        arrays = {name: getattr(self, name) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}

    def graph_arguments(self):
        """What `oracle.graphs` takes beside queries, keys and options."""
        return self.given(
            "graph_query",
            "graph_key",
            "discoverability",
            "concentration",
            "padding_mask",
            "segment_ids",
        )

    def labels(self):
        """The segment of each token, `oracle.PADDING` at padding, (B, S)."""
        return oracle.token_labels(self.query.shape[:2], self.padding_mask, self.segment_ids)

    def real(self):
        return self.labels() != oracle.PADDING


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: sizes, options and which tensors take part."""

    name: str
    options: tuple = ()
    sizes: tuple = ()
    padding: str | None = None  # "right", "left", "holes" or "row"
    segments: bool = False
    discoverability: bool = False
    hop_weights: str | None = None  # "shared", "head" or "token"
    extreme: bool = False  # concentrations of 64, biases beyond 8, vectors far from length 1
    seed: tuple = (0, 0)
    far: bool = False  # whether the case promises edges outside the window

    def __str__(self):
        return self.name

    @property
    def oracle_options(self):
        return oracle.Options(**dict(self.options))

    @property
    def is_first_edition(self):
        """Whether the case asks for nothing that came after 0.1.0."""
        sizes = dict(self.sizes)
        new = (self.segments, self.hop_weights, sizes.get("kv_heads"), sizes.get("graph_heads"))
        return self.oracle_options.self_edges and not any(new)

    @functools.cached_property
    def inputs(self):
        return self.draw()

    def draw(self):
        """The first seeded draw that float32 can decide as float64 does.

        A cosine within 1e-5 of the threshold may fall on either side of it, a block's score within
        1e-5 of another's may win or lose, a bias may or may not be clipped, and a degree under
        0.01 amplifies every rounding more than 100 times. None of them says anything about the
        code.
        """
        for attempt in range(100):
            rng = np.random.default_rng([zlib.crc32(self.name.encode()), attempt])
            inputs = draw_inputs(
                rng,
                padding=self.padding,
                segments=self.segments,
                discoverability=self.discoverability,
                hop_weights=self.hop_weights,
                steps=self.oracle_options.steps,
                extreme=self.extreme,
                **{**CASE_DEFAULTS, **dict(self.sizes)},
            )
            if is_well_conditioned(inputs, self.oracle_options):
                return inputs
        raise RuntimeError(f"No well-conditioned inputs in 100 draws. Received: case={self.name}")

    def tensor_arguments(self):
        """The tensor-valued options as NumPy, for functions of the package and of the oracle."""
        walk = self.inputs.given("lens_strength", "hop_weights")
        return {**self.inputs.graph_arguments(), **walk}

    @functools.cached_property
    def graphs(self):
        """The oracle's graphs, [batch][graph]."""
        arguments = self.inputs.graph_arguments()
        return oracle.graphs(self.inputs.query, self.inputs.key, self.oracle_options, **arguments)

    @functools.cached_property
    def neighbors(self):
        """The oracle's neighbour blocks, (B, G, S, topk / neighbor_block)."""
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
        """Output and gradients by name, from the independent formula."""
        return oracle_gradients.gradients(
            self.inputs.arrays(),
            self.inputs.cotangent,
            options=self.oracle_options,
            labels=self.inputs.labels(),
            neighbors=self.neighbors,
            seed=self.seed,
        )


def stack(graphs, field):
    """One field of the oracle's nested graphs as (B, G, ...)."""
    return np.stack([np.stack([getattr(graph, field) for graph in row]) for row in graphs])


def draw_inputs(
    rng,
    *,
    batch,
    tokens,
    heads,
    kv_heads,
    head_dim,
    value_dim,
    graph_heads,
    graph_dim,
    padding=None,
    segments=False,
    discoverability=False,
    hop_weights=None,
    steps=4,
    extreme=False,
):
    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    def leaning(key):
        # Queries lean on keys, as they do in a trained model, so that degrees differ from token to
        # token.
        return (normal(*key.shape) + 0.7 * key).astype("float32")

    kv_heads = heads if kv_heads is None else kv_heads
    key = normal(batch, tokens, kv_heads, head_dim)
    query = leaning(oracle.repeat_heads(key, heads))
    if extreme:
        query[:, 1::5], key[:, 2::5] = 0.01 * query[:, 1::5], 0.01 * key[:, 2::5]
    drawn = {
        "query": query,
        "key": key,
        "value": normal(batch, tokens, kv_heads, value_dim),
        "cotangent": normal(batch, tokens, heads, value_dim),
        "padding_mask": draw_padding(rng, padding, batch, tokens),
    }
    if graph_heads is not None:
        scale = draw_scale(rng, batch, tokens) if extreme else 1.0
        graph_key = normal(batch, tokens, graph_heads, graph_dim)
        drawn["graph_query"] = (scale * leaning(graph_key)).astype("float32")
        drawn["graph_key"] = (scale * graph_key).astype("float32")
    graphs, size = (heads, head_dim) if graph_heads is None else (graph_heads, graph_dim)
    if discoverability:
        strength = 2.0 if extreme else 0.5
        drawn["discoverability"] = (strength * normal(graphs, size)).astype("float32")
    kappa = rng.uniform(2.0, 25.0, graphs)
    drawn["concentration"] = np.where(extreme, 64.0, kappa).astype("float32")
    if hop_weights is None:
        drawn["lens_strength"] = rng.uniform(0.2, 0.8, heads).astype("float32")
    else:
        shapes = {"shared": (), "head": (heads,), "token": (batch, tokens, heads)}
        drawn["hop_weights"] = draw_hop_weights(rng, (*shapes[hop_weights], steps + 1))
    if segments:
        drawn["segment_ids"] = draw_segments(rng, batch, tokens)
    return Inputs(**drawn)


def draw_scale(rng, batch, tokens):
    """Lengths of vectors, (B, S, 1, 1): squares of most leave float32's range, two are nothing."""
    scale = 10.0 ** rng.uniform(-2.0, 30.0, (batch, tokens, 1, 1))
    scale[:, 1], scale[:, 2] = 0.0, 1e-30
    return scale


def draw_hop_weights(rng, shape):
    """Of either sign for each token; else positive, as a reciprocal mix wants them, but for a 0."""
    if len(shape) > 2:
        return rng.normal(0.4, 0.4, shape).astype("float32")
    weights = rng.uniform(0.1, 0.9, shape).astype("float32")
    if len(shape) == 2:
        weights[0, shape[1] // 2] = 0.0
    return weights


def draw_segments(rng, batch, tokens):
    """Three documents in each sequence, the last with the number of the first."""
    first, second = np.sort(rng.integers(tokens // 4, tokens - tokens // 4, (2, batch, 1)), axis=0)
    place = np.arange(tokens)
    return np.where((place >= first) & (place < second), -3, 5).astype("int32")


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


def is_well_conditioned(inputs, options):
    threshold = oracle.edge_threshold(options)
    labels, arguments = inputs.labels(), inputs.graph_arguments()
    query, key = oracle.graph_vectors(
        inputs.query, inputs.key, inputs.graph_query, inputs.graph_key
    )
    for b, g in np.ndindex(query.shape[0], query.shape[2]):
        query_unit = oracle.unit_rows(query[b, :, g])
        key_unit = oracle.unit_rows(key[b, :, g])
        if np.isfinite(threshold) and np.abs(query_unit @ key_unit.T - threshold).min() < 1e-5:
            return False
        if options.topk and selection_margin(query_unit, key_unit, labels[b], options) < 1e-5:
            return False
    if inputs.discoverability is not None:
        bias = np.einsum("bjgf,gf->bjg", key, inputs.discoverability)
        if np.abs(np.abs(bias) - 8.0).min() < 1e-4:
            return False
    if options.edge_weight == "exponential":
        return True
    graphs = oracle.graphs(inputs.query, inputs.key, options, **arguments)
    return stack(graphs, "degree").min() > 1e-2


def selection_margin(query_unit, key_unit, labels, options):
    """Smallest gap between the last block taken and the first one left."""
    slots = options.topk // options.neighbor_block
    margin = np.inf
    for i in range(len(query_unit)):
        candidates = oracle.block_candidates(i, query_unit, key_unit, labels, options)
        scores = sorted((score for score, _ in candidates), reverse=True)
        if len(scores) > slots:
            margin = min(margin, scores[slots - 1] - scores[slots])
    return margin


# --- the cases -----------------------------------------------------------------------------------


def case(name, *, sizes=None, far=True, **arguments):
    """A `Case` of its fields, options of the operation and sizes, all by name."""
    fields = {field.name for field in dataclasses.fields(Case)}
    sizes = {**(sizes or {}), **{x: arguments[x] for x in CASE_DEFAULTS if x in arguments}}
    options = {x: y for x, y in arguments.items() if x not in fields and x not in CASE_DEFAULTS}
    return Case(
        name=name,
        options=tuple(sorted(options.items())),
        sizes=tuple(sorted(sizes.items())),
        far=far,
        **{x: y for x, y in arguments.items() if x in fields},
    )


SINGLE = {"window": 3, "topk": 5, "neighbor_block": 1}
FOURS = {"window": 5, "topk": 8, "neighbor_block": 4}
SIXTEENS = {"window": 17, "topk": 32, "neighbor_block": 16}
LONG = {"batch": 1, "tokens": 97, "heads": 1}
MEDIUM = {"batch": 1, "tokens": 53}
GROUPED = {"heads": 4, "kv_heads": 2}
TWO_OF_FOUR = {**GROUPED, "graph_heads": 2}
R5 = {"graph_heads": 1, "edge_weight": "exponential", "self_edges": False, "hop_weights": "token"}

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
        "exponential threshold", edge_weight="exponential", threshold=-0.2, is_causal=True, **SINGLE
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

SECOND_EDITION = [
    case("R5 causal", is_causal=True, **R5, **SINGLE),
    case("R5 bidirectional", **R5, **SINGLE),
    case("R5 padding right", padding="right", is_causal=True, **R5, **SINGLE),
    case("R5 padding left", padding="left", is_causal=True, **R5, **SINGLE),
    case("R5 padding holes", padding="holes", **R5, **SINGLE),
    case("R5 segments", padding="holes", segments=True, is_causal=True, **R5, **SINGLE),
    case("R5 blocks", is_causal=True, sizes=MEDIUM, **R5, **FOURS),
    case("R5 one token", tokens=1, far=False, is_causal=True, **R5, **SINGLE),
    case(
        "two graphs for four heads",
        hop_weights="head",
        discoverability=True,
        is_causal=True,
        **TWO_OF_FOUR,
        **SINGLE,
    ),
    case(
        "grouped heads", reversible=True, discoverability=True, is_causal=True, **GROUPED, **SINGLE
    ),
    case(
        "grouped heads dropout",
        edge_weight="exponential",
        heads=3,
        kv_heads=1,
        dropout=0.2,
        seed=(3, 5),
        **SINGLE,
    ),
    case("hop weights shared", hop_weights="shared", steps=2, is_causal=True, **SINGLE),
    case("hop weights of a head", hop_weights="head", edge_weight="exponential", **SINGLE),
    case("hop weights of a token", hop_weights="token", padding="right", **SINGLE),
    case(
        "hop weights reciprocal",
        hop_weights="head",
        reversible=True,
        discoverability=True,
        is_causal=True,
        **SINGLE,
    ),
    case("no self edges", self_edges=False, is_causal=True, **SINGLE),
    case("no self edges reversible", self_edges=False, reversible=True, **SINGLE),
    case(
        "discoverable graph",
        graph_heads=1,
        edge_weight="exponential",
        reversible=True,
        discoverability=True,
        padding="right",
        **SINGLE,
    ),
    case("segments causal", segments=True, is_causal=True, discoverability=True, **SINGLE),
    case("segments bidirectional", segments=True, reversible=True, **SINGLE),
    case("segments without neighbours", segments=True, window=4, topk=0, far=False),
    case(
        "isolated tokens",
        edge_weight="exponential",
        threshold=0.35,
        self_edges=False,
        reversible=True,
        discoverability=True,
        is_causal=True,
        **SINGLE,
    ),
    case(
        "window 0 without self edges",
        self_edges=False,
        window=0,
        topk=3,
        neighbor_block=1,
        reversible=True,
    ),
    case(
        "extreme graph",
        extreme=True,
        graph_heads=1,
        edge_weight="exponential",
        discoverability=True,
        is_causal=True,
        **SINGLE,
    ),
    case(
        "extreme reversible",
        extreme=True,
        edge_weight="exponential",
        reversible=True,
        discoverability=True,
        self_edges=False,
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


def random_cases(count, second_edition=False):
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
        if second_edition:
            options["self_edges"] = pick([False, True])
            options["segments"] = block == 1 and pick([False, True])
            options["hop_weights"] = pick([None, "shared", "head", "token"])
            options.update(pick([{}, {"kv_heads": 1}, {"graph_heads": 1}, TWO_OF_FOUR, GROUPED]))
            if options["hop_weights"] is not None:
                del options["alpha"]
            if options["hop_weights"] == "token":
                options["reciprocal_beta"] = 1.0
        cases.append(
            case(
                f"random {len(cases)}{' second edition' if second_edition else ''}",
                tokens=53 if block == 16 else 29,
                batch=1,
                head_dim=16,
                padding=pick([None, "right", "left", "holes"]),
                discoverability=pick([False, True]),
                seed=(int(rng.integers(2**31)), int(rng.integers(2**31))),
                far=False,
                **options,
            )
        )
    return cases


RANDOM = random_cases(8) + random_cases(8, second_edition=True)
SUM_CASES = HAND_CHOSEN + SECOND_EDITION + RANDOM
# Those that the active backend's kernels take.
KERNEL_CASES = SUM_CASES
if BACKEND == "jax":
    KERNEL_CASES = [
        case
        for case in SUM_CASES
        if case.is_first_edition
        and not (
            case.oracle_options.reversible and case.oracle_options.edge_weight == "exponential"
        )
    ]
ALL_CASES = SUM_CASES + SOFTMAX


def by_name(name):
    (found,) = [case for case in ALL_CASES if case.name == name]
    return found


# The ablation steps with their windows scaled down to the tests' lengths.
ABLATION = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "discoverability": True},
    "R4": {"edge_weight": "exponential"},
    "R5": R5,
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
        # Activations and weights of each token have gradients of their own.
        kind = "gradient" if np.ndim(gradient) == 4 else "gradient_of_a_sum"
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


def attention_gradients(run, inputs):
    """Output and gradients by name of `run(**tensors)`, for the tensors that take part."""
    arrays = inputs.arrays()

    def scalar(*tensors):
        output = run(**dict(zip(arrays, tensors, strict=True)))
        return ops.sum(output * ops.convert_to_tensor(inputs.cotangent)), output

    output, gradients = value_and_gradients(scalar, *arrays.values())
    return output, dict(zip(arrays, gradients, strict=True))


# --- running the package -------------------------------------------------------------------------


def attention(inputs, options, implementation, *, seed=None, padding_mask=None, graph=None):
    """`keras_rwr.ops.rwr_attention` as a function of the tensors in `oracle_gradients.NAMES`."""
    # The oracle's own tests run without the package.
    from keras_rwr.ops import rwr_attention

    if seed is not None:
        seed = ops.convert_to_tensor(np.array(seed, "int32"))
    masks = inputs.given("padding_mask", "segment_ids")
    if padding_mask is not None:
        masks["padding_mask"] = padding_mask
    masks = {name: ops.convert_to_tensor(mask) for name, mask in masks.items()}

    def run(query, key, value, **tensors):
        return rwr_attention(
            query,
            key,
            value,
            **tensors,
            **masks,
            **options,
            seed=seed,
            graph=graph,
            implementation=implementation,
        )

    return run


BUILDING = (
    "window",
    "topk",
    "neighbor_block",
    "threshold",
    "edge_weight",
    "self_edges",
    "is_causal",
)


def graph_vectors(case):
    """The queries and keys that the graph of a case is built from."""
    inputs = case.inputs
    vectors = oracle.graph_vectors(inputs.query, inputs.key, inputs.graph_query, inputs.graph_key)
    return [x.astype("float32") for x in vectors]


def build_graph(case, query=None, key=None):
    """W, S and P of a case, of the public graph functions; W again for S without `reversible`."""
    inputs = case.inputs
    if query is None:
        query, key = graph_vectors(case)
    options = {name: value for name, value in case.options if name in BUILDING}
    given = inputs.given("padding_mask", "segment_ids")
    weight = graphs.build_sparse_w(
        query, key, concentration=inputs.concentration, **given, **options
    )
    symmetric = graphs.reversible(weight) if case.oracle_options.reversible else weight
    return weight, symmetric, graphs.normalize_to_p(symmetric, graph_bias(case))


def graph_bias(case):
    """The log-discoverability b of a case, `(B, S, G)`, or None."""
    if not case.discoverability:
        return None
    _, key = graph_vectors(case)
    return np.einsum("bjgf,gf->bjg", key, case.inputs.discoverability).clip(-8, 8)


@functools.cache
def run_case(case, implementation):
    """(output, gradients by name) of one case: made once, looked at by several tests."""
    options = dict(case.options)
    seed = case.seed if options.get("dropout") else None
    run = attention(case.inputs, options, implementation, seed=seed)
    return attention_gradients(run, case.inputs)
