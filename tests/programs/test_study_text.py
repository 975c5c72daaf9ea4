"""Text, vocabulary and batches of the studies' language models."""

import gzip
import lzma
import sys
import types

import numpy as np
import pytest

from studies import data


def test_text_files_of_each_kind(tmp_path):
    content = "one\r\n<|endoftext|>two é<|endoftext|> \n"
    raw = content.encode("utf-8")
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    for name in ("a.txt", "b.txt.gz", "c.xz"):
        assert data.read_path(tmp_path / name) == ["one\n", "two é"]
    assert data.read_path(tmp_path) == ["one\n", "two é"] * 3


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.txt", b"\xff\xfe", "must be UTF-8 text"),
        ("a.gz", b"not compressed", "must be a readable text file"),
        ("a.gz", gzip.compress(b"some text")[:-9], "must be a readable text file"),
        ("a.xz", b"not compressed", "must be a readable text file"),
        ("a.xz", lzma.compress(b"some text")[:-9], "must be a readable text file"),
        ("a.txt", b" \n", "must hold text; it is empty"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.UsageError, match=rule) as error:
        data.read_path(tmp_path / name)
    assert str(error.value).endswith(f"Received: dataset={tmp_path / name}")


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(data.UsageError, match=r"a folder that holds .txt, .gz, .xz files"):
        data.read_path(tmp_path)


def test_embedded_text_is_whole_books():
    training, validation = data.load_documents("embedded", tokens=0)
    assert [len(training), len(validation)] == [6, 1]
    assert training[0].startswith("## Chapter 1\n\nIt is a truth universally acknowledged")
    assert sum(path.stat().st_size for path in data.EMBEDDED.iterdir()) < 1_000_000


def test_held_out_text_is_the_end_of_the_dataset():
    documents = ["a" * 60, "b" * 37, "c" * 3]
    training, validation = data.hold_out(documents, share=0.05)
    assert training == ["a" * 60, "b" * 35] and validation == ["b" * 2, "c" * 3]
    assert data.hold_out(["abcd"], share=0.25) == (["abc"], ["d"])


def test_vocabulary_is_that_of_gpt2s_tokenizer():
    from keras_hub.tokenizers import GPT2Tokenizer

    documents = ["the cat sat on the mat. " * 20, "Straße\n"]
    vocabulary, merges = data.train_vocabulary(documents, 280)
    assert vocabulary["<|endoftext|>"] == 0
    assert len(vocabulary) <= 280
    tokenizer = GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    ids = data.encode(documents, tokenizer)
    assert list(ids).count(0) == 2 and ids[-1] == 0
    first = int(np.flatnonzero(ids == 0)[0])
    assert tokenizer.detokenize([ids[:first].tolist()])[0] == documents[0]


def test_batches_visit_each_block_once_a_pass():
    blocks, batch = 7, 3
    rows = np.concatenate([data.batch_rows(blocks, batch, step, seed=5) for step in range(14)])
    passes = rows.reshape(6, blocks)
    assert all(sorted(one) == list(range(blocks)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) > 1
    assert not np.array_equal(rows[:21], np.concatenate(
        [data.batch_rows(blocks, batch, step, seed=6) for step in range(7)]
    ))  # fmt: skip


def test_targets_are_the_next_tokens():
    rows = data.cut_blocks(np.arange(24), context=5, name="training")
    assert rows.shape == (4, 6)
    inputs, targets = data.as_batch(rows)
    assert np.array_equal(inputs["token_ids"] + 1, targets)
    assert inputs["padding_mask"].min() == 1
    with pytest.raises(data.UsageError, match=r"Received: 5 training tokens, context=5"):
        data.cut_blocks(np.arange(5), context=5, name="training")


def fake_datasets(load):
    exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    return types.SimpleNamespace(load_dataset=load, exceptions=exceptions)


def test_finewebedu_is_read_only_as_far_as_needed(monkeypatch):
    read = []

    def load(path, **options):
        assert (path, options["streaming"]) == ("HuggingFaceFW/fineweb-edu", True)
        for number in range(1000):
            read.append(number)
            yield {"text": "x" * 100}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    training, validation = data.load_documents("finewebedu", tokens=250)
    assert len(read) == 15
    assert sum(map(len, training)) == 1425 and sum(map(len, validation)) == 75


def test_finewebedu_offline_names_the_other_choices(monkeypatch):
    def load(path, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    with pytest.raises(data.UsageError, match=r"offline.*no route to host") as error:
        data.load_documents("finewebedu", tokens=10)
    assert "`embedded`, a .txt/.gz/.xz file, a folder of such files" in str(error.value)
    assert str(error.value).endswith("Received: dataset=finewebedu")


def test_finewebedu_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.UsageError, match=r"needs the package `datasets`.*`embedded`"):
        data.load_documents("finewebedu", tokens=10)
