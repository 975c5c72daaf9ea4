"""Draws what one token of a text attends to: its window, its walk, and both together.

    python examples/finetune_gpt2.py --run-dir runs/mine --ablation-step R4
    python examples/saliency.py runs/mine/model --text "..." --out saliency.png
    python examples/saliency.py runs/mine/model --text chapter.txt --layer 0 --head 2 --token 180

The first panel shows LOCAL's probabilities, the second how often the token's walk visits each token
before it, the third the attention that multiplies the values, LOCAL + gamma * walk. The last one
shows how much the walks of all tokens visit each token. Numbers count from 0, and negative ones
from the end.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import keras_hub
import numpy as np
from keras import ops

import keras_rwr.models
from keras_rwr.statistics import record_calls

# What the functions of `keras_rwr.ops` take of a layer's configuration.
GRAPH_OPTIONS = (
    "alpha",
    "steps",
    "topk",
    "neighbor_block",
    "window",
    "threshold",
    "edge_weight",
    "reversible",
    "is_causal",
)
LABELS = 12  # tokens with names on each panel
# Okabe and Ito's palette, safe for colour-blind readers
COLORS = {"LOCAL": "#0072B2", "walk": "#D55E00", "LOCAL + gamma * walk": "#009E73"}
IMPORTANCE_COLOR = "#CC79A7"


def explain_token(backbone, token_ids, layer, head, token):
    """Attention of one token, and the importance of all.

    Args:
        backbone: A `keras_rwr.models.RWRGPT2Backbone`.
        token_ids: List of ints.
        layer: Int. Which of its layers.
        head: Int. Which of the layer's heads.
        token: Int. Position of the token.

    Returns:
        A dict from the names of `COLORS`, and `"importance"`, to arrays of shape `(S,)`.
    """
    inputs = {"token_ids": np.array([token_ids]), "padding_mask": np.ones((1, len(token_ids)))}
    with record_calls(backbone) as calls:
        backbone(inputs, training=False)
    call = calls[layer]
    query, key = call.query_and_key()
    own = call.weights()
    gamma = np.broadcast_to(own.pop("lens_strength"), key.shape[2])[head]
    config = dataclasses.asdict(call.config)
    options = {name: config[name] for name in GRAPH_OPTIONS} | own

    def row(lens_strength, fusion="sum"):
        matrix = keras_rwr.ops.attention_scores(
            query,
            key,
            lens_strength=lens_strength,
            reciprocal_beta=config["reciprocal_beta"],
            fusion=fusion,
            **options,
        )  # (1, N, S, S)
        return ops.convert_to_numpy(matrix)[0, head, token]

    local = row(0.0)
    importance = ops.convert_to_numpy(keras_rwr.ops.token_importance(query, key, **options))
    return {
        "LOCAL": local,
        "walk": row(1.0) - local,
        "LOCAL + gamma * walk": row(float(gamma), config["fusion"]),
        "importance": importance[0, :, head],
    }


def draw(found, words, token, title, path):
    """Writes the picture.

    Args:
        found: What `explain_token` returns.
        words: List of strings, the tokens.
        token: Int. Position of the token that is explained.
        title: String.
        path: Where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True)
    for panel, (name, values) in zip(panels, found.items(), strict=True):
        panel.bar(range(len(words)), values, width=1.0, color=COLORS.get(name, IMPORTANCE_COLOR))
        for position in np.argsort(-values)[:LABELS]:
            if values[position] > 0:
                panel.annotate(
                    words[position],
                    (position, values[position]),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    parse_math=False,
                )
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


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", help="a GPT-2 with RWR attention, folder of save_to_preset")
    parser.add_argument("--text", required=True, help="a text, or the name of a .txt file")
    parser.add_argument("--layer", type=int, default=-1, help="transformer layer (the last)")
    parser.add_argument("--head", type=int, default=0, help="attention head (0)")
    parser.add_argument("--token", type=int, default=-1, help="position in the text (the last)")
    parser.add_argument("--out", type=Path, default=Path("saliency.png"), help="PNG to write")
    return parser, parser.parse_args(arguments)


def main(arguments=None):
    """Runs the command line."""
    parser, given = parse(arguments)
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
    sizes = {
        "layer": backbone.num_layers,
        "head": backbone.num_heads,
        "token": len(token_ids),
    }
    for name, size in sizes.items():
        if not -size <= getattr(given, name) < size:
            parser.error(
                f"`{name}` must be in [{-size}, {size}). Received: {name}={getattr(given, name)}"
            )
    layer, head, token = (getattr(given, name) % size for name, size in sizes.items())
    words = [tokenizer.id_to_token(x).replace("Ġ", " ").replace("Ċ", "¶") for x in token_ids]
    found = explain_token(backbone, token_ids, layer, head, token)
    title = f"{Path(given.preset).name}, layer {layer}, head {head}, {len(words)} tokens"
    draw(found, words, token, title, given.out)
    print(f"Picture: {given.out}")


if __name__ == "__main__":
    sys.exit(main())
