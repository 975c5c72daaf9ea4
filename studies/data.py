"""Text, vocabulary and batches of the language models."""

import gzip
import hashlib
import json
import lzma
import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
CHOICES = "`embedded`, a .txt/.gz/.xz file, a folder of such files, or `finewebedu`"
SUFFIXES = (".txt", ".gz", ".xz")
EMBEDDED = Path(__file__).parents[1] / "examples" / "data"
VALIDATION_SHARE = 0.05  # held out of a file, a folder or a stream
VOCABULARY_CHARACTERS = 50_000_000  # of the training text, from which a vocabulary is made
CHARACTERS_PER_TOKEN = 6  # more than any vocabulary here reaches, so a stream is long enough


class UsageError(ValueError):
    """A bad argument, reported without a traceback."""


def read_text(path: Path, name: str = "dataset") -> str:
    """Text of one UTF-8 file, plain or compressed (.gz, .xz)."""
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(
            f"`{name}` must be a readable text file ({error}). Received: {name}={path}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"`{name}` must be UTF-8 text ({error}). Received: {name}={path}"
        ) from error


def split_documents(text: str) -> list[str]:
    """Documents of a text in which they are joined by `<|endoftext|>`."""
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


def read_path(path: Path, name: str = "dataset") -> list[str]:
    """Documents of a text file, or of every text file in a folder, by name."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise UsageError(
                f"`{name}` must be a folder that holds {', '.join(SUFFIXES)} files. "
                f"Received: {name}={path}"
            )
    elif path.exists():
        files = [path]
    else:
        raise UsageError(f"`{name}` must be {CHOICES}; nothing is there. Received: {name}={path}")
    documents = [document for file in files for document in split_documents(read_text(file, name))]
    if not documents:
        raise UsageError(f"`{name}` must hold text; it is empty. Received: {name}={path}")
    return documents


def hold_out(documents: list[str], share: float = VALIDATION_SHARE) -> tuple[list[str], list[str]]:
    """Splits the last `share` of the characters off as validation documents."""
    remaining = math.ceil(share * sum(map(len, documents)))
    training = list(documents)
    validation: list[str] = []
    while remaining > 0:
        document = training.pop()
        if len(document) > remaining:
            training.append(document[:-remaining])
            document = document[-remaining:]
        remaining -= len(document)
        validation.append(document)
    return training, validation[::-1]


def stream_finewebedu(characters: int) -> list[str]:
    """The first documents of FineWeb-Edu's 10-billion-token sample, streamed."""
    remedy = f"Choose another dataset: {CHOICES}"
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"`dataset` needs the package `datasets` to be streamed ({error}). {remedy}. "
            "Received: dataset=finewebedu"
        ) from error
    try:
        stream = datasets.load_dataset(
            "HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True
        )
        return until((row["text"] for row in stream), characters)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"`dataset` could not be streamed: is this machine offline? "
            f"({type(error).__name__}: {error}) {remedy}. Received: dataset=finewebedu"
        ) from error


def read_packages() -> tuple[list[str], list[str]]:
    """The Python code of this interpreter's installed packages: training and validation documents.

    Each file of 2,000 to 400,000 characters is one, in an order that is drawn once for all. The
    packages in whose name's SHA-256 the first byte is below 13, one in 20, are held out.
    """
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    parts: tuple[list[str], list[str]] = ([], [])
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            package = path.relative_to(folder).parts[0]
            if package == "site-packages" or not 2_000 <= path.stat().st_size <= 400_000:
                continue  # inside the standard library's folder, and read as one of its own
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            is_held_out = hashlib.sha256(package.encode()).digest()[0] < 13
            parts[is_held_out].append(text)
    for documents in parts:
        np.random.default_rng(0).shuffle(documents)
    return parts


def until(documents: Iterable[str], characters: int) -> list[str]:
    """The first documents that have so many characters together, or all."""
    found: list[str] = []
    for document in documents:
        found.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return found


def load_documents(
    dataset: str, tokens: int, validation_dataset: str | None = None
) -> tuple[list[str], list[str]]:
    """Training and validation documents.

    Args:
        dataset: str. `"embedded"`, a path, `"packages"`, or `"finewebedu"`.
        tokens: int. How many tokens the run reads; only a stream is cut to it.
        validation_dataset: None, or str: a path. Nothing is held out then.
    """
    if dataset == "packages" and validation_dataset is None:
        training, validation = read_packages()
        return until(training, tokens * CHARACTERS_PER_TOKEN), validation
    if dataset == "embedded":
        training = read_path(EMBEDDED / "train.txt.xz")
    elif dataset == "finewebedu":
        training = stream_finewebedu(tokens * CHARACTERS_PER_TOKEN)
    else:
        training = read_path(Path(dataset))
    if validation_dataset is not None:
        return training, read_path(Path(validation_dataset), "validation_dataset")
    if dataset == "embedded":
        return training, read_path(EMBEDDED / "validation.txt.xz")
    return hold_out(training)


def train_vocabulary(documents: Iterable[str], size: int) -> tuple[dict[str, int], list[str]]:
    """GPT-2's byte-pair vocabulary and merges, trained on `documents`."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        documents, vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    model = json.loads(trainer.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def read_vocabulary(folder: str) -> tuple[dict[str, int], list[str]]:
    """GPT-2's vocabulary and merges from `vocab.json` and `merges.txt` in a folder."""
    try:
        vocabulary = json.loads((Path(folder) / "vocab.json").read_text("utf-8"))
        lines = (Path(folder) / "merges.txt").read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`vocabulary` must be a folder with vocab.json and merges.txt ({error}). "
            f"Received: vocabulary={folder}"
        ) from error
    merges = [line for line in lines if line and not line.startswith("#version")]
    if END_OF_TEXT not in vocabulary:
        raise UsageError(
            f"`vocabulary` must have the token {END_OF_TEXT}. Received: vocabulary={folder}"
        )
    return vocabulary, merges


def encode(documents: list[str], tokenizer) -> np.ndarray:
    """Token ids of the documents, each followed by `<|endoftext|>`."""
    pieces = [np.append(ids, tokenizer.end_token_id) for ids in tokenizer(documents)]
    return np.concatenate(pieces).astype("int32")


def write_json(path: Path, value) -> None:
    """Writes a JSON file that is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file that is never seen half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs may share files
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def prepare_tokens(folder: Path, arguments: dict, train_tokens: int) -> dict[str, np.ndarray]:
    """Token arrays `training` and `validation`, made once and kept in `folder`.

    Args:
        folder: path. Receives `vocabulary.json`, `merges.txt` and `tokens.npz`.
        arguments: dict. The run's, with `dataset`, `validation_dataset`, `vocabulary`,
            `vocabulary_size` and `validation_tokens`.
        train_tokens: int. How many training tokens the run reads.
    """
    path = folder / "tokens.npz"
    if path.exists():
        with np.load(path) as stored:
            return dict(stored)
    # keras_hub brings Keras in, which the readers above do without
    from keras_hub.tokenizers import GPT2Tokenizer

    # a stream must fill VALIDATION_SHARE of itself with validation tokens
    dataset, validation_tokens = arguments["dataset"], arguments["validation_tokens"]
    needed = max(train_tokens, math.ceil(validation_tokens / VALIDATION_SHARE))
    training, validation = load_documents(dataset, needed, arguments["validation_dataset"])
    if arguments["vocabulary"] is not None:
        vocabulary, merges = read_vocabulary(arguments["vocabulary"])
    else:
        sample = until(training, VOCABULARY_CHARACTERS)
        vocabulary, merges = train_vocabulary(sample, arguments["vocabulary_size"])
        if not merges:
            raise UsageError(
                "`dataset` must hold enough text for a byte-pair vocabulary. "
                f"Received: dataset={dataset} with {sum(map(len, training))} training characters"
            )
    tokenizer = GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocabulary.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    tokens = {
        "training": encode(training, tokenizer),
        "validation": encode(validation, tokenizer)[: validation_tokens + 1],
    }
    write_arrays(path, tokens)
    return tokens


def cut_blocks(tokens: np.ndarray, context: int, name: str) -> np.ndarray:
    """(blocks, context + 1) rows: a block's inputs, and its targets one further."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise UsageError(
            f"`dataset` must hold more {name} tokens than `context`. "
            f"Received: {len(tokens)} {name} tokens, context={context}"
        )
    starts = context * np.arange(count)[:, None]
    return tokens[starts + np.arange(context + 1)]


def as_batch(rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(inputs, targets) of GPT-2 for (batch, context + 1) token ids."""
    token_ids = rows[:, :-1].astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return inputs, rows[:, 1:].astype("int32")


def batch_rows(blocks: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Block numbers of one training step.

    They depend on the seed and the step alone, so every model reads the same
    data in the same order and a resumed run continues where it stopped. Each
    pass over the text has its own permutation.
    """
    positions = step * batch_size + np.arange(batch_size)
    rows = np.empty(batch_size, dtype="int64")
    for number in np.unique(positions // blocks):
        order = np.random.default_rng((seed, int(number))).permutation(blocks)
        chosen = positions // blocks == number
        rows[chosen] = order[positions[chosen] % blocks]
    return rows
