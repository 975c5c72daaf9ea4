"""Measures attention implementations side by side, after checking that they compute the same.

    KERAS_BACKEND=jax python -m benchmarks.run --sizes 4096
    KERAS_BACKEND=torch python -m benchmarks.run --sizes 1024 4096 --step R1 R5 R5-1 LOCAL
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
from benchmarks.cases import LEVELS, MODES, STEPS, Case
from benchmarks.measure import OUT_OF_MEMORY, measure_memory, measure_times, memory_of_one_call
from benchmarks.parity import TOLERANCES, ParityError, check_parity
from benchmarks.report import environment, print_report, write
from keras_rwr._dispatch import current_device

MEASURES = ("time", "memory")


def benchmark(
    cases,
    names=None,
    variants=None,
    device=None,
    measure=MEASURES,
    repeat=10,
    baseline="keras",
    modules=(),
    on_case=None,
    title=None,
):
    """Checks peers on all cases, then measures them.

    Args:
        cases: List of `Case`. Neighbours that differ in length and batch only share their check.
        names: `None` for all peers that can run, or list of names, or dict of one by level.
        variants: `None` for the framework's default, or list of strings.
        device: `None` for the backend's, or `"cpu"` or `"gpu"`.
        measure: Any of `MEASURES`.
        repeat: Int >= 1. Turns of timing.
        baseline: String, the peer that ratios refer to.
        modules: Names of modules to import, which register further peers.
        on_case: `None`, or function of the report so far, called after each case.
        title: `None` for level, backend, device and dtype, or string: what the report is called.

    Returns:
        A dict with the keys "name", "environment", "options" and "refused" (by step), "baseline",
        "peers", "parity" and "results", fit for JSON.

    Raises:
        ParityError: If a peer does not compute what it should.
        ValueError: If an argument is unknown or cannot be had.
    """
    load_peers(modules)
    framework, first = frameworks.active(), cases[0]
    variants = list(framework.default_variants if variants is None else variants)
    for variant in variants:
        if variant not in framework.variants:
            raise ValueError(
                f"`variants` must be among {', '.join(framework.variants)} on {framework.name}. "
                f"Received: variants={variant}"
            )
    with on_device(device) as device:
        report = {
            "name": title or f"{first.level}-{framework.name}-{device}-{first.dtype}",
            "environment": environment(device),
            "options": {case.step: case.options for case in cases},
            "baseline": baseline,
            "peers": {},
            "refused": {},
            "parity": [],
            "results": [],
        }
        checked = []
        for _, group in itertools.groupby(
            cases, lambda case: dataclasses.replace(case, tokens=1, batch=1)
        ):
            group = list(group)
            case = group[0]
            named = names[case.level] if isinstance(names, dict) else names
            chosen, refused = peers.select(case, device, named)
            report["peers"].update({peer.name: peer.description for peer in chosen})
            report["refused"].setdefault(case.step, {}).update(refused)
            report["parity"] += check_parity(case, chosen, variants)
            checked += [(case, chosen) for case in group]
        for case, chosen in checked:
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
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE. Received: {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def count(text):
    """An int of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return int(text)


def add_options(parser, several=False):
    """Adds `--step` and `--option`."""
    more = {"nargs": "+", "default": ["R1"]} if several else {"default": "R1"}
    parser.add_argument("--step", choices=list(STEPS), help="RWR attention's options (R1)", **more)
    parser.add_argument(
        "--option", type=option, nargs="+", default=[], metavar="NAME=VALUE",
        help="replaces an option of the step",
    )  # fmt: skip


def make_parser(module, text):
    """The parser of a command line."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(arguments):
    """The command line."""
    parser = make_parser("run", __doc__)
    parser.add_argument("--sizes", type=count, nargs="+", default=[4096], help="tokens (4096)")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--head-size", type=count, default=64)
    parser.add_argument("--level", choices=LEVELS, default="layer", help="with projections, or not")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32")
    parser.add_argument("--bidirectional", action="store_true", help="instead of causal")
    add_options(parser, several=True)
    parser.add_argument("--peers", nargs="+", help="names (all that can run)")
    parser.add_argument("--baseline", default="keras", help="what ratios refer to (keras)")
    parser.add_argument("--variants", nargs="+", help="eager, compile, cudagraph, jit, graph, xla")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="the backend's own")
    parser.add_argument("--measure", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--repeat", type=count, default=10, help="turns (10)")
    parser.add_argument("--import", dest="modules", nargs="+", default=[], help="more peers")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and CSV")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parsed = parse(arguments)
    if parsed.memory_of is not None:
        print(answer_memory(json.loads(parsed.memory_of)))
        return 0
    cases = [
        Case(
            tokens=tokens,
            level=parsed.level,
            batch=parsed.batch,
            heads=parsed.heads,
            head_size=parsed.head_size,
            dtype=parsed.dtype,
            is_causal=not parsed.bidirectional,
            gradients=parsed.mode == MODES[1],
            step=step,
            options={**STEPS[step], **dict(parsed.option)},
        )
        for step in parsed.step
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
    print_report(report)
    if parsed.out is not None:
        print("wrote", *write(report, parsed.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
