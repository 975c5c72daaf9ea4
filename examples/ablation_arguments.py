"""Command line of `gpt2_ablation.py`: flags, defaults, and what they may be.

`finetune_gpt2.py` takes its flags for RWR attention, model and training from here.
"""

import argparse
import functools
import math

from ablation_data import CHOICES, UsageError

from keras_rwr.ablation import STEPS, step_options
from keras_rwr.config import EDGE_WEIGHTS, RWRConfig, check_per_head

# The embedded text and a CPU: small enough for minutes, with a window that leaves most of the
# context to the far edges.
DEFAULTS = {
    "dataset": "embedded",
    "layers": 2,
    "width": 128,
    "heads": 4,
    "context": 256,
    "vocabulary_size": 2048,
    "dropout": 0.0,
    "batch_size": 4,
    "training_steps": 160,
    "evaluate_every": 20,
    "validation_tokens": 8192,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "seed": 0,
    "rwr_window": 32,
}
# What `finetune_gpt2.py` has no flags for.
ABLATION_DEFAULTS = {
    **DEFAULTS,
    "validation_dataset": None,
    "vocabulary": None,
    "dtype": "float32",
}
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
INTEGERS = {  # name: smallest value, help
    "layers": (1, "transformer layers"),
    "width": (1, "hidden size, a multiple of --heads"),
    "heads": (1, "attention heads"),
    "context": (2, "tokens a sequence"),
    "vocabulary_size": (257, "byte-pair vocabulary, trained on the dataset"),
    "batch_size": (1, "sequences a training step"),
    "training_steps": (1, "training steps, a multiple of --evaluate-every"),
    "evaluate_every": (1, "training steps between evaluations, each of which writes a checkpoint"),
    "validation_tokens": (1, "tokens that an evaluation reads, at most"),
    "warmup_steps": (0, "steps of learning-rate warm-up, less than --training-steps"),
    "seed": (0, "of the initial weights, the data order and dropout"),
}
REALS = {  # name: rule, help
    "dropout": ("in [0, 1)", "dropout rate"),
    "learning_rate": ("positive", "peak learning rate"),
    "weight_decay": ("at least 0", "weight decay of matrices and embeddings"),
}
RWR_INTEGERS = {
    "steps": "walk steps",
    "topk": "tokens outside the window that each query links to",
    "window": "half-width of the local window",
    "neighbor_block": "those tokens come in blocks of this many",
    "block_size": "overrides an implementation's tile; changes speed only",
    "head_dim_pad": "kernels round the head size up to a multiple; changes speed only",
}
RWR_REALS = {
    "alpha": "restart probability",
    "concentration": "initial sharpness of exponential edges",
    "reciprocal_beta": "forward share of the reciprocal mix",
    "lens_strength": "weight of the walk",
}


def make_parser():
    """The command line. Flags that are not given are absent from the result."""
    parser = argparse.ArgumentParser(
        description="Trains a small GPT-2 with stock attention (R0) and RWR attention (R1 to R4).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    run = parser.add_argument_group("what to run")
    add = functools.partial(add_flag, ABLATION_DEFAULTS)
    names = "; ".join(f"{step.name}: {step.description}" for step in STEPS.values())
    add(run, "ablation_step", f"one or more steps, or all. {names} (default: all)", nargs="+")
    add(
        run,
        "use_rwr",
        "without --ablation-step: train R1 alone, or with --no-use-rwr R0 alone",
        action=argparse.BooleanOptionalAction,
    )
    add(run, "dataset", CHOICES)
    add(run, "validation_dataset", "a text file or folder (default: 5 %% held out of --dataset)")
    add(run, "vocabulary", "folder with GPT-2's vocab.json and merges.txt (default: a trained one)")
    add(run, "dtype", "Keras's dtype policy of the model", choices=DTYPES)
    add(run, "run_dir", "new folder for the results (default: runs/<date and time>)")
    for name, text in (
        ("resume", "continue the run in --run-dir; flags not given are the run's"),
        ("dry_run", "build each model, train it for one step, keep nothing"),
    ):
        add(run, name, text, action="store_true", default=False)
    add_rwr_flags(parser, DEFAULTS)
    add_training_flags(parser, DEFAULTS)
    return parser


def add_flag(defaults, group, name, text, **options):
    """Adds one flag; its help says its default."""
    if defaults.get(name) is not None:
        text += f" (default: {defaults[name]})"
    group.add_argument(flag(name), help=text, **options)


def add_rwr_flags(parser, defaults):
    """The options of RWR attention, named `rwr_...`."""
    add = functools.partial(add_flag, defaults)
    rwr = parser.add_argument_group("RWR attention", "each replaces the value in every RWR step")
    for name, text in RWR_INTEGERS.items():
        add(rwr, f"rwr_{name}", text, type=int)
    for name, text in RWR_REALS.items():
        add(rwr, f"rwr_{name}", text, type=float)
    add(rwr, "rwr_threshold", "an edge needs a cosine above it, or none", type=number_or_none)
    add(rwr, "rwr_edge_weight", "edges' weights", choices=EDGE_WEIGHTS)
    for name, text in (
        ("rwr_reversible", "symmetrise the graph"),
        ("rwr_use_discoverability", "train how easily each token is found"),
        ("rwr_trainable_lens", "train the weight of the walk"),
    ):
        add(rwr, name, text, action=argparse.BooleanOptionalAction)


def add_training_flags(parser, defaults):
    """Sizes of the model and options of its training."""
    add = functools.partial(add_flag, defaults)
    model = parser.add_argument_group("model and training")
    for name, (_, text) in INTEGERS.items():
        add(model, name, text, type=int)
    for name, (_, text) in REALS.items():
        add(model, name, text, type=float)


def number_or_none(text):
    """A float, or None for "none"."""
    return None if text.lower() == "none" else float(text)


def flag(name):
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def choose_steps(given):
    """The ablation steps that the flags ask for, in the order of STEPS."""
    use_rwr = given.get("use_rwr")
    if "ablation_step" not in given:
        return {None: list(STEPS), True: ["R1"], False: ["R0"]}[use_rwr]
    text = given["ablation_step"]
    names = text if isinstance(text, list) else [text]
    names = [part for name in names for part in name.split(",") if part]
    if [name.lower() for name in names] == ["all"]:
        names = list(STEPS)
    if not names or not set(names) <= set(STEPS):
        raise UsageError(
            f"`ablation_step` must be all, or some of {', '.join(STEPS)}. "
            f"Received: ablation_step={' '.join(text)}"
        )
    steps = [name for name in STEPS if name in names]
    if use_rwr is not None and use_rwr not in {name != "R0" for name in steps}:
        raise UsageError(
            "`use_rwr` must agree with `ablation_step`, where R0 alone is without RWR. "
            f"Received: use_rwr={use_rwr}, ablation_step={' '.join(steps)}"
        )
    return steps


def check_numbers(arguments):
    """Raises UsageError for a size or a training option outside its range."""
    for name, (minimum, _) in INTEGERS.items():
        if arguments[name] < minimum:
            raise UsageError(
                f"`{name}` must be at least {minimum}. Received: {name}={arguments[name]}"
            )
    holds = {
        "dropout": lambda x: 0 <= x < 1,
        "learning_rate": lambda x: 0 < x < math.inf,
        "weight_decay": lambda x: 0 <= x < math.inf,
    }
    for name, (rule, _) in REALS.items():
        if not holds[name](arguments[name]):
            raise UsageError(f"`{name}` must be {rule}. Received: {name}={arguments[name]}")
    for name, divisor in (("width", "heads"), ("training_steps", "evaluate_every")):
        if arguments[name] % arguments[divisor]:
            raise UsageError(
                f"`{name}` must be a multiple of `{divisor}`. "
                f"Received: {name}={arguments[name]}, {divisor}={arguments[divisor]}"
            )
    if arguments["warmup_steps"] >= arguments["training_steps"]:
        raise UsageError(
            "`warmup_steps` must be less than `training_steps`. "
            f"Received: warmup_steps={arguments['warmup_steps']}, "
            f"training_steps={arguments['training_steps']}"
        )


def make_overrides(arguments, given):
    """For each step, the RWR options that the flags and this example's defaults replace."""
    steps = arguments["ablation_step"]
    walks = [step for step in steps if STEPS[step].options is not None]
    flags = [name for name in given if name.startswith("rwr_")]
    if flags and not walks:
        raise UsageError(
            f"{', '.join(map(flag, flags))} need an RWR step (R1 to R4). "
            f"Received: ablation_step={' '.join(steps)}"
        )
    options = {
        name.removeprefix("rwr_"): value
        for name, value in arguments.items()
        if name.startswith("rwr_")
    }
    overrides = {step: options if step in walks else None for step in steps}
    effective = {step: step_options(step, options) for step in walks}
    for step, values in effective.items():
        check_rwr_options(step, values)
    reversible = any(values.get("reversible") for values in effective.values())
    if "rwr_reciprocal_beta" in given and not reversible:
        raise UsageError(
            "`rwr_reciprocal_beta` needs a reversible step (R2, R3 or --rwr-reversible). "
            f"Received: ablation_step={' '.join(steps)}"
        )
    return overrides


def check_rwr_options(step, values):
    """Raises UsageError if the options of an RWR step are none of RWR attention."""
    fields = {k: v for k, v in values.items() if k in RWRConfig.__dataclass_fields__}
    try:
        RWRConfig(**fields, is_causal=True)
        check_per_head("lens_strength", values["lens_strength"], None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{step}: {error}") from error
