"""Trains language models that differ in their attention alone, and tells where each is better.

    python -m studies.language                                       # small, on the embedded text
    python -m studies.language --dataset packages --context 4096 --width 512 --layers 6 --heads 8 \\
        --vocabulary-size 8192 --batch-size 8 --training-steps 5000 --dtype mixed_bfloat16
    python -m studies.language --models fair fair-1 R5 R5:steps=1 --seeds 0 1 2 --out runs/language

The models are transformers with rotary positions. `full` has full attention. `fair` has full
attention with what R5 has besides its walk: keys convolved over four tokens, queries and keys of
length one with a trained temperature, a token's own value. `fair-1` and `fair-all` begin as R5's
graph does, in one head of each layer or in all: the key's projection is the query's, the
convolution a shift by one token, and nothing is rotated, so that a token attends to the tokens that
followed tokens like it. `local` is `fair` within a window. R1 to R5 are `local` in each layer and
walk in theirs; `R5:steps=1` is one with options of its own.

A validation target is far, near or new: the pair of it and the token before came before, last
outside the window or within, or never did. The folder receives a line of `results.jsonl` for each
trained model, its losses as it trained and each of its validation losses; `table.md`,
`curves.png` and `differences.png` sum up, with intervals by bootstrap over validation sequences.
A run that is stopped and started again goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_rwr.ablation import STEPS
from studies.arguments import DEFAULTS as ABLATION
from studies.arguments import (
    DTYPES,
    INTEGERS,
    REALS,
    base,
    check_layers,
    check_numbers,
    check_options,
    flag,
)
from studies.data import CHOICES, UsageError, batch_rows, cut_blocks, prepare_tokens, write_arrays
from studies.language_models import PLAIN, build_model, walk_options
from studies.report import as_png, markdown, new_figure, replace_file
from studies.training import make_optimizer
from studies.workers import RunLog, read_losses, read_results, verbosity

# Those of the ablation, where they mean something here.
DEFAULTS = {
    **{x: y for x, y in ABLATION.items() if x not in ("dropout", "seeds", "rwr_window")},
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "window": 32,
}
SLICES = ("far", "near", "new")
RESAMPLES = 2000


# --- training and evaluation ----------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    """Endless training batches; number n of them is that of training step `first` + n."""

    def __init__(self, blocks, run, first):
        super().__init__()
        self.blocks, self.run, self.first = blocks, run, first

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        size, step = self.run["batch_size"], self.first + index
        rows = self.blocks[batch_rows(len(self.blocks), size, step, self.run["seed"])]
        return rows[:, :-1], rows[:, 1:]


def train(run, data, folder, verbose=0):
    """Trains one model, from its last checkpoint if there is one, and measures it.

    Args:
        run: Dict with `model`, `seed` and the values of `DEFAULTS`.
        data: Path of the folder with the tokens; see `studies.data.prepare_tokens`.
        folder: Path of the folder that receives checkpoints and losses.
        verbose: Keras's.

    Returns:
        A dict of the losses overall and of each slice, in nats a token, and of speed and size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(data / "tokens.npz") as stored:
        training = cut_blocks(stored["training"], run["context"], "training")
        validation = cut_blocks(stored["validation"], run["context"], "validation")
    size = run["batch_size"]
    if len(validation) > size:  # whole batches, so that one shape is compiled
        validation = validation[: len(validation) // size * size]
    keras.utils.clear_session()  # a checkpoint goes by names, which Keras numbers
    model = build_model(run)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = make_optimizer(run)
    model.compile(optimizer, loss)
    optimizer.build(model.trainable_variables)
    log = RunLog(folder, run["evaluate_every"], size * run["context"], run["seed"])
    done = log.restore(model)
    model.fit(
        Batches(training, run, done * run["evaluate_every"]),
        steps_per_epoch=run["evaluate_every"],
        initial_epoch=done,
        epochs=run["training_steps"] // run["evaluate_every"],
        validation_data=(validation[:, :-1], validation[:, 1:]),
        validation_batch_size=size,
        shuffle=False,
        callbacks=[log],
        verbose=verbose,
    )
    losses = token_losses(model, validation, size)
    slices = np.stack([slice_of(row, run["window"]) for row in validation])
    write_arrays(folder / "validation.npz", {"losses": losses, "slices": slices})
    timed = sum(row["timed_tokens"] for row in log.rows)
    seconds = sum(row["timed_seconds"] for row in log.rows)
    return {
        "loss": float(losses.mean()),
        **{
            name: float(losses[slices == number].mean()) if (slices == number).any() else None
            for number, name in enumerate(SLICES)
        },
        "parameters": model.count_params(),
        "tokens_per_second": timed / seconds if timed else None,
        "peak_memory_mb": log.rows[-1]["peak_memory_mb"],
    }


def token_losses(model, rows, batch_size):
    """The loss of each target of `(B, S + 1)` token ids, `(B, S)`."""
    targets = keras.Input((None,), dtype="int32")
    loss = ops.sparse_categorical_crossentropy(targets, model.output, from_logits=True)
    evaluator = keras.Model([model.input, targets], loss)
    return evaluator.predict([rows[:, :-1], rows[:, 1:]], batch_size, verbose=0)


def slice_of(tokens, window):
    """The number in `SLICES` of each target of a sequence of S + 1 tokens, `(S,)`."""
    last: dict[tuple[int, int], int] = {}
    found = np.full(len(tokens) - 1, SLICES.index("new"), "int8")
    for place, pair in enumerate(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)):
        if pair in last:
            name = "far" if place - last[pair] > window else "near"
            found[place] = SLICES.index(name)
        last[pair] = place
    return found


# --- results --------------------------------------------------------------------------------------


def folder_of(out, run):
    """Where a training writes to."""
    return out / f"{run['model'].replace(':', '-')}-seed{run['seed']}"


def intervals(out, rows):
    """The difference of each model from the first, by slice: (mean, low, high) in nats a token.

    Sequences are drawn with replacement, the same for both models; seeds count as more sequences.
    """
    from scipy.stats import bootstrap

    def sums(row):
        with np.load(folder_of(out, row) / "validation.npz") as stored:
            losses, slices = stored["losses"].astype("float64"), stored["slices"]
        chosen = [np.ones_like(slices, bool), *(slices == x for x in range(len(SLICES)))]
        return np.stack([(losses * x).sum(-1) for x in chosen]), np.stack(
            [x.sum(-1) for x in chosen]
        )

    by_model: dict[str, dict[int, tuple]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["seed"]] = sums(row)
    first = next(iter(by_model))
    found = {}
    for model, seeds in by_model.items():
        shared = sorted(seeds.keys() & by_model[first].keys())
        if model == first or not shared:
            continue
        gained = np.concatenate([seeds[x][0] - by_model[first][x][0] for x in shared], axis=1)
        counts = np.concatenate([seeds[x][1] for x in shared], axis=1)
        found[model] = {}
        for name, gain, count in zip(("all", *SLICES), gained, counts, strict=True):
            if count.sum() == 0:
                continue
            drawn = bootstrap(
                (gain, count),
                lambda gain, count, axis: gain.sum(axis) / np.maximum(count.sum(axis), 1),
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            found[model][name] = (gain.sum() / count.sum(), drawn.low, drawn.high)
    return found


def write_report(out, rows):
    """Writes `table.md` and the pictures, and returns the table."""
    differences = intervals(out, rows)
    first = rows[0]["model"]
    headings = ["model", "seeds", "loss", *SLICES, f"minus {first} (95 %)", "far minus (95 %)"]
    headings += ["million parameters", "tokens/s"]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    lines = []
    for model, found in groups.items():
        cells = [mean_of(found, name, "{:.4f}") for name in ("loss", *SLICES)]
        for name in ("all", "far"):
            interval = differences.get(model, {}).get(name)
            cells.append(
                "-" if interval is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*interval)
            )
        cells.append(f"{found[0]['parameters'] / 1e6:.2f}")
        cells.append(mean_of(found, "tokens_per_second", "{:,.0f}"))
        lines.append([model, str(len(found)), *cells])
    table = markdown(headings, lines)
    replace_file(out / "table.md", table.encode("utf-8"))
    replace_file(out / "curves.png", draw_curves(out, groups))
    if differences:
        replace_file(out / "differences.png", draw_differences(first, differences))
    return table


def mean_of(rows, name, form):
    """The mean of what was measured of some runs, as a table has it."""
    values = [row[name] for row in rows if row[name] is not None]
    return form.format(np.mean(values)) if values else "-"


def draw_curves(out, groups):
    """PNG of the validation loss while training: the mean of seeds and their range."""
    figure, (panel,) = new_figure((7, 4.5))
    for model, found in groups.items():
        curves = [read_losses(folder_of(out, row) / "losses.csv") for row in found]
        losses = np.array([[row["validation_loss"] for row in curve] for curve in curves])
        tokens = [row["tokens"] / 1e6 for row in curves[0]]
        (line,) = panel.plot(tokens, losses.mean(0), label=model)
        panel.fill_between(tokens, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2)
    panel.set_xscale("log")
    panel.set_xlabel("million training tokens")
    panel.set_ylabel("validation loss, nats a token")
    panel.legend()
    return as_png(figure, "Validation loss: mean and range of seeds")


def draw_differences(first, differences):
    """PNG of the differences from the first model by slice, with intervals."""
    names = ("all", *SLICES)
    figure, panels = new_figure(
        (3.2 * len(names), 1.2 + 0.5 * len(differences)), len(names), sharey=True
    )
    for panel, name in zip(panels, names, strict=True):
        for place, model in enumerate(differences):
            if name in differences[model]:
                mean, low, high = differences[model][name]
                panel.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
        panel.axvline(0, color="#666", linestyle=":")
        panel.set_title(name)
        panel.set_xlabel("nats a token")
    panels[0].set_yticks(range(len(differences)), list(differences))
    return as_png(figure, f"Validation loss minus that of {first}, with 95 % intervals")


# --- command line ---------------------------------------------------------------------------------


def parse(arguments=None):
    """The command line, and the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = f"some of {', '.join(PLAIN)}, and steps of the ablation as in R5:steps=1"
    parser.add_argument("--models", nargs="+", default=["fair", "local", "R5"], help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each a training")
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="folder")
    text = "sum up what --out holds, train nothing"
    parser.add_argument("--report", action="store_true", help=text)
    dataset = f"packages (Python's installed ones), {CHOICES}"
    texts = {"dataset": dataset, "validation_dataset": "a text of its own", "window": "of LOCAL"}
    texts["vocabulary"] = "folder with GPT-2's vocab.json and merges.txt"
    for name, value in DEFAULTS.items():
        text = texts.get(name) or (INTEGERS.get(name) or REALS.get(name) or ("", "precision"))[1]
        kind = str if value is None else type(value)
        choices = DTYPES if name == "dtype" else None
        text += "" if value is None else f" ({value})"
        parser.add_argument(flag(name), type=kind, default=value, choices=choices, help=text)
    return parser, vars(parser.parse_args(arguments))


def make_runs(given):
    """All models to train, as dicts.

    Raises:
        UsageError: If an argument is outside its range.
    """
    check_numbers({**given, "dropout": 0.0})
    if given["window"] < 0:
        raise UsageError(f"`window` must be at least 0. Received: window={given['window']}")
    sizes = {name: given[name] for name in DEFAULTS}
    runs = []
    for seed in given["seeds"]:
        for model in dict.fromkeys(given["models"]):
            run = {"model": model, "seed": seed, **sizes}
            if model not in PLAIN:
                if STEPS.get(base(model)) is None or STEPS[base(model)].options is None:
                    raise UsageError(
                        f"`models` must be some of {', '.join(PLAIN)}, and R1 to R5. "
                        f"Received: models={model}"
                    )
                check_options(model, walk_options(run))
                check_layers(base(model), run["layers"])
            runs.append(run)
    return runs


def main(arguments=None):
    """Runs the command line."""
    parser, given = parse(arguments)
    try:
        runs = make_runs(given)
        out = given["out"]
        path = out / "results.jsonl"
        known = [{name: row.get(name) for name in runs[0]} for row in read_results(path)]
        if not given["report"]:
            out.mkdir(parents=True, exist_ok=True)
            tokens = given["training_steps"] * given["batch_size"] * given["context"]
            prepare_tokens(out / "data", given, tokens)
        for run in [] if given["report"] else runs:
            if run in known:
                continue
            started = time.perf_counter()
            measured = train(run, out / "data", folder_of(out, run), verbosity())
            seconds = {"seconds": time.perf_counter() - started}
            backend = {"backend": keras.backend.backend(), "keras": keras.__version__}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**run, **measured, **seconds, **backend}) + "\n")
    except UsageError as error:
        parser.error(str(error))
    rows = read_results(path)
    if not rows:
        parser.error(f"`out` must hold results to report. Received: out={out}")
    print(f"\n{write_report(out, rows)}\nTable and pictures: {out}")


if __name__ == "__main__":
    main()
