"""Importing the package needs one framework and loads no kernel and no model library."""

import pytest
from isolation import BACKENDS, others, run_python

LIBRARIES = ("triton", "keras_hub", "keras_nlp")

# Keras itself loads Pallas on the jax backend. That is undone, so that any use of ours would show.
CHECK = """
import keras

def is_kernel(name):
    if name.startswith("keras_rwr.backends."):  # what registers kernels may be there
        return name.endswith(("_kernels", ".launch", ".selection", ".forward", ".backward"))
    return (name + ".").startswith(
        ("triton.", "jax.experimental.pallas.", "keras_hub.", "keras_nlp.")
    )

finder.hidden += ("jax.experimental.pallas",)
for name in [name for name in sys.modules if name.startswith("jax.experimental.pallas")]:
    parent, _, child = name.rpartition(".")
    vars(sys.modules.get(parent, sys)).pop(child, None)
    del sys.modules[name]

import keras_rwr
import keras_rwr.ablation
{extra}
found = sorted(filter(is_kernel, sys.modules))
if found:
    sys.exit(f"loaded: {{found}}")
print("cold", keras_rwr.__version__)
"""


def check(backend, tmp_path, extra="", hidden=LIBRARIES, path=()):
    return run_python(
        CHECK.format(extra=extra),
        backend=backend,
        hidden=(*hidden, *others(backend)),
        path=path,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_import_with_one_framework(backend, tmp_path):
    done = check(backend, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cold ")


def test_the_check_fails_where_an_import_needs_what_is_hidden(tmp_path):
    done = check("numpy", tmp_path, extra="import keras_rwr.models")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("No module named 'keras_hub'")


def test_the_check_fails_where_a_kernel_or_a_library_is_loaded(tmp_path):
    (tmp_path / "triton.py").touch()
    (tmp_path / "made_up_kernels.py").touch()
    extra = f"""
import triton
import keras_rwr.backends
keras_rwr.backends.__path__.append({str(tmp_path)!r})
import keras_rwr.backends.made_up_kernels
"""
    done = check("numpy", tmp_path, extra=extra, hidden=(), path=[tmp_path])
    assert done.returncode == 1
    assert "'keras_rwr.backends.made_up_kernels', 'triton']" in done.stderr


def test_the_check_hides_frameworks_and_pallas(tmp_path):
    extra = """
for statement in (
    "import torch",
    "import jax.experimental.pallas",
    "from jax.experimental import pallas",
    "import jax.numpy",
):
    try:
        exec(statement)
    except ImportError:
        print("no", statement)
"""
    done = check("numpy", tmp_path, extra=extra)
    assert done.stdout.splitlines()[:-1] == [
        "no import torch",
        "no import jax.experimental.pallas",
        "no from jax.experimental import pallas",
    ]
