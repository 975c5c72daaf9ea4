"""The example that converts a pretrained model, with the small one that stands in for it."""

import pathlib
import runpy
import sys

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "convert_smollm2.py"


def test_the_example_runs(monkeypatch, capsys):
    sizes = ["--context", "40", "--window", "40", "--rows", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *sizes])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "a small random model takes its place" in out
    lines = dict(line.split(": ") for line in out.splitlines() if " attention" in line)
    # With a window over the whole context it is at first the model that it was made of.
    assert lines["full attention"] == lines["RWR attention"]
    assert float(lines["RWR attention, trained on 160 tokens"]) < float(lines["RWR attention"])
    assert "The old house by the river" in out
