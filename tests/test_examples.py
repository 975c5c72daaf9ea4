"""The shortest example, as a user starts it."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart_learns(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[1] == "parameters,"
    assert float(words[-1]) < 0.8 * float(words[-3])
