"""RWR attention for a model of KerasHub, in one line."""

from typing import Any

import keras
import keras_hub

from keras_rwr import ablation
from keras_rwr.models import conversion
from keras_rwr.models.attention import WalkingAttention
from keras_rwr.models.backbone import RWRBackbone
from keras_rwr.models.causal_lm import RWRCausalLM
from keras_rwr.models.families import FAMILIES
from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone
from keras_rwr.models.gpt2_causal_lm import RWRGPT2CausalLM

# Our classes, and by KerasHub's class ours.
CLASSES: dict[str, type] = {}
_OURS: dict[type, Any] = {}


def convert(
    model: Any,
    layers: Any = "every second",
    others: str = "local",
    packed: bool = False,
    **options: Any,
) -> Any:
    """Makes a model with RWR attention and the weights of a model of KerasHub.

    The attention of the layers that walk is `LOCAL + walk`: LOCAL takes the queries, keys and
    values that the model has always made, rotated and normalised as they were; the graph of the
    walk has projections of its own of the layer's input. The new model is trained, fine-tuned,
    saved and generates as the old one; its classes are called `RWRLlamaCausalLM`,
    `RWRLlamaBackbone` and so on.

    Trained hop weights begin at 0 here, so that the new model is at first the old one within its
    window: with a window over the whole context it computes the same. A smaller window takes
    something away from a pretrained model, and the walk is new: train it before use.

    Args:
        model: A built `CausalLM` or `Backbone` of KerasHub, of the families GPT-2, OPT, GPT-NeoX,
            Llama, Llama 3, Mistral, Mixtral, Qwen, Qwen 3 and their mixtures of experts, Phi-3,
            SmolLM3, Gemma, Gemma 3, BERT, DistilBERT and RoBERTa.
        layers: `"every second"` (the default, from the second on), `"all"`, or a list of the
            numbers of the layers that walk; negative ones count from the end.
        others: `"local"` (the default): the other layers are LOCAL alone, with the same window.
            `"stock"`: they keep the model's own attention.
        packed: Bool. Whether padding masks of the new model number the documents of each row; see
            `keras_rwr.data.pack`. Defaults to `False`.
        **options: Options of RWR attention, such as `window`; see `keras_rwr.RWRAttention`. Those
            not given are those of step R5 of the ablation.

    Returns:
        A model of our class with copies of the weights, and with the preprocessor of `model`.

    Raises:
        TypeError: If `model` is no such model, or an option is of the wrong type or unknown.
        ValueError: If an option is outside its range or does not fit the model, or the model's
            attention does something that RWR attention does not.

    Example:

    ```python
    stock = keras_hub.models.CausalLM.from_preset("hf://HuggingFaceTB/SmolLM2-135M")
    model = keras_rwr.models.convert(stock, window=256)
    model.fit(texts)
    ```
    """
    backbone = model.backbone if isinstance(model, keras_hub.models.CausalLM) else model
    ours = _ours(backbone)
    if ours is None or isinstance(backbone, RWRBackbone):
        raise TypeError(
            "`model` must be a stock `CausalLM` or `Backbone` of KerasHub, of one of the families "
            f"{', '.join(FAMILIES)}. Received: model={model}"
        )
    new = ours.from_backbone(
        backbone,
        rwr_layers=_numbers(layers, len(backbone.transformer_layers)),
        rwr_others=others,
        rwr_packed=packed,
        **{**(ablation.STEPS["R5"].options or {}), **options},
    )
    if not conversion.walk_weights(backbone):
        for layer in conversion.attention_layers(new):
            if isinstance(layer, WalkingAttention) and layer.walk.hop_weights is not None:
                weights = layer.walk.hop_weights
                weights.assign(keras.ops.zeros(weights.shape, weights.dtype))
    if backbone is model:
        return new
    task = _ours(model)
    return task(new, task._from_stock_preprocessor(model.preprocessor), name=model.name)


def _ours(model: Any) -> Any:
    """Our class for a model of KerasHub, or `None`."""
    return next((_OURS[x] for x in type(model).__mro__ if x in _OURS), None)


def _numbers(layers: Any, count: int) -> list[int] | None:
    if not isinstance(layers, str):
        return conversion.layer_numbers("layers", layers, count)
    if layers not in ("every second", "all"):
        raise ValueError(
            f'`layers` must be "every second", "all" or a list of ints. Received: layers={layers!r}'
        )
    return None if layers == "all" else list(range(1, count, 2))


def _add(cls: Any) -> Any:
    CLASSES[cls.__name__] = _OURS[cls.stock_cls] = cls
    return cls


def _make(stock: Any, base: type, **attributes: Any) -> Any:
    """A class of ours for a stock class, known to Keras's files."""
    name = f"RWR{stock.__name__}"
    doc = f"KerasHub's `{stock.__name__}` with RWR attention; see `{base.__name__}`."
    members = {"stock_cls": stock, "__doc__": doc, "__module__": __name__, **attributes}
    return keras.saving.register_keras_serializable("keras_rwr")(type(name, (base, stock), members))


_add(RWRGPT2Backbone)
_add(RWRGPT2CausalLM)
for _name in FAMILIES:
    if _name != "GPT2":
        _backbone = _add(_make(getattr(keras_hub.models, f"{_name}Backbone"), RWRBackbone))
        _task = getattr(keras_hub.models, f"{_name}CausalLM", None)
        if _task is not None:
            _add(_make(_task, RWRCausalLM, backbone_cls=_backbone))
