"""Tiny random models of every family, and a tokenizer for them, built here."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
LAYERS, WIDTH, NEURONS = 3, 32, 48


def texts(name: str, field: str) -> list[str]:
    """A field of an embedded file."""
    lines = (ROOT / "lib" / "assets" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)[field] for line in lines]


def build_tokenizer(bos: bool):
    """A byte-level BPE of 500 tokens that adds one BOS, or none as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts("passages", "text")[:100], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    names = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", **names)


def build_model(family: str, vocab: int, seed: int = 0):
    """A random model whose weights are large enough that every neuron matters and texts differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.25}
    if family == "gpt2":
        shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_inner": NEURONS, "n_positions": 256}
    else:
        shape = {
            "num_hidden_layers": LAYERS,
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
        }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **shape))
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_" in name:  # norms at their start would hide a mistake in how they are read
            weight.data += 0.3 * torch.randn_like(weight)
    return model.float().eval()
