"""What `ablation_study.py` trains: the runs of each study and the sizes that they share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_rwr.ablation import STEPS


@dataclasses.dataclass(frozen=True)
class Run:
    """One model of a study.

    Args:
        step: String, a key of `keras_rwr.ablation.STEPS`.
        options: Options of RWR attention that differ from the step's.
        seeds: Tuple of ints.
        description: String.
    """

    step: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    description: str


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that share sizes, data order and initial weights.

    Args:
        arguments: Arguments of `gpt2_ablation.py`.
        runs: Dict from a name to a `Run`.
        baseline: String, the run that the others are compared with.
        window: Int, that of the runs which do not change it.
    """

    arguments: Mapping[str, Any]
    runs: Mapping[str, Run]
    baseline: str = "R0"
    window: int = 128


WINDOW_ALONE = {"topk": 0, "lens_strength": 0.0}


def ablation(seeds, context):
    """R0 to R4, R1 and R4 with single tokens, the window alone, and a heavier walk.

    The last runs take a part of it away: the far edges, or all steps, which leaves a token's own
    value, beside the window or beside full attention.

    Args:
        seeds: Dict from a run's name to its seeds; others have seed 0.
        context: Int, in tokens.
    """
    runs = {name: Run(name, {}, seeds.get(name, (0,)), x.description) for name, x in STEPS.items()}
    for step in ("R1", "R4"):
        name = f"{step}-single"
        runs[name] = Run(
            step, {"neighbor_block": 1}, seeds.get(name, (0,)), f"{step}, neighbours one by one"
        )
    runs["window"] = Run("R1", WINDOW_ALONE, seeds.get("window", (0,)), "the window alone")
    heavy = {"lens_strength": 1.0, "alpha": 0.5}
    full = {**heavy, "steps": 0, "topk": 0, "window": context}
    for name, options in (
        ("gamma-1", {"lens_strength": 1.0}),
        ("gamma-1-alpha-0.5", heavy),
        ("gamma-1-alpha-0.5-topk-0", {**heavy, "topk": 0}),
        ("gamma-1-alpha-0.5-steps-0", {**heavy, "steps": 0}),
        (f"gamma-1-alpha-0.5-steps-0-window-{context}", full),
    ):
        changed = ", ".join(f"{option} {value:g}" for option, value in options.items())
        runs[name] = Run("R4", options, seeds.get(name, (0,)), f"R4, {changed}")
    return runs


def mechanisms():
    """One option changed at a time."""
    three, two = (0, 1, 2), (0, 1)
    runs = {
        "R0": Run("R0", {}, three, "full attention"),
        "window": Run("R1", WINDOW_ALONE, two, "the window alone"),
        "R1": Run("R1", {}, three, "cosine edges"),
        "reversible": Run(
            "R1", {"reversible": True, "reciprocal_beta": 1.0}, two, "R1, symmetrised"
        ),
        "R2": Run("R2", {}, two, "R1, symmetrised, half of the walk reversed"),
        "discoverability": Run("R1", {"use_discoverability": True}, two, "R1, keys' own bias"),
        "R3": Run("R3", {}, two, "R2, 0.7 forward, keys' own bias"),
        "R4": Run("R4", {}, three, "R1, exponential edges"),
    }
    changes = {
        "steps": (0, 1, 2, 8),
        "topk": (0, 64, 128),
        "window": (32, 64, 256),
        "alpha": (0.05, 0.5, 0.8),
        "gamma": (0.1, 1.0, 2.0),
        "kappa": (5.0, 10.0, 40.0),
        "block": (1, 4),
    }
    names = {
        "gamma": "lens_strength",
        "kappa": "concentration",
        "block": "neighbor_block",
    }
    for key, values in changes.items():
        option = names.get(key, key)
        for value in values:
            runs[f"{key}-{value:g}"] = Run("R4", {option: value}, (0,), f"R4, {option} {value:g}")
    for value in (0.3, 1.0):
        runs[f"trained-gamma-{value:g}"] = Run(
            "R4",
            {"lens_strength": value, "trainable_lens": True},
            two,
            f"R4, lens_strength trained from {value:g}",
        )
    return runs


_GPU = {"dropout": 0.0, "dtype": "mixed_bfloat16", "validation_tokens": 1048576}

STUDIES = {
    "small": Study(
        {
            **_GPU,
            **{"layers": 12, "width": 768, "heads": 12, "context": 1024, "batch_size": 16},
            **{"training_steps": 1224, "evaluate_every": 204, "warmup_steps": 100},
            "learning_rate": 6e-4,
        },
        ablation(
            dict.fromkeys(("R0", "R1", "R4", "window", "gamma-1-alpha-0.5"), (0, 1)), context=1024
        ),
    ),
    "long": Study(
        {
            **_GPU,
            **{"layers": 8, "width": 512, "heads": 8, "context": 4096, "batch_size": 4},
            **{"training_steps": 612, "evaluate_every": 204, "warmup_steps": 60},
            "learning_rate": 8e-4,
        },
        ablation({}, context=4096),
    ),
    "mechanisms": Study(
        {
            **_GPU,
            **{"layers": 4, "width": 256, "heads": 4, "context": 1024, "batch_size": 16},
            **{"training_steps": 612, "evaluate_every": 204, "warmup_steps": 60},
            **{"learning_rate": 1e-3, "vocabulary_size": 8192, "validation_tokens": 524288},
        },
        mechanisms(),
    ),
}
