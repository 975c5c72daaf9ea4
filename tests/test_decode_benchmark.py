"""The decode benchmark: what it refuses to measure, what it reports. No figure is judged here."""

import csv
import json

import pytest

from benchmarks import decode

FLAGS = ["--layers", "1", "--heads", "2", "--head-size", "8", "--tokens", "2", "--repeat", "2"]
FLAGS += ["--option", "window=8", "topk=8", "neighbor_block=4"]


def test_decoding_gives_the_forward_passes_logits(monkeypatch):
    make_models = decode.make_models
    monkeypatch.setattr(decode, "make_models", lambda *x: {"rwr": make_models(*x)["rwr"]})
    flags = ["--layers", "2", "--heads", "2", "--head-size", "8"]
    parsed = decode.parse([*flags, "--step", "R5", "--option", "window=8"])
    options = decode.read_options(parsed)
    assert options["rwr_layers"] == [1]
    assert 0 <= decode.check_parity(parsed, options)["rwr"] <= 5e-5


def test_a_wrong_decoder_is_not_measured(monkeypatch, tmp_path, capsys):
    make_models = decode.make_models

    def make_wrong_model(*arguments):
        task = make_models(*arguments)["stock"]
        right = task.call_with_cache
        monkeypatch.setattr(
            type(task),
            "call_with_cache",
            lambda self, token, cache, index: right(token, cache, 0 * index),
        )
        return {"stock": task}

    monkeypatch.setattr(decode, "make_models", make_wrong_model)
    monkeypatch.setattr(decode, "measure", lambda *_: pytest.fail("timed a wrong decoder"))
    assert decode.main([*FLAGS, "--out", str(tmp_path)]) == 1
    assert "decoding must give the logits of the forward pass" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_timed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "check_parity", lambda *_: {"stock": 0.0, "rwr": 0.0})
    assert decode.main([*FLAGS, "--sizes", "37", "29", "--out", str(tmp_path)]) == 0
    written, rows = sorted(tmp_path.iterdir(), reverse=True)
    report = json.loads(written.read_text())
    found = [(row["context"], row["model"]) for row in report["results"]]
    assert found == [(29, "stock"), (29, "rwr"), (37, "stock"), (37, "rwr")]
    for row in report["results"]:
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["samples"] == 2
        assert (row["growth"] is None) == (row["context"] == 29)
    # keys and values; for RWR the keys, 4 states of the walk, and the means of its blocks
    keys_and_values = 2 * 2 * 8 * 4
    assert report["results"][2]["cache_bytes_per_token"] == keys_and_values
    assert keys_and_values < report["results"][3]["cache_bytes_per_token"] < 4 * keys_and_values
    assert {"device", "commit", "keras", "keras_rwr"} <= set(report["environment"])
    with rows.open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["stock", "rwr"] * 2
    assert len(capsys.readouterr().out.split("context ")[1].splitlines()) == 6


@pytest.mark.parametrize("flags", [["--tokens", "0"], ["--sizes", "68"], ["--option", "window"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        decode.main(flags)
    assert "Received: " in capsys.readouterr().err
