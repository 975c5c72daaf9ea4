"""`RWRAttention` as a layer: what it computes, its weights, its configuration, its training."""

import contextlib
import inspect

import keras
import numpy as np
import oracle
import pytest
from helpers import BACKEND, assert_close, compiled
from keras import ops
from keras.src.testing import TestCase

import keras_rwr
from keras_rwr import Options, RWRAttention
from keras_rwr._core import ClipToRange
from keras_rwr._tokens import Masks
from keras_rwr.options import Tuning

BATCH, LENGTH, DIM, HEADS, KEY_DIM = 2, 23, 12, 4, 5
SHAPE = (BATCH, LENGTH, DIM)

# A window and neighbours that matter at this length.
SMALL = {"window": 3, "topk": 4, "neighbor_block": 2}
# The window holds everything and the walk is off: plain attention.
PLAIN = {"window": LENGTH, "lens_strength": 0.0}

GRAPH = {"graph_heads": 1, "graph_dim": 6, "neighbor_block": 1}
R5 = {**GRAPH, "edge_weight": "exponential", "self_edges": False, "stopping": "gated"}
ABLATION = {
    "R1": {},
    "R2": {"reversible": True},
    "R3": {"reversible": True, "reciprocal_beta": 0.7, "use_discoverability": True},
    "R4": {"edge_weight": "exponential"},
    "R5": R5,
}
# Every weight that a walk can have, in two layers.
EXTRAS = {**R5, "use_discoverability": True}
LENS = {"edge_weight": "exponential", "use_discoverability": True, "trainable_lens": True}

NO_MASKS = Masks(None, None, False)

# float32 roundings of two orders of the same few sums.
ATOL = 1e-5

HOLES = np.random.default_rng(7).uniform(size=(BATCH, LENGTH)) > 0.3
HOLES[:, 0] = True
SEGMENTS = np.repeat([[3, -1, 3, 0]], BATCH, axis=0).repeat([4, 8, 3, 8], axis=1).astype("int32")


def make_inputs(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numpy(x):
    """A copy of a tensor or a variable, which training may change in place."""
    return np.array(ops.convert_to_numpy(x))


def run(layer, *inputs, **arguments):
    """A call; on jax as one program, since each of its operations alone would be compiled too."""
    return compiled(lambda *inputs: layer(*inputs, **arguments))(*inputs)


def layer_of(**options):
    return RWRAttention(HEADS, KEY_DIM, **{**SMALL, **options})


def built(layer, seed=3):
    """Builds the layer if need be, and draws every weight, those of the walk too."""
    if not layer.built:
        layer.build(SHAPE, SHAPE)
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.name == "log_concentration":
            weight.assign(np.log(rng.uniform(5.0, 25.0, weight.shape)))
        elif weight.name in ("hop_weights", "lens_strength"):
            weight.assign(rng.uniform(0.1, 0.9, weight.shape))
        else:
            weight.assign(0.4 * rng.normal(size=weight.shape))
    return layer


def paths(layer):
    """The weights by their paths within the layer."""
    return {weight.path.rpartition(f"{layer.name}/")[2]: weight for weight in layer.weights}


def copy_weights(source, target):
    old, new = paths(source), paths(target)
    assert list(old) == list(new)
    for name, weight in new.items():
        weight.assign(old[name])


def model_of(layer, **call):
    x = keras.Input((None, DIM))
    return keras.Model(x, layer(x, x, **call))


def assert_same(a, b, atol=ATOL):
    np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=atol)


def float64_allowed():
    """A context in which tensors may be float64, which takes a switch on jax."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


class Expected:
    """What a call gives in float64, from the layer's weights and the oracle."""

    def __init__(self, layer, query, value=None, key=None, is_causal=False, **masks):
        value = query if value is None else value
        options, weights = layer.options, paths(layer)
        self.weights = {name: np.float64(numpy(weight)) for name, weight in weights.items()}
        # The query and what depends on each token come from the first input.
        self.query = self.project(query, "query")
        self.key = self.project(value if key is None else key, "key")
        self.value = self.project(value, "value")
        names = set(oracle.Options.__dataclass_fields__) & set(Options.names())
        self.options = oracle.Options(
            **{name: getattr(options, name) for name in names}, is_causal=is_causal
        )
        kappa = self.walk("log_concentration")
        self.graph = {
            "concentration": options.concentration if kappa is None else np.exp(kappa),
            "discoverability": self.walk("discoverability"),
            **masks,
        }
        if options.graph_heads is not None:
            plain = self.project(query, "walk/graph_key")
            self.graph["graph_query"] = self.project(query, "walk/graph_query")
            self.graph["graph_key"] = oracle.convolve(
                plain, self.walk("graph_convolution"), **masks
            )
        lens = self.walk("lens_strength")
        self.theta = {"lens_strength": options.lens_strength if lens is None else lens}
        if options.stopping != "restart":
            self.theta = {"hop_weights": self.walk("hop_weights")}
        if options.stopping == "gated":
            self.theta["hop_weights"] = self.theta["hop_weights"] + self.project(
                query, "walk/hop_gate"
            )

    def walk(self, name):
        return self.weights.get(f"walk/{name}")

    def project(self, x, name):
        """`(B, S, dim)` to `(B, S, n, F)` by a kernel of the layer, and its bias."""
        kernel = self.weights.get(f"{name}/kernel", self.weights.get(name))
        return np.einsum("bsd,dnf->bsnf", np.float64(x), kernel) + self.weights.get(
            f"{name}/bias", 0.0
        )

    def scores(self):
        return oracle.attention_scores(
            self.query, self.key, self.options, **self.theta, **self.graph
        )

    def output(self):
        heads = np.einsum("bnij,bjnv->binv", self.scores(), self.value)
        output = np.einsum("bsnv,nve->bse", heads, self.weights["attention_output/kernel"])
        return output + self.weights["attention_output/bias"]


# --- what it computes ----------------------------------------------------------------------------

# A list of heads, where it is not one number.
CONCENTRATIONS, LENSES = [2.0, 3.0, 4.0, 64.0], [0.1, -0.2, 0.0, 0.4]
COMPUTED = {
    **ABLATION,
    "trained lens": LENS,
    "numbers of a head": {**LENS, "concentration": CONCENTRATIONS, "lens_strength": LENSES},
    "learned": {"stopping": "learned", "steps": 2},
    "learned reciprocal": {"stopping": "learned", "reversible": True, "self_edges": False},
    "gated": {"stopping": "gated", "steps": 3},
    "gated own value": {"stopping": "gated", "steps": 0},
    "no self edges": {"self_edges": False, "neighbor_block": 1},
    "two graphs": {**R5, "graph_heads": 2, "use_discoverability": True, "graph_convolution": 2},
    "a graph a head": {**GRAPH, "graph_heads": HEADS, "reversible": True, "alpha": 0.4},
    "discoverable graph": EXTRAS,
    "graph of blocks": {**R5, "neighbor_block": 2, "graph_convolution": 7},
    "softmax": {"fusion": "softmax", "use_discoverability": True},
}


@pytest.mark.costly
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_equals_the_definition(name, is_causal):
    layer = built(layer_of(**COMPUTED[name]))
    x = make_inputs()
    masks = {"padding_mask": HOLES}
    if layer.options.neighbor_block == 1:
        masks["segment_ids"] = SEGMENTS
    output = run(
        layer,
        x,
        x,
        use_causal_mask=is_causal,
        attention_mask=HOLES,
        segment_ids=masks.get("segment_ids"),
    )
    assert_close(numpy(output), Expected(layer, x, is_causal=is_causal, **masks).output(), 1e-5)


def test_graphs_and_gates_come_from_the_query():
    layer = built(layer_of(**EXTRAS, seed=1))
    query, value, key = (make_inputs(seed) for seed in range(3))
    expected = Expected(layer, query, value, key, is_causal=True).output()
    assert_close(numpy(run(layer, query, value, key, use_causal_mask=True)), expected, 1e-5)
    expected = Expected(layer, query, value).output()
    assert_close(numpy(run(layer, query, value)), expected, 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"value_dim": 7, "use_gate": True, "dropout": 0.2, "attention_axes": 1},
        {"use_bias": False, "output_shape": (4, 3)},
    ],
    ids=["plain", "gate", "shape"],
)
def test_equals_multi_head_attention(is_causal, arguments):
    keras.utils.set_random_seed(1)
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM, **arguments))
    layer = RWRAttention(HEADS, KEY_DIM, **arguments, **PLAIN)
    layer.build(SHAPE, SHAPE)
    copy_weights(stock, layer)
    x = make_inputs()
    for padding in (None, HOLES):
        mask = None if padding is None else padding[:, None, :]
        expected = numpy(run(stock, x, x, attention_mask=mask, use_causal_mask=is_causal))
        output = numpy(run(layer, x, x, attention_mask=mask, use_causal_mask=is_causal))
        assert output.shape == expected.shape
        real = np.ones((BATCH, LENGTH), bool) if padding is None else padding
        assert_same(output[real], expected[real])


def test_scores_equal_those_of_multi_head_attention():
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    layer = RWRAttention(HEADS, KEY_DIM, **PLAIN)
    layer.build(SHAPE, SHAPE)
    copy_weights(stock, layer)
    x = make_inputs()
    _, expected = run(stock, x, x, return_attention_scores=True, use_causal_mask=True)
    _, scores = run(layer, x, x, return_attention_scores=True, use_causal_mask=True)
    assert_same(scores, expected)


def test_query_key_and_value_may_have_different_features():
    value_shape, key_shape = (BATCH, LENGTH, 9), (BATCH, LENGTH, 4)
    stock = keras.layers.MultiHeadAttention(HEADS, KEY_DIM)
    layer = RWRAttention(HEADS, KEY_DIM, **PLAIN)
    stock.build(SHAPE, value_shape, key_shape)
    layer.build(SHAPE, value_shape, key_shape)
    copy_weights(stock, layer)
    arguments = make_inputs(), make_inputs(1, value_shape), make_inputs(2, key_shape)
    assert_same(run(layer, *arguments), run(stock, *arguments))


def test_made_from_the_config_of_multi_head_attention():
    stock = keras.layers.MultiHeadAttention(HEADS, KEY_DIM, use_bias=False, name="attention")
    layer = RWRAttention.from_config(stock.get_config())
    assert layer.name == "attention"
    assert not layer.use_bias
    assert layer.options == Options()
    assert layer.tuning == Tuning()


# --- how it begins -------------------------------------------------------------------------------


@pytest.mark.parametrize("graph_heads", [1, 2, HEADS])
def test_an_untrained_graph_links_a_token_to_what_followed_it_before(graph_heads):
    """One walker a token, one step, one edge beyond the window, tokens told apart by one number."""
    tokens = np.array([7, 3, 5, 0, 9, 7, 2, 8, 3, 1, 6, 4, 10, 7, 11, 5])
    options = {**R5, "graph_heads": graph_heads, "graph_dim": 16, "topk": 1, "steps": 1}
    layer = RWRAttention(HEADS, KEY_DIM, **{**options, "window": 1})
    x = np.eye(DIM, dtype="float32")[tokens][None]
    _, scores = run(layer, x, x, use_causal_mask=True, return_attention_scores=True)
    scores = numpy(scores)[0]  # (N, S, S)
    repeated = [i for i in range(len(tokens)) if tokens[i] in tokens[: max(0, i - 2)]]
    assert repeated == [5, 8, 13, 15]
    for i in repeated:
        before = [j for j in range(i - 2) if tokens[j] == tokens[i]]
        # Of several the walker takes the first: their cosines are all 1.
        following = scores[:, i, before[0] + 1]
        assert (following > 0.9).all()
        far = scores[:, i, : i - 1].sum(-1)
        assert_same(far, following)


def test_two_steps_of_an_untrained_graph_follow_two_links():
    """The second 0 leads to the 1 behind the first, and that to the 2 behind the first 1."""
    tokens = np.array([1, 2, 3, 4, 0, 1, 5, 6, 7, 0])
    options = {**R5, "graph_dim": 16, "steps": 2, "topk": 1, "window": 0}
    layer = RWRAttention(HEADS, KEY_DIM, **options)
    x = np.eye(DIM, dtype="float32")[tokens][None]
    _, scores = run(layer, x, x, use_causal_mask=True, return_attention_scores=True)
    expected = np.zeros((HEADS, len(tokens)))
    expected[:, 9] = 1.0 + 0.5  # LOCAL and no step
    expected[:, 5], expected[:, 1] = 1.0, 0.5
    assert_same(numpy(scores)[0, :, 9], expected)


def test_weights_and_their_paths():
    dense = [f"{x}/{y}" for x in ("query", "key", "value") for y in ("kernel", "bias")]
    dense += ["attention_output/kernel", "attention_output/bias"]
    tables = {
        (): {},
        (("steps", 0), ("graph_heads", 1), ("edge_weight", "exponential")): {},
        tuple(LENS.items()): {
            "log_concentration": (HEADS,),
            "discoverability": (HEADS, KEY_DIM),
            "lens_strength": (HEADS,),
        },
        tuple(EXTRAS.items()): {
            "graph_query": (DIM, 1, 6),
            "graph_key": (DIM, 1, 6),
            "graph_convolution": (4, 1, 6),
            "discoverability": (1, 6),
            "log_concentration": (1,),
            "hop_weights": (HEADS, 5),
            "hop_gate": (DIM, HEADS, 5),
        },
        (("stopping", "learned"), ("steps", 2)): {"hop_weights": (HEADS, 3)},
        (("graph_heads", 2), ("graph_convolution", 2)): {
            "graph_query": (DIM, 2, 64),
            "graph_key": (DIM, 2, 64),
            "graph_convolution": (2, 2, 64),
        },
    }
    for options, extra in tables.items():
        layer = layer_of(**dict(options))
        layer.build(SHAPE, SHAPE)
        found = paths(layer)
        assert set(found) == set(dense) | {f"walk/{name}" for name in extra}
        for name, shape in extra.items():
            assert found[f"walk/{name}"] is getattr(layer.walk, name)
            assert tuple(found[f"walk/{name}"].shape) == shape
            assert found[f"walk/{name}"].trainable
        if not extra:
            assert list(found) == dense
        assert {weight.path for weight in layer.extra_weights} == {
            f"{layer.name}/walk/{name}" for name in extra
        }


def test_initial_values():
    layer = layer_of(**EXTRAS, concentration=7.0)
    layer.build(SHAPE, SHAPE)
    walk = layer.walk
    np.testing.assert_array_equal(numpy(walk.graph_key), numpy(walk.graph_query))
    assert numpy(walk.graph_query).std() > 0.1
    shift = np.zeros((4, 1, 6))
    shift[1] = 1.0
    np.testing.assert_array_equal(numpy(walk.graph_convolution), shift)
    np.testing.assert_array_equal(numpy(walk.hop_weights), [[0.5, 1.0, 0.5, 0.5, 0.5]] * HEADS)
    assert not numpy(walk.hop_gate).any()
    assert not numpy(walk.discoverability).any()
    np.testing.assert_allclose(numpy(walk.log_concentration), np.log([7.0]), rtol=1e-6)

    layer = layer_of(**LENS, concentration=CONCENTRATIONS, lens_strength=LENSES)
    layer.build(SHAPE, SHAPE)
    np.testing.assert_allclose(numpy(layer.walk.concentration), CONCENTRATIONS, rtol=1e-5)
    np.testing.assert_allclose(numpy(layer.walk.lens_strength), LENSES, rtol=1e-6)
    # The initializer of the layer's kernels is that of the graph's.
    ones = layer_of(**GRAPH, kernel_initializer="ones")
    ones.build(SHAPE, SHAPE)
    np.testing.assert_array_equal(numpy(ones.walk.graph_query), np.ones((DIM, 1, 6)))


def test_gates_begin_closed():
    gated, learned = layer_of(**R5), layer_of(**{**R5, "stopping": "learned"})
    for layer in (gated, learned):
        layer.build(SHAPE, SHAPE)
    for name, weight in paths(learned).items():
        weight.assign(paths(gated)[name])
    x = make_inputs()
    np.testing.assert_array_equal(numpy(run(gated, x, x)), numpy(run(learned, x, x)))


# --- options -------------------------------------------------------------------------------------

# Together they give every option a value that is not its default.
EVERY_OPTION = [
    {},
    {
        "alpha": 0.35,
        "threshold": -0.1,
        "concentration": CONCENTRATIONS,
        "reversible": True,
        "reciprocal_beta": 0.7,
        "lens_strength": LENSES,
        "fusion": "softmax",
        "block_size": 8,
        "head_dim_pad": 16,
        "implementation": "reference",
        "dropout": 0.1,
        "seed": 5,
        "value_dim": 4,
        "use_gate": True,
        "kernel_regularizer": "l2",
        **LENS,
    },
    {**EXTRAS, "graph_heads": 2, "graph_convolution": 3, "steps": 2, "topk": 3, "window": 5},
]
EVERY_ID = ["default", "first edition", "second edition"]


def test_every_option_is_tried():
    names = [*Options.names(), *Tuning.names()]
    signature = inspect.signature(RWRAttention).parameters
    own = [name for name, x in signature.items() if x.kind is inspect.Parameter.KEYWORD_ONLY]
    assert own == names
    for name in names:
        values = [
            {**SMALL, **options}.get(name, signature[name].default) for options in EVERY_OPTION
        ]
        assert any(value != signature[name].default for value in values), name


@pytest.mark.parametrize("options", EVERY_OPTION, ids=EVERY_ID)
def test_config_round_trip(options):
    layer = layer_of(**options)
    config = layer.get_config()
    for name, value in {**SMALL, **options}.items():
        if name != "kernel_regularizer":
            assert config[name] == value
    layer.build(SHAPE, SHAPE)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is RWRAttention
    assert again.get_config() == layer.get_config()
    assert (again.options, again.tuning) == (layer.options, layer.tuning)


@pytest.mark.parametrize("options", EVERY_OPTION, ids=EVERY_ID)
def test_keras_file_round_trip(tmp_path, options):
    layer = layer_of(**options)
    model = model_of(layer, use_causal_mask=True)
    built(layer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is RWRAttention
    assert_same(run(loaded, make_inputs()), run(model, make_inputs()), atol=0)


def test_numbers_of_numpy_are_numbers():
    layer = layer_of(
        alpha=np.float32(0.5),
        steps=np.int64(3),
        concentration=np.array(CONCENTRATIONS),
        lens_strength=np.float64(0.2),
    )
    again = RWRAttention.from_config(layer.get_config())
    assert again.options == layer.options
    assert layer.options.concentration == tuple(CONCENTRATIONS)


SHORTER = (BATCH, LENGTH - 1, DIM)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((SHAPE, SHORTER), "`query` and `value` must be the same sequence.*Received: query of"),
        ((SHAPE, SHAPE, SHORTER), "`query` and `key` must be the same sequence.*Received: query"),
        ((SHAPE, (1, LENGTH, DIM)), "`query` and `value` must be the same sequence"),
        (((LENGTH, DIM), (LENGTH, DIM)), "`query` must have shape"),
        (((2, 3, 4, DIM), (2, 3, 4, DIM)), r"`query` must have shape \(B, S, dim\). Received"),
        ((SHAPE, (2, 3, 4, DIM)), r"`value` must have shape"),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_bad_shapes(shapes, message, symbolic):
    if symbolic:
        arguments = [keras.KerasTensor(shape) for shape in shapes]
    else:
        arguments = [make_inputs(0, shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        layer_of()(*arguments)
    if not symbolic and all(len(shape) == 3 for shape in shapes):
        layer = built(layer_of())
        with pytest.raises(ValueError, match=message):
            layer(*arguments)


def test_wide_blocks_are_refused_in_causal_calls_only():
    layer = layer_of(window=2, topk=8, neighbor_block=4)
    symbolic = keras.KerasTensor(SHAPE)
    layer(symbolic, symbolic)
    for x in (symbolic, make_inputs()):
        with pytest.raises(ValueError, match=r"`neighbor_block` must be at most `window \+ 1`"):
            layer(x, x, use_causal_mask=True)


# --- precision, LoRA, quantisation ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "step"),
    [
        ("mixed_bfloat16", "R3"),
        ("mixed_bfloat16", "R5"),
        ("mixed_float16", "R5"),
        ("mixed_float16", "R4"),
        ("bfloat16", "R5"),
    ],
)
def test_reduced_precision(policy, step):
    # Without neighbours, whose choice could turn on a rounding.
    options = {**ABLATION[step], "topk": 0, "dropout": 0.1}
    exact, layer = built(layer_of(**options)), built(layer_of(**options, dtype=policy))
    x = make_inputs()
    output = run(layer, x, x, attention_mask=HOLES.astype("float32"), use_causal_mask=True)
    compute_dtype = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(output.dtype) == compute_dtype
    variable_dtype = "float32" if policy.startswith("mixed") else policy
    assert {weight.dtype for weight in layer.trainable_weights} == {variable_dtype}
    expected = numpy(run(exact, x, x, attention_mask=HOLES, use_causal_mask=True))
    # Inputs, weights and projections rounded to the compute dtype, 2^-9 or 2^-11 each.
    atol = (0.05 if compute_dtype == "bfloat16" else 0.01) * np.abs(expected).max()
    assert_same(ops.cast(output, "float32"), expected, atol=atol)
    symbolic, scores = layer(
        keras.KerasTensor(SHAPE), keras.KerasTensor(SHAPE), return_attention_scores=True
    )
    assert symbolic.dtype == scores.dtype == compute_dtype
    _, scores = run(layer, x, x, return_attention_scores=True)
    assert keras.backend.standardize_dtype(scores.dtype) == compute_dtype


def test_hop_weights_and_concentrations_keep_float32():
    """A thousandth of theta or of log kappa is less than bfloat16 can tell."""
    layer = built(layer_of(**R5, dtype="mixed_bfloat16"))
    query = ops.cast(make_inputs(), "bfloat16")
    for name, moved in (("hop_weights", 1e-3), ("log_concentration", 1e-3)):
        weight = getattr(layer.walk, name)
        weight.assign(ops.ones_like(weight.value))
        inputs = layer.walk.inputs(query, *[query[:, :, None]] * 3, masks=NO_MASKS)
        before = {"hop_weights": inputs.hop_weights, "log_concentration": inputs.concentration}
        weight.assign(weight + moved)
        inputs = layer.walk.inputs(query, *[query[:, :, None]] * 3, masks=NO_MASKS)
        after = {"hop_weights": inputs.hop_weights, "log_concentration": inputs.concentration}
        assert np.abs(numpy(after[name]) - numpy(before[name])).min() > 0.9 * moved


@pytest.mark.parametrize("step", ["R3", "R5"])
def test_float64(step):
    with float64_allowed():
        layer = built(layer_of(**ABLATION[step], dtype="float64"))
        x = np.random.default_rng(0).normal(size=SHAPE)
        output = run(layer, x, x, use_causal_mask=True)
    assert keras.backend.standardize_dtype(output.dtype) == "float64"
    assert_close(numpy(output), Expected(layer, x, is_causal=True).output(), 1e-13)


def test_lora_on_the_projections():
    layer = built(layer_of(**EXTRAS))
    extra = len(layer.extra_weights)
    stock = built(keras.layers.MultiHeadAttention(HEADS, KEY_DIM))
    for attention in (layer, stock):
        for dense in (attention.query_dense, attention.value_dense):
            dense.enable_lora(2)
    assert len(layer.weights) - len(stock.weights) == extra == 7
    x = make_inputs()
    before = numpy(run(layer, x, x))
    layer.query_dense.lora_kernel_b.assign(np.ones((2, KEY_DIM)))
    assert np.abs(numpy(run(layer, x, x)) - before).max() > 1e-4


def test_int8_quantisation():
    layer = layer_of(**{**R5, "topk": 0})
    model = model_of(layer, use_causal_mask=True)
    built(layer)
    x = make_inputs()
    expected = numpy(run(model, x))
    model.quantize("int8", filters=lambda layer: isinstance(layer, keras.layers.EinsumDense))
    assert layer.query_dense.kernel.dtype == "int8"
    output = numpy(run(model, x))
    # Inputs and weights of each projection rounded to 1/127 of their largest value.
    assert_same(output, expected, atol=0.05 * np.abs(expected).max())
    assert np.abs(output - expected).max() > 0


# --- scores and graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["R3", "R5", "two graphs", "softmax"])
def test_scores_are_the_matrix_of_the_output(name):
    layer = built(layer_of(**COMPUTED[name], value_dim=4, use_gate=True))
    x = make_inputs()
    output, scores = run(
        layer, x, x, attention_mask=HOLES, use_causal_mask=True, return_attention_scores=True
    )
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)
    expected = Expected(layer, x, is_causal=True, padding_mask=HOLES).scores()
    assert_close(numpy(scores), expected, 1e-5)
    heads = ops.einsum("bnij,bjnh->binh", scores, layer.value_dense(x))
    gate = layer._gate_dense(x)
    assert_same(layer.output_dense(heads * gate), output)
    again = run(layer, x, x, attention_mask=HOLES, use_causal_mask=True)
    assert_same(output, again)


def test_symbolic_outputs_have_the_shapes_of_real_ones():
    layer = layer_of(output_shape=(4, 3), **R5)
    x, row = keras.KerasTensor((None, None, DIM)), keras.KerasTensor((None, None), dtype="int32")
    output, scores = layer(x, x, return_attention_scores=True, segment_ids=row)
    assert output.shape == (None, None, 4, 3)
    assert scores.shape == (None, HEADS, None, None)
    assert layer.compute_output_shape(SHAPE, SHAPE) == (BATCH, LENGTH, 4, 3)
    output, scores = run(layer, make_inputs(), make_inputs(), return_attention_scores=True)
    assert output.shape == (BATCH, LENGTH, 4, 3)
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_graph_made_before_the_call(is_causal):
    layer = built(layer_of(edge_weight="exponential"))
    other = built(layer_of(edge_weight="exponential"), seed=4)
    masks = {"attention_mask": HOLES, "use_causal_mask": is_causal}

    def calls(x):
        graph = keras_rwr.graph.build_sparse_w(
            layer.query_dense(x),
            layer.key_dense(x),
            edge_weight="exponential",
            concentration=layer.walk.concentration,
            is_causal=is_causal,
            padding_mask=HOLES,
            **SMALL,
        )
        graph = keras_rwr.graph.normalize_to_p(graph)
        with pytest.raises(ValueError, match="`graph` must be built with the call's options"):
            layer(x, x, use_causal_mask=not is_causal, graph=graph)
        found = [attention(x, x, **masks, graph=graph) for attention in (layer, other)]
        return [*found, layer(x, x, **masks), other(x, x, **masks)]

    same, shared, expected, own = compiled(calls)(make_inputs())
    assert_same(same, expected)
    # Another layer walks on the same graph.
    assert np.abs(numpy(shared) - numpy(own)).max() > 1e-3


def test_one_graph_made_before_the_call():
    layer = built(layer_of(**{**EXTRAS, "graph_convolution": 2}))

    def calls(x):
        plain = ops.einsum("bsd,dgf->bsgf", x, layer.walk.graph_key)
        taps = ops.convert_to_tensor(layer.walk.graph_convolution)
        before = ops.pad(plain, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        key = taps[0] * plain + taps[1] * before
        graph = keras_rwr.graph.build_sparse_w(
            ops.einsum("bsd,dgf->bsgf", x, layer.walk.graph_query),
            key,
            edge_weight="exponential",
            concentration=layer.walk.concentration,
            self_edges=False,
            is_causal=True,
            **{**SMALL, "neighbor_block": 1},
        )
        bias = ops.einsum("bsgf,gf->bsg", key, layer.walk.discoverability)
        graph = keras_rwr.graph.normalize_to_p(graph, ops.clip(bias, -8.0, 8.0))
        return [layer(x, x, use_causal_mask=True, graph=made) for made in (graph, None)]

    same, expected = compiled(calls)(make_inputs())
    assert_same(same, expected)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.costly
def test_dropout_in_training_only():
    layer = built(layer_of(**R5, dropout=0.5, seed=3))
    x = make_inputs()
    expected = built(layer_of(**R5))(x, x)
    assert_same(layer(x, x), expected, atol=0)
    assert_same(layer(x, x, training=False), expected, atol=0)
    first, second = numpy(layer(x, x, training=True)), numpy(layer(x, x, training=True))
    assert np.abs(first - numpy(expected)).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2
    again = built(layer_of(**R5, dropout=0.5, seed=3))
    np.testing.assert_array_equal(numpy(again(x, x, training=True)), first)


def test_dropout_leaves_the_walk_alone():
    """With one key in the window LOCAL is kept and doubled, or dropped; the walk is added whole."""
    layer = built(layer_of(**R5, dropout=0.5, seed=3))
    plain = built(layer_of(**R5))
    for attention in (layer, plain):
        attention.walk.options = attention.options = attention.options.replace(window=0)
    x = make_inputs()
    values = plain.value_dense(x)  # (B, S, N, V): LOCAL
    whole = plain.output_dense(values * 0.0)  # the output's bias
    local = numpy(plain.output_dense(values) - whole)
    dropped = numpy(layer(x, x, training=True) - plain(x, x))
    heads = numpy(layer.output_dense.kernel)
    # Each head of each token adds LOCAL again or takes it away.
    parts = np.einsum("bsnv,nve->bsne", numpy(values), heads)
    assert_same(parts.sum(2), local)
    for b, i in np.ndindex(BATCH, LENGTH):
        signs, *_ = np.linalg.lstsq(parts[b, i].T, dropped[b, i], rcond=None)
        assert_same(np.abs(signs), np.ones(HEADS), atol=1e-3)


@pytest.mark.parametrize("step", ["R3", "R5"])
def test_fit(step):
    x, segments = keras.Input((None, DIM)), keras.Input((None,), dtype="int32")
    options = {} if step == "R5" else {"trainable_lens": True}
    layer = layer_of(**ABLATION[step], **options, dropout=0.1, concentration=63.5)
    single = layer.options.neighbor_block == 1
    output = layer(x, x, use_causal_mask=True, segment_ids=segments if single else None)
    model = keras.Model([x, segments] if single else x, keras.layers.Dense(1)(output))
    model.compile(keras.optimizers.Adam(0.03), "mse")
    inputs = make_inputs(0, (4, LENGTH, DIM))
    targets = np.cumsum(inputs[..., :1], axis=1) / 5.0
    data = [inputs, np.zeros((4, LENGTH), "int32")] if single else inputs
    before = {weight.path: numpy(weight) for weight in layer.extra_weights}
    history = model.fit(data, targets, batch_size=2, epochs=6, verbose=0)
    assert history.history["loss"][-1] < 0.8 * history.history["loss"][0]
    assert np.isfinite(history.history["loss"]).all()
    for weight in layer.extra_weights:
        assert np.abs(numpy(weight) - before[weight.path]).max() > 1e-4, weight.path
    if layer.walk.log_concentration is not None:
        assert (numpy(layer.walk.log_concentration) <= np.float32(np.log(64.0))).all()


@pytest.mark.parametrize("name", ["trained lens", "discoverable graph"])
def test_every_weight_of_the_walk_has_a_gradient(name):
    """One step of plain gradient descent from the initial values moves every number."""
    layer = layer_of(**COMPUTED[name])
    model = model_of(layer, use_causal_mask=True)
    before = {weight.path: numpy(weight) for weight in layer.extra_weights}
    assert before
    model.compile(keras.optimizers.SGD(100.0), "mse", jit_compile=BACKEND == "jax")
    model.train_on_batch(make_inputs(), make_inputs(1))
    for weight in layer.extra_weights:
        moved = numpy(weight) != before[weight.path]
        assert moved.all(), (weight.path, moved.mean())


def test_the_concentration_is_trained_as_its_logarithm():
    layer = built(layer_of(edge_weight="exponential"))
    weight = layer.walk.log_concentration
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])
    weight.assign(np.log([2.0, 4.0, 8.0, 16.0]))
    optimizer.apply([ops.full((HEADS,), -np.log(2.0))])
    np.testing.assert_allclose(numpy(layer.walk.concentration), [4.0, 8.0, 16.0, 32.0], rtol=1e-5)
    for step, bound in ((1000.0, 1.0), (-1000.0, 64.0)):
        optimizer.apply([ops.full((HEADS,), step)])
        np.testing.assert_allclose(numpy(layer.walk.concentration), [bound] * HEADS, rtol=1e-6)


def test_clip_to_range():
    clip = ClipToRange(1.0, 40.0)
    np.testing.assert_array_equal(numpy(clip(np.float32([0.5, 7.0, 41.0]))), [1.0, 7.0, 40.0])
    again = keras.constraints.deserialize(keras.constraints.serialize(clip))
    assert (again.minimum, again.maximum) == (1.0, 40.0)


def test_one_functional_model_takes_every_length():
    model = model_of(built(layer_of(**R5)), use_causal_mask=True)
    layer = model.layers[-1]
    for length in (1, LENGTH):
        x = make_inputs(length, (BATCH, length, DIM))
        expected = run(layer, x, x, use_causal_mask=True)
        assert_same(run(model, x), expected)
    assert_same(model.predict(x, verbose=0), expected)


class KerasLayerTest(TestCase):
    def test_basics(self):
        for options in (LENS, EXTRAS):
            self.run_layer_test(
                RWRAttention,
                init_kwargs={
                    "num_heads": HEADS,
                    "key_dim": KEY_DIM,
                    **SMALL,
                    **options,
                    "dropout": 0.1,
                },
                input_shape={"query_shape": SHAPE, "value_shape": SHAPE},
                expected_output_shape=SHAPE,
                expected_num_trainable_weights=8 + (3 if options is LENS else 7),
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=1,
                expected_num_losses=0,
                supports_masking=True,
                run_training_check=False,
            )
