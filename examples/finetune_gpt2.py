"""Fine-tunes GPT-2 with RWR attention on a text.

    python examples/finetune_gpt2.py                        # trains its own small GPT-2 first
    python examples/finetune_gpt2.py --ablation-step R5 --lora 4
    python examples/finetune_gpt2.py --preset gpt2_base_en --text my.txt --context 1024 \\
        --learning-rate 5e-5 --options window=128

The preset's weights go into a model with RWR attention, which is trained on the text. Perplexity on
the last 5 % of the text is measured with stock attention, after the conversion, and after the
training. The folder of `--out` receives the model as a preset, `model/`, and with LoRA its factors.
"""

import argparse
import json
import lzma
from pathlib import Path

import keras
import keras_hub
import numpy as np

from keras_rwr.ablation import STEPS, step_options
from keras_rwr.models import RWRGPT2CausalLM

END = "<|endoftext|>"
NOVELS = Path(__file__).parent / "data" / "train.txt.xz"


def cut(texts, tokenizer, context):
    """Inputs and targets of GPT-2, rows of `context` tokens, and how many there are."""
    tokens = np.concatenate([[*tokenizer(text), tokenizer.end_token_id] for text in texts])
    count = (len(tokens) - 1) // context
    rows = tokens[context * np.arange(count)[:, None] + np.arange(context + 1)].astype("int32")
    inputs = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}
    return inputs, rows[:, 1:], count


def compiled(task, learning_rate):
    """The language model of a task, which takes what `cut` returns."""
    backbone = task.backbone
    model = keras.Model(backbone.input, backbone.token_embedding(backbone.output, reverse=True))
    model.compile(
        keras.optimizers.AdamW(learning_rate, weight_decay=0.01, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
    )
    return model


def small_preset(folder, texts, given):
    """Trains a small stock GPT-2 with a vocabulary of its own, and saves it as a preset."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, 1024, special_tokens=[END], show_progress=False)
    words = json.loads(trainer.to_str())["model"]
    # As in GPT-2, the end of text is the last token: the tokenizer pads with 0.
    numbers = {word: (number - 1) % len(words["vocab"]) for word, number in words["vocab"].items()}
    merges = [" ".join(pair) for pair in words["merges"]]
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(vocabulary=numbers, merges=merges)
    task = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=len(numbers),
            num_layers=2,
            num_heads=2,
            hidden_dim=64,
            intermediate_dim=256,
            dropout=0.0,
            max_sequence_length=given.context,
        ),
        keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=given.context),
    )
    inputs, targets, _ = cut(texts, tokenizer, given.context)
    some = slice(300 * given.batch_size)
    inputs = {name: x[some] for name, x in inputs.items()}
    compiled(task, 6e-3).fit(inputs, targets[some], given.batch_size, epochs=1, verbose=2)
    task.save_to_preset(str(folder))


def parse(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", help="stock GPT-2: a folder, a name such as gpt2_base_en, kaggle:// or hf://")
    add("--text", type=Path, help=f"UTF-8 file, documents joined by {END} (one embedded novel)")
    add("--ablation-step", choices=[x for x in STEPS if x != "R0"], default="R4", help="attention")
    text = "of RWRAttention, where they differ (window=32)"
    add("--options", nargs="*", default=["window=32"], metavar="NAME=VALUE", help=text)
    add("--lora", type=int, help="train only factors of this rank of queries and values")
    add("--context", type=int, default=256, help="tokens a sequence (256)")
    add("--batch-size", type=int, default=4, help="sequences a training step (4)")
    add("--epochs", type=int, default=2, help="passes over the text (2)")
    add("--learning-rate", type=float, default=1e-3, help="about 5e-5 for a real GPT-2 (0.001)")
    add("--prompt", default="It was a", help="what a sample goes on from")
    add("--out", type=Path, default=Path("runs/finetune"), help="folder")
    return parser.parse_args(arguments)


def read_options(words):
    """Options of RWR attention from words such as `window=64`."""
    found = {}
    for name, _, value in (word.partition("=") for word in words):
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def main(arguments=None):
    """Runs the command line and returns the perplexities."""
    given = parse(arguments)
    keras.utils.set_random_seed(0)
    novels = lzma.decompress(NOVELS.read_bytes()).decode("utf-8").split(END)
    text = given.text.read_text("utf-8") if given.text else novels[-1]
    preset = given.preset or str(given.out / "stock")
    if given.preset is None and not Path(preset).exists():
        small_preset(preset, novels[:-1], given)
    stock = keras_hub.models.GPT2CausalLM.from_preset(preset)
    tokenizer = stock.preprocessor.tokenizer
    inputs, targets, count = cut(text.split(END), tokenizer, given.context)
    last = max(count // 20, 1)
    held_out = {name: x[-last:] for name, x in inputs.items()}, targets[-last:]
    inputs, targets = {name: x[:-last] for name, x in inputs.items()}, targets[:-last]

    def perplexity(model):
        return model.evaluate(*held_out, given.batch_size, verbose=0)[1]

    measured = {"stock": perplexity(compiled(stock, given.learning_rate))}
    options = step_options(given.ablation_step, read_options(given.options))
    if "rwr_layers" not in options:
        options["rwr_layers"] = STEPS[given.ablation_step].rwr_layers(stock.backbone.num_layers)
    task = RWRGPT2CausalLM.from_preset(preset, **options)
    if given.lora:
        task.backbone.enable_lora(given.lora)
    model = compiled(task, given.learning_rate)
    measured["converted"] = perplexity(model)
    model.fit(inputs, targets, given.batch_size, given.epochs, verbose=2)
    measured["fine-tuned"] = perplexity(model)

    if given.lora:
        task.backbone.save_lora_weights(str(given.out / "adapter.lora.h5"))
    task.save_to_preset(str(given.out / "model"))
    print({name: f"perplexity {value:.2f}" for name, value in measured.items()})
    task.compile(sampler="top_p")
    print(task.generate(given.prompt, max_length=min(64, given.context)))
    print(f"Model: {given.out / 'model'}")
    return measured


if __name__ == "__main__":
    main()
