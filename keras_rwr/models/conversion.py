"""What models share: the RWR options of a model, presets, and weights on the move."""

import difflib
import inspect
import json
import numbers
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops

from keras_rwr._checks import check_bool, check_choice
from keras_rwr.models import attention
from keras_rwr.models.families import family_of
from keras_rwr.options import Call, Options, Tuning

_OPTIONS = (*Options.names(), *Tuning.names())
# Those of a model say besides which layers walk, what the others do, and what its inputs mean.
_OF_MODELS = ("rwr_layers", "rwr_others", "rwr_packed")
_MODEL_OPTIONS = (*_OPTIONS, *_OF_MODELS)


class StockPresets:
    """Attribute `presets` of a class that converts those of `stock_cls`."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return owner.stock_cls.presets


def check_options(
    options: Mapping[str, Any], context: int | None, others: Iterable[str] = ()
) -> dict[str, Any]:
    """Checks the RWR options of a causal attention layer by themselves and against its context.

    Args:
        options: Mapping of options.
        context: `None` or int, the model's `max_sequence_length`.
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
    if context is not None and meaning.topk > context > meaning.window + 1:
        raise ValueError(
            "`topk` must be at most `max_sequence_length`, the model's context. "
            f"Received: topk={meaning.topk}, max_sequence_length={context}"
        )
    return {**meaning.to_config(), **Tuning.pick(options).to_config()}


def check_model_options(
    options: Mapping[str, Any], num_layers: int, context: int | None
) -> dict[str, Any]:
    """The same as `check_options` for a model, with its own options."""
    layers, others = options.get("rwr_layers"), options.get("rwr_others", "local")
    if layers is not None:
        layers = layer_numbers("rwr_layers", layers, num_layers)
    check_choice("rwr_others", others, ("local", "stock"))
    rest = {name: value for name, value in options.items() if name not in _OF_MODELS}
    packed = options.get("rwr_packed", False)
    check_bool("rwr_packed", packed)
    own = {"rwr_layers": layers, "rwr_others": others, "rwr_packed": packed}
    if packed and layers is not None and others == "stock":
        raise ValueError(
            '`rwr_others` must be "local" with `rwr_packed`: stock attention sees all documents of '
            f"a row. Received: rwr_others={others!r}"
        )
    return {**check_options(rest, context), **own}


def layer_options(model_options: Mapping[str, Any], number: int) -> dict[str, Any] | None:
    """The options of one layer of a model; `None` where it keeps the stock attention."""
    options = {name: model_options[name] for name in _OPTIONS}
    layers = model_options["rwr_layers"]
    if layers is None or number in layers:
        return options
    if model_options["rwr_others"] == "stock":
        return None
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
    arguments: Mapping[str, Any], cls: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into RWR options and those of a class of KerasHub.

    Args:
        arguments: Mapping.
        cls: Class of KerasHub.

    Raises:
        TypeError: If one is neither.
    """
    listed = [x.name for x in inspect.signature(cls).parameters.values() if x.kind != x.VAR_KEYWORD]
    check_names(arguments, (*_MODEL_OPTIONS, *listed, "dtype", "name", "trainable"))
    options = {name: x for name, x in arguments.items() if name in _MODEL_OPTIONS}
    return options, {name: x for name, x in arguments.items() if name not in options}


def check_same_options(backbone: Any, options: Mapping[str, Any]) -> None:
    """Checks that options asked for are those that a saved model has."""
    saved = backbone.rwr_options
    wanted = check_model_options(
        {**saved, **options}, backbone.num_layers, getattr(backbone, "max_sequence_length", None)
    )
    differing = [name for name, value in wanted.items() if value != saved[name]]
    if differing:
        listed = ", ".join(f"{name}={wanted[name]!r}" for name in differing)
        raise ValueError(
            f"RWR options must be those that the preset was saved with, "
            f"{', '.join(f'{name}={saved[name]!r}' for name in differing)}. To change them, load "
            "the preset without them and convert its backbone with "
            f"`{type(backbone).__name__}.from_backbone(backbone, {listed})`. Received: {listed}"
        )


def patched_options(backbone: Any) -> dict[str, Any]:
    """The RWR options of a stock backbone that is patched; of others none."""
    found = [_options_of(layer) for layer in attention_layers(backbone)]
    patched = [options for options in found if options is not None]
    if not patched:
        return {}
    walking = [number for number, x in enumerate(found) if x and Options.pick(x).walks]
    options = {
        **next((x for x in patched if Options.pick(x).walks), patched[0]),
        "rwr_layers": walking if len(walking) < len(found) else None,
        "rwr_others": "local" if len(patched) == len(found) else "stock",
        "rwr_packed": False,
    }
    if found != [layer_options(options, number) for number in range(len(found))]:
        raise ValueError(
            "`backbone` must have the same options in all layers that walk, and in all others "
            "LOCAL alone with the same window, or stock attention: call `unpatch_gpt2` first. "
            f"Received: backbone with the options {found}"
        )
    return options


def attention_layers(backbone: Any) -> list[Any]:
    """The attention layers of a backbone, in order."""
    family = family_of(type(backbone))
    return [family.attention_of(block) for block in backbone.transformer_layers]


def convert_block(
    backbone: Any, block: Any, options: Mapping[str, Any], is_packed: bool = False
) -> None:
    """Puts RWR attention into a block of a backbone; see `attention.convert`."""
    family = family_of(type(backbone))
    layer = family.attention_of(block)
    attention.convert(block, layer, family.kind, options, backbone.hidden_dim, is_packed)


def _options_of(layer: Any) -> dict[str, Any] | None:
    if not isinstance(layer, attention.WalkingAttention):
        return None
    return {**layer.options.to_config(), **layer.tuning.to_config()}


def load_preset(stock_cls: Any, preset: str, load_weights: bool, arguments: dict) -> Any:
    """Loads a preset of a family, stock or ours.

    Args:
        stock_cls: KerasHub's class, whose `from_preset` also finds our subclass of it.
        preset: String, a name, handle or folder.
        load_weights: Bool.
        arguments: Dict of further arguments of `from_preset`.

    Returns:
        An instance of `stock_cls` or of our subclass of it.

    Raises:
        ValueError: If KerasHub finds no model of the family there.
    """
    try:
        return stock_cls.from_preset(preset, load_weights=load_weights, **arguments)
    except ValueError as error:
        raise ValueError(
            f"`preset` must be a {stock_cls.__name__}: a name in `presets`, a Kaggle or Hugging "
            "Face handle, or a folder that `save_to_preset` wrote. KerasHub cannot load it as one: "
            f"{error}\n"
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


def left_out(backbone: Any, stock_cls: Any) -> dict[str, Any]:
    """The arguments of a stock class that its `get_config` forgets, such as Llama's tied ones."""
    known = backbone.__dict__
    config = stock_cls.get_config(backbone)
    names = inspect.signature(stock_cls).parameters
    return {name: known[name] for name in names if name in known and name not in config}


def copy_weights(source: keras.Model, target: keras.Model, drop_walk: bool = False) -> None:
    """Copies the weights of one backbone to another of the same family and sizes.

    Args:
        source: Backbone to copy from.
        target: Backbone that has a place for each weight.
        drop_walk: Bool. Whether to leave out what only RWR attention has.
    """
    if any(getattr(layer, "lora_enabled", False) for layer in source._flatten_layers()):
        raise ValueError(
            "`backbone` must be without LoRA. Save it with `save_to_preset`, which merges LoRA's "
            "matrices into the kernels, and convert what `from_preset` loads. "
            f"Received: backbone={source}"
        )
    copied = {} if drop_walk else {weight.path: weight for weight in walk_weights(source)}
    walk = {weight.path: weight for weight in walk_weights(target)}
    missing = [path for path in copied if path not in walk]
    if missing:
        raise ValueError(
            f"`backbone` must have no weights but those of {type(target).__name__}. "
            f"Received: backbone with the weights {missing}"
        )
    pairs = [(weight, walk[path]) for path, weight in copied.items()]
    # Keras numbers the names of some layers, so the order tells which is which, not the path.
    pairs += zip(_stock_weights(source), _stock_weights(target), strict=True)
    for old, new in pairs:
        # Without the copy, both would share jax's buffer, which a training step deletes.
        new.assign(ops.copy(old))


def walk_weights(backbone: Any) -> list[keras.Variable]:
    """The weights of a backbone that only RWR attention has."""
    layers = [x for x in attention_layers(backbone) if isinstance(x, attention.WalkingAttention)]
    return [weight for layer in layers for weight in layer.extra_weights]


def _stock_weights(backbone: Any) -> list[keras.Variable]:
    walk = {id(weight) for weight in walk_weights(backbone)}
    return [weight for weight in backbone.weights if id(weight) not in walk]
