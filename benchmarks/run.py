"""Measures attention implementations side by side, after checking that they compute the same.

    KERAS_BACKEND=jax python -m benchmarks.run --sizes 4096
    KERAS_BACKEND=torch python -m benchmarks.run --sizes 16384 --peers rwr-portable --measure memory

Every peer is compared with the definition of what it computes first, on few tokens with the same
options; if one differs, nothing is measured. Times include everything from the call's inputs on,
the graph's construction too. Peers take turns, and ratios are of times of the same turn. Peak
memory is that of a process of its own, which imports, compiles and makes one call.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import datetime
import importlib
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys

import keras
import numpy as np
from keras import ops

import keras_rwr
from benchmarks import frameworks, peers
from benchmarks.cases import LEVELS, Case, make_inputs
from keras_rwr.ablation import STEPS
from keras_rwr.dispatch import current_device

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Largest error allowed, relative to the largest value of a tensor. In float32 two orders of
# summation differ by some dozen roundings (6e-8), and gradients of weights sum over all tokens.
# Below it, results are rounded at the end (2^-11, 2^-8), and layers round their projections too.
TOLERANCES = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}

# A tensor this much smaller than the largest one is roundings of terms that cancel.
SMALLEST_SCALE = 1e-2

# Calls in a sample: enough that the clock's and the launch's granularity do not show.
SAMPLE_SECONDS = 0.02

COLUMNS = (
    *("backend", "device", "dtype", "level", "tokens", "batch", "heads", "head_size"),
    *("gradients", "is_causal", "peer", "variant", "median_ms", "low_ms", "high_ms"),
    *("samples", "ratio", "peak_mib", "rise_mib"),
)


class ParityError(Exception):
    """Some peer does not compute what it should: there is nothing to measure."""


def prepare(case, peer, variant):
    """The call of a peer, see `Framework.prepare`."""
    inputs = make_inputs(case)
    function, arrays = peer.build(case, inputs)
    cotangent = ops.convert_to_tensor(inputs["cotangent"], case.dtype) if case.gradients else None
    return frameworks.active().prepare(function, arrays, cotangent, variant)


# --- parity


def results(case, peer, variant):
    """Output and gradients of a peer as float64 arrays."""
    tensors = prepare(case, peer, variant)()
    return [
        ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), "float32")).astype("float64")
        for x in tensors
    ]


def check_parity(case, chosen, variants):
    """Compares peers with the definitions of what they compute, on a few tokens.

    Args:
        case: `Case`; its sequence length does not matter.
        chosen: List of `Peer`.
        variants: List of strings.

    Returns:
        List of dicts with the keys "peer", "variant", "error" and "tolerance".

    Raises:
        ParityError: If an error is larger than its tolerance, or not a number.
    """
    case = case.small()
    tolerance = TOLERANCES[case.dtype]
    expected = {}
    for definition in {peer.definition for peer in chosen}:
        right = peers.PEERS[case.level, peers.DEFINITIONS[definition]]
        expected[definition] = results(case, right, variants[0])
    checks = []
    for peer in chosen:
        for variant in variants:
            error = largest_error(results(case, peer, variant), expected[peer.definition])
            checks.append(
                {"peer": peer.name, "variant": variant, "error": error, "tolerance": tolerance}
            )
    wrong = [check for check in checks if not check["error"] <= tolerance]
    if wrong:
        raise ParityError(
            "peers must agree with their definition. Received: "
            + ", ".join(f"{x['peer']} ({x['variant']}) is off by {x['error']:.1e}" for x in wrong)
            + f", tolerance {tolerance:.0e}"
        )
    return checks


def largest_error(arrays, expected):
    """Largest error of any array relative to its largest value; not a number where either is."""
    if [x.shape for x in arrays] != [x.shape for x in expected]:
        return math.inf
    floor = SMALLEST_SCALE * max(np.abs(x).max() for x in expected)
    errors = [
        np.abs(x - right).max() / max(np.abs(right).max(), floor)
        for x, right in zip(arrays, expected, strict=True)
    ]
    return float(np.max(errors))  # np.max keeps what is not a number, max would not


# --- time


def measure_times(case, chosen, variants, repeat, baseline):
    """Times peers in turn.

    Args:
        case: `Case`.
        chosen: List of `Peer`.
        variants: List of strings.
        repeat: Int >= 1, turns.
        baseline: String, the peer that ratios refer to, within a variant.

    Returns:
        A dict from `(peer, variant)` to a dict with the keys "median_ms", "low_ms" and "high_ms"
        (the quartiles), "samples" and "ratio" (`None` without the baseline).
    """
    framework = frameworks.active()
    calls = {(p.name, variant): prepare(case, p, variant) for p in chosen for variant in variants}
    numbers = {}
    for key, call in calls.items():
        framework.wait(call())  # compiles
        numbers[key] = max(1, math.ceil(SAMPLE_SECONDS / framework.seconds(call, 1)))
    samples = {key: [] for key in calls}
    for turn in range(repeat):
        order = list(calls)
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for key in order:
            samples[key].append(framework.seconds(calls[key], numbers[key]))
    return {
        (peer, variant): summarize(times, samples.get((baseline, variant)))
        for (peer, variant), times in samples.items()
    }


def summarize(times, baseline):
    """Median and quartiles of seconds, and the median ratio to seconds of the same turns."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    ratio = None
    if baseline is not None:
        ratio = statistics.median(a / b for a, b in zip(times, baseline, strict=True))
    return {
        "median_ms": 1e3 * statistics.median(times),
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "samples": len(times),
        "ratio": ratio,
    }


# --- memory


def memory_of_one_call(case, peer, variant, device):
    """Peak memory of this process after one call; see `measure_memory`."""
    call = prepare(case, peer, variant)
    if device == "cpu":
        before, _ = frameworks.resident_bytes()
        frameworks.active().wait(call())
        _, peak = frameworks.resident_bytes()
    else:
        before = frameworks.active().device_peak()
        frameworks.active().wait(call())
        peak = frameworks.active().device_peak()
    return {"peak_mib": peak / 2**20, "rise_mib": (peak - before) / 2**20}


def measure_memory(case, chosen, variants, device, modules=()):
    """Peak memory of one call of each peer, in a process of its own.

    Args:
        case: `Case`.
        chosen: List of `Peer`.
        variants: List of strings.
        device: String.
        modules: Names of the modules that registered further peers.

    Returns:
        A dict from `(peer, variant)` to a dict with the keys "peak_mib", all that the process held
        (on an accelerator: allocated), and "rise_mib", what the call added, its compilation
        included.

    Raises:
        RuntimeError: If a process fails.
    """
    found = {}
    for peer in chosen:
        for variant in variants:
            request = {
                "case": dataclasses.asdict(case),
                "peer": peer.name,
                "variant": variant,
                "device": device,
                "modules": list(modules),
            }
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.run", "--memory-of", json.dumps(request)],
                cwd=ROOT,
                env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(
                    f"measuring the memory of {peer.name} ({variant}) failed:\n{done.stderr}"
                )
            found[peer.name, variant] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer_memory(request):
    """What `--memory-of` prints: the memory of one call, as JSON."""
    load_peers(request["modules"])
    case = Case(**request["case"])
    peer = peers.PEERS[case.level, request["peer"]]
    with on_device(request["device"]) as device:
        return json.dumps(memory_of_one_call(case, peer, request["variant"], device))


# --- report


def environment(device):
    """Where and with what the figures were measured."""
    framework = frameworks.active()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": framework.device_name(device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "keras_rwr": keras_rwr.__version__,
        "keras": keras.__version__,
        framework.name: framework.version(),
        "numpy": np.__version__,
    }


def git_commit():
    """The checkout's commit, with a note if files differ from it; "unknown" outside of git."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return "unknown"
    if commit is None:
        return "unknown"
    return f"{commit} with changes" if changes else commit


def table(rows):
    """Rows as text in columns."""

    def number(value, digits):
        return "" if value is None else f"{value:.{digits}f}"

    lines = [("tokens", "peer", "variant", "ms", "quartiles", "ratio", "peak MiB", "rise MiB")]
    for row in rows:
        spread = ""
        if row.get("low_ms") is not None:
            spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        lines.append(
            (
                str(row["tokens"]),
                row["peer"],
                row["variant"],
                number(row.get("median_ms"), 2),
                spread,
                number(row.get("ratio"), 2),
                number(row.get("peak_mib"), 0),
                number(row.get("rise_mib"), 0),
            )
        )
    return align(lines, left=(1, 2))


def align(lines, left):
    """Lines of texts as columns, those with the numbers `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if index in left else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(report, folder, columns=COLUMNS):
    """Writes a report as JSON and its results as CSV.

    Args:
        report: Dict, what `benchmark` returns.
        folder: Path. Files of the same name are replaced.
        columns: Names of the CSV's columns.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{report['name']}.json", folder / f"{report['name']}.csv"
    paths[0].write_text(json.dumps(report, indent=2) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(report["results"])
    return paths


# --- the whole


def benchmark(
    cases,
    names=None,
    variants=None,
    device=None,
    measure=("time", "memory"),
    repeat=10,
    baseline="keras",
    modules=(),
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

    Returns:
        A dict with the keys "name", "environment", "options", "peers", "refused", "parity" and
        "results", fit for JSON.

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
            del fields["options"]
            for key in times | memory:
                report["results"].append(
                    {
                        "backend": framework.name,
                        "device": device,
                        **fields,
                        "peer": key[0],
                        "variant": key[1],
                        **times.get(key, {}),
                        **memory.get(key, {}),
                    }
                )
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


def load_peers(modules):
    for module in modules:
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
