"""Measures our kernels beside their framework's and Keras's attention on a GPU, in one run.

    KERAS_BACKEND=torch python -m benchmarks.gpu --out runs/benchmarks
    KERAS_BACKEND=jax python -m benchmarks.gpu --out runs/benchmarks
    KERAS_BACKEND=torch python -m benchmarks.gpu --sizes 4096 16384 --levels op --modes forward

Batches hold the same number of tokens at all lengths, or one longer sequence. Ratios are times of a
peer over ours. The report is written anew after each case, so that a run cut short leaves what it
has measured. `python -m benchmarks.figures` makes tables and a picture of it.
"""

import pathlib
import sys
import time

import keras

from benchmarks import frameworks
from benchmarks.cases import LEVELS, MODES, STEPS, Case
from benchmarks.parity import TOLERANCES, ParityError
from benchmarks.report import print_report, write
from benchmarks.run import MEASURES, add_options, benchmark, count, make_parser
from keras_rwr._dispatch import current_device

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
NAMES = {"eager": "attention-gpu", "jit": "attention-gpu-jax"}  # of reports, by variant
SIZES = tuple(1024 * 2**i for i in range(8))
LAYER_SIZES = SIZES[:4]  # beyond, its projections tell nothing new


def make_groups(arguments):
    """Lists of cases that differ in length only, by level, head size and mode."""
    return [
        [
            Case(
                tokens=size,
                level=level,
                batch=max(1, arguments.tokens // size),
                heads=arguments.heads,
                head_size=head_size,
                dtype=arguments.dtype,
                gradients=mode == MODES[1],
                step=arguments.step,
                options={**STEPS[arguments.step], **dict(arguments.option)},
            )
            for size in arguments.sizes or {"op": SIZES, "layer": LAYER_SIZES}[level]
        ]
        for level in arguments.levels
        for head_size in arguments.head_sizes
        for mode in arguments.modes
    ]


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
        names: `None` for `PEERS`, or list of names.
        variant: `None` for the framework's first one, or string, one of its `variants`. A CUDA
            graph's memory is not measured: it holds all of its own between calls.
        device: `None` for the backend's, or string.
        repeat: Int >= 1. Turns of timing.
        baseline: `None` for ours, or string, the peer that ratios refer to.
        on_case: `None`, or function of the report so far, called after each case.
        measures: Any of `benchmarks.run.MEASURES`.

    Returns:
        A dict as of `benchmarks.run.benchmark`.

    Raises:
        ParityError: If a peer does not compute what it should.
        ValueError: If a peer is unknown or cannot run.
    """
    framework = frameworks.active()
    variant = framework.default_variants[0] if variant is None else variant
    return benchmark(
        [case for group in groups for case in group],
        names=PEERS[framework.name] if names is None else names,
        variants=[variant],
        device=device,
        measure=("time",) if variant == "cudagraph" else tuple(measures),
        repeat=repeat,
        baseline=OURS[framework.name] if baseline is None else baseline,
        on_case=on_case,
        title=NAMES.get(variant, f"attention-gpu-{variant}"),
    )


def parse(arguments):
    """The command line."""
    parser = make_parser("gpu", __doc__)
    parser.add_argument(
        "--sizes", type=count, nargs="+", help="tokens (1024 to 131072; layers 8192)"
    )
    parser.add_argument("--tokens", type=count, default=32768, help="of a batch (32768)")
    parser.add_argument("--heads", type=count, default=12)
    parser.add_argument("--head-sizes", type=count, nargs="+", default=[64, 128])
    parser.add_argument("--levels", choices=LEVELS, nargs="+", default=["op", "layer"])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="bfloat16")
    add_options(parser)
    parser.add_argument("--peers", nargs="+", help="names")
    parser.add_argument("--baseline", help="what ratios refer to (ours)")
    parser.add_argument(
        "--variant",
        choices=(*frameworks.Torch.variants, *frameworks.Jax.variants),
        help="(eager on torch, jit on jax)",
    )
    parser.add_argument("--measure", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--repeat", type=count, default=7, help="turns (7)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and CSV")
    return parser.parse_args(arguments)


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


if __name__ == "__main__":
    sys.exit(main())
