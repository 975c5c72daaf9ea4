"""What the GPT-2 classes share: RWR options of a model, presets, and weights on the move."""

import dataclasses
import difflib
import inspect
import json
import numbers
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import keras
from keras import ops

from keras_rwr.models.gpt2_decoder import TransformerDecoder
from keras_rwr.options import Call, Options, Tuning

OPTIONS = (*Options.names(), *Tuning.names())


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The RWR options of a model.

    Attributes:
        options: `Options` of the layers that walk.
        tuning: `Tuning` of all layers.
        rwr_layers: `None` for all, or list of the numbers of the layers that walk. The others are
            LOCAL alone.
    """

    options: Options
    tuning: Tuning
    rwr_layers: list[int] | None = None

    @classmethod
    def create(cls, arguments: Mapping[str, Any], num_layers: int, context: int) -> Self:
        """Checks and takes the options out of a model's arguments.

        Args:
            arguments: Mapping that may hold other things too.
            num_layers: Int.
            context: Int, the model's `max_sequence_length`.
        """
        options, tuning = check_options(
            {name: arguments[name] for name in OPTIONS if name in arguments}, context
        )
        layers = arguments.get("rwr_layers")
        if layers is not None:
            layers = layer_numbers("rwr_layers", layers, num_layers)
        return cls(options, tuning, layers)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return (*OPTIONS, "rwr_layers")

    def to_config(self) -> dict[str, Any]:
        layers = self.rwr_layers if self.rwr_layers is None else list(self.rwr_layers)
        return {**self.options.to_config(), **self.tuning.to_config(), "rwr_layers": layers}

    def of_layer(self, number: int) -> dict[str, Any]:
        """The options of one layer's `RWRAttention`."""
        walks = self.rwr_layers is None or number in self.rwr_layers
        options = self.options if walks else self.options.local_only()
        return {**options.to_config(), **self.tuning.to_config()}


class StockPresets:
    """Attribute `presets` of a class that converts those of `stock_cls`."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        return owner.stock_cls.presets


def check_options(options: Mapping[str, Any], context: int) -> tuple[Options, Tuning]:
    """Checks RWR options of a causal model by themselves and against its context.

    Args:
        options: Mapping of options of an attention layer.
        context: Int, the model's `max_sequence_length`.

    Returns:
        `Options` and `Tuning`.

    Raises:
        ValueError: If an option is outside its range or two do not fit together.
        TypeError: If an option is of the wrong type or unknown.
    """
    check_names(options, OPTIONS)
    meaning, tuning = Options.pick(options), Tuning.pick(options)
    Call(is_causal=True).check(meaning)
    # A window over the whole context leaves nothing to link to, whatever `topk` is.
    if meaning.topk > context > meaning.window + 1:
        raise ValueError(
            "`topk` must be at most `max_sequence_length`, the model's context. "
            f"Received: topk={meaning.topk}, max_sequence_length={context}"
        )
    return meaning, tuning


def check_names(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Checks that keyword arguments are among the known ones.

    Raises:
        TypeError: Names the first that is not, and those that it may have been meant for.
    """
    known = list(known)
    for name, value in arguments.items():
        if name not in known:
            close = difflib.get_close_matches(name, known) or known
            raise TypeError(
                f"`{name}` must be the name of an argument, such as "
                f"{', '.join(f'`{x}`' for x in close)}. Received: {name}={value!r}"
            )


def split_arguments(
    arguments: Mapping[str, Any], cls: type, *others: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the keyword arguments of `from_preset` into RWR options and others.

    Args:
        arguments: Mapping.
        cls: Class of KerasHub that takes the others.
        *others: Names of those that `cls` does not list.

    Raises:
        TypeError: If one is neither.
    """
    names = ModelOptions.names()
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    listed = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD and x.name != "self"]
    check_names(arguments, (*names, *listed, *others, "name", "trainable"))
    options = {name: value for name, value in arguments.items() if name in names}
    return options, {name: value for name, value in arguments.items() if name not in names}


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


def check_same_options(model_options: ModelOptions, backbone: Any) -> None:
    """Checks that the options of a saved model are those asked for."""
    wanted, saved = model_options.to_config(), backbone.rwr_options
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
    layers = [
        block._self_attention_layer if isinstance(block, TransformerDecoder) else None
        for block in blocks
    ]
    if not any(layers):
        return {}
    found = [layer and (layer.options, layer.tuning) for layer in layers]
    walking = [number for number, x in enumerate(found) if x and x[0].walks]
    options, tuning = found[walking[0] if walking else 0] or (Options(), Tuning())
    model_options = ModelOptions(options, tuning, None if len(walking) == len(found) else walking)
    expected = [
        (options if number in walking else options.local_only(), tuning)
        for number in range(len(found))
    ]
    if found != expected:
        raise ValueError(
            "`backbone` must have RWR attention in all layers or in none, with the same options "
            "except for layers that are LOCAL alone: call `unpatch_gpt2` first. "
            f"Received: backbone with the options {[x and x[0] for x in found]}"
        )
    return model_options.to_config()


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
