"""README's arithmetic of an 8B model on one 80 GB GPU, counted on a model without weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo.trainable import choose
from lib.evaluation import PERPLEXITY_TOKENS
from lib.generation import MAX_PROMPT_TOKENS, NEW_TOKENS

GB = 1e9
PAIRS, POSITIONS = 4, 128  # the yang2025 preset: pairs at once, tokens of a prompt and a response


@pytest.fixture(scope="module")
def llama():
    """Llama-3.1-8B by its configuration."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def size(tensors) -> float:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) / GB


def test_an_experiment_in_bf16(llama):
    """Both models, and what one batch of 64 texts and one of perplexity hold besides."""
    config = llama.config
    weights = size(llama.parameters())
    assert weights == pytest.approx(16.06, abs=0.01)
    head = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 2 / GB  # keys and values, bf16
    cache = 64 * (MAX_PROMPT_TOKENS + NEW_TOKENS) * token
    step = 64 * config.vocab_size * (2 + 4) / GB  # one position's logits, bf16 and float32
    read = PERPLEXITY_TOKENS * config.vocab_size * (2 + 4 + 4) / GB  # of all positions; float32 row by row
    assert 2 * weights + cache + max(step, read) < 36 < 80
    means = 2 * 2 * config.num_hidden_layers * config.intermediate_size * 8 / GB  # float64 sums of two models
    assert means < 0.1


def test_dpo_of_adapters(llama):
    """--trainable lora:16 --dtype bfloat16: base weights, adapters in float32 with gradient and optimizer state."""
    model, _ = choose(llama, "lora:16")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 41_943_040 and {p.dtype for p in trained} == {torch.float32}
    frozen = size(p for p in model.parameters() if not p.requires_grad)
    config, rows = llama.config, 2 * PAIRS
    kept = rows * POSITIONS * config.hidden_size * 2 * config.num_hidden_layers / GB  # a layer's input; the rest again
    # The widest of a layer computed again: four d_mlp-wide maps and their adapters' inputs in float32.
    layer = rows * POSITIONS * (4 * config.intermediate_size + 8 * config.hidden_size) * (2 + 4) / GB
    logits = rows * 64 * config.vocab_size * (2 + 3 * 4) / GB  # of the responses: bf16, float32, its gradient's parts
    whole = frozen + 3 * size(trained) + kept + layer + logits
    assert frozen == pytest.approx(16.06, abs=0.01) and whole < 20 < 80


def test_readme_says_so(request):
    readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    assert "16.1 GB" in readme and "36 GB" in readme and "20 GB" in readme
