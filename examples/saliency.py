"""Draws what one token of a text attends to: its window, its walk, and both together.

    python examples/finetune_gpt2.py --out runs/mine
    python examples/saliency.py runs/mine/model --text "..." --out saliency.png
    python examples/saliency.py runs/mine/model --text chapter.txt --layer 0 --head 1 --token 180

The first panel shows LOCAL's probabilities, the second the weights that the token's walk brings
values back with, the third both together, which multiply the values. The last one shows how much
the walks of all tokens visit each token. Numbers count from 0, and negative ones from the end.
"""

import argparse
import sys
from pathlib import Path

import keras_hub
import numpy as np
from keras import ops

import keras_rwr.models
from keras_rwr.statistics import record_calls

# What the functions of `keras_rwr.ops` take of a call's tensors and of a layer's options.
TENSORS = ("graph_query", "graph_key", "concentration", "discoverability")
OPTIONS = ("topk", "neighbor_block", "window", "threshold", "edge_weight", "reversible")
OPTIONS += ("self_edges",)
LABELS = 12  # tokens with names on each panel
LABEL = {"ha": "center", "va": "bottom", "fontsize": 8, "parse_math": False}
# Okabe and Ito's palette, safe for colour-blind readers
COLORS = {"LOCAL": "#0072B2", "walk": "#D55E00", "LOCAL + walk": "#009E73"}
IMPORTANCE_COLOR = "#CC79A7"


def explain_token(call, head, token):
    """Attention of one token, and the importance of all.

    Args:
        call: A `keras_rwr.statistics.RecordedCall` of one sequence.
        head: Int. Which of the layer's heads.
        token: Int. Position of the token.

    Returns:
        A dict from the names of `COLORS`, and `"importance"`, to arrays of shape `(S,)`.
    """
    inputs, options = call.inputs, call.layer.options
    shared = {name: getattr(inputs, name) for name in TENSORS}
    shared.update({name: getattr(options, name) for name in OPTIONS}, is_causal=call.is_causal)

    def hops(strength):
        """The weights of the steps, times a number."""
        if inputs.hop_weights is not None:
            return {"hop_weights": strength * inputs.hop_weights}
        gamma = ops.convert_to_tensor(inputs.lens_strength, "float32")
        walk = {"alpha": options.alpha, "steps": options.steps}
        return {**walk, "lens_strength": strength * gamma}

    def row(strength, fusion="sum"):
        beta = options.reciprocal_beta
        matrix = keras_rwr.ops.attention_scores(
            *(inputs.query, inputs.key),
            fusion=fusion,
            reciprocal_beta=beta,
            **hops(strength),
            **shared,
        )  # (1, N, S, S)
        return ops.convert_to_numpy(matrix)[0, head, token]

    walk = hops(1.0)
    walk.pop("lens_strength", None)
    importance = keras_rwr.ops.token_importance(inputs.query, inputs.key, **walk, **shared)
    local = row(0.0)
    return {
        "LOCAL": local,
        "walk": row(1.0) - local,
        "LOCAL + walk": row(1.0, options.fusion),
        "importance": ops.convert_to_numpy(importance)[0, :, head],
    }


def draw(found, words, token, title, path):
    """Writes the picture of what `explain_token` found, with the text's tokens as words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True)
    for panel, (name, values) in zip(panels, found.items(), strict=True):
        panel.bar(range(len(words)), values, width=1.0, color=COLORS.get(name, IMPORTANCE_COLOR))
        for position in np.argsort(-values)[:LABELS]:
            if values[position] > 0:
                panel.annotate(words[position], (position, values[position]), **LABEL)
        panel.margins(x=0.01, y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        if name == "importance":
            panel.set_title("importance of each token: how much the walks of all visit it")
            panel.set_ylabel("share of all visits")
        else:
            panel.set_title(f"{name}, of the token {words[token]!r}", parse_math=False)
            panel.set_ylabel("weight")
            panel.axvline(token, color="#000000", linestyle=":", linewidth=1)
    panels[-1].set_xlabel("position in the text, tokens")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", help="a GPT-2 with RWR attention, folder of save_to_preset")
    add("--text", required=True, help="a text, or the name of a .txt file")
    add("--layer", type=int, default=-1, help="of the layers that walk (the last)")
    add("--head", type=int, default=0, help="attention head (0)")
    add("--token", type=int, default=-1, help="position in the text (the last)")
    add("--out", type=Path, default=Path("saliency.png"), help="PNG to write")
    given = parser.parse_args(arguments)
    if not Path(given.preset).is_dir():
        parser.error(f"`preset` must be a folder. Received: preset={given.preset}")
    text = given.text
    if text.endswith(".txt"):
        if not Path(text).is_file():
            parser.error(f"`text` must be a text or a file that exists. Received: text={text}")
        text = Path(text).read_text("utf-8")
    model = keras_hub.models.CausalLM.from_preset(given.preset)
    backbone, tokenizer = model.backbone, model.preprocessor.tokenizer
    if not isinstance(backbone, keras_rwr.models.RWRGPT2Backbone):
        parser.error(
            "`preset` must hold a GPT-2 with RWR attention. "
            f"Received: preset={given.preset} with a {type(backbone).__name__}"
        )
    token_ids = [int(x) for x in tokenizer(text)][: backbone.max_sequence_length]
    inputs = {"token_ids": np.array([token_ids]), "padding_mask": np.ones((1, len(token_ids)))}
    with record_calls(backbone) as calls:
        backbone(inputs, training=False)
    sizes = {"layer": len(calls), "head": backbone.num_heads, "token": len(token_ids)}
    for name, size in sizes.items():
        if not -size <= getattr(given, name) < size:
            parser.error(
                f"`{name}` must be in [{-size}, {size}). Received: {name}={getattr(given, name)}"
            )
    layer, head, token = (getattr(given, name) % size for name, size in sizes.items())
    words = [tokenizer.id_to_token(x).replace("Ġ", " ").replace("Ċ", "¶") for x in token_ids]
    found = explain_token(calls[layer], head, token)
    title = f"{Path(given.preset).name}, layer {layer}, head {head}, {len(words)} tokens"
    draw(found, words, token, title, given.out)
    print(f"Picture: {given.out}")


if __name__ == "__main__":
    sys.exit(main())
