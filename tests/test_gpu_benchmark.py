"""The benchmark on a GPU, as far as a machine without one can tell. No figure is judged here."""

import json

import keras
import numpy as np
import pytest

from benchmarks import counters, figures, frameworks, gpu, parity, peers, run, torch_peers
from benchmarks.cases import Case, make_inputs

OPTIONS = {"window": 8, "topk": 8, "neighbor_block": 4}
TINY = ["--tokens", "74", "--heads", "2", "--head-sizes", "8", "--sizes", "37", "74"]
TINY += ["--dtype", "float32", "--option", *(f"{name}={x}" for name, x in OPTIONS.items())]


def groups(*flags):
    return gpu.make_groups(gpu.parse([*TINY, *flags]))


def test_the_cases_are_those_of_the_table():
    made = gpu.make_groups(gpu.parse([]))
    keys = [(x[0].level, x[0].head_size, x[0].gradients) for x in made]
    assert keys == [
        (level, size, gradients)
        for level in ("op", "layer")
        for size in (64, 128)
        for gradients in (False, True)
    ]
    assert [case.tokens for case in made[0]] == [1024 * 2**i for i in range(8)]
    assert [case.batch for case in made[0]] == [32, 16, 8, 4, 2, 1, 1, 1]
    assert made[-1][-1].tokens == 8192
    for case in (case for cases in made for case in cases):
        assert (case.heads, case.dtype, case.is_causal) == (12, "bfloat16", True)
        assert case.options["topk"] == 32 and case.options["window"] == 128
    run.load_peers(())
    for backend, levels in gpu.PEERS.items():
        for level, names in levels.items():
            assert gpu.OURS[backend] in names
            assert all((level, name) in peers.PEERS for name in names)
            assert set(names) <= set(figures.PEERS)


def test_groups_are_measured_and_what_is_measured_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_memory", lambda *_: {})
    kept = []
    report = gpu.measure(
        groups("--modes", "forward"),
        names=["keras", "rwr-portable"],
        repeat=2,
        baseline="rwr-portable",
        on_case=lambda report: kept.append(json.dumps(report)),
    )
    found = [(row["level"], row["tokens"], row["peer"]) for row in report["results"]]
    names = ("keras", "rwr-portable")
    assert sorted(set(found)) == sorted(
        (level, tokens, name) for level in ("op", "layer") for tokens in (37, 74) for name in names
    )
    assert [len(json.loads(x)["results"]) for x in kept] == [
        len(found) * i // 4 for i in range(1, 5)
    ]
    assert json.loads(kept[-1]) == json.loads(json.dumps(report))
    assert {check["level"] for check in report["parity"]} == {"op", "layer"}
    assert len(report["parity"]) == len(found) // 2
    assert {row["ratio"] for row in report["results"] if row["peer"] == "rwr-portable"} == {1.0}
    gpu.print_report(report)


@pytest.mark.parametrize(
    ("command", "backends"), [(gpu, "torch or jax"), (counters, "torch")], ids=["gpu", "counters"]
)
def test_without_a_gpu_nothing_runs(command, backends, capsys):
    assert command.main([]) == 1
    expected = f"error: it needs the {backends} backend and a GPU. Received: "
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--sizes", "0"], ["--tokens", "0"], ["--repeat", "-1"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(flags)
    assert "Received: " in capsys.readouterr().err


# --- torch's attention


def test_flash_attention():
    case = Case(tokens=37, level="op", heads=2, head_size=8, gradients=True, options=OPTIONS)
    run.load_peers(())
    (check,) = parity.check_parity(case, [peers.PEERS["op", "torch-sdpa-flash"]], ["eager"])
    assert check["error"] <= check["tolerance"]


def test_reasons_of_torchs_peers():
    run.load_peers(())
    case = Case(tokens=37, level="op", options=OPTIONS)
    found = {name: peers.PEERS["op", f"torch-{name}"] for name in ("sdpa-flash", "flex")}
    assert found["sdpa-flash"].supports(case, "cpu") == "it needs a GPU"
    assert found["sdpa-flash"].supports(case, "gpu") == "it needs float16 or bfloat16"
    assert found["flex"].supports(case, "cpu") == "it needs a GPU"
    assert found["flex"].supports(case, "gpu") is None


@pytest.mark.parametrize(("tokens", "batch"), [(389, 2), (512, 2), (1024, 1)])
def test_flex_attention_sees_the_window_and_its_tiles(tokens, batch):
    import torch

    case = Case(tokens=tokens, level="op", batch=batch, heads=2, head_size=8)
    mask = torch_peers.block_mask(case)
    tile = torch_peers.TILE
    number = torch_peers.number_of_tiles(case)
    size = batch * number * tile
    position = torch.arange(size)
    near = mask.mask_mod(0, 0, position[:, None], position).numpy()
    seen = np.zeros((2, size, size), bool)
    for is_full, counts, lists in (
        (False, mask.kv_num_blocks, mask.kv_indices),
        (True, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert (np.sort(lists) == np.arange(batch * number)).all()
        for head, row in np.ndindex(2, batch * number):
            for column in lists[0, head, row, : counts[0, head, row]].tolist():
                block = np.s_[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                assert not seen[head][block].any()
                seen[head][block] = True if is_full else near[block]
    seen = seen.reshape(2, batch, number * tile, batch, number * tile)
    chosen = torch_peers.choose_tiles(case)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    expected = chosen.repeat(tile, 1).repeat(tile, 2)[:, :tokens, :tokens]
    expected = expected | ((distance >= 0) & (distance <= 128))
    for first, second in np.ndindex(batch, batch):
        found = seen[:, first, :tokens, second, :tokens]
        assert (found == (expected if first == second else False)).all()
    # the budget of a query: 2 blocks, or what there is before the window
    assert (chosen.sum(-1) == np.clip(np.arange(number) - 1, 0, 2)).all()


def test_flex_attention_gets_one_shape_for_all_lengths(monkeypatch):
    from torch.nn.functional import scaled_dot_product_attention

    shapes = []

    def attend(query, key, value, block_mask):
        shapes.append((query.shape, block_mask.shape))
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    monkeypatch.setattr(torch_peers, "flex_attention", lambda: attend)
    run.load_peers(())
    flex, dense = peers.PEERS["op", "torch-flex"], peers.PEERS["op", "keras"]
    for tokens, batch in ((256, 2), (512, 1)):
        case = Case(tokens=tokens, level="op", batch=batch, heads=2, head_size=8)
        found = parity.results(case, flex, "eager")
        assert found[0].shape == case.shape
    assert shapes[0] == shapes[1] == ((1, 2, 512, 8), (1, 2, 512, 512))
    np.testing.assert_allclose(found[0], parity.results(case, dense, "eager")[0], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
def test_every_peer_of_the_table_computes_what_it_says(head_size):
    run.load_peers(())
    for level, names in gpu.PEERS[keras.backend.backend()].items():
        case = Case(
            tokens=1024,
            level=level,
            batch=2,
            heads=3,
            head_size=head_size,
            dtype="bfloat16",
            gradients=True,
            options={"window": 128, "topk": 32},
        )
        chosen, _ = peers.select(case, "gpu", names)
        parity.check_parity(case, chosen, frameworks.active().default_variants)


# --- jax's attention


def test_attention_on_a_window():
    """The formula that cuDNN's is compared with, and XLA's with a window beside it."""
    run.load_peers(())
    case = Case(tokens=37, level="op", heads=2, head_size=8, options=OPTIONS)
    position = np.arange(37)
    distance = position[:, None] - position
    near = np.where((distance >= 0) & (distance <= 8), 0.0, -np.inf)
    query, key, value = (make_inputs(case)[name][0] for name in ("query", "key", "value"))
    logits = np.einsum("qnh,knh->nqk", query, key) * 8**-0.5 + near
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("nqk,knh->qnh", weights, value)
    variant = frameworks.active().default_variants[0]
    (found,) = parity.results(case, peers.PEERS["op", "window-formula"], variant)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_jaxs_peers():
    run.load_peers(())
    case = Case(tokens=37, level="op", heads=2, head_size=8, gradients=True, options=OPTIONS)
    found = {name: peers.PEERS["op", f"jax-{name}"] for name in ("xla", "cudnn", "cudnn-window")}
    for name in ("cudnn", "cudnn-window"):
        assert found[name].supports(case, "cpu") == "it needs a GPU"
        assert found[name].supports(case, "gpu") == "it needs float16 or bfloat16"
    both_ways = Case(tokens=37, level="op", dtype="bfloat16", is_causal=False)
    assert "reaches back" in found["cudnn-window"].supports(both_ways, "gpu")
    if keras.backend.backend() == "jax":
        (check,) = parity.check_parity(case, [found["xla"]], ["jit"])
        assert check["error"] <= check["tolerance"]
    else:
        assert "jax backend" in peers.refusal(found["xla"], case, "gpu")


# --- tables and the picture


@pytest.fixture
def report():
    """A report of made-up figures."""
    rows = []
    for level, head_size, gradients, tokens in (
        ("op", 64, False, 1024),
        ("op", 64, False, 65536),
        ("op", 64, True, 1024),
        ("layer", 64, False, 1024),
    ):
        case = {"level": level, "head_size": head_size, "gradients": gradients, "tokens": tokens}
        case.update(batch=32, heads=12, dtype="bfloat16", variant="eager")
        rows.append(
            {**case, "peer": "rwr-triton", "median_ms": 0.5, "ratio": 1.0, "rise_mib": 100.0}
        )
        slow = {"median_ms": 8.126, "ratio": 16.25, "rise_mib": 2000.4}
        rows.append({**case, "peer": "keras-gpt2", **slow})
        if tokens > 1024:
            rows[-1] = {**case, "peer": "keras-gpt2", "failure": "out of memory"}
        rows.append({**case, "peer": "torch-sdpa-flash", "median_ms": 0.25, "ratio": 0.5})
    environment = {"device": "some GPU"}
    return {"environment": environment, "baseline": "rwr-triton", "results": rows}


def test_tables(report):
    text = figures.markdown(report)
    assert "attention alone, heads of 64, forward: ms (times keras-rwr)" in text
    assert "| tokens | keras-rwr | SDPA flash | MultiHeadAttention in GPT-2 |" in text
    assert "| 1,024 | 0.50 | 0.25 (0.50) | 8.13 (16) |" in text
    assert "| 65,536 | 0.50 | 0.25 (0.50) | out of memory |" in text
    assert "| 1,024 | 100 |  | 2,000 |" in text
    assert text.count("layer with its projections") == 2
    assert "layer with its projections, heads of 64, forward + backward" not in text


def test_picture(report, tmp_path, capsys):
    path = tmp_path / "attention-gpu.json"
    path.write_text(json.dumps(report))
    assert figures.main([str(path), "--picture", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("attention alone")


# --- counters

HEADER = '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","sm__x.sum"'


def listing(*kernels):
    lines = ["==PROF== Profiling one - 0: 0%....100% - 2 passes", HEADER, '"","","byte","byte",""']
    lines += [f'"{i}","{name}","1,000","20","3"' for i, name in enumerate(kernels)]
    return "\n".join(lines)


def test_counts_are_sums_over_the_kernels_of_a_call():
    mark = "at::cuda::spin_kernel(long)"
    counts = counters.read_counts(listing(mark, "a", "b", mark, "c"), ["first", "second"])
    assert counts["first"] == {
        "kernels": 2,
        "passes": 2,
        "dram__bytes_read.sum": 2000,
        "dram__bytes_write.sum": 40,
        "sm__x.sum": 6,
    }
    assert counts["second"]["kernels"] == 1
    rows = [{"peer": name, "mode": "forward", **x} for name, x in counts.items()]
    assert len(counters.table(rows).splitlines()) == 3
    with pytest.raises(ValueError, match=r"must be 3 marked calls\. Received: 2"):
        counters.read_counts(listing(mark, "a", mark), ["first", "second", "third"])
    with pytest.raises(ValueError, match=r"must be 1 marked calls\. Received: 0"):
        counters.read_counts("nothing", ["first"])


def test_what_is_counted_is_what_the_chip_has():
    listing = "dram__bytes_read  Counter  byte\nsm__inst_executed_pipe_tensor_op_gmma  Counter\n"
    names = counters.metric_names(["bytes", "instructions"], listing)
    assert names == ["dram__bytes_read.sum", "sm__inst_executed_pipe_tensor_op_gmma.sum"]
    command = counters.ncu_command(counters.parse(["--size", "512"]), names)
    assert command[0] == "ncu" and ",".join(names) in command
    assert counters.parse(command[command.index("benchmarks.counters") + 1 :]).size == 512
