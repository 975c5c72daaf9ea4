"""What is measured side by side. `register` adds to it; benchmarks/README.md says how."""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

import keras_rwr
from benchmarks import frameworks
from benchmarks.cases import Case
from keras_rwr.options import IMPLEMENTATIONS, Options

# The peers that say what is right: every other one is compared with that of its definition.
DEFINITIONS = {
    "rwr": "rwr-reference",
    "dense": "dense-formula",
    "tiles": "tiles-formula",
    "window": "window-formula",
}
HALVES = ("float16", "bfloat16")
# Options that bring a layer's weights; an op is given what these make.
LAYER_OPTIONS = (
    *("use_discoverability", "trainable_lens", "stopping"),
    *("graph_heads", "graph_dim", "graph_convolution"),
)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Args:
        name: String, unique among the peers of a level.
        description: String, what runs.
        level: String, `"layer"` or `"op"`: what it takes, see `Case`.
        definition: String, a key of `DEFINITIONS`: what it computes.
        build: Function of a `Case` and of the arrays of `make_inputs` that returns a function of
            tensors and the list of its arguments. The function is what is compiled, differentiated
            with respect to all of its arguments, and timed.
        supports: Function of a `Case` and a device, `"cpu"` or `"gpu"`, that returns `None` or the
            reason why the peer cannot run it.
        backend: `None` for any Keras backend, or the one that it is written for.
        is_default: Bool. Whether it runs without being asked for.
    """

    name: str
    description: str
    level: str
    definition: str
    build: Callable
    supports: Callable = lambda case, device: None
    backend: str | None = None
    is_default: bool = True


PEERS: dict[tuple[str, str], Peer] = {}


def register(peer):
    """Adds a peer.

    Raises:
        ValueError: If its level has one of that name, or there is no such definition.
    """
    key = (peer.level, peer.name)
    if key in PEERS:
        raise ValueError(f"`name` must be unique among the peers of a level. Received: name={key}")
    if peer.definition not in DEFINITIONS:
        raise ValueError(
            f"`definition` must be one of {', '.join(DEFINITIONS)}. "
            f"Received: definition={peer.definition!r}"
        )
    PEERS[key] = peer
    return peer


def select(case, device, names=None):
    """The peers that measure a case.

    Args:
        case: `Case`.
        device: String.
        names: `None` for all that can run, or list of names, each of which has to.

    Returns:
        List of `Peer`, and a dict from the name of each that cannot run to the reason.

    Raises:
        ValueError: If a name is unknown, or names a peer that cannot run the case.
    """
    known = {name: peer for (level, name), peer in PEERS.items() if level == case.level}
    if names is not None:
        for name in names:
            if name not in known:
                raise ValueError(
                    f"`peers` must be among {', '.join(known)} at the level {case.level}. "
                    f"Received: peers={name}"
                )
    chosen, refused = [], {}
    for name, peer in known.items():
        if (names is None and not peer.is_default) or (names is not None and name not in names):
            continue
        reason = refusal(peer, case, device)
        if reason is None:
            chosen.append(peer)
        elif names is not None:
            raise ValueError(f"`peers` must be able to run, {reason}. Received: peers={name}")
        else:
            refused[name] = reason
    return chosen, refused


def refusal(peer, case, device):
    """Why a peer cannot run a case, or `None`."""
    if peer.backend not in (None, keras.backend.backend()):
        return f"it needs the {peer.backend} backend"
    return peer.supports(case, device)


def needs_half_on_gpu(case, device):
    """`Peer.supports` of fused attention."""
    if device != "gpu":
        return "it needs a GPU"
    if case.dtype not in HALVES:
        return f"it needs {' or '.join(HALVES)}"
    return None


# --- layers


def layer_builder(make_layer):
    """`Peer.build` of a layer with the weights and the call of `keras.layers.MultiHeadAttention`.

    Args:
        make_layer: Function of a `Case` and of keyword arguments for the layer.
    """

    def build(case, inputs):
        policy = case.dtype if case.dtype == "float32" else f"mixed_{case.dtype}"
        layer = make_layer(case, num_heads=case.heads, key_dim=case.head_size, dtype=policy)
        layer.build((case.batch, case.tokens, case.width), (case.batch, case.tokens, case.width))
        for variable in layer.trainable_variables:
            name = "/".join(variable.path.split("/")[-2:])
            if name in inputs:  # others keep their initial values, the same in each layer
                variable.assign(inputs[name])
        function, weights = frameworks.active().layer_function(
            layer, use_causal_mask=case.is_causal
        )
        return function, [ops.convert_to_tensor(inputs["x"], case.dtype), *weights]

    return build


def build_dense_layer(case, inputs):
    """`keras.layers.MultiHeadAttention` as it is written down."""
    # The projections', in the order of the layer's weights.
    names = [name for name in inputs if name.endswith(("/kernel", "/bias"))]

    def function(x, *weights):
        weights = {name: ops.cast(w, x.dtype) for name, w in zip(names, weights, strict=True)}
        projected = [
            ops.einsum("bsd,dnh->bsnh", x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]
            for name in ("query", "key", "value")
        ]
        output = dense_formula(*projected, case.is_causal)
        output = ops.einsum("bsnh,nhd->bsd", output, weights["attention_output/kernel"])
        return output + weights["attention_output/bias"]

    weights = [ops.convert_to_tensor(inputs[name], "float32") for name in names]
    return function, [ops.convert_to_tensor(inputs["x"], case.dtype), *weights]


def decoder_mask(batch, tokens, is_causal):
    """The mask `(B, S, S)` that KerasHub's decoder makes in each layer and call, in int32."""
    mask = ops.ones((batch, 1, tokens), dtype="int32")  # no padding
    position = ops.arange(tokens)
    if is_causal:
        mask = ops.minimum(mask, ops.cast(position[:, None] >= position, "int32"))
    return ops.broadcast_to(mask, (batch, tokens, tokens))


class GPT2Attention(keras.layers.MultiHeadAttention):
    """Attention in KerasHub's GPT-2, outside of training.

    Its dropout rate takes it off Keras's fused path, in inference too. So does its mask.
    """

    def __init__(self, **arguments):
        super().__init__(dropout=0.1, **arguments)

    def call(self, query, value, use_causal_mask=False):
        mask = decoder_mask(*query.shape[:2], use_causal_mask)
        return super().call(query, value, attention_mask=mask)

    def attend(self, query, key, value, is_causal):
        """What `call` does between the projections."""
        mask = decoder_mask(*query.shape[:2], is_causal)
        return self._compute_attention(query, key, value, attention_mask=mask)[0]


def build_gpt2_op(case, inputs):
    layer = GPT2Attention(num_heads=case.heads, key_dim=case.head_size, dtype=case.dtype)
    shape = (case.batch, case.tokens, case.width)
    layer.build(shape, shape)
    return op_builder(lambda case, *arrays: layer.attend(*arrays, case.is_causal))(case, inputs)


def rwr_layer(implementation):
    def make_layer(case, **arguments):
        return keras_rwr.RWRAttention(**arguments, **case.options, implementation=implementation)

    return make_layer


# --- ops


def dense_formula(query, key, value, is_causal):
    """Softmax attention of `(B, S, N, H)`, in float32, in the dtype of `query`."""
    position = ops.arange(query.shape[1])
    return masked_formula(query, key, value, position[:, None] >= position if is_causal else None)


def masked_formula(query, key, value, mask):
    """Softmax attention with a mask `(S, S)` or `(B, N, S, S)`, or `None`."""
    dtype = query.dtype
    query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    logits = ops.einsum("bqnh,bknh->bnqk", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = ops.where(mask, logits, -1e30)
    return ops.cast(ops.einsum("bnqk,bknh->bqnh", ops.softmax(logits), value), dtype)


def op_builder(attention):
    """`Peer.build` of a function of a `Case`, query, key and value."""

    def build(case, inputs):
        names = ("query", "key", "value")
        arrays = [ops.convert_to_tensor(inputs[name], case.dtype) for name in names]
        return (lambda *arrays: attention(case, *arrays)), arrays

    return build


def rwr_op(implementation):
    """`Peer.build` of `keras_rwr.ops.rwr_attention`, with what the options of a layer bring."""

    def build(case, inputs):
        names = [name for name in inputs if name != "cotangent"]
        arrays = [ops.convert_to_tensor(inputs[name], case.dtype) for name in names]
        options = {name: x for name, x in case.options.items() if name not in LAYER_OPTIONS}

        def attention(*arrays):
            return keras_rwr.ops.rwr_attention(
                **dict(zip(names, arrays, strict=True)),
                is_causal=case.is_causal,
                implementation=implementation,
                **options,
            )

        return attention, arrays

    return build


def rwr_supports(implementation):
    def supports(case: Case, device):
        options = Options.pick(case.options).to_config()
        explanation = keras_rwr.explain(
            case.shape, dtype=case.dtype, device=device, is_causal=case.is_causal, **options
        )
        return explanation.refusals.get(implementation)

    return supports


MHA = "keras.layers.MultiHeadAttention"
FORMULA = "softmax attention with explicit scores"
for peer in (
    Peer(
        *("keras", MHA, "layer", "dense"),
        layer_builder(lambda case, **arguments: keras.layers.MultiHeadAttention(**arguments)),
    ),
    Peer(
        *("keras", "keras.ops.dot_product_attention", "op", "dense"),
        op_builder(lambda case, *x: ops.dot_product_attention(*x, is_causal=case.is_causal)),
    ),
    Peer(
        *("keras-gpt2", f"{MHA} as in KerasHub's GPT-2", "layer", "dense"),
        layer_builder(lambda case, **arguments: GPT2Attention(**arguments)),
        is_default=False,
    ),
    Peer(
        *("keras-gpt2", f"{MHA} as in KerasHub's GPT-2, its projections aside", "op", "dense"),
        build_gpt2_op,
        is_default=False,
    ),
    Peer("dense-formula", FORMULA, "layer", "dense", build_dense_layer, is_default=False),
    Peer(
        *("dense-formula", FORMULA, "op", "dense"),
        op_builder(lambda case, q, k, v: dense_formula(q, k, v, case.is_causal)),
        is_default=False,
    ),
):
    register(peer)
for name in IMPLEMENTATIONS:
    for level, function, build in (
        ("layer", "RWRAttention", layer_builder(rwr_layer(name))),
        ("op", "ops.rwr_attention", rwr_op(name)),
    ):
        register(
            Peer(
                *(f"rwr-{name}", f"keras_rwr.{function}, {name}", level, "rwr", build),
                supports=rwr_supports(name),
                is_default=name != "reference",
            )
        )
