"""The models of the language study: one transformer, with attention of several kinds."""

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_rwr._attend import attend
from keras_rwr._core import WalkCore, convolve
from keras_rwr._tensors import unit
from keras_rwr._tokens import Masks
from keras_rwr.ablation import STEPS, step_options
from keras_rwr.options import Call, Options, Tuning
from studies.arguments import base, own_options

PLAIN = ("full", "fair", "fair-1", "fair-all", "local")  # those without a walk


class Attention(keras.layers.Layer):
    """Causal attention of one of the models.

    Args:
        heads: Int. Number of heads N.
        is_fair: Bool. Whether keys are convolved, queries and keys of length one, and a token has
            its own value.
        begun: Int. Heads that begin as an induction head.
        options: `None` for full attention, or `Options` of LOCAL and the walk.
    """

    def __init__(self, heads, is_fair, begun=0, options=None, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.is_fair, self.begun, self.options = heads, is_fair, begun, options
        walks = options is not None and options.walks
        self.has_own_value = is_fair and not walks  # a walk has it among its hop weights
        self.rotary = keras_hub.layers.RotaryEmbedding(sequence_axis=1, dtype=self.dtype_policy)

    def build(self, shape):
        width, heads = shape[-1], self.heads
        size = width // heads
        for name in ("query", "key", "value"):
            setattr(self, name, self._dense("bsd,dnh->bsnh", (None, heads, size), name))
            getattr(self, name).build(shape)
        self.output_dense = self._dense("bsnh,nhd->bsd", (None, width), "output")
        self.output_dense.build((None, None, heads, size))
        if self.is_fair:
            constant = keras.initializers.Constant
            weights = {
                "log_temperature": ((heads, 1), constant(np.log(20.0))),
                "key_convolution": ((4, heads, size), self._taps),
            }
            if self.has_own_value:
                weights["own_value"] = ((heads, 1), constant(0.5))
            for name, (dimensions, initializer) in weights.items():
                weight = self.add_weight(name=name, shape=dimensions, initializer=initializer)
                setattr(self, name, weight)
        if self.begun:
            kernels = self.query.kernel[:, : self.begun], self.key.kernel[:, self.begun :]
            self.key.kernel.assign(ops.concatenate(kernels, axis=1))
        if self.options is not None:
            self.walk = WalkCore(self.options, heads, size, small())
            self.walk.build(shape)

    def call(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)  # (B, S, N, H)
        if self.is_fair:
            key = convolve(key, self.key_convolution)
        query, key = self._rotate(query), self._rotate(key)
        if self.is_fair:
            query, key = unit(query), unit(key)
            # Attention divides by the root of a head's size.
            temperature = ops.exp(self.log_temperature) * query.shape[-1] ** 0.5
            query = query * ops.cast(temperature, query.dtype)
        if self.options is None:
            output = ops.dot_product_attention(query, key, value, is_causal=True)
        else:
            inputs = self.walk.inputs(x, query, key, value, Masks(None, None, True))
            output = attend(inputs, self.options, Call(is_causal=True), Tuning())
        if self.has_own_value:
            output = output + ops.cast(self.own_value, value.dtype) * value
        return self.output_dense(output)

    def _rotate(self, x):
        """Rotates the heads that have not begun as induction heads."""
        if self.begun == self.heads:
            return x
        return ops.concatenate([x[:, :, : self.begun], self.rotary(x[:, :, self.begun :])], axis=2)

    def _taps(self, shape, dtype=None):
        """A convolution that takes the token itself, or the one before in heads that have begun."""
        taps = np.zeros(shape, "float32")
        taps[0, self.begun :], taps[1, : self.begun] = 1.0, 1.0
        return ops.convert_to_tensor(taps, dtype)

    def _dense(self, equation, shape, name):
        return keras.layers.EinsumDense(equation, shape, kernel_initializer=small(), name=name)


def small():
    """A new initializer with GPT-2's spread."""
    return keras.initializers.RandomNormal(stddev=0.02)


def make_attention(run, layer):
    """The attention of a layer of a model."""
    name, heads = run["model"], run["heads"]
    if base(name) not in STEPS:
        begun = {"fair-1": 1, "fair-all": heads}.get(name, 0)
        options = Options(window=run["window"]).local_only() if name == "local" else None
        return Attention(heads, name != "full", begun, options)
    values = walk_options(run)
    layers = values.pop("rwr_layers", STEPS[base(name)].rwr_layers(run["layers"]))
    options = Options.pick(values)
    walks = layers is None or layer in layers
    return Attention(heads, True, options=options if walks else options.local_only())


def walk_options(run):
    """The options of a model that walks."""
    own = own_options(run["model"], run["layers"])
    return step_options(base(run["model"]), {"window": run["window"], **own})


def build_model(run):
    """A transformer that predicts the next token: `(B, S)` ids to float32 logits.

    Args:
        run: Dict with `model`, `seed` and the values of `DEFAULTS`.
    """
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(run["dtype"])
    keras.utils.set_random_seed(run["seed"])
    try:
        inputs = keras.Input((None,), dtype="int32")
        embedding = keras.layers.ReversibleEmbedding(
            run["vocabulary_size"], run["width"], True, small()
        )
        x = embedding(inputs)  # (B, S, width)
        for layer in range(run["layers"]):
            x = x + make_attention(run, layer)(normalized(x))
            hidden = dense(4 * run["width"], "gelu")(normalized(x))
            x = x + dense(run["width"])(hidden)
        logits = embedding(normalized(x), reverse=True)
        return keras.Model(inputs, ops.cast(logits, "float32"))
    finally:
        keras.config.set_dtype_policy(policy)


def normalized(x):
    return keras.layers.RMSNormalization(epsilon=1e-6)(x)


def dense(units, activation=None):
    return keras.layers.Dense(units, activation, use_bias=False, kernel_initializer=small())
