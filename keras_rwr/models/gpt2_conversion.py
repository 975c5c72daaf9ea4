"""What the GPT-2 classes share: RWR options of a model, presets, and weights on the move."""

import difflib
import inspect
import json
import numbers
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops

from keras_rwr.models.gpt2_decoder import TransformerDecoder
from keras_rwr.options import Call, Options, Tuning

_OPTIONS = (*Options.names(), *Tuning.names())
# Those of a model have the layers that walk besides.
_MODEL_OPTIONS = (*_OPTIONS, "rwr_layers")


class StockPresets:
    """Attribute `presets` of a class that converts those of `stock_cls`."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return owner.stock_cls.presets


def check_options(
    options: Mapping[str, Any], context: int, others: Iterable[str] = ()
) -> dict[str, Any]:
    """Checks the RWR options of a causal attention layer by themselves and against its context.

    Args:
        options: Mapping of options.
        context: Int, the model's `max_sequence_length`.
        others: Names of other arguments, one of which an unknown option may have been meant for.

    Returns:
        Dict of all options.

    Raises:
        ValueError: If an option is outside its range or two do not fit together.
        TypeError: If an option is of the wrong type or unknown.
    """
    check_names(options, (*_OPTIONS, *others))
    meaning = Options.pick(options)
    Call(is_causal=True).check(meaning)
    # A window over the whole context leaves nothing to link to, whatever `topk` is.
    if meaning.topk > context > meaning.window + 1:
        raise ValueError(
            "`topk` must be at most `max_sequence_length`, the model's context. "
            f"Received: topk={meaning.topk}, max_sequence_length={context}"
        )
    return {**meaning.to_config(), **Tuning.pick(options).to_config()}


def check_model_options(
    options: Mapping[str, Any], num_layers: int, context: int
) -> dict[str, Any]:
    """The same as `check_options` for a model, with `rwr_layers`."""
    layers = options.get("rwr_layers")
    if layers is not None:
        layers = layer_numbers("rwr_layers", layers, num_layers)
    others = {name: value for name, value in options.items() if name != "rwr_layers"}
    return {**check_options(others, context), "rwr_layers": layers}


def layer_options(model_options: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The options of one layer of a model."""
    options = {name: model_options[name] for name in _OPTIONS}
    layers = model_options["rwr_layers"]
    if layers is None or number in layers:
        return options
    return {**options, **Options.pick(options).local_only().to_config()}


def layer_numbers(name: str, layers: Any, count: int) -> list[int]:
    """The numbers of layers, from 0 and in order.

    Args:
        name: String, the argument's name.
        layers: List, tuple or range of different ints; negative ones count from the end.
        count: Int. Number of layers there are.

    Raises:
        TypeError: If `layers` is of the wrong type.
        ValueError: If a layer does not exist or is named twice.
    """
    if not isinstance(layers, (list, tuple, range)) or not all(
        isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in layers
    ):
        raise TypeError(f"`{name}` must be `None` or a list of ints. Received: {name}={layers!r}")
    chosen = sorted(int(x) + count if x < 0 else int(x) for x in layers)
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(count)):
        raise ValueError(
            f"`{name}` must be different layers of {count}, numbered from 0. "
            f"Received: {name}={layers!r}"
        )
    return chosen


def check_names(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Checks that keyword arguments are among the known ones.

    Raises:
        TypeError: Names the first that is not, and those that it may have been meant for.
    """
    known = list(known)
    for name, value in arguments.items():
        if name not in known:
            close = difflib.get_close_matches(name, known)
            choice = " or ".join(f"`{x}`" for x in close) or f"one of {', '.join(known)}"
            raise TypeError(
                f"`{name}` is no argument here. Did you mean {choice}? Received: {name}={value!r}"
            )


def split_arguments(
    arguments: Mapping[str, Any], cls: type, *others: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into RWR options and those of a class of KerasHub.

    Args:
        arguments: Mapping.
        cls: Class of KerasHub.
        *others: Names of arguments that its constructor does not list.

    Raises:
        TypeError: If one is neither.
    """
    listed = [x.name for x in inspect.signature(cls).parameters.values() if x.kind != x.VAR_KEYWORD]
    check_names(arguments, (*_MODEL_OPTIONS, *listed, *others, "name", "trainable"))
    options = {name: x for name, x in arguments.items() if name in _MODEL_OPTIONS}
    return options, {name: x for name, x in arguments.items() if name not in options}


def check_same_options(backbone: Any, options: Mapping[str, Any]) -> None:
    """Checks that options asked for are those that a saved model has."""
    saved = backbone.rwr_options
    wanted = check_model_options(
        {**saved, **options}, backbone.num_layers, backbone.max_sequence_length
    )
    differing = [name for name, value in wanted.items() if value != saved[name]]
    if differing:
        listed = ", ".join(f"{name}={wanted[name]!r}" for name in differing)
        raise ValueError(
            f"RWR options must be those that the preset was saved with, "
            f"{', '.join(f'{name}={saved[name]!r}' for name in differing)}. To change them, load "
            "the preset without them and convert its backbone with "
            f"`RWRGPT2Backbone.from_backbone(backbone, {listed})`. Received: {listed}"
        )


def patched_options(backbone: Any) -> dict[str, Any]:
    """The RWR options of a stock backbone that is patched; of others none."""
    blocks = backbone.transformer_layers
    if not any(isinstance(block, TransformerDecoder) for block in blocks):
        return {}
    context, everything = backbone.max_sequence_length, range(len(blocks))
    found = [
        check_options(block.rwr_options, context) if isinstance(block, TransformerDecoder) else {}
        for block in blocks
    ]
    walking = [number for number in everything if Options.pick(found[number]).walks]
    model_options = {**found[walking[0] if walking else 0], "rwr_layers": walking}
    if {} in found or found != [layer_options(model_options, number) for number in everything]:
        raise ValueError(
            "`backbone` must have RWR attention in all layers or in none, with the same options "
            "in all that are not LOCAL alone: call `unpatch_gpt2` first. "
            f"Received: backbone with the options {found}"
        )
    return model_options if len(walking) < len(found) else {**found[0], "rwr_layers": None}


def load_preset(stock_cls: Any, preset: str, load_weights: bool, arguments: dict) -> Any:
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


def quantized_dtype(preset: str) -> Any:
    """The saved dtype policies of a local preset whose layers are quantised, or `None`.

    KerasHub reads them for a task, and forgets them for a backbone by itself.
    """
    path = pathlib.Path(preset) / "config.json"
    if not path.is_file():
        return None
    dtype = json.loads(path.read_text(encoding="utf-8")).get("config", {}).get("dtype")
    is_map = isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicyMap"
    return dtype if is_map else None


def copy_weights(source: keras.Model, target: keras.Model, dropped: Iterable[str] = ()) -> None:
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
