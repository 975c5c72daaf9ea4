"""Fine-tunes GPT-2 with RWR attention on a text.

    python examples/finetune_gpt2.py                                  # makes its own small preset
    python examples/finetune_gpt2.py --preset gpt2_base_en --dataset my.txt --learning-rate 5e-5
    python examples/finetune_gpt2.py --lora 4 --rwr-edge-weight exponential
    python examples/finetune_gpt2.py --resume runs/1                  # continues a run that stopped

The preset's weights go into a model with RWR attention, which is trained on the text. Perplexity
on held-out text is measured with stock attention, after the conversion, and after the training.
The run folder receives the trained model as a preset (`model/`), the perplexities and a sample
(`report.json`), losses and a checkpoint.
"""

import argparse
import datetime
import functools
import json
import sys
from pathlib import Path

import ablation_arguments
from ablation_arguments import add_flag, check_numbers, flag, make_overrides
from ablation_data import UsageError, write_json
from gpt2_ablation import environment, open_run_folder

from keras_rwr.ablation import STEPS, step_options

CHOICES = "`embedded` (one novel), a .txt/.gz/.xz file, or a folder of such files"
DEFAULTS = {
    **ablation_arguments.DEFAULTS,
    "ablation_step": "R1",
    "learning_rate": 5e-4,
    "training_steps": 120,
    "pretraining_steps": 300,
    "prompt": "It was a",
    "sample_tokens": 60,
    "sampler": "top_p",
}
LORA_LEARNING_RATE = 5e-3
SAMPLERS = ("greedy", "top_k", "top_p", "beam", "contrastive", "random")


def make_parser():
    """The command line. Flags that are not given are absent from the result."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes GPT-2 with RWR attention on a text.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = functools.partial(add_flag, DEFAULTS)
    run = parser.add_argument_group("what to run")
    add(
        run,
        "preset",
        "a stock GPT-2: a folder of save_to_preset, a name such as gpt2_base_en, kaggle://... or "
        "hf://... (without it, a small one is trained on the embedded text)",
    )
    add(run, "dataset", f"{CHOICES}; its last 5 %% are held out")
    add(run, "run_dir", "new folder for the results (default: runs/<date and time>)")
    add(run, "resume", "folder of a run to continue; its arguments are the run's", metavar="FOLDER")
    add(run, "lora", "train only low-rank factors of this rank of queries and values", type=int)
    steps = "; ".join(f"{step.name}: {step.description}" for step in STEPS.values())
    add(run, "ablation_step", steps, choices=list(STEPS))
    add(run, "prompt", "what the sample goes on from")
    add(run, "sample_tokens", "length of the sample", type=int)
    add(run, "sampler", "how it is drawn", choices=SAMPLERS)
    add(run, "pretraining_steps", "training steps of the small preset", type=int)
    ablation_arguments.add_rwr_flags(parser, DEFAULTS)
    ablation_arguments.add_training_flags(parser, DEFAULTS)
    parser.epilog = (
        f"--learning-rate is {LORA_LEARNING_RATE} with --lora; for a real GPT-2, take about 5e-5. "
        "Layers, width, heads, vocabulary and dropout are those of the small preset."
    )
    return parser


def make_config(given):
    """The whole configuration of a new run, from the flags."""
    defaults = dict(DEFAULTS)
    if "lora" in given:
        defaults["learning_rate"] = LORA_LEARNING_RATE
    arguments = {"preset": None, "lora": None, **defaults, **given}
    for name in ("dataset", "preset"):
        if arguments[name] is not None and Path(arguments[name]).exists():
            arguments[name] = str(Path(arguments[name]).resolve())
    check_numbers(arguments)
    for name in ("pretraining_steps", "sample_tokens", "lora"):
        if arguments[name] is not None and arguments[name] < 1:
            raise UsageError(f"`{name}` must be at least 1. Received: {name}={arguments[name]}")
    if arguments["dataset"] == "finewebedu":
        raise UsageError(f"`dataset` must be {CHOICES}. Received: dataset=finewebedu")
    own = {"layers", "width", "heads", "vocabulary_size", "dropout", "pretraining_steps"}
    ignored = [flag(name) for name in given if name in own]
    if ignored and arguments["preset"] is not None:
        raise UsageError(
            f"{', '.join(ignored)} must be left out with `preset`, which has its own. "
            f"Received: preset={arguments['preset']}"
        )
    step = arguments["ablation_step"]
    overrides = make_overrides({**arguments, "ablation_step": [step]}, given)[step]
    return {
        "arguments": arguments,
        "options": step_options(step, overrides),
        **environment(),
    }


def check_resume(given, stored):
    """Raises UsageError if a run cannot be continued as the flags and this process have it."""
    if len(given) > 1:
        others = ", ".join(flag(name) for name in given if name != "resume")
        raise UsageError(
            f"`resume` must be the only flag, since the run keeps its arguments; {others} given "
            f"too. Received: resume={given['resume']}"
        )
    backend = environment()["backend"]
    if backend != stored["backend"]:
        raise UsageError(
            f"`KERAS_BACKEND` must be that of the run, {stored['backend']}. "
            f"Received: KERAS_BACKEND={backend}"
        )


def run(run_dir, config):
    """Prepares, trains and reports, going on from what the run folder holds."""
    import finetune_model

    finetune_model.use_cache_when_offline(config["arguments"]["preset"])
    finetune_model.prepare(run_dir, config)
    report = finetune_model.train(run_dir, config)
    write_json(run_dir / "report.json", {**report, **config})
    print(f"\n{table(report)}\n\nSample: {report['sample']}\n\nModel and report: {run_dir}")


def table(report):
    """The perplexities in Markdown."""
    lines = ["| model | held-out perplexity | against stock |", "| --- | --- | --- |"]
    stock = report["perplexity"]["stock"]
    for name, value in report["perplexity"].items():
        lines.append(f"| {name} | {value:.2f} | {100 * (value / stock - 1):+.1f} % |")
    return "\n".join(lines)


def main(argv=None):
    """Runs the command line."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    try:
        if "resume" in given:
            run_dir = Path(given["resume"])
            config = open_run_folder(run_dir, resume=True)
            check_resume(given, config)
        else:
            default = f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
            run_dir = Path(given.pop("run_dir", default))
            config = json.loads(json.dumps(make_config(given)))
            open_run_folder(run_dir, resume=False)
        run(run_dir, config)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(f"Stopped. To go on: --resume {run_dir}")


if __name__ == "__main__":
    main()
