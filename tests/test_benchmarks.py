"""The benchmark runner: what it refuses to measure, what it reports. No figure is judged here."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import types

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import frameworks, measure, parity, peers, run
from benchmarks.cases import STEPS, Case, make_inputs
from benchmarks.report import ROOT, table

OPTIONS = {"window": 8, "topk": 8, "neighbor_block": 4}
FLAGS = ["--heads", "2", "--head-size", "8", "--option", "window=8", "topk=8", "neighbor_block=4"]


def tiny(**arguments):
    return Case(**{"tokens": 37, "heads": 2, "head_size": 8, "options": OPTIONS, **arguments})


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """No figure matters here."""
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.0)


@pytest.fixture
def variants():
    return [frameworks.active().variants[0]]


@pytest.fixture
def peer(monkeypatch):
    """A function that registers a peer for the time of a test."""
    monkeypatch.setattr(peers, "PEERS", dict(peers.PEERS))
    right = peers.PEERS["op", "keras"]

    def register(**changes):
        return peers.register(dataclasses.replace(right, name="made-up", **changes))

    return register


def changed(change):
    """`Peer.build` of the right attention, changed."""
    return peers.op_builder(
        lambda case, *arrays: change(
            arrays[0], peers.dense_formula(*arrays, is_causal=case.is_causal)
        )
    )


def test_a_run_is_checked_timed_and_written(tmp_path, capsys, variants):
    folder = tmp_path / "new" / "folder"
    flags = ["--heads", "2", "--head-size", "8", "--option", "window=8", "--level", "op"]
    flags += ["--step", "LOCAL", "R5-1", "--sizes", "37", "--variants", *variants]
    assert run.main([*flags, "--measure", "time", "--repeat", "2", "--out", str(folder)]) == 0
    backend = keras.backend.backend()
    rows, written = sorted(folder.iterdir())
    assert written.name == f"op-{backend}-{run.current_device()}-float32.json"
    report = json.loads(written.read_text())
    expected = [(step, name) for step in ("LOCAL", "R5-1") for name in ("keras", "rwr-portable")]
    assert [(check["step"], check["peer"]) for check in report["parity"]] == expected
    assert all(0 <= check["error"] < check["tolerance"] for check in report["parity"])
    assert [(row["step"], row["peer"]) for row in report["results"]] == expected
    for row in report["results"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert (row["tokens"], row["samples"]) == (37, 2)
        assert row["ratio"] == 1 if row["peer"] == "keras" else row["ratio"] > 0
    assert {"device", "commit", "keras", "keras_rwr"} <= set(report["environment"])
    assert report["options"]["R5-1"] == {**STEPS["R5"], "steps": 1, "window": 8}
    assert report["refused"]["R5-1"].keys() == {"rwr-triton", "rwr-pallas"}
    with rows.open() as file:
        read = list(csv.DictReader(file))
    assert [(row["step"], row["peer"]) for row in read] == expected
    assert float(read[1]["ratio"]) == report["results"][1]["ratio"]
    printed = capsys.readouterr().out
    assert "\n\nLOCAL, op, forward, float32, heads 2 of 8\n" in printed
    assert "rwr-triton: cannot run R5-1, " in printed


@pytest.mark.parametrize(
    ("level", "name", "options", "count"),
    [
        # Input, projections, and what the sublayer `walk` has.
        ("layer", "rwr-portable", STEPS["R5"], 1 + 8 + 6),
        ("op", "keras", {}, 3),
        ("op", "rwr-portable", {**OPTIONS, "use_discoverability": True}, 3 + 1),
    ],
)
def test_gradients_take_part(level, name, options, count, variants, monkeypatch):
    options = {**options, "window": 8}
    case = tiny(level=level, gradients=True, options=options)
    results, found = parity.results, []
    monkeypatch.setattr(parity, "results", lambda *x: found.append(results(*x)) or found[-1])
    (check,) = parity.check_parity(case, [peers.PEERS[level, name]], variants)
    assert check["error"] <= check["tolerance"]
    assert len(found[-1]) == 1 + count
    assert all(np.abs(x).max() > 0 for x in found[-1])


def test_definitions_alone_are_exact(variants, monkeypatch):
    framework, results = frameworks.active(), parity.results
    inside, seen = [], []

    @contextlib.contextmanager
    def exact():
        inside.append(True)
        yield
        inside.clear()

    def noting(case, peer, variant):
        seen.append((peer.name, bool(inside)))
        return results(case, peer, variant)

    if keras.backend.backend() == "jax":
        import jax

        with framework.exact():
            assert jax.config.jax_default_matmul_precision == "highest"
    monkeypatch.setattr(framework, "exact", exact)
    monkeypatch.setattr(parity, "results", noting)
    peer = peers.PEERS["op", "rwr-portable"]
    parity.check_parity(tiny(level="op"), [peer], variants)
    assert seen == [(peers.DEFINITIONS[peer.definition], True), (peer.name, False)]


@pytest.mark.parametrize(
    ("change", "gradients"),
    [
        (lambda x, y: y * 1.001, False),
        (lambda x, y: y * math.nan, False),
        (lambda x, y: y[:, 1:], False),
        (lambda x, y: y + 0.01 * (x - ops.stop_gradient(x)), True),
    ],
    ids=["values", "not a number", "shape", "gradient alone"],
)
def test_a_wrong_peer_is_not_measured(change, gradients, peer, variants, monkeypatch):
    monkeypatch.setattr(run, "measure_times", lambda *_: pytest.fail("timed a wrong peer"))
    peer(build=changed(change))
    cases = [tiny(level="op", gradients=x) for x in (False, gradients)]
    with pytest.raises(parity.ParityError, match=r"must agree .* made-up \(\w+\) is off by"):
        run.benchmark(cases, names=["made-up"], variants=variants, measure=("time",))


def test_the_command_line_reports_nothing_of_a_wrong_peer(peer, tmp_path, capsys, variants):
    peer(build=changed(lambda x, y: -y))
    flags = [*FLAGS, "--level", "op", "--peers", "made-up", "--variants", *variants]
    assert run.main([*flags, "--measure", "time", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: peers must agree with their definition" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_peers_of_another_module_take_part(tmp_path, monkeypatch, capsys, variants):
    (tmp_path / "more_peers.py").write_text(
        "import dataclasses\n"
        "from benchmarks import peers\n"
        "right = peers.PEERS['op', 'dense-formula']\n"
        "peers.register(dataclasses.replace(right, name='mine', is_default=True))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "PEERS", dict(peers.PEERS))
    flags = [*FLAGS, "--level", "op", "--sizes", "31", "--repeat", "1", "--variants", *variants]
    flags += ["--peers", "mine"]
    assert run.main([*flags, "--measure", "time", "--import", "more_peers"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["31", "1", "mine", variants[0]] in [row[:4] for row in rows]


def test_the_peer_of_the_readme(monkeypatch, variants):
    monkeypatch.setattr(peers, "PEERS", dict(peers.PEERS))
    text = (ROOT / "benchmarks" / "README.md").read_text()
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    found = peers.PEERS["op", "torch-sdpa"]
    if keras.backend.backend() == "torch":
        (check,) = parity.check_parity(tiny(level="op", gradients=True), [found], variants)
        assert check["error"] <= check["tolerance"]
    else:
        assert peers.refusal(found, tiny(level="op"), "cpu") == "it needs the torch backend"


def test_memory_is_that_of_a_process_of_its_own(variants):
    held = np.ones(2**25)  # 256 MiB here do not count there
    found = measure.measure_memory(tiny(), [peers.PEERS["layer", "keras"]], variants, "cpu")
    (memory,) = found.values()
    assert held.all()
    assert 0 < memory["rise_mib"] < memory["peak_mib"]


def test_memory_where_the_peak_can_be_reset(peer, variants, monkeypatch):
    framework = type(frameworks.active())
    peaks = iter([2**20, 3 * 2**20])
    resets = []
    monkeypatch.setattr(framework, "resets_peak", True)
    monkeypatch.setattr(framework, "reset_peak", lambda self: resets.append(1))
    monkeypatch.setattr(framework, "device_peak", lambda self: next(peaks))
    monkeypatch.setattr(framework, "out_of_memory", (MemoryError,))

    def run_out(case, inputs):
        raise MemoryError

    chosen = [peers.PEERS["op", "keras"], peer(build=run_out)]
    found = measure.measure_memory(tiny(level="op"), chosen, variants, "gpu")
    assert found == {
        ("keras", variants[0]): {"peak_mib": 3.0, "rise_mib": 2.0},
        ("made-up", variants[0]): {"failure": "out of memory"},
    }
    assert len(resets) == 1


def test_memory_of_this_process():
    before, _ = frameworks.resident_bytes()
    held = np.ones(2**23)  # 64 MiB
    after, peak = frameworks.resident_bytes()
    assert held.all()
    assert after - before > 50 * 2**20
    assert peak >= after


def test_half_precision(variants):
    case = tiny(level="op", dtype="bfloat16")
    checks = parity.check_parity(case, [peers.PEERS["op", "rwr-portable"]], variants)
    assert checks[0]["error"] <= checks[0]["tolerance"] == parity.TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["nothing"]}, "`peers` must be among .* Received: peers=nothing"),
        ({"names": ["rwr-triton"]}, "`peers` must be able to run, .* Received: peers=rwr-triton"),
        ({"variants": ["fast"]}, "`variants` must be among .* Received: variants=fast"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.benchmark([tiny()], **arguments)


def test_a_name_is_taken_once(peer):
    peer()
    with pytest.raises(ValueError, match="`name` must be unique"):
        peer()
    with pytest.raises(ValueError, match="`definition` must be one of rwr, dense, tiles"):
        peer(level="layer", definition="sparse")


def test_a_peer_of_another_backend_is_refused(peer):
    peer(backend="numpy")
    _, refused = peers.select(tiny(level="op"), "cpu")
    assert refused["made-up"] == "it needs the numpy backend"


def test_a_call_runs_warm_before_it_is_timed(variants, monkeypatch):
    clock, taken = itertools.count(), iter([9.0, 2.0, 1.0])
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 3)
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(frameworks.active(), "seconds", lambda call, number: next(taken))
    assert measure.warm_up(None) == 1.0

    events = []
    monkeypatch.setattr(measure, "prepare", lambda case, peer, variant: lambda: peer.name)
    monkeypatch.setattr(frameworks.active(), "wait", lambda name: events.append(f"compile {name}"))
    monkeypatch.setattr(measure, "warm_up", lambda call: events.append(f"warm {call()}") or 1.0)
    monkeypatch.setattr(
        frameworks.active(), "seconds", lambda call, _: events.append(f"time {call()}") or 1.0
    )
    chosen = [peers.PEERS["op", name] for name in ("keras", "rwr-portable")]
    measure.measure_times(tiny(level="op"), chosen, variants, 2, "keras")
    names = ("keras", "rwr-portable")
    assert events == [
        *(f"{what} {name}" for what in ("compile", "warm", "time") for name in names),
        *("time rwr-portable", "time keras"),  # the next turn begins with the next peer
    ]


def test_ratios_are_of_the_same_turn():
    summary = measure.summarize([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert summary["ratio"] == 2.0
    assert summary["median_ms"] == 4000.0
    assert (summary["low_ms"], summary["high_ms"]) == (3000.0, 17000.0)
    assert measure.summarize([2.0], None)["ratio"] is None


def test_errors_are_relative_to_each_tensor():
    right = [np.array([10.0, 0.0]), np.array([1.0])]
    assert parity.largest_error([right[0] + 0.1, right[1]], right) == pytest.approx(0.01)
    assert parity.largest_error([right[0], right[1] + 0.1], right) == pytest.approx(0.1)
    assert math.isnan(parity.largest_error([right[0] * math.nan, right[1]], right))
    assert parity.largest_error(right[:1], right) == math.inf


def test_a_gradient_that_cancels_is_measured_by_the_others():
    right = [np.array([1.0]), np.array([1e-4])]
    wrong = [right[0], right[1] + 1e-3]
    assert parity.largest_error(wrong, right) == pytest.approx(0.1)
    assert parity.largest_error(wrong, right, "bfloat16") == pytest.approx(0.01)


@pytest.mark.parametrize(("level", "dtype"), [("layer", "float32"), ("op", "bfloat16")])
def test_the_stock_gpt2s_attention(level, dtype, variants):
    case = tiny(level=level, gradients=True, dtype=dtype)
    (check,) = parity.check_parity(case, [peers.PEERS[level, "keras-gpt2"]], variants)
    assert check["error"] <= check["tolerance"]
    assert (check["level"], check["gradients"]) == (level, True)
    layer = peers.GPT2Attention(num_heads=2, key_dim=8)
    assert layer.dropout > 0  # what keeps Keras from its fused attention


def test_a_peer_without_memory_is_reported_and_the_rest_measured(peer, variants, monkeypatch):
    def run_out(case, inputs):
        raise MemoryError

    monkeypatch.setattr(type(frameworks.active()), "out_of_memory", (MemoryError,))
    chosen = [peers.PEERS["op", "keras"], peer(build=run_out)]
    case = tiny(level="op")
    times = measure.measure_times(case, chosen, variants, 1, "made-up")
    assert times["made-up", variants[0]] == {"failure": "out of memory"}
    assert times["keras", variants[0]]["ratio"] is None
    assert times["keras", variants[0]]["median_ms"] > 0
    fields = {"tokens": 37, "batch": 1}
    rows = [{**fields, "peer": key[0], "variant": key[1], **x} for key, x in times.items()]
    assert "out of memory" in table(rows)

    def fail(case, inputs):
        raise ZeroDivisionError

    chosen[1] = dataclasses.replace(chosen[1], build=fail)
    with pytest.raises(ZeroDivisionError):
        measure.measure_times(case, chosen, variants, 1, "keras")


def test_the_check_is_on_tokens_outside_the_window():
    assert tiny().small().tokens == 30
    assert tiny(batch=64).small().batch == 2
    assert Case(tokens=4096).small().tokens == 390


def test_checked_queries_lean_on_their_keys():
    plain, small = tiny(level="op", tokens=30), tiny(level="op").small()
    assert plain.shape == small.shape
    plain, leaning = (make_inputs(case) for case in (plain, small))
    np.testing.assert_allclose(leaning["query"], plain["query"] + 0.7 * plain["key"], rtol=1e-6)
    np.testing.assert_array_equal(leaning["key"], plain["key"])


def test_naming_the_device_in_use_copies_no_tensor():
    x = ops.ones(3)
    with run.on_device(run.current_device()) as device:
        assert device == run.current_device()
        assert ops.convert_to_tensor(x) is x


def test_inputs_are_the_same_for_every_peer():
    first, second = make_inputs(tiny()), make_inputs(tiny())
    assert list(first) == list(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("text", "value"),
    [("window=8", 8), ("threshold=None", None), ("edge_weight=exponential", "exponential")],
)
def test_options_of_the_command_line(text, value):
    assert run.option(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("flags", [["--option", "window"], ["--repeat", "0"], ["--sizes", "0"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(flags)
    assert "Received: " in capsys.readouterr().err
