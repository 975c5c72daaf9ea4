"""Command lines of the studies: flags, defaults, and what they may be."""

import argparse
import functools
import inspect
import math
import re
import types
import typing

from keras_rwr.ablation import STEPS, step_options
from keras_rwr.options import Call, Options, Tuning
from studies.data import CHOICES, UsageError

# The embedded text and a CPU: small enough for minutes, with a window that leaves most of the
# context to the far edges.
DEFAULTS = {
    "dataset": "embedded",
    "validation_dataset": None,
    "vocabulary": None,
    "dtype": "float32",
    "layers": 2,
    "width": 64,
    "heads": 2,
    "context": 256,
    "vocabulary_size": 512,
    "dropout": 0.0,
    "batch_size": 4,
    "training_steps": 500,
    "evaluate_every": 100,
    "validation_tokens": 8192,
    "learning_rate": 6e-3,
    "warmup_steps": 30,
    "weight_decay": 0.1,
    "seeds": [0],
    "rwr_window": 32,
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
}
REALS = {  # name: rule, help
    "dropout": ("in [0, 1)", "dropout rate"),
    "learning_rate": ("positive", "peak learning rate"),
    "weight_decay": ("at least 0", "weight decay of matrices and embeddings"),
}


def make_parser():
    """The command line of the ablation. Flags that are not given are absent from the result."""
    parser = argparse.ArgumentParser(
        description="Trains a small GPT-2 with stock attention (R0) and with RWR attention.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    run = parser.add_argument_group("what to run")
    add = functools.partial(add_flag, DEFAULTS)
    names = "; ".join(f"{step.name}: {step.description}" for step in STEPS.values())
    text = "one or more steps, or all; a step may have options of its own, as in R5:topk=4:steps=2"
    add(run, "ablation_step", f"{text}. {names} (default: all)", nargs="+")
    text = "of the initial weights, the data order and dropout; each trains every step"
    add(run, "seeds", text, nargs="+", type=int)
    add(
        run,
        "use_rwr",
        "without --ablation-step: train R1 alone, or with --no-use-rwr R0 alone",
        action=argparse.BooleanOptionalAction,
    )
    add(
        run,
        "tracking",
        "then the tracking study at its small size (default: with all steps)",
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
    model = parser.add_argument_group("model and training")
    for name, (_, text) in INTEGERS.items():
        add(model, name, text, type=int)
    for name, (_, text) in REALS.items():
        add(model, name, text, type=float)
    return parser


def add_flag(defaults, group, name, text, **options):
    """Adds one flag; its help says its default."""
    if defaults.get(name) is not None:
        text += f" (default: {defaults[name]})"
    group.add_argument(flag(name), help=text, **options)


def flag(name):
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


# --- options of RWR attention ---------------------------------------------------------------------


def add_rwr_flags(parser, defaults):
    """A flag `--rwr-...` for every field of `Options` and `Tuning`, and `--rwr-layers`."""
    group = parser.add_argument_group("RWR attention", "each replaces the value in every RWR step")
    for kind in (Options, Tuning):
        texts = describe_fields(kind)
        for name, annotation in typing.get_type_hints(kind).items():
            add_flag(defaults, group, f"rwr_{name}", texts[name], **read_as(annotation))
    text = "numbers of the layers that walk, or all; the others are LOCAL alone"
    add_flag(defaults, group, "rwr_layers", text, nargs="+")


def describe_fields(kind):
    """What the docstring of a dataclass says of each argument, for argparse."""
    arguments = inspect.getdoc(kind).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.replace("%", "%%").split()) for name, text in found}


def read_as(annotation):
    """How argparse reads a value of a type: a number, a word, `none`, or several numbers."""
    kinds = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    plain = next(kind for kind in kinds if kind in (bool, int, float, str))
    if plain is bool:
        return {"action": argparse.BooleanOptionalAction}
    if type(None) in kinds:

        def read(text):
            return None if text.lower() == "none" else plain(text)

        read.__name__ = plain.__name__  # what argparse's message says
        return {"type": read}
    several = any(typing.get_origin(kind) is tuple for kind in kinds)
    return {"type": plain, "nargs": "+"} if several else {"type": plain}


def rwr_overrides(arguments, layers):
    """The options of RWR attention among parsed arguments, as `RWRGPT2Backbone` takes them."""
    found = {}
    for name, value in arguments.items():
        option = name.removeprefix("rwr_")
        if option == name:
            continue
        if option == "layers":
            found["rwr_layers"] = read_layers(value, layers)
        else:
            found[option] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return found


def read_layers(words, layers):
    """`None` for all layers, or a list of their numbers."""
    if words == ["all"]:
        return None
    if not all(word.isdecimal() and int(word) < layers for word in words):
        raise UsageError(
            f"`rwr_layers` must be all, or numbers of layers from 0 to {layers - 1}. "
            f"Received: rwr_layers={' '.join(words)}"
        )
    return [int(word) for word in words]


def check_options(step, values):
    """Raises UsageError if the options of a step are none of RWR attention in a causal call."""
    try:
        Call(is_causal=True).check(Options.pick(values))
        Tuning.pick(values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{step}: {error}") from error


def make_overrides(arguments, given):
    """For each step, the RWR options that its name, the flags and the defaults replace."""
    names, layers = arguments["ablation_step"], arguments["layers"]
    walks = [name for name in names if STEPS[base(name)].options is not None]
    flags = [name for name in given if name.startswith("rwr_")]
    if flags and not walks:
        raise UsageError(
            f"{', '.join(map(flag, flags))} need a step with RWR attention. "
            f"Received: ablation_step={' '.join(names)}"
        )
    shared = rwr_overrides(arguments, layers)
    overrides = {name: {**shared, **own_options(name, layers)} for name in walks}
    effective = {name: step_options(base(name), overrides[name]) for name in walks}
    for name, values in effective.items():
        check_options(name, values)
        if "rwr_layers" not in values:
            check_layers(base(name), layers)
    reversible = any(values.get("reversible") for values in effective.values())
    if "rwr_reciprocal_beta" in given and not reversible:
        raise UsageError(
            "`rwr_reciprocal_beta` needs a reversible step (R2, R3 or --rwr-reversible). "
            f"Received: ablation_step={' '.join(names)}"
        )
    return {name: overrides.get(name) for name in names}


def check_layers(step, layers):
    """Raises UsageError if a step has no layer that walks among so many."""
    try:
        STEPS[step].rwr_layers(layers)
    except ValueError as error:
        raise UsageError(str(error).replace("num_layers", "layers")) from error


def own_options(name, layers):
    """The options of a step such as `R5:topk=4:no-self-edges`, which are flags without `--rwr`."""
    parser = argparse.ArgumentParser(
        prog=name, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False
    )
    add_rwr_flags(parser, {})
    parts = name.split(":")[1:]
    words = [f"--rwr-{x}" if x[:3] != "no-" else f"--no-rwr-{x[3:]}" for x in parts]
    return rwr_overrides(vars(parser.parse_args(words)), layers)


# --- steps, sizes and training --------------------------------------------------------------------


def base(name):
    """The ablation step of a step with options of its own."""
    return name.partition(":")[0]


def choose_steps(given):
    """The ablation steps that the flags ask for, in the order of STEPS."""
    use_rwr = given.get("use_rwr")
    if "ablation_step" not in given:
        return {None: list(STEPS), True: ["R1"], False: ["R0"]}[use_rwr]
    text = given["ablation_step"]
    names = [part for name in text for part in name.split(",") if part]
    if [name.lower() for name in names] == ["all"]:
        names = list(STEPS)
    known = all(base(x) in STEPS and (x == base(x) or STEPS[base(x)].options) for x in names)
    if not names or not known:
        raise UsageError(
            f"`ablation_step` must be all, or some of {', '.join(STEPS)}, R0 without options. "
            f"Received: ablation_step={' '.join(text)}"
        )
    names = sorted(dict.fromkeys(names), key=lambda name: list(STEPS).index(base(name)))
    if use_rwr is not None and use_rwr not in {base(name) != "R0" for name in names}:
        raise UsageError(
            "`use_rwr` must agree with `ablation_step`, where R0 alone is without RWR. "
            f"Received: use_rwr={use_rwr}, ablation_step={' '.join(names)}"
        )
    return names


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
    if min(arguments["seeds"]) < 0:
        raise UsageError(f"`seeds` must be at least 0. Received: seeds={arguments['seeds']}")
    if arguments["warmup_steps"] >= arguments["training_steps"]:
        raise UsageError(
            "`warmup_steps` must be less than `training_steps`. "
            f"Received: warmup_steps={arguments['warmup_steps']}, "
            f"training_steps={arguments['training_steps']}"
        )
