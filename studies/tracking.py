"""Trains small models to follow variables: full attention (R0), and attention that walks.

    python -m studies.tracking                                  # R0, R0 of two layers, and R5
    python -m studies.tracking --small                          # in minutes on a CPU
    python -m studies.tracking --models R5 R4x2 --seeds 0 1 --out runs/tracking
    python -m studies.tracking --hops 1 --chains 16 --tokens 192 --layers 2 --models R0 R5

A sequence begins with statements "x y", where y is a literal or a name stated earlier. Later each
name comes once more, and there the model has to say the literal behind it: at the end of a chain of
up to `hops` statements, most of them further away than the window. With `--hops 1` that is
associative recall, after Zoology (https://arxiv.org/abs/2312.04927). As there, a short causal
convolution stands before each attention: it lets a token know the ones before it. Positions are
embedded, since without them R5 followed four hops in 10 of 13 seeds and with them in 8 of 8; not at
the small size, whose 300 steps were enough for 2 of 2 seeds without and 1 of 2 with them.

The folder receives a line of `results.jsonl` for each trained model, and a run that is started
again trains those that are missing; `table.md` and `accuracy.png` sum up.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

import keras_rwr
from keras_rwr.ablation import STEPS, step_options
from studies.arguments import add_rwr_flags, check_options, rwr_overrides
from studies.data import UsageError
from studies.report import STYLES, as_png, draw_line, markdown, new_figure, replace_file
from studies.workers import read_results, verbosity

SIZES = {
    "hops": (4, "statements from a name to its literal, at most"),
    "chains": (2, "literals to tell apart"),
    "tokens": (64, "length of a sequence, at least three times hops x chains"),
    "vocabulary": (64, "names and literals, half of each"),
    "layers": (1, "transformer layers, where the model does not say"),
    "width": (64, "hidden size, a multiple of --heads"),
    "heads": (2, "attention heads"),
    "batch_size": (64, "sequences a training step"),
    "training_steps": (5000, "training steps"),
    "warmup_steps": (200, "steps of learning-rate warm-up, at most half of --training-steps"),
}
WALK = {"window": 8, "topk": 8, "neighbor_block": 1, "steps": 4, "concentration": 8.0}
SMALL: dict[str, Any] = {
    "hops": 3,
    "tokens": 48,
    "training_steps": 300,
    "warmup_steps": 50,
    "positions": False,
    "seeds": [0, 1],
}
TEST_SEED, TEST_BATCHES = 2**31, 16
POOL = 1500  # training batches, which then come again


@dataclasses.dataclass(frozen=True)
class Task:
    """Variable tracking.

    Args:
        hops: Int >= 1. Statements of a chain: the first tells a name's literal, each other one
            gives another name to the name before it. Chains are told mingled, each from its
            literal on, so that a causal model can follow them.
        chains: Int >= 1. Each has a literal of its own.
        tokens: Int. Length of a sequence.
        vocabulary: Int. Token 0 fills, the others are names and, from the middle on, literals.

    Raises:
        UsageError: If the sizes do not fit together.
    """

    hops: int
    chains: int
    tokens: int
    vocabulary: int

    def __post_init__(self):
        names = self.hops * self.chains
        for name, least in (("tokens", 3 * names), ("vocabulary", 2 * names + 2)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"`{name}` must be at least {least} with {self.chains} chains of {self.hops} "
                    f"hops. Received: {name}={getattr(self, name)}"
                )

    def draw(self, seed, batch):
        """One batch; a seed, which may be a tuple of ints, always gives the same one.

        Returns:
            Int32 arrays of shape `(batch, tokens)`: tokens, answers, and the number of statements
            from a question to its answer; the last two are 0 where there is no question.
        """
        rng = np.random.default_rng(seed)
        hops, chains, half = self.hops, self.chains, self.vocabulary // 2
        number = hops * chains

        def choose(count, size):
            return rng.random((batch, count)).argsort(1)[:, :size]

        names = 1 + choose(half - 1, number).reshape(batch, chains, hops)
        literals = half + choose(half, chains)[..., None]
        meanings = np.concatenate([literals, names[:, :, :-1]], 2)
        answers = np.broadcast_to(literals, names.shape)
        depths = np.broadcast_to(1 + np.arange(hops), names.shape)
        # random times, sorted within each chain
        order = np.sort(rng.random(names.shape), 2).reshape(batch, number).argsort(1)
        names, meanings, answers, depths = (
            np.take_along_axis(x.reshape(batch, number), order, 1)
            for x in (names, meanings, answers, depths)
        )
        sequences, targets, asked = np.zeros((3, batch, self.tokens), "int32")
        sequences[:, 0 : 2 * number : 2], sequences[:, 1 : 2 * number : 2] = names, meanings
        places = 2 * number + choose(self.tokens - 2 * number, number)
        for array, filled in ((sequences, names), (targets, answers), (asked, depths)):
            np.put_along_axis(array, places, filled, 1)
        return sequences, targets, asked


class Batches(keras.utils.PyDataset):
    """Endless training batches, `POOL` different ones."""

    def __init__(self, task, batch_size):
        super().__init__()
        self.draw = functools.cache(lambda index: task.draw((1, index), batch_size)[:2])

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return self.draw(index % POOL)


# --- models ---------------------------------------------------------------------------------------


def read_model(name, layers):
    """The ablation step and the number of layers of a model such as "R0" or "R0x2"."""
    step, _, number = name.partition("x")
    if step not in STEPS or not (number.isdecimal() and int(number) if number else "x" not in name):
        raise UsageError(
            f"`models` must be steps of {', '.join(STEPS)}, or such with a number of layers as in "
            f"R0x2. Received: models={name}"
        )
    return step, int(number) if number else layers


def small():
    """A new initializer with GPT-2's spread."""
    return keras.initializers.RandomNormal(stddev=0.02)


def make_attention(step, run):
    """The attention layer of a model."""
    sizes = {"num_heads": run["heads"], "key_dim": run["width"] // run["heads"]}
    shared = {"use_bias": False, "kernel_initializer": small()}
    if STEPS[step].options is None:
        return keras.layers.MultiHeadAttention(**sizes, **shared)
    return keras_rwr.RWRAttention(**sizes, **shared, **step_options(step, run["options"]))


def build_model(run):
    """A transformer that names a token at each position.

    Args:
        run: Dict with `model`, `options`, `positions` and the values of `SIZES`.
    """
    step, layers = read_model(run["model"], run["layers"])
    width = run["width"]
    norm = functools.partial(keras.layers.RMSNormalization, epsilon=1e-6)
    dense = functools.partial(keras.layers.Dense, use_bias=False, kernel_initializer=small())
    inputs = keras.Input((run["tokens"],), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(run["vocabulary"], width, True, small())
    x = embedding(inputs)  # (B, S, width)
    if run["positions"]:
        x = x + keras_hub.layers.PositionEmbedding(run["tokens"], initializer=small())(x)
    for _ in range(layers):
        padded = keras.layers.ZeroPadding1D((2, 0))(norm()(x))
        x = x + keras.layers.DepthwiseConv1D(3, depthwise_initializer=small())(padded)
        normal = norm()(x)
        x = x + make_attention(step, run)(normal, normal, use_causal_mask=True)
        x = x + dense(width)(dense(4 * width, "gelu")(norm()(x)))
    return keras.Model(inputs, embedding(norm()(x), reverse=True))


def train(run, verbose=0):
    """Trains one model.

    Args:
        run: Dict with `model`, `options`, `positions`, `seed`, `learning_rate` and the values of
            `SIZES`.
        verbose: Keras's.

    Returns:
        A dict of `accuracy`, on questions of unseen sequences that are 1, 2, ... statements from
        their answers, the last `loss` and `seconds`.
    """
    task = Task(run["hops"], run["chains"], run["tokens"], run["vocabulary"])
    started = time.perf_counter()
    keras.utils.set_random_seed(run["seed"])
    model = build_model(run)
    steps, warmup = run["training_steps"], min(run["warmup_steps"], run["training_steps"] // 2)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, 0.05, warmup_target=run["learning_rate"], warmup_steps=warmup
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0),
    )
    batches = Batches(task, run["batch_size"])
    epochs = max(x for x in range(1, 11) if steps % x == 0)
    history = model.fit(
        batches, epochs=epochs, steps_per_epoch=steps // epochs, shuffle=False, verbose=verbose
    )
    sequences, targets, asked = task.draw(TEST_SEED, TEST_BATCHES * run["batch_size"])
    right = model.predict(sequences, run["batch_size"], verbose=0).argmax(-1) == targets
    return {
        "accuracy": [float(right[asked == hop].mean()) for hop in range(1, task.hops + 1)],
        "loss": history.history["loss"][-1],
        "seconds": time.perf_counter() - started,
    }


# --- results --------------------------------------------------------------------------------------


def write_report(folder, rows):
    """Writes `table.md` and `accuracy.png` and returns the table."""
    groups = {}
    for row in rows:
        size = tuple(row[name] for name in ("hops", "chains", "tokens", "training_steps"))
        options = json.dumps([row["options"], row["positions"]])
        groups.setdefault((size, row["model"], options), []).append(row)
    deepest = max(row["hops"] for row in rows)
    headings = ["hops", "chains", "tokens", "training steps", "model", "seeds"]
    headings += [f"{hop} hop{'s' * (hop > 1)}" for hop in range(1, deepest + 1)] + ["s a model"]
    lines = []
    for (size, model, _), found in groups.items():
        columns = np.transpose([row["accuracy"] for row in found])
        cells = [f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in columns]
        cells += ["-"] * (deepest - size[0])
        seconds = f"{np.mean([row['seconds'] for row in found]):.0f}"
        lines.append([*map(str, size), model, str(len(found)), *cells, seconds])
    table = markdown(headings, lines)
    replace_file(folder / "table.md", table.encode("utf-8"))
    replace_file(folder / "accuracy.png", draw(groups))
    return table


def draw(groups):
    """PNG of the accuracy by hops: a panel for each size, a line for each model."""
    sizes = list(dict.fromkeys(size for size, _, _ in groups))
    figure, panels = new_figure((1.5 + 4.5 * len(sizes), 4.2), columns=len(sizes), sharey=True)
    for panel, size in zip(panels, sizes, strict=True):
        hops = range(1, size[0] + 1)
        lines = [(model, found) for (other, model, _), found in groups.items() if other == size]
        for number, (model, found) in enumerate(lines):
            accuracy = 100 * np.array([row["accuracy"] for row in found])  # (seeds, hops)
            step, layers = read_model(model, found[0]["layers"])
            label = f"{step}, {layers} layer{'s' * (layers > 1)}"
            beside = [hop + 0.04 * (number - len(lines) / 2) for hop in hops]
            style = {"label": label, "linestyle": "--"} if layers > 1 else {"label": label}
            draw_line(panel, step, beside, accuracy.mean(0), **style)
            panel.vlines(beside, accuracy.min(0), accuracy.max(0), color=STYLES[step][0])
        panel.axhline(100 / size[1], color="#666", linestyle=":")
        panel.set_xticks(hops)
        panel.set_ylim(-3, 103)
        panel.set_xlabel("statements from a question to its answer")
        title = f"{size[1]} chains of {size[0]}, {size[2]} tokens, {size[3]} steps"
        panel.set_title(title, fontsize=10)
        panel.legend()
    panels[0].set_ylabel("accuracy, %")
    return as_png(figure, "Variable tracking: mean and range of seeds (dotted: guessing)")


# --- command line ---------------------------------------------------------------------------------


def parse(arguments=None):
    """The command line, and the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = "steps of the ablation, with layers as in R0x2"
    parser.add_argument("--models", nargs="+", default=["R0", "R0x2", "R5"], help=text)
    parser.add_argument("--seeds", type=int, nargs="+", help="each a training (0 1 2 3 4)")
    for name, (value, text) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text} ({value})")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (0.003)")
    parser.add_argument("--out", type=Path, default=Path("runs/tracking"), help="folder")
    text = "embed positions (yes)"
    parser.add_argument("--positions", action=argparse.BooleanOptionalAction, help=text)
    small = ", ".join(f"{name} {value}" for name, value in SMALL.items())
    parser.add_argument("--small", action="store_true", default=False, help=f"with {small}")
    text = "sum up what --out holds, train nothing"
    parser.add_argument("--report", action="store_true", default=False, help=text)
    add_rwr_flags(parser, {f"rwr_{name}": value for name, value in WALK.items()})
    return parser, vars(parser.parse_args(arguments))


def make_runs(given):
    """All models to train, as dicts.

    Raises:
        UsageError: If an argument is outside its range.
    """
    if "rwr_layers" in given:
        raise UsageError("`rwr_layers` must be left out: every layer walks here.")
    defaults = {name: value for name, (value, _) in SIZES.items()}
    defaults.update(seeds=list(range(5)), positions=True)
    given = {**defaults, **(SMALL if given["small"] else {}), **given}
    sizes = {name: given[name] for name in SIZES}
    for name, value in sizes.items():
        if value < (name != "warmup_steps"):
            raise UsageError(f"`{name}` must be at least 1. Received: {name}={value}")
    if sizes["width"] % sizes["heads"]:
        raise UsageError(
            "`width` must be a multiple of `heads`. "
            f"Received: width={sizes['width']}, heads={sizes['heads']}"
        )
    Task(*(sizes[name] for name in ("hops", "chains", "tokens", "vocabulary")))
    overrides = {**WALK, **rwr_overrides(given, sizes["layers"])}
    runs = []
    for seed in given["seeds"]:
        for model in given["models"]:
            step, _ = read_model(model, sizes["layers"])
            options = {}
            if STEPS[step].options is not None:
                options = overrides
                check_options(step, step_options(step, overrides))
            run = {"model": model, "seed": seed, **sizes, "options": options}
            runs.append({**run, **{name: given[name] for name in ("positions", "learning_rate")}})
    return runs


def main(arguments=None):
    """Runs the command line."""
    parser, given = parse(arguments)
    try:
        runs = make_runs(given)
    except UsageError as error:
        parser.error(str(error))
    out = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    done = [{name: row.get(name) for name in runs[0]} for row in read_results(path)]
    for run in [] if given["report"] else runs:
        if run in done:
            continue
        measured = train(run, verbosity() if sys.stdout.isatty() else 0)
        backend = {"backend": keras.backend.backend(), "keras": keras.__version__}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**run, **measured, **backend}) + "\n")
        accuracy = " ".join(f"{x:.3f}" for x in measured["accuracy"])
        print(
            f"{run['model']}, seed {run['seed']}: accuracy by hops {accuracy}, "
            f"{measured['seconds']:.0f} s",
            flush=True,
        )
    rows = read_results(path)
    if not rows:
        parser.error(f"`out` must hold results to report. Received: out={out}")
    print(f"\n{write_report(out, rows)}\nTable and picture: {out}")


if __name__ == "__main__":
    main()
