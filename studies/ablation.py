"""Trains a small GPT-2 with stock attention (R0) and with RWR attention (R1 to R5).

    python -m studies.ablation                              # all six, on the embedded text
    python -m studies.ablation --ablation-step R0 R5 R5:topk=4:steps=2 --seeds 0 1
    python -m studies.ablation --run-dir runs/1 --resume    # continues a run that was stopped

Every step starts from the same initial weights and reads the same data in the same order, in a
process of its own. The run folder receives the losses (`R0-0/losses.csv`, ...), checkpoints, the
table (`table.md`, `.csv`, `.json`), the curves (`curves.png`), perplexity by position
(`positions.png`) and the configuration (`config.json`). Where all steps are trained, the tracking
study follows at its small size and leaves its table and picture in `tracking/`.
"""

import datetime
import importlib.metadata
import itertools
import json
import platform
import shutil
import tempfile
from pathlib import Path

import keras

from keras_rwr.ablation import STEPS
from studies import report, tracking, training, workers
from studies.arguments import (
    DEFAULTS,
    base,
    check_numbers,
    choose_steps,
    make_overrides,
    make_parser,
)
from studies.data import UsageError, read_vocabulary, write_json

BACKENDS = ("torch", "jax", "tensorflow")


def make_config(given, stored=None):
    """The whole configuration of a run, from the flags and, when resuming, the stored one."""
    given = dict(given)
    if stored is not None:
        # flags that say nothing new need no repeating
        arguments = {**stored["arguments"], **given}
        if "ablation_step" in given or "use_rwr" in given:
            arguments["ablation_step"] = choose_steps(given)
    else:
        steps = choose_steps(given)
        tracked = steps == list(STEPS)
        arguments = {**DEFAULTS, "tracking": tracked, **given, "ablation_step": steps}
    arguments.pop("use_rwr", None)
    for name in ("dataset", "validation_dataset", "vocabulary"):
        if arguments[name] not in ("embedded", "finewebedu", None):
            arguments[name] = str(Path(arguments[name]).resolve())
    if arguments["vocabulary"] is not None:
        size = len(read_vocabulary(arguments["vocabulary"])[0])
        if given.get("vocabulary_size", size) != size:
            raise UsageError(
                "`vocabulary_size` must be left out, or that of `vocabulary`. "
                f"Received: vocabulary_size={given['vocabulary_size']}, a vocabulary of {size}"
            )
        arguments["vocabulary_size"] = size
    check_numbers(arguments)
    return {
        "arguments": arguments,
        "overrides": make_overrides(arguments, given),
        **environment(),
    }


def environment():
    """Backend, platform and versions of this process."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise UsageError(
            f"`KERAS_BACKEND` must be one that trains: {', '.join(BACKENDS)}. "
            f"Received: KERAS_BACKEND={backend}"
        )
    return {
        "backend": backend,
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("keras", "keras-hub", "numpy", backend)
            },
        },
    }


def open_run_folder(path, resume):
    """Makes the run folder, or checks that it can be continued; returns its config or None."""
    try:
        if not resume and path.exists() and any(path.iterdir()):
            raise UsageError(
                "`run_dir` must be new or empty, or --resume given to continue its run. "
                f"Received: run_dir={path}"
            )
        if resume and not (path / "config.json").exists():
            raise UsageError(
                f"`run_dir` must hold a run to resume (config.json). Received: run_dir={path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        return json.loads((path / "config.json").read_text("utf-8")) if resume else None
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(
            f"`run_dir` must be a writable folder ({error}). Received: run_dir={path}"
        ) from error


def check_same(config, stored):
    """Raises UsageError if a resumed run would not be the same run."""
    old = {**stored["arguments"], "backend": stored["backend"]}
    new = {**config["arguments"], "backend": config["backend"]}
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        received = ", ".join(f"{key}={new.get(key)} (run: {old.get(key)})" for key in differing)
        raise UsageError(
            f"A resumed run must have the run's own configuration; {', '.join(differing)} "
            f"differ. Received: {received}"
        )


def dry_run(config):
    """Builds every model and trains it for one step, in a temporary folder."""
    arguments = {**config["arguments"], "training_steps": 1, "evaluate_every": 1}
    arguments.update(warmup_steps=0, validation_tokens=arguments["context"])
    config = {**config, "arguments": arguments}
    with tempfile.TemporaryDirectory() as folder:
        training.prepare(Path(folder), arguments)
        for step in arguments["ablation_step"]:
            result = training.train(Path(folder), step, arguments["seeds"][0], config, verbose=0)
            print(
                f"{step}: {result['parameters']:,} parameters, "
                f"training loss {result['training_loss']:.4f}"
            )
        if arguments["tracking"]:
            once = ["--small", "--training-steps", "1", "--seeds", "0", "--out", folder]
            tracking.main(once)


def start(run_dir, config):
    """Writes what a new run needs into its empty folder, or leaves the folder empty."""
    write_json(run_dir / "config.json", config)
    try:
        training.prepare(run_dir, config["arguments"])
    except UsageError:
        shutil.rmtree(run_dir / "data")
        (run_dir / "config.json").unlink()
        raise


def run(run_dir, config):
    """Trains the steps that are not finished and reports after each."""
    training.prepare(run_dir, config["arguments"])
    results, losses = [], []
    seeds, steps = config["arguments"]["seeds"], config["arguments"]["ablation_step"]
    for seed, step in itertools.product(seeds, steps):
        folder = training.folder_of(run_dir, step, seed)
        if not (folder / "result.json").exists():
            print(f"\n{step}, seed {seed}: {STEPS[base(step)].description}", flush=True)
            work(run_dir, step, "studies.training", run_dir, step, str(seed))
        results.append(json.loads((folder / "result.json").read_text("utf-8")))
        losses.append(workers.read_losses(folder / "losses.csv"))
        table = report.write_report(run_dir, config, results, losses, training.PROBE_SEQUENCES)
    print(f"\n{table}\nTable and curves: {run_dir}", flush=True)
    if config["arguments"]["tracking"]:
        print("\nVariable tracking", flush=True)
        work(run_dir, "tracking", "studies.tracking", "--small", "--out", run_dir / "tracking")


def work(run_dir, name, *command):
    """Runs a worker, and says how to go on if it stops."""
    if workers.start(*command):
        raise SystemExit(
            f"{name} stopped. What is written stays; to go on: --resume --run-dir {run_dir}"
        )


def main(argv=None):
    """Runs the command line."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    resume, dry = given.pop("resume"), given.pop("dry_run")
    run_dir = given.pop("run_dir", None)
    try:
        if resume and (run_dir is None or dry):
            raise UsageError(
                "`resume` needs `run_dir` and no `dry_run`. "
                f"Received: resume=True, run_dir={run_dir}, dry_run={dry}"
            )
        if dry:
            dry_run(make_config(given))
            return
        if run_dir is None:
            run_dir = f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
        run_dir = Path(run_dir)
        if resume:
            stored = open_run_folder(run_dir, resume)
            config = make_config(given, stored)
            check_same(config, stored)
        else:
            config = make_config(given)
            open_run_folder(run_dir, resume)
            start(run_dir, config)
        run(run_dir, config)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
