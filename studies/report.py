"""Tables and pictures."""

import csv
import io
import math
import os

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.arguments import base
from studies.data import write_json

# Okabe and Ito's palette, safe for colour-blind readers; dashes and markers say the same again
STYLES = {
    "R0": ("#000000", "-", "o"),
    "R1": ("#0072B2", "--", "s"),
    "R2": ("#009E73", "-.", "^"),
    "R3": ("#CC79A7", ":", "D"),
    "R4": ("#D55E00", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "R5": ("#56B4E9", "-", "P"),
}
# name, heading, number format
COLUMNS = (
    ("step", "step", ""),
    ("description", "model", ""),
    ("seeds", "seeds", "d"),
    ("parameters", "parameters", ",d"),
    ("validation_loss", "validation loss", ".4f"),
    ("range", "range of seeds", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("difference_percent", "perplexity against R0, %", "+.2f"),
    ("tokens_per_second", "training tokens/s", ",.0f"),
    ("peak_memory_mb", "peak memory, MiB", ",.0f"),
    ("device_memory_mb", "peak memory of the accelerator, MiB", ",.0f"),
    ("degree", "degree", ".3g"),
    ("edges", "edges a token", ".1f"),
    ("outside_window", "walk outside window", ".3f"),
    ("entropy", "walk entropy, nats", ".3f"),
    ("isolated", "isolated tokens", ".4f"),
)
LEGEND = """\
- Validation loss: mean cross-entropy a token, in nats, after the last training step; perplexity
  is its exponential. Numbers are means over seeds; a difference from R0 is that of equal seeds.
- Training tokens/s: without evaluations and without the first step of a process, which compiles.
- Peak memory: highest resident memory of the step's own process, interpreter, framework and
  compiler included; on an accelerator, the most that the framework's allocator held.
- Graph statistics, after training, on {probes} validation sequences, mean over layers, heads and
  tokens: degree is the sum of a token's edge weights; edges a token counts those above 0; walk
  outside window is the share of the walk's mass on tokens further away than the window; walk
  entropy is that of the walk's distribution over tokens; isolated tokens are those without
  weight. Each layer by itself: `table.json`.
"""


def make_rows(results):
    """Flat table rows, one a step, with its difference from R0 where R0 has been trained."""
    baseline = {x["seed"]: x["validation_loss"] for x in results if x["step"] == "R0"}
    rows = []
    for step in dict.fromkeys(result["step"] for result in results):
        found = [{**x, **(x["statistics"] or {})} for x in results if x["step"] == step]
        row = {name: mean(x.get(name) for x in found) for name, _, _ in COLUMNS[4:]}
        losses = [x["validation_loss"] for x in found]
        pairs = [(x["validation_loss"], baseline.get(x["seed"])) for x in found]
        changes = [100.0 * math.expm1(loss - r0) for loss, r0 in pairs if r0 is not None]
        row.update({name: found[0][name] for name in ("step", "description", "parameters")})
        row["seeds"], row["range"] = len(found), max(losses) - min(losses)
        row["perplexity"], row["difference_percent"] = math.exp(mean(losses)), mean(changes)
        rows.append({name: row[name] for name, _, _ in COLUMNS})
    return rows


def mean(values):
    """The mean of those that are there, or `None`."""
    values = [x for x in values if x is not None]
    return sum(values) / len(values) if values else None


def make_table(rows):
    """The table of the ablation in Markdown; a hyphen where a number does not apply."""
    cells = [
        ["-" if row[name] is None else format(row[name], form) for name, _, form in COLUMNS]
        for row in rows
    ]
    return markdown([heading for _, heading, _ in COLUMNS], cells)


def markdown(headings, rows):
    """A table in Markdown of lists of strings."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def configuration(config, results):
    """What was run, in Markdown."""
    arguments = config["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    lines = [
        f"Backend {config['backend']} on {config['platform']}; {versions}.\n",
        "GPT-2 with {layers} layers, width {width}, {heads} heads, context {context}, vocabulary "
        "{vocabulary_size}, dropout {dropout}; {training_steps} steps of {batch_size} sequences, "
        "AdamW, learning rate {learning_rate}, {warmup_steps} warm-up steps, weight decay "
        "{weight_decay}, seeds {seeds}, dataset `{dataset}`.\n".format(**arguments),
    ]
    for step, found in {x["step"]: x["options"] for x in results if x["options"]}.items():
        lines.append(f"- {step}: " + ", ".join(f"{name} {x}" for name, x in found.items()))
    return "\n".join(lines) + "\n"


def write_report(run_dir, config, results, losses, probes):
    """Writes `table.md`, `table.csv`, `table.json`, `curves.png` and `positions.png`.

    Args:
        run_dir: path. The run folder.
        config: dict. What `config.json` holds.
        results: list of the finished steps' results.
        losses: list of the rows of their losses CSVs.
        probes: int. How many sequences the graph statistics were measured on.

    Returns:
        The table in Markdown.
    """
    rows = make_rows(results)
    table = make_table(rows)
    text = "# GPT-2 ablation\n\n" + table + "\n" + LEGEND.format(probes=probes)
    text += "\n## Configuration\n\n" + configuration(config, results)
    replace_file(run_dir / "table.md", text.encode("utf-8"))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [name for name, _, _ in COLUMNS])
    writer.writeheader()
    writer.writerows(rows)
    replace_file(run_dir / "table.csv", buffer.getvalue().encode("utf-8"))
    write_json(run_dir / "table.json", {"rows": rows, "results": results})
    replace_file(run_dir / "curves.png", draw_curves(results, losses, config))
    replace_file(run_dir / "positions.png", draw_positions(results, config))
    return table


# --- pictures -------------------------------------------------------------------------------------


def draw_curves(results, losses, config):
    """PNG of the training and validation losses over training tokens."""
    figure, panels = new_figure((10, 4.2), columns=2, sharex=True, sharey=True)
    for panel, name in zip(panels, ("training_loss", "validation_loss"), strict=True):
        for step, columns in by_step(results, [[x[name] for x in rows] for rows in losses]):
            tokens = [row["tokens"] for row in losses[0]]
            draw_line(panel, step, tokens, np.mean(columns, 0))
        panel.set_title(name.replace("_", " ").capitalize())
        panel.set_xlabel("training tokens")
    panels[0].set_ylabel("cross-entropy, nats a token")
    panels[1].legend()
    return as_png(figure, describe(config))


def draw_positions(results, config):
    """PNG of the validation perplexity by position in the context."""
    figure, (panel,) = new_figure((7, 4.2))
    parts = [[part["loss"] for part in result["losses_by_position"]] for result in results]
    first = [part["first"] for part in results[0]["losses_by_position"]]
    for step, columns in by_step(results, parts):
        draw_line(panel, step, first, np.exp(np.mean(columns, 0)))
    panel.set_yscale("log")
    panel.set_xlabel("position in the context, tokens")
    panel.set_ylabel("validation perplexity")
    panel.legend()
    return as_png(figure, describe(config))


def by_step(results, columns):
    """Pairs of a step and the columns of its seeds, given one column a result."""
    steps = [result["step"] for result in results]
    for step in dict.fromkeys(steps):
        yield step, [x for name, x in zip(steps, columns, strict=True) if name == step]


def describe(config):
    """The title of a picture."""
    text = "GPT-2, {layers} layers, width {width}, context {context}, "
    return text.format(**config["arguments"]) + config["backend"]


def new_figure(size, columns=1, **options):
    """A figure with a row of panels, for files alone, and the panels."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False, **options)[0]
    for panel in panels:
        panel.grid(alpha=0.3, which="both")
    return figure, panels


def draw_line(panel, step, x, y, **options):
    """A line in the style of an ablation step; one with options of its own is thin."""
    color, dashes, marker = STYLES[base(step)]
    style = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4, "label": step}
    if step != base(step):
        style |= {"linewidth": 0.8, "marker": f"${len(panel.lines)}$", "markersize": 6}
    panel.plot(x, y, **{**style, **options})


def as_png(figure, title):
    """The bytes of a figure's PNG, under a title."""
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def replace_file(path, content):
    """Writes a file that is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
