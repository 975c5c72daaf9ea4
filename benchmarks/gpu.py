"""Measures our kernels beside their framework's and Keras's attention on a GPU, in one run.

    KERAS_BACKEND=torch python -m benchmarks.gpu --out runs/benchmarks
    KERAS_BACKEND=jax python -m benchmarks.gpu --out runs/benchmarks
    KERAS_BACKEND=torch python -m benchmarks.gpu --sizes 4096 16384 --levels op --modes forward

Batches hold the same number of tokens at all lengths, or one longer sequence. Ratios are times of a
peer over ours. The report is written anew after each case, so that a run cut short leaves what it
has measured. `python -m benchmarks.figures` makes tables and a picture of it.
"""

import argparse
import pathlib
import sys
import time

import keras

from benchmarks import frameworks, peers
from benchmarks.cases import LEVELS, Case
from benchmarks.parity import TOLERANCES, ParityError
from benchmarks.report import table, write
from benchmarks.run import benchmark, load_peers, option
from keras_rwr._dispatch import current_device
from keras_rwr.ablation import STEPS

OURS = {"torch": "rwr-triton", "jax": "rwr-pallas"}
PEERS = {
    "torch": {
        "op": ("torch-sdpa-flash", "torch-sdpa-cudnn", "torch-flex", "keras-gpt2", OURS["torch"]),
        "layer": ("keras", "keras-gpt2", OURS["torch"]),
    },
    "jax": {
        "op": ("jax-xla", "jax-cudnn", "jax-cudnn-window", "keras-gpt2", OURS["jax"]),
        "layer": ("keras", "keras-gpt2", OURS["jax"]),
    },
}
MEASURES = ("time", "memory")
SIZES = tuple(1024 * 2**i for i in range(8))
LAYER_SIZES = SIZES[:4]  # beyond, its projections tell nothing new
MODES = ("forward", "forward+backward")


def make_groups(arguments):
    """Lists of cases that differ in length only, by level, head size and mode."""
    options = {**STEPS["R1"].options, **dict(arguments.option)}
    groups = []
    for level in arguments.levels:
        sizes = arguments.sizes or {"op": SIZES, "layer": LAYER_SIZES}[level]
        for head_size in arguments.head_sizes:
            for mode in arguments.modes:
                groups.append(
                    [
                        Case(
                            tokens=size,
                            level=level,
                            batch=max(1, arguments.tokens // size),
                            heads=arguments.heads,
                            head_size=head_size,
                            dtype=arguments.dtype,
                            gradients=mode == MODES[1],
                            options=options,
                        )
                        for size in sizes
                    ]
                )
    return groups


def merge(reports, variant):
    """One report of several."""
    first = reports[0]
    kept = ("environment", "options", "baseline")
    names = {"eager": "attention-gpu", "jit": "attention-gpu-jax"}
    return {
        "name": names.get(variant, f"attention-gpu-{variant}"),
        **{key: first[key] for key in kept},
        "peers": {name: x for report in reports for name, x in report["peers"].items()},
        "parity": [check for report in reports for check in report["parity"]],
        "results": [row for report in reports for row in report["results"]],
    }


def measure(
    groups,
    names=None,
    variant=None,
    device=None,
    repeat=7,
    baseline=None,
    on_case=None,
    measures=MEASURES,
):
    """Checks and measures groups of cases.

    Args:
        groups: List of lists of `Case`, what `make_groups` returns.
        names: `None` for `PEERS`, or list of names; each level takes those that it has.
        variant: `None` for the framework's first one, or string, one of its `variants`. A CUDA
            graph's memory is not measured: it holds all of its own between calls.
        device: `None` for the backend's, or string.
        repeat: Int >= 1. Turns of timing.
        baseline: `None` for ours, or string, the peer that ratios refer to.
        on_case: `None`, or function of the report so far, called after each case.
        measures: Any of `MEASURES`.

    Returns:
        A dict as of `benchmarks.run.benchmark`.

    Raises:
        ParityError: If a peer does not compute what it should.
        ValueError: If a peer is unknown or cannot run.
    """
    load_peers(())
    framework = frameworks.active()
    variant = framework.default_variants[0] if variant is None else variant
    baseline = OURS[framework.name] if baseline is None else baseline
    finished = []
    for cases in groups:
        level = cases[0].level
        known = {name for key, name in peers.PEERS if key == level}
        chosen = (
            PEERS[framework.name][level]
            if names is None
            else [name for name in names if name in known]
        )

        def progress(report):
            if on_case is not None:
                on_case(merge([*finished, report], variant))

        finished.append(
            benchmark(
                cases,
                names=chosen,
                variants=[variant],
                device=device,
                measure=("time",) if variant == "cudagraph" else tuple(measures),
                repeat=repeat,
                baseline=baseline,
                on_case=progress,
            )
        )
    return merge(finished, variant)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens (1024 to 131072; layers 8192)")
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch (32768)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--levels", choices=LEVELS, nargs="+", default=["op", "layer"])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="bfloat16")
    parser.add_argument(
        "--option", type=option, nargs="+", default=[], metavar="NAME=VALUE",
        help="replaces an option of RWR attention",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="+", help="names")
    parser.add_argument("--baseline", help="what ratios refer to (ours)")
    parser.add_argument(
        "--variant",
        choices=(*frameworks.Torch.variants, *frameworks.Jax.variants),
        help="(eager on torch, jit on jax)",
    )
    parser.add_argument("--measure", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--repeat", type=int, default=7, help="turns (7)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and CSV")
    parsed = parser.parse_args(arguments)
    numbers = [parsed.tokens, parsed.heads, parsed.repeat, *parsed.head_sizes]
    if min([*numbers, *(parsed.sizes or [])]) < 1:
        parser.error(f"numbers must be at least 1. Received: {' '.join(arguments or sys.argv[1:])}")
    return parsed


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parsed = parse(arguments)
    backend, device = keras.backend.backend(), current_device()
    if backend not in OURS or device != "gpu":
        print(
            f"error: it needs the {' or '.join(OURS)} backend and a GPU. "
            f"Received: {backend} on {device}",
            file=sys.stderr,
        )
        return 1
    started = time.monotonic()

    def progress(report):
        row = report["results"][-1]
        print(
            f"{time.monotonic() - started:.0f} s: {row['level']}, {row['tokens']} tokens, heads of "
            f"{row['head_size']}, {MODES[row['gradients']]}",
            flush=True,
        )
        if parsed.out is not None:
            write(report, parsed.out)

    try:
        report = measure(
            make_groups(parsed),
            names=parsed.peers,
            variant=parsed.variant,
            repeat=parsed.repeat,
            baseline=parsed.baseline,
            on_case=progress,
            measures=parsed.measure,
        )
    except (ParityError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(report)
    return 0


def print_report(report):
    for name, value in report["environment"].items():
        print(f"{name}: {value}")
    print(f"options: {report['options']}")
    for name, description in report["peers"].items():
        errors = [check["error"] for check in report["parity"] if check["peer"] == name]
        print(f"{name}: {description}, largest error {max(errors):.1e}")
    groups = {}
    for row in report["results"]:
        key = f"{row['level']}, heads of {row['head_size']}, {MODES[row['gradients']]}"
        groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        print(f"\n{key}")
        print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
