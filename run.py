#!/usr/bin/env python3
"""The project's two main jobs, each in an environment that this script makes for itself.

    python3 run.py ablation [arguments of studies/ablation.py]
    python3 run.py test [arguments of pytest]

`ablation` trains R0 to R5 of a small GPT-2, then small models that follow variables, and leaves a
table and a picture of each in a run folder. `test` runs ruff, mypy, all tests on torch, jax and
tensorflow in processes of their own, and those of the Triton and of the Pallas kernels in two that
interpret them on the CPU. With arguments it runs the tests alone.

The environment is `.venv` beside this script. It is made on first use, from pyproject.toml and the
versions in constraints.txt, and updated only when one of them changes.

Environment variables:
    KERAS_RWR_VENV: Folder of the environment, instead of `.venv`.
    KERAS_RWR_JOBS: Processes of `test` that run at the same time. Defaults to 2, or 1 on one core.
    KERAS_BACKEND: What `ablation` trains with. Defaults to torch.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent
BACKENDS = ("torch", "jax", "tensorflow")
# Test processes a backend, slowest first, so that no long one ends alone. TensorFlow keeps what it
# has compiled: one process for all tests would take twice the memory.
PARTS = {"jax": 1, "torch": 1, "tensorflow": 2}
CHECKS = {
    "ruff check": ["ruff", "check"],
    "ruff format": ["ruff", "format", "--check"],
    "mypy": ["mypy"],
}

# Tests that run once: those that start processes of their own, with other backends or with none,
# and those of studies and examples, which are the same on every backend.
ACROSS_BACKENDS = ("tests/cross_backend", "tests/devices", "tests/packaging", "tests/programs")
# Tests of kernels, which a process interprets from its start or not at all: for each backend the
# process's name and its switch.
KERNELS = "tests/kernels"
INTERPRETED = {
    "torch": ("Triton kernels", "TRITON_INTERPRET"),
    "jax": ("Pallas kernels", "KERAS_RWR_INTERPRET"),
}
# Those of both backends, and how the names of those of one backend alone begin.
SHARED = (f"{KERNELS}/test_cases.py", f"{KERNELS}/test_guarantees.py")
PALLAS_ALONE = f"{KERNELS}/test_pallas"

NO_TESTS_COLLECTED = 5  # pytest's exit code


def main(arguments):
    """Runs one of the two jobs and returns its exit code."""
    jobs = {"ablation": ablation, "test": test}
    if not arguments or arguments[0] not in jobs:
        wanted = arguments[0] if arguments else ""
        print(__doc__)
        if wanted in ("-h", "--help"):
            return 0
        print(f"error: the job must be one of {', '.join(jobs)}. Received: {wanted!r}")
        return 2
    return jobs[arguments[0]](arguments[1:])


def ablation(arguments):
    """Trains R0 to R5 on the embedded text, or as the arguments ask."""
    backend = os.environ.get("KERAS_BACKEND", "torch")
    if backend not in BACKENDS:
        print(f"error: KERAS_BACKEND must be one of {', '.join(BACKENDS)}. Received: {backend!r}")
        return 2
    python = environment([backend, "examples"])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [python, "-m", "studies.ablation", *arguments]
    return subprocess.run(command, env=settings(backend, PYTHONPATH=path), check=False).returncode


def test(arguments):
    """Runs ruff, mypy and pytest: once a backend, on interpreted kernels and across backends."""
    python = environment([*BACKENDS, "examples", "dev"])
    selected = [x for x in arguments if not x.startswith("-") and is_test_path(x)]
    options = [x for x in arguments if x not in selected]
    spanning = [x for x in selected if x.startswith(ACROSS_BACKENDS)]
    interpreted = [x for x in selected if x.startswith(KERNELS)]
    single = [x for x in selected if x not in (*spanning, *interpreted)]

    runs = []  # the longest first
    if not selected:
        interpreted = [KERNELS]
    for backend, (name, switch) in INTERPRETED.items():
        paths = [x for x in interpreted if is_interpreted_on(x, backend)]
        if paths:
            runs.append((name, settings(backend, **{switch: "1"}), paths))
    if spanning or not selected:
        paths = spanning if spanning else [x for x in ACROSS_BACKENDS if (ROOT / x).is_dir()]
        runs.append(("across backends", settings(BACKENDS[0]), paths))
    if single or not selected:
        for backend, parts in PARTS.items():
            for number, paths in enumerate([single] if single else divide(parts), 1):
                name = f"{backend} {number}" if parts > 1 and not single else backend
                runs.append((name, settings(backend), paths))
    tasks = [functools.partial(pytest, python, *run, options) for run in runs]
    if not arguments:
        tasks += [functools.partial(check, python, *run) for run in CHECKS.items()]
    jobs = int(os.environ.get("KERAS_RWR_JOBS", min(2, os.cpu_count() or 1)))
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda task: task(captured=jobs > 1), tasks))

    print("\n" + "=" * 100)
    for result in results:
        print(
            f"{result['name']:16} {result['passed']:5} passed, {result['failed']:3} failed, "
            f"{result['skipped']:3} skipped, exit code {result['code']}, {result['seconds']:.0f} s"
        )
    total = {key: sum(x[key] for x in results) for key in ("passed", "failed", "skipped")}
    filtered = bool(arguments)
    good = all(x["code"] == 0 or (filtered and x["code"] == NO_TESTS_COLLECTED) for x in results)
    good = good and not total["failed"]
    print(f"{'all in order' if good else 'NOT in order'}, {time.monotonic() - started:.0f} s")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 0 if good and total["passed"] else 1


def is_test_path(argument):
    """Whether a command line argument names tests, such as `tests/test_layer.py::test_call`."""
    return (ROOT / argument.split("::")[0]).exists()


def divide(parts):
    """Arguments of pytest for so many processes that share the tests of one backend."""
    elsewhere = ["--share-costly", *[f"--ignore={x}" for x in (*ACROSS_BACKENDS, KERNELS)]]
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py"))
    return [
        ["tests", *elsewhere, *[f"--ignore={x}" for i, x in enumerate(files) if i % parts != part]]
        for part in range(parts)
    ]


def check(python, name, module, captured):
    """Runs ruff or mypy on the checkout, and counts as one test."""
    command = [python, "-m", *module]
    result = execute(name, command, dict(os.environ), captured)
    good = result["code"] == 0
    return {**result, "passed": int(good), "failed": int(not good), "skipped": 0}


def pytest(python, name, variables, paths, options, captured):
    """Runs one pytest process.

    Args:
        python: Path of the environment's interpreter.
        name: String, what to call the process.
        variables: Dict, its environment.
        paths: List of strings, what it tests.
        options: List of strings, further arguments.
        captured: Bool. Whether to print its output in one piece at its end.

    Returns:
        A dict with the counts "passed", "failed", "skipped", and "name", "code" and "seconds".
    """
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [python, "-m", "pytest", *paths, f"--junitxml={report}", *options]
        return {**execute(name, command, variables, captured), **read_counts(report)}


def execute(name, command, variables, captured):
    """Runs a command in the checkout; returns its "name", exit "code" and "seconds"."""
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if captured else None,
        stderr=subprocess.STDOUT if captured else None,
    )
    if captured:
        print(f"\n##### {name}: {' '.join(command[2:])}\n{done.stdout}", flush=True)
    return {"name": name, "code": done.returncode, "seconds": time.monotonic() - started}


def is_interpreted_on(path, backend):
    """Whether a path below `KERNELS` has tests of a backend's kernels."""
    if path.rstrip("/") == KERNELS or path.startswith(SHARED):
        return True
    return path.startswith(PALLAS_ALONE) == (backend == "jax")


def read_counts(report):
    """Counts of a JUnit report; a process that died before writing one counts as a failure."""
    if not report.is_file():
        return {"passed": 0, "failed": 1, "skipped": 0}
    root = xml.etree.ElementTree.parse(report).getroot()
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in root.iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, 0))
    failed = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
    }


def settings(backend, **others):
    """The environment variables of a process that uses a backend, and others to set."""
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        **others,
    }


def environment(extras):
    """Makes or updates the virtual environment.

    Args:
        extras: List of strings, the project's extras that it must have.

    Returns:
        Path of its interpreter, as a string.
    """
    if sys.version_info < (3, 11):
        sys.exit(f"error: Python must be 3.11 or newer. Received: {sys.version.split()[0]}")
    folder = pathlib.Path(os.environ.get("KERAS_RWR_VENV", ROOT / ".venv")).absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "keras-rwr.json"
    state = {"inputs": hash_inputs(folder), "extras": sorted(extras)}
    if python.is_file() and stamp.is_file():
        installed = json.loads(stamp.read_text())
        if installed["inputs"] == state["inputs"]:
            if set(extras) <= set(installed["extras"]):
                return str(python)
            state["extras"] = sorted({*extras, *installed["extras"]})

    print(f"Installing into {folder}: {', '.join(state['extras'])}", flush=True)
    started = time.monotonic()
    if not python.is_file():
        venv.create(folder, with_pip=True)
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    constrained = [*pip, "--constraint", str(ROOT / "constraints.txt")]
    project = f"{ROOT}[{','.join(state['extras'])}]"
    for command in (
        [*constrained, "setuptools", "wheel"],
        [*constrained, "--no-build-isolation", "--editable", project],
    ):
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(f"error: the installation failed: {' '.join(command)}")
    stamp.write_text(json.dumps(state, indent=2) + "\n")
    print(f"Installed in {time.monotonic() - started:.0f} s", flush=True)
    return str(python)


def hash_inputs(folder):
    """A hash of everything that decides what is installed and where."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT} {folder}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
