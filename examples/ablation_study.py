"""Trains the models of a study: the ablation at full size, or one mechanism at a time.

    python examples/ablation_study.py small --dataset texts/ --validation-dataset held_out.txt.xz \\
        --vocabulary gpt2/ --out runs/small
    python examples/ablation_study.py mechanisms --dataset texts/ --runs R4 gamma-1 --seeds 0 1
    python examples/ablation_study.py small --report --out runs/small

`small` is GPT-2 small (124M), `long` a context of 4,096, `mechanisms` a small model with one option
changed at a time. `--list` prints the runs of a study. Each run is one of `gpt2_ablation.py`, in
a folder of its own below `--out`; a study that is started again goes on where it stopped.
`results.csv`, `table.md` and pictures sum up the runs that are there. Rows of runs whose folders
are gone stay in `results.csv`, and are not trained again.
"""

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from ablation_data import CHOICES, UsageError, write_json
from ablation_log import read_losses
from ablation_report import STYLES
from ablation_studies import STUDIES
from gpt2_ablation import check_same, make_config, open_run_folder

RESULTS = "results.csv"
# for runs that are no step: two more colours of Okabe and Ito's palette, and a grey
SPARE_STYLES = (
    *(("#56B4E9", "-", "o"), ("#E69F00", "--", "P"), ("#666666", ":", "X")),
    *(("#56B4E9", "-.", "<"), ("#E69F00", ":", ">"), ("#666666", "--", "d")),
    *(("#56B4E9", ":", "*"), ("#E69F00", "-", "h"), ("#666666", "-.", "p")),
)
FIELDS = (
    "run",
    "step",
    "seed",
    "tokens",
    "parameters",
    "training_loss",
    "validation_loss",
    "tokens_per_second",
    "device_memory_mb",
    "lens_strength",
    "concentration",
    "outside_window",
    "entropy",
    "isolated",
    "hit_rate",
    "options",
    "positions",
)


def arguments_of(study, name, seed, given):
    """What `gpt2_ablation.make_config` takes for one run of a study."""
    run = study.runs[name]
    options = {} if run.step == "R0" else {"window": study.window, **run.options}
    return {
        **study.arguments,
        **given,
        **{f"rwr_{option}": value for option, value in options.items()},
        "ablation_step": [run.step],
        "seed": seed,
    }


def train(out, study, name, seed, given):
    """Trains one run, unless it is there.

    Raises:
        UsageError: If the folder holds a run of another configuration, or data are missing.
        subprocess.CalledProcessError: If the training stopped.
    """
    import ablation_train

    run_dir = out / f"{name}-{seed}"
    is_finished = any((row["run"], row["seed"]) == (name, seed) for row in collect(out))
    resume = (run_dir / "config.json").exists()
    if is_finished and not resume:
        return
    stored = open_run_folder(run_dir, resume)
    config = make_config(arguments_of(study, name, seed, given))
    if stored is not None:
        check_same(config, stored)
    if is_finished:
        return
    ablation_train.prepare(out, config["arguments"])
    if not (run_dir / "data").exists():
        # tokens and initial weights are those of every run
        target = os.path.relpath(out / "data", run_dir)
        os.symlink(target, run_dir / "data", target_is_directory=True)
    write_json(run_dir / "config.json", config)
    print(f"\n{name}, seed {seed}", flush=True)
    worker = Path(__file__).with_name("ablation_train.py")
    command = [sys.executable, os.fspath(worker), os.fspath(run_dir), study.runs[name].step]
    subprocess.run(command, check=True)


def read_run(folder):
    """A row of `results.csv` of a finished run's folder, or `None`."""
    config_path = folder / "config.json"
    if not config_path.exists():
        return None
    arguments = json.loads(config_path.read_text("utf-8"))["arguments"]
    (step,) = arguments["ablation_step"]
    if not (folder / step / "result.json").exists():
        return None
    result = json.loads((folder / step / "result.json").read_text("utf-8"))
    rates = [
        row["timed_tokens"] / row["timed_seconds"]
        for row in read_losses(folder / step / "losses.csv")
        if row["timed_tokens"]
    ]
    values = {**(result["statistics"] or {}), **result, "tokens_per_second": np.median(rates)}
    name, _, _ = folder.name.rpartition("-")
    batch_tokens = arguments["batch_size"] * arguments["context"]
    return {
        **{field: values.get(field) for field in FIELDS},
        "run": name,
        "seed": arguments["seed"],
        "tokens": arguments["training_steps"] * batch_tokens,
        "options": json.dumps(result["options"]),
        "positions": json.dumps(
            [[part["first"], round(part["loss"], 5)] for part in result["losses_by_position"]]
        ),
    }


def collect(out):
    """Brings `results.csv` up to date with the finished runs in a folder and returns its rows."""
    path = out / RESULTS
    rows = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = {(row["run"], int(row["seed"])): row for row in csv.DictReader(file)}
    for row in map(read_run, sorted(out.iterdir())):
        if row is not None:
            rows[row["run"], row["seed"]] = row
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    return read_results(path)


def read_results(path):
    """The rows of a `results.csv`, with numbers as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: number(key, x) for key, x in row.items()} for row in csv.DictReader(file)]


def number(key, text):
    """A cell of `results.csv` as what it means."""
    if key in ("options", "positions"):
        return json.loads(text)
    if key in ("run", "step"):
        return text
    if key == "seed":
        return int(text)
    return float(text) if text else None


def sum_up(rows, study):
    """Rows by run, in the study's order: a dict from a name to its rows of all seeds."""
    found = {name: [row for row in rows if row["run"] == name] for name in study.runs}
    return {name: seeds for name, seeds in found.items() if seeds}


def write_table(path, rows, study):
    """Writes the study's table in Markdown, with the spread over seeds."""
    groups = sum_up(rows, study)
    baseline = {row["seed"]: row["validation_loss"] for row in groups.get(study.baseline, [])}
    heads = [
        "run",
        "what",
        "seeds",
        "validation loss",
        "range",
        "perplexity",
        f"against {study.baseline}, %",
        "walk outside window",
        "tokens/s",
        "GPU memory, MiB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, seeds in groups.items():
        losses = [row["validation_loss"] for row in seeds]
        # the same seeds of the baseline, so that the initial weights and the data are the same
        differences = [
            100 * math.expm1(row["validation_loss"] - baseline[row["seed"]])
            for row in seeds
            if row["seed"] in baseline
        ]
        cells = [
            name,
            study.runs[name].description,
            str(len(seeds)),
            f"{np.mean(losses):.4f}",
            f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-",
            f"{math.exp(np.mean(losses)):.2f}",
            " ".join(f"{x:+.2f}" for x in differences) if differences else "-",
            mean_of(seeds, "outside_window", ".3f"),
            mean_of(seeds, "tokens_per_second", ",.0f"),
            mean_of(seeds, "device_memory_mb", ",.0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mean_of(rows, name, form):
    """The mean of a column, formatted; a hyphen where it does not apply."""
    values = [row[name] for row in rows if row[name] is not None]
    return format(float(np.mean(values)), form) if values else "-"


# --- pictures ------------------------------------------------------------------------------------


def draw_losses(path, rows, study):
    """PNG of the validation perplexities: a line for each run, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = sum_up(rows, study)
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for height, (name, seeds) in enumerate(groups.items()):
        perplexities = [math.exp(row["validation_loss"]) for row in seeds]
        color = STYLES[study.runs[name].step][0]
        panel.plot(perplexities, [height] * len(seeds), "o", color=color, alpha=0.8)
    panel.set_yticks(range(len(groups)), list(groups), fontsize=8)
    panel.invert_yaxis()
    for row in groups.get(study.baseline, []):
        panel.axvline(math.exp(row["validation_loss"]), color="#666", linestyle=":")
    panel.set_xlabel(f"validation perplexity, a dot a seed (dotted: {study.baseline})")
    panel.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)


def draw_positions(path, rows, study):
    """PNG of the perplexity by position against the baseline's, for runs of its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {(row["run"], row["seed"]): dict(row["positions"]) for row in rows if row["positions"]}
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    others = [name for name in study.runs if name not in STYLES]
    styles = {**dict(zip(others, itertools.cycle(SPARE_STYLES), strict=False)), **STYLES}
    for name in study.runs:
        bases = [(study.baseline, seed) for run, seed in found if run == name]
        pairs = [((name, base[1]), base) for base in bases if base in found]
        if name == study.baseline or not pairs:
            continue
        positions = sorted(found[pairs[0][0]])
        changes = [
            [100 * math.expm1(found[one][x] - found[base][x]) for x in positions]
            for one, base in pairs
        ]
        color, dashes, marker = styles[name]
        panel.plot(
            positions,
            np.mean(changes, 0),
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            label=name,
        )
    panel.axhline(0.0, color="#000")
    panel.set_xlabel("position in the context, tokens")
    panel.set_ylabel(f"validation perplexity against {study.baseline}, %")
    panel.grid(alpha=0.3)
    if panel.lines[1:]:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


# --- command line --------------------------------------------------------------------------------


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--dataset", help=CHOICES + " (default: embedded)")
    parser.add_argument("--validation-dataset", help="a text file or folder")
    parser.add_argument("--vocabulary", help="folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument(
        "--runs", nargs="+", help="to train and to sum up, beside the baseline (all)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="to train and to sum up (those of each run)"
    )
    parser.add_argument(
        "--training-steps", type=int, help="a multiple of the evaluations' distance"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/<study>)")
    parser.add_argument(
        "--list", action="store_true", default=False, help="print the runs and stop"
    )
    parser.add_argument(
        "--report", action="store_true", default=False, help="sum up, train nothing"
    )
    return parser, vars(parser.parse_args(arguments))


def main(arguments=None):
    """Runs the command line."""
    parser, given = parse(arguments)
    study = STUDIES[given["study"]]
    names = given.pop("runs", list(study.runs))
    seeds, out = given.pop("seeds", None), given.pop("out", Path("runs") / given.pop("study"))
    given.pop("study", None)
    listed, report = given.pop("list"), given.pop("report")
    if listed:
        for name, run in study.runs.items():
            print(f"{name:37} seeds {run.seeds}  {run.step} {dict(run.options)}: {run.description}")
        return
    unknown = sorted(set(names) - set(study.runs))
    if unknown:
        parser.error(f"`runs` must be of {', '.join(study.runs)}. Received: {' '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    if not report:
        order = sorted({seed for name in names for seed in (seeds or study.runs[name].seeds)})
        try:
            for seed in order:
                for name in names:
                    if seed in (seeds or study.runs[name].seeds):
                        train(out, study, name, seed, given)
                        collect(out)
        except UsageError as error:
            parser.error(str(error))
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"A run stopped. Finished ones stay; the same command goes on. Folder: {out}"
            ) from None
    rows = [
        row
        for row in collect(out)
        if row["run"] in {study.baseline, *names} and (seeds is None or row["seed"] in seeds)
    ]
    write_table(out / "table.md", rows, study)
    draw_losses(out / "losses.png", rows, study)
    draw_positions(out / "positions.png", rows, study)
    print((out / "table.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
