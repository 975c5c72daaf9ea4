"""Tables in Markdown and a picture of what `benchmarks.gpu` has measured.

python -m benchmarks.figures runs/benchmarks/attention-gpu.json --picture docs/attention_gpu.png
"""

import json
import pathlib
import sys

from benchmarks.run import make_parser

# Name and colour of each peer, in the order of columns.
PEERS = {
    "rwr-triton": ("keras-rwr", "#c03028"),
    "rwr-pallas": ("keras-rwr", "#c03028"),
    "jax-xla": ("XLA", "#1f5f99"),
    "jax-cudnn": ("cuDNN", "#4fa3d1"),
    "jax-cudnn-window": ("cuDNN, window alone", "#3a8f4d"),
    "torch-sdpa-flash": ("SDPA flash", "#1f5f99"),
    "torch-sdpa-cudnn": ("SDPA cuDNN", "#4fa3d1"),
    "torch-flex": ("FlexAttention, window + blocks", "#3a8f4d"),
    "keras": ("MultiHeadAttention", "#1f5f99"),
    "keras-gpt2": ("MultiHeadAttention in GPT-2", "#8a6fb0"),
}
LEVELS = {"op": "attention alone", "layer": "layer with its projections"}
MODES = ("forward", "forward + backward")


def label(peer):
    return PEERS[peer][0] if peer in PEERS else peer


def select(report, **fields):
    """Rows of a report with the given values."""
    return [row for row in report["results"] if all(row[key] == x for key, x in fields.items())]


def different(rows, field):
    """Values of a field, sorted; peers in the order of `PEERS`, then of their names."""
    order = list(PEERS)
    values = {row[field] for row in rows}
    if field != "peer":
        return sorted(values)
    return sorted(values, key=lambda x: (order.index(x) if x in PEERS else len(order), x))


def markdown(report):
    """Tables of times and memory.

    Args:
        report: Dict, what `benchmarks.gpu.measure` returns.

    Returns:
        String: for each level, head size and mode a table of milliseconds with, in brackets, how
        many times ours that is, and one of the memory that a call adds.
    """
    parts = []
    for level in sorted({row["level"] for row in report["results"]}, reverse=True):
        for head_size in different(select(report, level=level), "head_size"):
            for gradients in (False, True):
                rows = select(report, level=level, head_size=head_size, gradients=gradients)
                title = f"{LEVELS[level]}, heads of {head_size}, {MODES[gradients]}"
                if any("median_ms" in row or "failure" in row for row in rows):
                    parts.append(f"{title}: ms (times {label(report['baseline'])})\n")
                    parts.append(grid(rows, lambda row: time_cell(row, report["baseline"])))
                if any("rise_mib" in row for row in rows):
                    parts.append(f"{title}: MiB that a call adds\n")
                    parts.append(grid(rows, memory_cell))
    return "\n".join(parts)


def grid(rows, cell):
    """A Markdown table: lengths by peers."""
    names = different(rows, "peer")
    lines = [["tokens", *map(label, names)], ["---:"] * (1 + len(names))]
    for tokens in different(rows, "tokens"):
        found = {row["peer"]: row for row in rows if row["tokens"] == tokens}
        lines.append([f"{tokens:,}", *(cell(found[x]) if x in found else "" for x in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def time_cell(row, baseline):
    if row.get("median_ms") is None:
        return row.get("failure", "")
    text = f"{row['median_ms']:.2f}"
    if row["peer"] == baseline or row.get("ratio") is None:
        return text
    digits = 2 if row["ratio"] < 1 else 1 if row["ratio"] < 10 else 0
    return f"{text} ({row['ratio']:.{digits}f})"


def memory_cell(row):
    return row.get("failure", "") if row.get("rise_mib") is None else f"{row['rise_mib']:,.0f}"


def picture(report, path):
    """Times, and memory with the backward pass, over the length: a row for each head size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in report["results"] if row["level"] == "op"]
    head_sizes = different(rows, "head_size")
    panels = (
        ("forward, ms", False, "median_ms"),
        ("forward + backward, ms", True, "median_ms"),
        ("forward + backward, MiB added", True, "rise_mib"),
    )
    figure, axes = pyplot.subplots(
        len(head_sizes),
        len(panels),
        figsize=(12, 3.4 * len(head_sizes)),
        sharex=True,
        squeeze=False,
    )
    for line, head_size in zip(axes, head_sizes, strict=True):
        for axis, (title, gradients, value) in zip(line, panels, strict=True):
            shown = select({"results": rows}, head_size=head_size, gradients=gradients)
            draw(axis, shown, value)
            axis.set_title(f"heads of {head_size}: {title}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("tokens in a sequence")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    case = rows[0]
    figure.suptitle(
        f"{report['environment']['device']}, {case['dtype']}, {case['heads']} heads, "
        f"{case['batch'] * case['tokens']:,} tokens a call or one longer sequence; a line ends "
        "where memory does",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(axis, rows, value):
    """Lines of one quantity over the length, on logarithmic axes."""
    for peer in different(rows, "peer"):
        points = sorted(
            (row["tokens"], row[value])
            for row in rows
            if row["peer"] == peer and row.get(value) is not None
        )
        if not points:
            continue
        name, color = PEERS.get(peer, (peer, None))
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=color)
    ticks = different(rows, "tokens")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in ticks])
    axis.grid(alpha=0.3)


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parser = make_parser("figures", __doc__)
    parser.add_argument("report", type=pathlib.Path, help="JSON of `python -m benchmarks.gpu`")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to write")
    parsed = parser.parse_args(arguments)
    report = json.loads(parsed.report.read_text())
    print(markdown(report))
    if parsed.picture is not None:
        picture(report, parsed.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
