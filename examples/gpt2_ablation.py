"""Trains a small GPT-2 with stock attention (R0) and with RWR attention (R1 to R4).

    python examples/gpt2_ablation.py                            # all five, on the embedded text
    python examples/gpt2_ablation.py --ablation-step R0 R4 --rwr-window 16
    python examples/gpt2_ablation.py --run-dir runs/1 --resume  # continues a run that was stopped

Every step starts from the same initial weights and reads the same data in the same order, in a
process of its own. The run folder receives the losses (`R0/losses.csv`, ...), checkpoints, the
table (`table.md`, `.csv`, `.json`), the curves (`curves.png`), perplexity by position
(`positions.png`) and the configuration (`config.json`).
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ablation_arguments import (
    ABLATION_DEFAULTS,
    check_numbers,
    choose_steps,
    make_overrides,
    make_parser,
)
from ablation_data import UsageError, read_vocabulary, write_json

from keras_rwr.ablation import STEPS

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
        arguments = {**ABLATION_DEFAULTS, **given, "ablation_step": choose_steps(given)}
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
    import keras

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
    import ablation_train

    config = json.loads(json.dumps(config))
    config["arguments"].update(
        training_steps=1, evaluate_every=1, warmup_steps=0,
        validation_tokens=config["arguments"]["context"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ablation_train.prepare(Path(folder), config["arguments"])
        for step in config["arguments"]["ablation_step"]:
            result = ablation_train.train(Path(folder), step, config, verbose=0)
            print(
                f"{step}: {result['parameters']:,} parameters, "
                f"training loss {result['training_loss']:.4f}"
            )


def start(run_dir, config):
    """Writes what a new run needs into its empty folder, or leaves the folder empty."""
    import ablation_train

    write_json(run_dir / "config.json", config)
    try:
        ablation_train.prepare(run_dir, config["arguments"])
    except UsageError:
        shutil.rmtree(run_dir / "data")
        (run_dir / "config.json").unlink()
        raise


def run(run_dir, config):
    """Trains the steps that are not finished and reports after each."""
    import ablation_log
    import ablation_report
    import ablation_train

    ablation_train.prepare(run_dir, config["arguments"])
    results, losses = [], {}
    for step in config["arguments"]["ablation_step"]:
        done = run_dir / step / "result.json"
        if not done.exists():
            print(f"\n{step}: {STEPS[step].description}", flush=True)
            worker = Path(__file__).with_name("ablation_train.py")
            command = [sys.executable, os.fspath(worker), os.fspath(run_dir), step]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"{step} stopped. What is written stays; to go on: --resume --run-dir {run_dir}"
                )
        results.append(json.loads(done.read_text("utf-8")))
        losses[step] = ablation_log.read_losses(run_dir / step / "losses.csv")
        table = ablation_report.write_report(
            run_dir, config, results, losses, ablation_train.PROBE_SEQUENCES
        )
    print(f"\n{table}\nTable and curves: {run_dir}")


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
