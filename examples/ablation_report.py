"""Table and picture of a run of `gpt2_ablation.py`."""

import csv
import io
import math
import os

from ablation_data import write_json

# Okabe and Ito's palette, safe for colour-blind readers; dashes and markers say the same again
STYLES = {
    "R0": ("#000000", "-", "o"),
    "R1": ("#0072B2", "--", "s"),
    "R2": ("#009E73", "-.", "^"),
    "R3": ("#CC79A7", ":", "D"),
    "R4": ("#D55E00", (0, (5, 1, 1, 1, 1, 1)), "v"),
}
# name, heading, number format
COLUMNS = (
    ("step", "step", ""),
    ("description", "model", ""),
    ("parameters", "parameters", ",d"),
    ("validation_loss", "validation loss", ".4f"),
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
  is its exponential.
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
    """Flat table rows, with each step's difference from R0 if R0 has been trained."""
    baseline = {row["step"]: row["perplexity"] for row in results}.get("R0")
    rows = []
    for result in results:
        difference = None
        if baseline is not None:
            difference = 100.0 * (result["perplexity"] / baseline - 1.0)
        statistics = result["statistics"]
        if statistics is None:
            statistics = {}
        values = {**result, **statistics, "difference_percent": difference}
        rows.append({name: values.get(name) for name, _, _ in COLUMNS})
    return rows


def markdown_table(rows):
    """The table in Markdown; a hyphen where a number does not apply."""
    lines = [[heading for _, heading, _ in COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        lines.append(
            ["-" if row[name] is None else format(row[name], form) for name, _, form in COLUMNS]
        )
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
        "{weight_decay}, seed {seed}, dataset `{dataset}`.\n".format(**arguments),
    ]
    for result in results:
        if result["options"] is None:
            continue
        options = ", ".join(f"{name} {value}" for name, value in result["options"].items())
        lines.append(f"- {result['step']}: {options}")
    return "\n".join(lines) + "\n"


def write_report(run_dir, config, results, losses, probes):
    """Writes `table.md`, `table.csv`, `table.json`, `curves.png` and `positions.png`.

    Args:
        run_dir: path. The run folder.
        config: dict. What `config.json` holds.
        results: list of the finished steps' results.
        losses: dict from a step to the rows of its losses CSV.
        probes: int. How many sequences the graph statistics were measured on.

    Returns:
        The table in Markdown.
    """
    rows = make_rows(results)
    table = markdown_table(rows)
    text = "# GPT-2 ablation\n\n" + table + "\n" + LEGEND.format(probes=probes)
    text += "\n## Configuration\n\n" + configuration(config, results)
    replace_file(run_dir / "table.md", text.encode("utf-8"))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [name for name, _, _ in COLUMNS])
    writer.writeheader()
    writer.writerows(rows)
    replace_file(run_dir / "table.csv", buffer.getvalue().encode("utf-8"))
    merged = [{**result, **row} for result, row in zip(results, rows, strict=True)]
    write_json(run_dir / "table.json", merged)
    replace_file(run_dir / "curves.png", draw_curves(losses, config))
    replace_file(run_dir / "positions.png", draw_positions(results, config))
    return table


def draw_curves(losses, config):
    """PNG of the training and validation losses over training tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, name in zip(panels, ("training_loss", "validation_loss"), strict=True):
        for step, rows in losses.items():
            color, dashes, marker = STYLES[step]
            panel.plot(
                [row["tokens"] for row in rows],
                [row[name] for row in rows],
                color=color,
                linestyle=dashes,
                marker=marker,
                markersize=4,
                label=step,
            )
        panel.set_title(name.replace("_", " ").capitalize())
        panel.set_xlabel("training tokens")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("cross-entropy, nats a token")
    panels[1].legend()
    return finish(figure, config)


def draw_positions(results, config):
    """PNG of the validation perplexity by position in the context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for result in results:
        color, dashes, marker = STYLES[result["step"]]
        parts = result["losses_by_position"]
        panel.plot(
            [part["first"] for part in parts],
            [math.exp(part["loss"]) for part in parts],
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            label=result["step"],
        )
    panel.set_yscale("log")
    panel.set_xlabel("position in the context, tokens")
    panel.set_ylabel("validation perplexity")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    return finish(figure, config)


def finish(figure, config):
    """The picture's title, and its PNG."""
    arguments = config["arguments"]
    figure.suptitle(
        f"GPT-2, {arguments['layers']} layers, width {arguments['width']}, "
        f"context {arguments['context']}, {config['backend']}"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def replace_file(path, content):
    """Writes a file that is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
