"""Runs code in a process where chosen modules are absent."""

import os
import subprocess
import sys

FRAMEWORKS = ("torch", "jax", "tensorflow")
BACKENDS = (*FRAMEWORKS, "numpy")

_HIDE = """
import sys

class Finder:
    \"\"\"Finds what the ordinary finders find, but for the modules that are hidden.\"\"\"

    def __init__(self, finders, hidden):
        self.finders = finders
        self.hidden = hidden

    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in self.hidden):
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def invalidate_caches(self):
        for finder in self.finders:
            if hasattr(finder, "invalidate_caches"):
                finder.invalidate_caches()

finder = Finder(list(sys.meta_path), {hidden!r})
sys.meta_path[:] = [finder]
"""


def others(backend):
    """The frameworks that a backend has to do without."""
    needed = {"numpy": "jax"}.get(backend, backend)  # Keras's NumPy backend is built on JAX
    return tuple(name for name in FRAMEWORKS if name != needed)


def run_python(code, *, backend, hidden=(), path=(), cwd):
    """Runs Python code in a process of its own.

    Args:
        code: String. It can hide further modules with `finder.hidden += (name,)`.
        backend: String, the Keras backend.
        hidden: Names of modules that are not to be found, nor anything below them.
        path: Folders to import from before all others.
        cwd: Folder to run in.

    Returns:
        A `subprocess.CompletedProcess`.
    """
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return subprocess.run(
        [sys.executable, "-c", _HIDE.format(hidden=tuple(hidden)) + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
