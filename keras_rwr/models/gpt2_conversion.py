"""What the GPT-2 classes share: checks of RWR options, presets, and weights on the move."""

import dataclasses
import inspect
import json
import pathlib

from keras import ops

from keras_rwr.config import RWRConfig
from keras_rwr.layer import RWRAttention
from keras_rwr.models.gpt2_decoder import TransformerDecoder

# The arguments that `RWRAttention` has besides those of `MultiHeadAttention`.
RWR_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(RWRAttention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


class StockPresets:
    """Attribute `presets` of a class that converts those of `stock_cls`."""

    def __get__(self, instance, owner):
        return owner.stock_cls.presets


def check_options(options, context):
    """Checks RWR options of a causal model by themselves and against its context.

    Args:
        options: Dict of options.
        context: Int, the model's `max_sequence_length`.

    Raises:
        ValueError: If an option is outside its range or two do not fit together.
        TypeError: If an option is of the wrong type or unknown.
    """
    unknown = sorted(set(options) - set(RWR_OPTIONS))
    if unknown:
        raise TypeError(
            f"RWR options must be among {', '.join(RWR_OPTIONS)}. Received: {', '.join(unknown)}"
        )
    fields = {field.name for field in dataclasses.fields(RWRConfig)}
    config = RWRConfig(
        **{name: value for name, value in options.items() if name in fields}, is_causal=True
    )
    # A window over the whole context leaves nothing to link to, whatever `topk` is.
    if config.topk > context > config.window + 1:
        raise ValueError(
            "`topk` must be at most `max_sequence_length`, the model's context. "
            f"Received: topk={config.topk}, max_sequence_length={context}"
        )


def split_options(arguments):
    """Splits keyword arguments into RWR options and others."""
    options = {name: value for name, value in arguments.items() if name in RWR_OPTIONS}
    others = {name: value for name, value in arguments.items() if name not in RWR_OPTIONS}
    return options, others


def check_same_options(backbone, options):
    """Checks that options asked for are those that a saved model has."""
    saved = backbone.rwr_options
    differing = [name for name, value in options.items() if _plain(value) != _plain(saved[name])]
    if differing:
        wanted = ", ".join(f"{name}={options[name]!r}" for name in differing)
        raise ValueError(
            f"RWR options must be those that the preset was saved with, "
            f"{', '.join(f'{name}={saved[name]!r}' for name in differing)}. To change them, load "
            "the preset without them and convert its backbone with "
            f"`RWRGPT2Backbone.from_backbone(backbone, {wanted})`. Received: {wanted}"
        )


def patched_options(backbone):
    """The RWR options of a stock backbone that is patched; of others none."""
    options = [
        block.rwr_options if isinstance(block, TransformerDecoder) else None
        for block in backbone.transformer_layers
    ]
    if any(x != options[0] for x in options):
        raise ValueError(
            "`backbone` must have RWR attention with the same options in all layers or in none: "
            f"call `unpatch_gpt2` first. Received: backbone with the options {options}"
        )
    return options[0] or {}


def load_preset(stock_cls, preset, load_weights, arguments):
    """Loads a preset of GPT-2, stock or ours.

    Args:
        stock_cls: KerasHub's class, whose `from_preset` also finds our subclass of it.
        preset: String, a name, handle or folder.
        load_weights: Bool.
        arguments: Dict of further arguments of `from_preset`.

    Returns:
        An instance of `stock_cls` or of our subclass of it.

    Raises:
        ValueError: If KerasHub finds no GPT-2 there.
    """
    try:
        return stock_cls.from_preset(preset, load_weights=load_weights, **arguments)
    except ValueError as error:
        raise ValueError(
            "`preset` must be a GPT-2: a name in `presets`, a Kaggle or Hugging Face handle, or a "
            f"folder that `save_to_preset` wrote. KerasHub cannot load it as one: {error}\n"
            f"Received: preset={preset!r}"
        ) from error


def quantized_dtype(preset):
    """The saved dtype policies of a local preset whose layers are quantised, or `None`.

    KerasHub reads them for a task, and forgets them for a backbone by itself.
    """
    path = pathlib.Path(preset) / "config.json"
    if not path.is_file():
        return None
    dtype = json.loads(path.read_text(encoding="utf-8")).get("config", {}).get("dtype")
    is_map = isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicyMap"
    return dtype if is_map else None


def copy_weights(source, target, dropped=()):
    """Copies weights by path.

    Args:
        source: Model to copy from.
        target: Model that has a weight of each path.
        dropped: Paths of the weights of `source` to leave out.
    """
    if any(getattr(layer, "lora_enabled", False) for layer in source._flatten_layers()):
        raise ValueError(
            "`backbone` must be without LoRA. Save it with `save_to_preset`, which merges LoRA's "
            "matrices into the kernels, and convert what `from_preset` loads. "
            f"Received: backbone={source}"
        )
    weights = {weight.path: weight for weight in target.weights}
    copied = [weight for weight in source.weights if weight.path not in dropped]
    missing = [weight.path for weight in copied if weight.path not in weights]
    if missing:
        raise ValueError(
            f"`backbone` must have no weights but those of {type(target).__name__}. "
            f"Received: backbone with the weights {missing}"
        )
    for weight in copied:
        # Without the copy, both would share jax's buffer, which a training step deletes.
        weights[weight.path].assign(ops.copy(weight))


def _plain(value):
    """Sequences of numbers as lists, which is what a saved configuration holds."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value
