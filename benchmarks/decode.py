"""Measures one token's decoding: GPT-2 with RWR attention beside KerasHub's, with their caches.

    KERAS_BACKEND=jax python -m benchmarks.decode --out runs/benchmarks
    KERAS_BACKEND=torch python -m benchmarks.decode --sizes 2048 8192 --step R5

Tokens are decoded at the end of a cache that holds `context` positions and is filled with a text
that long. They run in the loop that `generate` compiles on the backend, without sampling. A loop
costs something by itself, such as a copy of the cache that it is given: the time of a token is the
difference between a long and a short loop, divided by the difference in tokens. Before any timing,
the logits of both models' loops are compared with those of their forward pass.
"""

import math
import pathlib
import sys

import keras
import keras_hub
import numpy as np
from keras import ops, tree

from benchmarks import frameworks
from benchmarks.cases import STEPS
from benchmarks.measure import summarize
from benchmarks.parity import TOLERANCES, ParityError, largest_error
from benchmarks.report import align, environment, write
from benchmarks.run import add_options, count, make_parser, on_device
from keras_rwr import ablation
from keras_rwr.models import RWRGPT2Backbone, RWRGPT2CausalLM

VARIANTS = {"torch": "eager", "jax": "jit", "tensorflow": "xla"}  # what `generate` does
VOCABULARY = 512
PIECE = 512  # tokens of a stock prefill at a time, since its attention is dense
SHORT_LOOP = 4
PARITY_LOOPS = (1, 2, 24)

COLUMNS = (
    *("backend", "device", "dtype", "context", "layers", "heads", "head_size", "model"),
    *("median_ms", "low_ms", "high_ms", "samples", "ratio", "growth"),
    "cache_bytes_per_token",
)


def make_models(arguments, context, options):
    """The tasks by name, "stock" and "rwr", with the same weights.

    Args:
        arguments: Namespace with "layers", "heads" and "head_size".
        context: Int, number of positions.
        options: Dict of the options of RWR attention, and which layers have it.
    """
    keras.utils.set_random_seed(20061)
    width = arguments.heads * arguments.head_size
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=context,
        dropout=0.0,
        dtype="float32",
    )
    walking = RWRGPT2Backbone.from_backbone(backbone, **options)
    return {
        "stock": keras_hub.models.GPT2CausalLM(backbone),
        "rwr": RWRGPT2CausalLM(walking),
    }


def make_tokens(context):
    """Token ids `(1, context)`."""
    return np.random.default_rng(20061).integers(1, VOCABULARY, (1, context)).astype("int32")


class Decoder:
    """The decoding loop of a task on a filled cache, compiled as `generate` compiles it.

    Args:
        task: A `GPT2CausalLM`.
        tokens: Int array of shape `(1, S)`, what the loop reads from position `start` on.
        start: Int. The positions before it are in the cache.
    """

    def __init__(self, task, tokens, start):
        self.task, self.start = task, start
        prompt = tokens.copy()
        prompt[:, start:] = 0  # as `generate` pads it
        self.structure = fill_cache(task, prompt)
        leaves = tree.flatten(self.structure)
        self.cache_bytes = sum(
            int(np.prod(x.shape)) * np.dtype(keras.backend.standardize_dtype(x.dtype)).itemsize
            for x in leaves
        )
        weights = [variable.value for variable in task.variables]
        self.number_of_leaves = len(leaves)
        # The call reads this list anew each time, so that its first entry can be another number.
        self.arrays = [self.count(1), ops.convert_to_tensor(tokens), *leaves, *weights]
        self.decode = prepare(self.loop, self.arrays)

    @staticmethod
    def count(tokens):
        return ops.convert_to_tensor(tokens, "int32")

    def __call__(self, tokens):
        """Decodes some tokens and returns a list of the last one's logits `(1, vocabulary)`."""
        self.arrays[0] = self.count(tokens)
        return self.decode()

    def loop(self, count, tokens, *arrays):
        """Function of tensors: number and ids of the tokens, cache, weights; gives the logits."""
        cache = tree.pack_sequence_as(self.structure, list(arrays[: self.number_of_leaves]))
        weights = zip(self.task.variables, arrays[self.number_of_leaves :], strict=True)

        def step(number, logits, cache):
            index = self.start + number
            token = ops.slice(tokens, [0, index], [1, 1])  # (1, 1)
            logits, _, cache = self.task.call_with_cache(token, cache, index)
            return number + 1, logits[:, 0], cache

        with keras.StatelessScope(state_mapping=list(weights)):
            start = self.count(0), ops.zeros((1, VOCABULARY)), cache
            return ops.while_loop(lambda number, *_: number < count, step, start)[1]


def prepare(function, arrays):
    """A call of a function of tensors, as `generate` runs one on this backend."""
    framework = frameworks.active()
    return framework.prepare(function, arrays, None, VARIANTS[framework.name])


def fill_cache(task, tokens):
    """The cache of a task after a text `(1, S)`; the stock one's is filled in pieces."""
    length = tokens.shape[1]
    piece = math.gcd(length, PIECE)

    def fill(tokens):
        if isinstance(task, RWRGPT2CausalLM):
            return task._build_cache(tokens)[1]
        backbone = task.backbone
        head_size = backbone.hidden_dim // backbone.num_heads
        shape = (1, backbone.num_layers, 2, length, backbone.num_heads, head_size)

        def step(number, cache):
            part = ops.slice(tokens, [0, number * piece], [1, piece])
            return number + 1, task.call_with_cache(part, cache, number * piece)[2]

        start = Decoder.count(0), ops.zeros(shape)
        return ops.while_loop(lambda number, _: number < length // piece, step, start)[1]

    return prepare(fill, [ops.convert_to_tensor(tokens)])()[0]


def check_parity(arguments, options):
    """Compares the loop's logits with those of the forward pass, three windows into a text.

    Args:
        arguments: Namespace with "layers", "heads" and "head_size".
        options: Dict of the options of RWR attention.

    Returns:
        Dict of the largest error by model, relative to the largest logit.

    Raises:
        ParityError: If an error is larger than the tolerance of float32, or not a number.
    """
    start = 3 * options["window"] + 5
    tokens = make_tokens(start + PARITY_LOOPS[-1])
    errors = {}
    for name, task in make_models(arguments, tokens.shape[1], options).items():
        (expected,) = prepare(
            lambda x, task=task: task({"token_ids": x, "padding_mask": ops.ones_like(x)}),
            [ops.convert_to_tensor(tokens)],
        )()
        expected = ops.convert_to_numpy(expected)[:, start:]
        decoder = Decoder(task, tokens, start)
        errors[name] = largest_error(
            [ops.convert_to_numpy(decoder(count)[0]) for count in PARITY_LOOPS],
            [expected[:, count - 1] for count in PARITY_LOOPS],
        )
    tolerance = TOLERANCES["float32"]
    wrong = [f"{name} is off by {x:.1e}" for name, x in errors.items() if not x <= tolerance]
    if wrong:
        raise ParityError(
            "decoding must give the logits of the forward pass. "
            f"Received: {', '.join(wrong)}, tolerance {tolerance:.0e}"
        )
    return errors


def measure(decoders, tokens, repeat):
    """Times decoders in turn.

    Args:
        decoders: Dict of `Decoder` by name, "stock" among them.
        tokens: Int, by how many the long loop is longer.
        repeat: Int >= 1, turns.

    Returns:
        For each name what `benchmarks.measure.summarize` gives, for one token.
    """
    framework = frameworks.active()
    samples = {name: [] for name in decoders}
    for turn in range(-1, repeat):  # the first one compiles
        order = list(decoders) if turn % 2 else list(decoders)[::-1]
        for name in order:
            short, long = (
                framework.seconds(lambda: decoders[name](count), 1)  # noqa: B023 - called at once
                for count in (SHORT_LOOP, SHORT_LOOP + tokens)
            )
            if turn >= 0:
                samples[name].append((long - short) / tokens)
    return {name: summarize(times, samples["stock"]) for name, times in samples.items()}


def benchmark(arguments, options, device="cpu"):
    """Checks and measures decoding.

    Args:
        arguments: Namespace with "sizes", "layers", "heads", "head_size", "tokens" and "repeat".
        options: Dict of the options of RWR attention.
        device: String.

    Returns:
        A dict with the keys "name", "environment", "options", "parity" and "results", for JSON.

    Raises:
        ParityError: If decoding differs from the forward pass.
    """
    framework = frameworks.active()
    with on_device(device):
        report = {
            "name": f"decode-{framework.name}-{device}-float32",
            "environment": environment(device),
            "options": options,
            "parity": check_parity(arguments, options),
            "results": [],
        }
        last = {}
        for context in sorted(arguments.sizes):
            tokens = make_tokens(context)
            start = context - SHORT_LOOP - arguments.tokens
            decoders = {
                name: Decoder(task, tokens, start)
                for name, task in make_models(arguments, context, options).items()
            }
            for name, times in measure(decoders, arguments.tokens, arguments.repeat).items():
                report["results"].append(
                    {
                        "backend": framework.name,
                        "device": device,
                        "dtype": "float32",
                        "context": context,
                        **{x: getattr(arguments, x) for x in ("layers", "heads", "head_size")},
                        "model": name,
                        **times,
                        "growth": times["median_ms"] / last[name] if name in last else None,
                        "cache_bytes_per_token": decoders[name].cache_bytes / context,
                    }
                )
                last[name] = times["median_ms"]
    return report


def table(rows):
    """Rows as text in columns."""
    lines = [("context", "model", "ms a token", "quartiles", "ratio", "growth", "cache B/token")]
    for row in rows:
        growth = row["growth"]
        lines.append(
            (
                str(row["context"]),
                row["model"],
                f"{row['median_ms']:.3f}",
                f"{row['low_ms']:.3f} to {row['high_ms']:.3f}",
                f"{row['ratio']:.2f}",
                "" if growth is None else f"{growth:.2f}",
                f"{row['cache_bytes_per_token']:.0f}",
            )
        )
    return align(lines, left=(1,))


def parse(arguments):
    """The command line."""
    parser = make_parser("decode", __doc__)
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[512, 2048, 8192],
        help="contexts: positions of the cache, at whose end is decoded (512 2048 8192)",
    )  # fmt: skip
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--head-size", type=count, default=64)
    parser.add_argument("--tokens", type=count, default=64, help="tokens a sample (64)")
    parser.add_argument("--repeat", type=count, default=10, help="turns (10)")
    add_options(parser)
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and CSV")
    parsed = parser.parse_args(arguments)
    least = parsed.tokens + SHORT_LOOP + 1
    if min(parsed.sizes) < least:
        parser.error(
            f"sizes must be at least {least}, for a prompt and the {least - 1} tokens of a sample. "
            f"Received: {parsed.sizes}"
        )
    return parsed


def read_options(parsed):
    """Options of RWR attention, and which layers have it, from the command line."""
    step = ablation.STEPS.get(parsed.step.removesuffix("-1"))  # R5-1 has the layers of R5
    layers = {} if step is None else {"rwr_layers": step.rwr_layers(parsed.layers)}
    return {**layers, **STEPS[parsed.step], **dict(parsed.option)}


def main(arguments=None):
    """The command line's run; returns the exit code."""
    parsed = parse(arguments)
    try:
        report = benchmark(parsed, read_options(parsed))
    except (ParityError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in report["environment"].items():
        print(f"{name}: {value}")
    print(f"options: {report['options']}")
    for name, largest in report["parity"].items():
        print(f"{name}: largest error {largest:.1e}")
    print(f"decode, float32, batch 1, {parsed.layers} layers, {parsed.heads} heads of "
          f"{parsed.head_size}")  # fmt: skip
    print(table(report["results"]))
    if parsed.out is not None:
        print("wrote", *write(report, parsed.out, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
