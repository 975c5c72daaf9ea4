"""Presets, conversion and training for `finetune_gpt2.py`."""

import json
import os
import socket
import urllib.request
from pathlib import Path

import keras
import numpy as np
from ablation_data import (
    EMBEDDED,
    UsageError,
    as_batch,
    cut_blocks,
    encode,
    hold_out,
    read_path,
    train_vocabulary,
    write_arrays,
    write_json,
)

REMEDY = (
    "Give a folder that save_to_preset has written, or leave --preset out: then a small preset is "
    "made from the embedded text"
)
CONNECTION_SECONDS = 5


def use_cache_when_offline(preset):
    """Lets an `hf://` preset come from the cache at once, or fail at once, without a network.

    To be called before anything imports keras_hub, which reads the setting then.
    """
    if not str(preset).startswith("hf://") or urllib.request.getproxies().get("https"):
        return
    try:
        socket.create_connection(("huggingface.co", 443), CONNECTION_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load_stock(preset):
    """The stock GPT-2 task of a preset.

    Args:
        preset: str or path. A name, a handle or a folder.
    """
    import keras_hub

    from keras_rwr.models import RWRGPT2Backbone

    try:
        task = keras_hub.models.GPT2CausalLM.from_preset(str(preset))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        remote = isinstance(error, OSError) or "://" in str(preset)
        raise UsageError(
            f"`preset` could not be loaded ({type(error).__name__}: {reason})."
            + (" Is this machine offline?" if remote and not Path(preset).exists() else "")
            + f" {REMEDY}. Received: preset={preset}"
        ) from error
    if isinstance(task.backbone, RWRGPT2Backbone):
        raise UsageError(
            f"`preset` must be a GPT-2 with stock attention. {REMEDY}. Received: preset={preset} "
            "with RWR attention"
        )
    return task


def new_stock(documents, arguments):
    """A small stock GPT-2 task with new weights and a vocabulary trained on documents."""
    import keras_hub

    vocabulary, merges = train_vocabulary(documents, arguments["vocabulary_size"])
    # As in GPT-2, the end of text is the last token: the tokenizer pads with 0, and generation
    # stops at the end of text.
    vocabulary = {token: (number - 1) % len(vocabulary) for token, number in vocabulary.items()}
    context = arguments["context"]
    keras.utils.set_random_seed(arguments["seed"])
    return keras_hub.models.GPT2CausalLM(
        backbone=keras_hub.models.GPT2Backbone(
            vocabulary_size=len(vocabulary),
            num_layers=arguments["layers"],
            num_heads=arguments["heads"],
            hidden_dim=arguments["width"],
            intermediate_dim=4 * arguments["width"],
            dropout=arguments["dropout"],
            max_sequence_length=context,
        ),
        preprocessor=keras_hub.models.GPT2CausalLMPreprocessor(
            keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=merges),
            sequence_length=context,
        ),
    )


def load_text(dataset):
    """Training and held-out documents of the text to fine-tune on."""
    if dataset == "embedded":
        return hold_out(read_path(EMBEDDED / "train.txt.xz")[-1:])
    return hold_out(read_path(Path(dataset)))


def prepare(run_dir, config):
    """Makes what training needs, checks before long work: tokens and, without one, the preset.

    Args:
        run_dir: path. The run folder, which receives `config.json`, `tokens.npz` and `preset/`.
        config: dict. What `config.json` holds.
    """
    if (run_dir / "tokens.npz").exists():
        return
    from keras_rwr.models.gpt2_conversion import check_options

    arguments = config["arguments"]
    context = arguments["context"]
    training, held_out = load_text(arguments["dataset"])
    if arguments["preset"] is None:
        novels = read_path(EMBEDDED / "train.txt.xz")[:-1]  # all but the one to fine-tune on
        stock = new_stock(novels, arguments)
    else:
        stock = load_stock(arguments["preset"])
    positions = stock.backbone.max_sequence_length
    if context > positions:
        raise UsageError(
            f"`context` must be at most the preset's, {positions}. Received: context={context}"
        )
    if config["options"] is not None:
        try:
            check_options(config["options"], positions)
        except ValueError as error:
            raise UsageError(f"the RWR options must fit the preset: {error}") from error
    tokenizer = stock.preprocessor.tokenizer
    tokens = {"training": encode(training, tokenizer), "held_out": encode(held_out, tokenizer)}
    for name, ids in tokens.items():
        cut_blocks(ids, context, name)
    write_json(run_dir / "config.json", config)
    if arguments["preset"] is None:
        print(f"Training a small GPT-2 for {run_dir / 'preset'}", flush=True)
        pretrain(stock, encode(novels, tokenizer), arguments)
        stock.save_to_preset(str(run_dir / "preset"))
    write_arrays(run_dir / "tokens.npz", tokens)


def pretrain(task, tokens, arguments):
    """Trains the small stock model."""
    from ablation_arguments import DEFAULTS
    from ablation_train import Batches, compile_model, verbosity

    steps = arguments["pretraining_steps"]
    model = compile_model(
        task.backbone,
        {
            "learning_rate": DEFAULTS["learning_rate"],
            "weight_decay": DEFAULTS["weight_decay"],
            "warmup_steps": min(DEFAULTS["warmup_steps"], steps // 2),
            "training_steps": steps,
        },
    )
    blocks = cut_blocks(tokens, arguments["context"], "pretraining")
    batches = Batches(blocks, arguments["batch_size"], arguments["seed"], 0)
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=verbosity())


def train(run_dir, config):
    """Fine-tunes from the last checkpoint, if there is one, and saves the result.

    Args:
        run_dir: path. The run folder, with what `prepare` made. Receives `model/`, the preset of
            the fine-tuned model, `adapter.lora.h5` with LoRA, `losses.csv`, `perplexity.json`
            and a checkpoint.
        config: dict. What `config.json` holds.

    Returns:
        Dict with "perplexity", by model, "parameters", "trained_parameters" and "sample".
    """
    import keras_hub
    from ablation_log import RunLog
    from ablation_train import Batches, compile_model, verbosity

    from keras_rwr.models import RWRGPT2CausalLM

    arguments = config["arguments"]
    context, batch_size = arguments["context"], arguments["batch_size"]
    preset = run_dir / "preset" if arguments["preset"] is None else arguments["preset"]
    with np.load(run_dir / "tokens.npz") as stored:
        training = cut_blocks(stored["training"], context, "training")
        held_out = cut_blocks(stored["held_out"], context, "held_out")
    held_out = held_out[: max(arguments["validation_tokens"] // context, 1)]
    if len(held_out) > batch_size:  # whole batches, so that one shape is compiled
        held_out = held_out[: len(held_out) // batch_size * batch_size]
    inputs, targets = as_batch(held_out)

    def language_model(task):
        metrics = [keras_hub.metrics.Perplexity(from_logits=True)]
        return compile_model(task.backbone, arguments, metrics)

    def perplexity(model):
        results = model.evaluate(
            inputs, targets, batch_size=batch_size, verbose=0, return_dict=True
        )
        return results["perplexity"]

    measured_path = run_dir / "perplexity.json"
    measured = json.loads(measured_path.read_text("utf-8")) if measured_path.exists() else {}
    keras.utils.set_random_seed(arguments["seed"])
    task = load_stock(preset)
    if "stock" not in measured:
        measured["stock"] = perplexity(language_model(task))
        write_json(measured_path, measured)
    if config["options"] is not None:
        task = RWRGPT2CausalLM.from_preset(str(preset), **config["options"])
    if arguments["lora"] is not None:
        task.backbone.enable_lora(arguments["lora"])
    model = language_model(task)
    steps_per_epoch = arguments["evaluate_every"]
    log = RunLog(run_dir, steps_per_epoch, batch_size * context, arguments["seed"])
    epochs_done = log.restore(model)
    if "converted" not in measured and config["options"] is not None:
        measured["converted"] = perplexity(model)
        write_json(measured_path, measured)
    model.fit(
        Batches(training, batch_size, arguments["seed"], epochs_done * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        initial_epoch=epochs_done,
        epochs=arguments["training_steps"] // steps_per_epoch,
        validation_data=(inputs, targets),
        validation_batch_size=batch_size,
        shuffle=False,
        callbacks=[log],
        verbose=verbosity(),
    )
    measured["fine-tuned"] = perplexity(model)

    if arguments["lora"] is not None:
        task.backbone.save_lora_weights(str(run_dir / "adapter.lora.h5"))
    task.save_to_preset(str(run_dir / "model"))
    return {
        "perplexity": measured,
        "parameters": task.count_params(),
        "trained_parameters": sum(int(np.prod(x.shape)) for x in model.trainable_variables),
        "sample": sample(task, arguments),
    }


def sample(task, arguments):
    """Text that the task generates after the prompt."""
    prompt = arguments["prompt"]
    length = len(task.preprocessor.tokenizer(prompt)) + 1 + arguments["sample_tokens"]
    keras.utils.set_random_seed(arguments["seed"])
    task.compile(sampler=arguments["sampler"])
    return task.generate(prompt, max_length=min(length, arguments["context"]))
