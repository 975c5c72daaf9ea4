"""The script of the two main jobs: what it installs, what it counts and what it returns."""

import json
import os
import subprocess
import sys

import pytest

import run

REPORT = """<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>"""


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """An environment that looks installed with the extras torch and test."""
    monkeypatch.setenv("KERAS_RWR_VENV", str(tmp_path))
    python = tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir()
    python.touch()
    state = {"inputs": run.hash_inputs(tmp_path), "extras": ["test", "torch"]}
    (tmp_path / "keras-rwr.json").write_text(json.dumps(state))
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """Collects the commands that would have been run."""
    seen = []

    def pretend(command, **options):
        seen.append([str(x) for x in command])
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(run.subprocess, "run", pretend)
    return seen


def test_an_installed_environment_is_left_alone(ready, commands):
    assert run.environment(["torch"]).startswith(str(ready))
    assert commands == []


def test_a_missing_extra_is_added_to_what_is_there(ready, commands):
    run.environment(["jax"])
    assert commands[-1][-1] == f"{run.ROOT}[jax,test,torch]"
    assert all(str(run.ROOT / "constraints.txt") in command for command in commands)
    run.environment(["jax", "torch"])
    assert len(commands) == 2


def test_other_inputs_install_anew(ready, commands, monkeypatch):
    monkeypatch.setattr(run, "hash_inputs", lambda folder: "other")
    run.environment(["torch"])
    assert commands[-1][-1] == f"{run.ROOT}[torch]"


def test_a_failed_installation_leaves_no_stamp(ready, commands, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit, match="the installation failed"):
        run.environment(["jax"])
    assert not (ready / "keras-rwr.json").exists()


def test_ablation_passes_its_arguments_on(ready, commands, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    run.main(["ablation", "--dry-run", "--ablation-step", "R1"])
    module = ["-m", "studies.ablation"]
    assert commands[-1][1:] == [*module, "--dry-run", "--ablation-step", "R1"]


def pytest_arguments(commands):
    return [command[3:] for command in commands if command[1:3] == ["-m", "pytest"]]


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        ([], 7),
        (["-x"], 7),
        (["tests/test_layer.py::test_one"], 3),
        (["tests/packaging"], 1),
        (["tests/kernels"], 2),
        (["tests/kernels/test_cases.py::test_float32"], 2),
        (["tests/kernels/test_pallas_lowering.py"], 1),
        (["tests/kernels/test_selection.py"], 1),
    ],
)
def test_test_runs_a_process_a_backend(ready, commands, arguments, processes, monkeypatch):
    monkeypatch.setenv("KERAS_RWR_JOBS", "1")
    run.main(["test", *arguments])
    assert len(pytest_arguments(commands)) == processes
    for started in pytest_arguments(commands):
        assert set(arguments) <= set(started)
    assert (["-m", "mypy"] in [command[1:] for command in commands]) == (not arguments)


def test_parts_share_all_tests_of_a_backend():
    files = [f"tests/{path.name}" for path in (run.ROOT / "tests").glob("test_*.py")]
    parts = run.divide(3)
    for path in files:
        assert sum(f"--ignore={path}" not in part for part in parts) == 1
    assert not any(f"--ignore={path}" in run.divide(1)[0] for path in files)


def test_a_process_without_a_report_is_a_failure(ready, commands, capsys):
    assert run.main(["test"]) == 1
    assert capsys.readouterr().out.endswith("3 passed, 7 failed, 0 skipped\n")


def test_kernels_are_interpreted_and_nothing_else_is(ready, monkeypatch):
    switches = [switch for _, switch in run.INTERPRETED.values()]
    for switch in switches:
        monkeypatch.delenv(switch, raising=False)
    interpreted = []

    def pretend(command, env=None, **options):
        if "pytest" in command:
            on = [switch for switch in switches if env.get(switch) == "1"]
            interpreted.append((" ".join(command), env["KERAS_BACKEND"], on))
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(run.subprocess, "run", pretend)
    run.main(["test"])
    assert len(interpreted) == 7
    assert sum(len(on) for _, _, on in interpreted) == 2
    for command, backend, on in interpreted:
        assert on == ([run.INTERPRETED[backend][1]] if " tests/kernels " in command else [])


def test_counts(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert run.read_counts(report) == {"passed": 4, "failed": 3, "skipped": 3}


@pytest.mark.parametrize("arguments", [[], ["tests"]])
def test_unknown_job(arguments):
    done = subprocess.run(
        [sys.executable, run.ROOT / "run.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: the job must be one of ablation, test. Received:" in done.stdout


def test_unknown_backend(capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "mxnet")
    assert run.main(["ablation"]) == 2
    assert "KERAS_BACKEND must be one of" in capsys.readouterr().out
