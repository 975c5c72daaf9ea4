"""Where a run was made, and its figures as text, JSON and CSV."""

import csv
import datetime
import json
import os
import pathlib
import platform
import subprocess

import keras
import numpy as np

import keras_rwr
from benchmarks import frameworks
from benchmarks.cases import MODES

ROOT = pathlib.Path(__file__).resolve().parents[1]

COLUMNS = (
    *("backend", "device", "dtype", "level", "tokens", "batch", "heads", "head_size"),
    *("gradients", "is_causal", "step", "peer", "variant", "median_ms", "low_ms", "high_ms"),
    *("samples", "ratio", "peak_mib", "rise_mib", "failure"),
)


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


def print_report(report):
    """Prints what `benchmarks.run.benchmark` returns."""
    for name, value in report["environment"].items():
        print(f"{name}: {value}")
    for step, options in report["options"].items():
        print(f"options of {step}: {options}")
    for name, description in report["peers"].items():
        errors = [check["error"] for check in report["parity"] if check["peer"] == name]
        print(f"{name}: {description}, largest error {max(errors):.1e}")
    for step, refused in report["refused"].items():
        for name, reason in refused.items():
            print(f"{name}: cannot run {step}, {reason}")
    groups = {}
    for row in report["results"]:
        key = f"{row['step']}, {row['level']}, {MODES[row['gradients']]}, {row['dtype']}, " + (
            f"heads {row['heads']} of {row['head_size']}"
        )
        groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        print(f"\n{key}\n{table(rows)}")


def table(rows):
    """Rows as text in columns."""

    def number(value, digits):
        return "" if value is None else f"{value:.{digits}f}"

    columns = ("ms", "quartiles", "ratio", "peak MiB", "rise MiB")
    lines = [("tokens", "batch", "peer", "variant", *columns)]
    for row in rows:
        spread = ""
        if row.get("low_ms") is not None:
            spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        lines.append(
            (
                str(row["tokens"]),
                str(row["batch"]),
                row["peer"],
                row["variant"],
                row["failure"] if "failure" in row else number(row.get("median_ms"), 2),
                spread,
                number(row.get("ratio"), 2),
                number(row.get("peak_mib"), 0),
                number(row.get("rise_mib"), 0),
            )
        )
    return align(lines, left=(2, 3))


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
