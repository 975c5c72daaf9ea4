"""Counts DRAM bytes and tensor-core instructions of attention by `ncu`, on one call of each peer.

    KERAS_BACKEND=torch python -m benchmarks.counters --out runs/benchmarks

The process starts itself again under Nsight Compute, which counts the kernels of one call of each
peer, after calls that compile. Kernels run one by one and find the caches as the kernel before them
left them; clocks are left as they are.
"""

import argparse
import csv
import json
import pathlib
import re
import subprocess
import sys

import keras

from benchmarks import frameworks, peers
from benchmarks.cases import MODES, STEPS, Case
from benchmarks.parity import check_parity, prepare
from benchmarks.report import ROOT, align, environment
from benchmarks.run import load_peers, make_parser
from keras_rwr._dispatch import current_device

NAMES = ("rwr-triton", "torch-sdpa-flash", "torch-sdpa-cudnn", "torch-flex", "keras-gpt2")
# What is counted, by what it tells: those that the chip has.
METRICS = {
    "bytes": ("dram__bytes_read", "dram__bytes_write"),
    "instructions": (
        "sm__inst_executed_pipe_tensor_op_gmma",
        "sm__inst_executed_pipe_tensor_op_hmma",
        "sm__ops_path_tensor_src_bf16_dst_fp32",
    ),
}
# A kernel that nothing else launches stands before those of each call.
MARKER = "spin_kernel"


def make_case(arguments, mode):
    return Case(
        tokens=arguments.size,
        level="op",
        batch=max(1, arguments.tokens // arguments.size),
        heads=arguments.heads,
        head_size=arguments.head_size,
        dtype="bfloat16",
        gradients=mode == MODES[1],
        options=STEPS["R1"],
    )


def run_calls(arguments):
    """Makes the calls that are counted, each behind a marker."""
    import torch

    framework = frameworks.active()
    for mode in arguments.modes:
        case = make_case(arguments, mode)
        chosen, _ = peers.select(case, "gpu", arguments.peers)
        check_parity(case, chosen, ["eager"])
        for name in arguments.peers:
            call = prepare(case, peers.PEERS[case.level, name], "eager")
            for _ in range(3):
                framework.wait(call())
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            call = None
            framework.release()


def metric_names(counted, listing):
    """What to count, of the output of `ncu --query-metrics`."""
    known = set(re.findall(r"\w+", listing))
    return [f"{name}.sum" for key in counted for name in METRICS[key] if name in known]


def ncu_command(arguments, metrics):
    return [
        "ncu",
        *("--clock-control", "none", "--cache-control", "none"),
        *("--profile-from-start", "off", "--target-processes", "application-only"),
        *("--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics)),
        *(sys.executable, "-m", "benchmarks.counters", "--calls"),
        *("--size", str(arguments.size), "--tokens", str(arguments.tokens)),
        *("--heads", str(arguments.heads), "--head-size", str(arguments.head_size)),
        *("--peers", *arguments.peers, "--modes", *arguments.modes),
    ]


def read_counts(text, calls):
    """Sums over the kernels of each call.

    Args:
        text: String, what `ncu --csv --page raw` prints.
        calls: List of keys, one for each call in the order of the calls.

    Returns:
        A dict from a key to a dict with the number of "kernels", the most "passes" that one of them
        took, and the sum of each metric.

    Raises:
        ValueError: If there is not one marker for each call.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(lines[header:]) if row["ID"]]  # not that of the units
    passes = max((int(x) for x in re.findall(r"- (\d+) pass", text)), default=None)
    marks = sum(MARKER in row["Kernel Name"] for row in rows)
    if marks != len(calls):
        raise ValueError(f"there must be {len(calls)} marked calls. Received: {marks}")
    counts, order = {}, iter(calls)
    for row in rows:
        metrics = {x: float(row[x].replace(",", "")) for x in row if x.endswith(".sum")}
        if MARKER in row["Kernel Name"]:
            current = {"kernels": 0, "passes": passes, **dict.fromkeys(metrics, 0.0)}
            counts[next(order)] = current
            continue
        current["kernels"] += 1
        for name, value in metrics.items():
            current[name] += value
    return counts


def table(rows):
    """Rows as text: mebibytes, and millions of the rest."""
    metrics = [name for name in rows[0] if name.endswith(".sum")]
    lines = [("peer", "mode", "kernels", *metrics)]
    for row in rows:
        numbers = [row[x] / 2**20 if x.startswith("dram") else row[x] / 1e6 for x in metrics]
        lines.append(
            (row["peer"], row["mode"], str(row["kernels"]), *(f"{x:.1f}" for x in numbers))
        )
    return align(lines, left=(0, 1))


def parse(arguments):
    """The command line."""
    parser = make_parser("counters", __doc__)
    parser.add_argument("--size", type=int, default=4096, help="tokens in a sequence (4096)")
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch (32768)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--peers", nargs="+", default=list(NAMES), help="names")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--count", choices=METRICS, nargs="+", default=list(METRICS))
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and ncu's own output")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parsed = parse(arguments)
    backend, device = keras.backend.backend(), current_device()
    if (backend, device) != ("torch", "gpu"):
        print(
            f"error: it needs the torch backend and a GPU. Received: {backend} on {device}",
            file=sys.stderr,
        )
        return 1
    load_peers(())
    if parsed.calls:
        run_calls(parsed)
        return 0
    listing = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, check=True)
    command = ncu_command(parsed, metric_names(parsed.count, listing.stdout))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if parsed.out is not None:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "counters-ncu.csv").write_text(done.stdout)
    if done.returncode:
        print(f"error: ncu failed:\n{done.stdout}\n{done.stderr}", file=sys.stderr)
        return 1
    calls = [(peer, mode) for mode in parsed.modes for peer in parsed.peers]
    counts = read_counts(done.stdout, calls)
    rows = [{"peer": peer, "mode": mode, **x} for (peer, mode), x in counts.items()]
    print(
        f"one call of {parsed.size} tokens, {parsed.heads} heads of {parsed.head_size}, batch "
        f"{make_case(parsed, MODES[0]).batch}; MiB, and millions; passes of a kernel: "
        f"{rows[0]['passes']} at most"
    )
    print(table(rows))
    if parsed.out is not None:
        options = {name: x for name, x in vars(parsed).items() if name not in ("out", "calls")}
        report = {"environment": environment("gpu"), "options": options, "results": rows}
        (parsed.out / "counters.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
