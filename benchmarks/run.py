"""Measures attention implementations side by side, after checking that they compute the same.

    KERAS_BACKEND=jax python -m benchmarks.run --sizes 4096
    KERAS_BACKEND=torch python -m benchmarks.run --sizes 16384 --peers rwr-portable --measure memory

Every peer is compared with the definition of what it computes first, on few tokens with the same
options; if one differs, nothing is measured. Times include everything from the call's inputs on,
the graph's construction too. Peers take turns, and ratios are of times of the same turn. Peak
memory is that of a process of its own, which imports, compiles and makes one call, or that of a
second call where an accelerator tells. Those of `torch_peers.py` and `jax_peers.py` run when named.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import itertools
import json
import pathlib
import sys

import keras

from benchmarks import frameworks, peers
from benchmarks.cases import LEVELS, Case
from benchmarks.measure import OUT_OF_MEMORY, measure_memory, measure_times, memory_of_one_call
from benchmarks.parity import TOLERANCES, ParityError, check_parity
from benchmarks.report import environment, table, write
from keras_rwr._dispatch import current_device
from keras_rwr.ablation import STEPS


def benchmark(
    cases,
    names=None,
    variants=None,
    device=None,
    measure=("time", "memory"),
    repeat=10,
    baseline="keras",
    modules=(),
    on_case=None,
):
    """Checks and measures peers on cases that differ in length only.

    Args:
        cases: List of `Case`.
        names: `None` for all peers that can run, or list of names.
        variants: `None` for the framework's default, or list of strings.
        device: `None` for the backend's, or `"cpu"` or `"gpu"`.
        measure: Any of `"time"` and `"memory"`.
        repeat: Int >= 1. Turns of timing.
        baseline: String, the peer that ratios refer to.
        modules: Names of modules to import, which register further peers.
        on_case: `None`, or function of the report so far, called after each case.

    Returns:
        A dict with the keys "name", "environment", "options", "baseline", "peers", "refused",
        "parity" and "results", fit for JSON.

    Raises:
        ParityError: If a peer does not compute what it should.
        ValueError: If an argument is unknown or cannot be had.
    """
    load_peers(modules)
    framework = frameworks.active()
    variants = list(framework.default_variants if variants is None else variants)
    for variant in variants:
        if variant not in framework.variants:
            raise ValueError(
                f"`variants` must be among {', '.join(framework.variants)} on {framework.name}. "
                f"Received: variants={variant}"
            )
    with on_device(device) as device:
        chosen, refused = peers.select(cases[0], device, names)
        report = {
            "name": f"{cases[0].level}-{framework.name}-{device}-{cases[0].dtype}",
            "environment": environment(device),
            "options": cases[0].options,
            "baseline": baseline,
            "peers": {peer.name: peer.description for peer in chosen},
            "refused": refused,
            "parity": check_parity(cases[0], chosen, variants),
            "results": [],
        }
        for case in cases:
            times, memory = {}, {}
            if "time" in measure:
                times = measure_times(case, chosen, variants, repeat, baseline)
            if "memory" in measure:
                memory = measure_memory(case, chosen, variants, device, modules)
            fields = dataclasses.asdict(case)
            del fields["options"], fields["leaning"]
            for peer, variant in itertools.product(chosen, variants):
                report["results"].append(
                    {
                        "backend": framework.name,
                        "device": device,
                        **fields,
                        "peer": peer.name,
                        "variant": variant,
                        **times.get((peer.name, variant), {}),
                        **memory.get((peer.name, variant), {}),
                    }
                )
            if on_case is not None:
                on_case(report)
    return report


@contextlib.contextmanager
def on_device(device):
    """Puts new tensors on a device, or leaves them where the backend puts them; gives its name."""
    # Not even a scope where it is the device anyway: in one named "cpu:0", torch copies its tensors
    # on "cpu" at each use.
    if device is None or device == current_device():
        yield current_device()
    else:
        with keras.device("cpu" if device == "cpu" else f"{device}:0"):
            yield device


def answer_memory(request):
    """What `--memory-of` prints: the memory of one call, as JSON."""
    load_peers(request["modules"])
    case = Case(**request["case"])
    peer = peers.PEERS[case.level, request["peer"]]
    with on_device(request["device"]) as device:
        try:
            found = memory_of_one_call(case, peer, request["variant"], device)
        except frameworks.active().out_of_memory:
            found = OUT_OF_MEMORY
    return json.dumps(found)


def load_peers(modules):
    for module in ("benchmarks.torch_peers", "benchmarks.jax_peers", *modules):
        importlib.import_module(module)


def option(text):
    """`name=value` with a Python literal, or a bare word, as value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"an option must be NAME=VALUE. Received: {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096], help="tokens (4096)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--level", choices=LEVELS, default="layer", help="with projections, or not")
    parser.add_argument("--mode", choices=["forward", "forward+backward"], default="forward")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32")
    parser.add_argument("--bidirectional", action="store_true", help="instead of causal")
    parser.add_argument(
        "--step", choices=[x for x in STEPS if x != "R0"], default="R1", help="ablation step (R1)"
    )
    parser.add_argument(
        "--option", type=option, nargs="+", default=[], metavar="NAME=VALUE",
        help="replaces an option of the step",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="+", help="names (all that can run)")
    parser.add_argument("--baseline", default="keras", help="what ratios refer to (keras)")
    parser.add_argument("--variants", nargs="+", help="eager, compile, jit, graph, xla")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="the backend's own")
    parser.add_argument(
        "--measure", choices=["time", "memory"], nargs="+", default=["time", "memory"]
    )
    parser.add_argument("--repeat", type=int, default=10, help="turns (10)")
    parser.add_argument("--import", dest="modules", nargs="+", default=[], help="more peers")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and CSV")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    for name in ("batch", "heads", "head_size", "repeat"):
        if getattr(parsed, name) < 1:
            parser.error(f"{name} must be at least 1. Received: {getattr(parsed, name)}")
    if min(parsed.sizes) < 1:
        parser.error(f"sizes must be at least 1. Received: {parsed.sizes}")
    return parsed


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parsed = parse(arguments)
    if parsed.memory_of is not None:
        print(answer_memory(json.loads(parsed.memory_of)))
        return 0
    options = {**STEPS[parsed.step].options, **dict(parsed.option)}
    cases = [
        Case(
            tokens=tokens,
            level=parsed.level,
            batch=parsed.batch,
            heads=parsed.heads,
            head_size=parsed.head_size,
            dtype=parsed.dtype,
            is_causal=not parsed.bidirectional,
            gradients=parsed.mode == "forward+backward",
            options=options,
        )
        for tokens in parsed.sizes
    ]
    try:
        report = benchmark(
            cases,
            names=parsed.peers,
            variants=parsed.variants,
            device=parsed.device,
            measure=parsed.measure,
            repeat=parsed.repeat,
            baseline=parsed.baseline,
            modules=parsed.modules,
            on_case=None if parsed.out is None else lambda report: write(report, parsed.out),
        )
    except (ParityError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in report["environment"].items():
        print(f"{name}: {value}")
    print(f"options: {report['options']}")
    for name, description in report["peers"].items():
        errors = [check["error"] for check in report["parity"] if check["peer"] == name]
        print(f"{name}: {description}, largest error {max(errors):.1e}")
    for name, reason in report["refused"].items():
        print(f"{name}: cannot run, {reason}")
    print(f"{cases[0].level}, {parsed.mode}, {parsed.dtype}, heads {parsed.heads} of "
          f"{parsed.head_size}, batch {parsed.batch}")  # fmt: skip
    print(table(report["results"]))
    if parsed.out is not None:
        print("wrote", *write(report, parsed.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
