"""Trains small models to look things up: full attention, a window alone, and R1 to R4.

    python examples/retrieval.py --seeds 0 1                          # associative recall
    python examples/retrieval.py --models R4 --steps 1 4
    python examples/retrieval.py --hops 4 --tokens 64 --pairs 8 --window 8 --layers 1 --models R4

Questions stand anywhere behind what answers them, most of them further away than the window. As in
Zoology (https://arxiv.org/abs/2312.04927), a short causal convolution stands before each attention:
it lets a token know the one before it, so that one attention finds a key's value. Each line of
`results.csv` in the folder is one trained model; a run that is started again trains those that are
missing. `table.md` and `accuracy.png` sum up.
"""

import argparse
import csv
import dataclasses
import functools
import sys
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np
from ablation_report import STYLES
from ablation_train import NO_DECAY
from retrieval_data import Batches, Task

import keras_rwr
from keras_rwr.ablation import STEPS

MODELS = ("full", "window", *[name for name in STEPS if name != "R0"])
WITHOUT_WALK = ("full", "window")
# their walk options, which LOCAL alone follows from
NO_WALK = {
    **{"walk_steps": 0, "topk": 0, "neighbor_block": 1, "alpha": 1.0, "concentration": 1.0},
    **{"lens_strength": 0.0, "trainable_lens": False},
}
TEST_SEED, TEST_SEQUENCES = 2**31, 512
EVALUATIONS = 10
# Okabe and Ito's palette, safe for colour-blind readers
COLORS = {name: style[0] for name, style in STYLES.items()} | {"full": "#000000", "window": "#999"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one line of `results.csv` is about."""

    tokens: int
    pairs: int
    symbols: int
    hops: int
    model: str
    walk_steps: int  # 0 for models without a walk
    window: int
    topk: int
    neighbor_block: int
    alpha: float
    lens_strength: float
    trainable_lens: bool
    concentration: float
    layers: int
    width: int
    heads: int
    training_steps: int
    batch_size: int
    learning_rate: float
    seed: int

    @property
    def label(self):
        if self.model in WITHOUT_WALK:
            return self.model
        return f"{self.model}, {self.walk_steps} step{'s' * (self.walk_steps != 1)}"

    @property
    def training(self):
        """Window, steps and learning rate, for a table."""
        return f"window {self.window}, {self.training_steps} steps, {self.learning_rate:g}"

    @property
    def walk(self):
        """The walk's options, for a table."""
        if self.model in WITHOUT_WALK:
            return ""
        trained = " at first" if self.trainable_lens else ""
        neighbors = f"{self.topk} in blocks of {self.neighbor_block}"
        sharpness = f", kappa {self.concentration:g}" if self.model == "R4" else ""
        return (
            f"alpha {self.alpha:g}, gamma {self.lens_strength:g}{trained}{sharpness}, {neighbors}"
        )


def small():
    """A new initializer with GPT-2's spread."""
    return keras.initializers.RandomNormal(stddev=0.02)


def make_attention(run):
    """The attention layer of a model."""
    key_dim = run.width // run.heads
    if run.model == "full":
        return keras.layers.MultiHeadAttention(run.heads, key_dim, kernel_initializer=small())
    options = {
        "kernel_initializer": small(),
        "window": run.window,
        "topk": run.topk,
        "neighbor_block": run.neighbor_block,
        "steps": run.walk_steps,
        "alpha": run.alpha,
        "lens_strength": run.lens_strength,
        "trainable_lens": run.trainable_lens,
        "concentration": run.concentration,
    }
    if run.model != "window":
        options = {**STEPS[run.model].options, **options}
    return keras_rwr.RWRAttention(run.heads, key_dim, **options)


def build_model(run, task):
    """A transformer that names a token at each position."""
    inputs = keras.Input((task.tokens,), dtype="int32")
    embedding = keras_hub.layers.TokenAndPositionEmbedding(
        task.vocabulary_size,
        task.tokens,
        run.width,
        tie_weights=True,
        embeddings_initializer=small(),
    )
    x = embedding(inputs)  # (B, S, width)
    for _ in range(run.layers):
        normal = keras.layers.LayerNormalization(epsilon=1e-5)(x)
        normal = keras.layers.ZeroPadding1D((2, 0))(normal)
        x = x + keras.layers.DepthwiseConv1D(3, depthwise_initializer=small())(normal)
        normal = keras.layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + make_attention(run)(normal, normal, use_causal_mask=True)
        hidden = keras.layers.LayerNormalization(epsilon=1e-5)(x)
        hidden = keras.layers.Dense(4 * run.width, "gelu", kernel_initializer=small())(hidden)
        x = x + keras.layers.Dense(run.width, kernel_initializer=small())(hidden)
    x = keras.layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(inputs, embedding.token_embedding(x, reverse=True))


def train(run, verbose=0):
    """Trains one model.

    Args:
        run: `Run`.
        verbose: Keras's.

    Returns:
        A dict with `accuracy` and `loss` on questions of unseen sequences, the `accuracy` on
        those of all hops, the best at any evaluation, and `seconds`.
    """
    task = Task(run.tokens, run.pairs, run.symbols, run.hops)
    started = time.perf_counter()
    keras.utils.set_random_seed(run.seed)
    model = build_model(run, task)
    warmup = max(run.training_steps // 20, 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, run.training_steps - warmup, 0.05, warmup_target=run.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.1, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=NO_DECAY)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    sequences, targets, asked = task.draw(TEST_SEED, TEST_SEQUENCES)
    epochs = min(EVALUATIONS, run.training_steps)
    history = model.fit(
        Batches(task, run.batch_size, run.seed),
        epochs=epochs,
        steps_per_epoch=run.training_steps // epochs,
        validation_data=(sequences, targets, (asked > 0).astype("float32")),
        validation_batch_size=run.batch_size,
        shuffle=False,
        verbose=verbose,
    ).history
    questions = run.pairs / run.tokens  # Keras divides the loss by all positions
    named = model.predict(sequences, run.batch_size, verbose=verbose).argmax(-1)
    return {
        "accuracy": history["val_accuracy"][-1],
        "all_hops_accuracy": float((named == targets)[asked == run.hops].mean()),
        "best_accuracy": max(history["val_accuracy"]),
        "loss": history["val_loss"][-1] / questions,
        "seconds": time.perf_counter() - started,
    }


# --- results -------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(Run)]
SUMMED = ("accuracy", "all_hops_accuracy")
MEASURED = ["accuracy", "all_hops_accuracy", "best_accuracy", "loss", "seconds"]


def read_results(path):
    """Rows of `results.csv`: pairs of a `Run` and a dict of what was measured."""
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in dataclasses.fields(Run)}
    read = {bool: lambda text: text == "True"}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            (
                Run(**{name: read.get(kinds[name], kinds[name])(row[name]) for name in FIELDS}),
                {name: float(row[name]) for name in MEASURED},
            )
            for row in csv.DictReader(file)
        ]


def add_result(path, run, measured):
    """Appends a row to `results.csv`."""
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*FIELDS, *MEASURED, "backend", "keras"])
        if is_new:
            writer.writeheader()
        versions = {"backend": keras.backend.backend(), "keras": keras.__version__}
        writer.writerow({**dataclasses.asdict(run), **measured, **versions})


def sum_up(rows):
    """Lines by everything but the seed: a `Run` and what was measured, in the order of the rows."""
    groups = {}
    for run, measured in rows:
        groups.setdefault(dataclasses.replace(run, seed=0), []).append(measured)
    return list(groups.items())


def write_report(folder, rows):
    """Writes `table.md` and `accuracy.png` and returns the table."""
    heads = ["tokens", "pairs", "hops", "layers", "width", "model", "walk", "seeds"]
    heads += ["training", "accuracy", "range", "all hops"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run, found in sum_up(rows):
        accuracies, deepest = ([x[name] for x in found] for name in SUMMED)
        size = f"{run.tokens} | {run.pairs} | {run.hops} | {run.layers} | {run.width}"
        model = f"{run.label} | {run.walk} | {len(found)} | {run.training}"
        lines.append(
            f"| {size} | {model} | {np.mean(accuracies):.3f} | "
            f"{min(accuracies):.3f} to {max(accuracies):.3f} | {np.mean(deepest):.3f} |"
        )
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw(folder / "accuracy.png", rows)
    return table


def draw(path, rows):
    """PNG of the accuracies: a panel for each size, a line for each model, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {}
    for run, found in sum_up(rows):
        size = (run.tokens, run.pairs, run.symbols, run.hops)
        panels.setdefault(size, []).append((run, found))
    heights = [1.2 + 0.24 * len(lines) for lines in panels.values()]
    figure = Figure(figsize=(9, 0.4 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (size, lines) in zip(axes, panels.items(), strict=True):
        tokens, pairs, _, hops = size
        for height, (run, found) in enumerate(lines):
            for name, marker in zip(SUMMED[: 1 + (hops > 1)], ("o", "D"), strict=False):
                panel.plot(
                    [100 * measured[name] for measured in found],
                    [height] * len(found),
                    marker,
                    color=COLORS[run.model],
                    markerfacecolor="none" if name != "accuracy" else None,
                )
        labels = [
            f"{run.label}, {run.layers} x {run.width}" + f"; {run.walk}" * bool(run.walk)
            for run, _ in lines
        ]
        panel.set_yticks(range(len(lines)), labels, fontsize=7)
        panel.set_ylim(len(lines) - 0.5, -0.5)
        panel.set_xlim(-3, 103)
        panel.axvline(100 * Task(*size).chance, color="#666", linestyle=":")
        panel.grid(alpha=0.3, axis="y")
        panel.set_xlabel("accuracy, %" + f" (hollow: questions of {hops} hops)" * (hops > 1))
        panel.set_title(f"{pairs} pairs in {tokens} tokens (dotted: guessing)", fontsize=10)
    figure.savefig(path, dpi=150)


# --- command line --------------------------------------------------------------------------------


def parse(arguments=None):
    """The command line, and the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = functools.partial(parser.add_argument, type=int)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    add("--steps", nargs="+", default=[1], help="walk steps of R1 to R4, each a model (1)")
    add("--seeds", nargs="+", default=[0], help="each a training (0)")
    add("--tokens", default=256, help="length of a sequence (256)")
    add("--pairs", default=16, help="pairs to remember, and questions (16)")
    add("--symbols", default=127, help="keys, and values, to draw from (127)")
    add("--hops", default=1, help="pairs from a key to its value, at most (1)")
    add("--window", default=32)
    add("--topk", default=16)
    add("--neighbor-block", default=1)
    parser.add_argument("--alpha", type=float, default=0.5, help="restart probability (0.5)")
    parser.add_argument("--lens-strength", type=float, default=4.0, help="the walk's weight (4)")
    parser.add_argument(
        "--trainable-lens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the walk's weight (yes)",
    )
    parser.add_argument("--concentration", type=float, default=8.0, help="R4's kappa at first (8)")
    add("--layers", default=2)
    add("--width", default=128)
    add("--heads", default=2)
    add("--training-steps", default=3000)
    add("--batch-size", default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--report", action="store_true", help="sum up what --out holds, train nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="folder")
    return parser, parser.parse_args(arguments)


def make_runs(given):
    """All models to train.

    Raises:
        ValueError: If an argument is outside its range.
    """
    fixed = {name: getattr(given, name) for name in FIELDS if hasattr(given, name)}
    for name in ("layers", "width", "heads", "training_steps", "batch_size"):
        if fixed[name] < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={fixed[name]}")
    if given.width % given.heads:
        raise ValueError(
            "`width` must be a multiple of `heads`. "
            f"Received: width={given.width}, heads={given.heads}"
        )
    runs = []
    for seed in given.seeds:
        for model in given.models:
            walks = [NO_WALK]
            if model not in WITHOUT_WALK:
                walks = [{"walk_steps": steps} for steps in given.steps]
            runs += [Run(**{**fixed, **walk}, model=model, seed=seed) for walk in walks]
    for run in runs:  # before anything is trained
        Task(run.tokens, run.pairs, run.symbols, run.hops)
        make_attention(run)
    return runs


def main(arguments=None):
    """Runs the command line."""
    parser, given = parse(arguments)
    try:
        runs = make_runs(given)
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "results.csv"
    done = {run for run, _ in read_results(path)}
    for run in [] if given.report else runs:
        if run in done:
            continue
        measured = train(run)
        add_result(path, run, measured)
        print(
            f"{run.label}, seed {run.seed}: accuracy {measured['accuracy']:.3f}, "
            f"{measured['seconds']:.0f} s",
            flush=True,
        )
    rows = read_results(path)
    if not rows:
        parser.error(f"`out` must hold results to report. Received: out={given.out}")
    print(f"\n{write_report(given.out, rows)}\nFolder: {given.out}")


if __name__ == "__main__":
    sys.exit(main())
