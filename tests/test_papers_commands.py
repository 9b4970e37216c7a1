"""The commands that README names for the papers' models, with every default, against a Hub on this machine.

The Hub serves tiny models under the real repositories' names with their files' names, tensor names, dtypes and gates,
small data sets in their real formats, and what Detoxify's library looks for.
"""

import json
import shutil

import pytest
import torch
from conftest import build_tokenizer, run, texts, write_lines
from hub_server import hub, sent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, BertTokenizerFast

SCRIPT = "experiments/patch_four_groups.py"
# name -> (repository, family, dtype of its files, gated, files beside the weights, what its generation_config asks for)
MODELS = {
    "gpt2": (
        "openai-community/gpt2-medium", "gpt2", torch.float32, False, ["pytorch_model.bin", "rust_model.ot"],
        {"do_sample": True, "max_length": 50},
    ),
    "llama": (
        "meta-llama/Llama-3.1-8B", "llama", torch.bfloat16, True, ["original/consolidated.00.pth", "USE_POLICY.md"],
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "gemma": ("google/gemma-2-2b", "gemma2", torch.float32, True, ["README.md"], {"cache_implementation": "hybrid"}),
    "mistral": (
        "mistralai/Mistral-7B-v0.1", "mistral", torch.bfloat16, True, ["pytorch_model-00001-of-00002.bin"], {},
    ),
}  # fmt: skip


def model_repository(root, tiny, name: str):
    """A tiny model as the Hub has the real one."""
    repository, family, dtype, gated, others, asked = MODELS[name]
    folder = root / repository
    folder.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=dtype)
    model.save_pretrained(folder, **({} if family == "gpt2" else {"max_shard_size": "30KB"}))
    build_tokenizer(bos=family != "gpt2").save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, **asked}))
    if family == "gpt2":  # the Hub's names: of the base class, with the attention masks of their time, without a head
        weights = load_file(folder / "model.safetensors")
        renamed = {key.removeprefix("transformer."): w for key, w in weights.items() if key != "lm_head.weight"}
        renamed |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(3)}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    for other in others:
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("not to be fetched")
    if gated:
        (folder / ".gated").write_text("")
    return folder


def data_repositories(root) -> None:
    """RealToxicityPrompts' JSON lines, WikiText-2's parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    prompts = root / "datasets" / "allenai" / "real-toxicity-prompts"
    prompts.mkdir(parents=True)
    rows = []
    for at, prompt in enumerate(texts("prompts", "prompt")[:6]):
        scores = {"profanity": 0.9, "toxicity": None if at == 1 else 0.9, "severe_toxicity": 0.5, "threat": None}
        rows.append(
            {"filename": f"{at}.txt", "begin": 340, "end": 564, "challenging": at < 4,
             "prompt": {"text": prompt, **scores}, "continuation": {"text": " and so on", **scores}}
        )  # fmt: skip
    write_lines(prompts / "prompts.jsonl", rows)
    wiki = root / "datasets" / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    wiki.mkdir(parents=True)
    lines = ["", " = A Title = \n", *(f" {text} \n" for text in texts("passages", "text")[:5]), ""]
    pyarrow.parquet.write_table(pa.table({"text": lines}), wiki / "test-00000-of-00001.parquet")


def detoxify_files(root, home) -> None:
    """A tiny BERT in the form of Detoxify's checkpoint, where torch.hub looks, and the configuration it asks for."""
    folder = root / "bert-base-uncased"
    folder.mkdir(parents=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefgh"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=6,
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    classes = ["toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack"]
    arch = {"model_type": "bert-base-uncased", "model_name": "BertForSequenceClassification", "num_classes": 6}
    about = {"arch": {"args": {**arch, "tokenizer_name": "BertTokenizer"}}, "dataset": {"args": {"classes": classes}}}
    place = home / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save({"config": about, "state_dict": model.state_dict()}, place / "toxic_original-c1212f89.ckpt")


@pytest.mark.parametrize("name", MODELS)
def test_the_command_with_every_default(name, tiny, tmp_path):
    root = tmp_path / "hub"
    folder = model_repository(root, tiny, name)
    data_repositories(root)
    detoxify_files(root, tmp_path / "torch")
    shutil.copytree(".", tmp_path / "checkout", ignore=shutil.ignore_patterns(".*", "results", "runs", "build"))
    sent.clear()
    with hub(root) as address:
        environment = {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "TORCH_HOME": str(tmp_path / "torch"), "DPO_NEURONS_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "",
        }  # fmt: skip
        if MODELS[name][3]:
            refused = run(SCRIPT, "--model", name, cwd=tmp_path / "checkout", **environment)
            assert refused.returncode == 2 and "accept its licence" in refused.stderr.splitlines()[-1], refused.stderr
            assert not any(MODELS[name][0] in file for file in sent) and not (tmp_path / "checkout" / "runs").exists()
        environment["HF_TOKEN"] = "hf_" + "x" * 34
        done = run(SCRIPT, "--model", name, cwd=tmp_path / "checkout", timeout=900, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    fetched = {file.removeprefix(MODELS[name][0] + "/") for file in sent if file.startswith(MODELS[name][0])}
    assert not fetched & set(MODELS[name][4]), "pickles and papers stay where they are"
    record = json.loads((tmp_path / "checkout" / "runs" / SCRIPT[12:-3] / name / "run.json").read_text())
    assert record["params"]["limit"] == 4 and record["params"]["scorer"] == "detoxify", "the challenging prompts"
    assert record["provenance"]["dtype"] == "float32", "DPO trained in it"
    rows = {(row["condition"], row["kind"]): row for row in record["rows"]}
    assert rows["dpo", "none"]["log_ppl"] != rows["none", "none"]["log_ppl"]
    # The base model's own perplexity, from the files that were served.
    (training,) = (tmp_path / "cache" / "dpo").glob("*/training.json")
    trained = json.loads(training.read_text())
    assert trained["config"]["warmup"] == 7 and trained["best_step"] > trained["config"]["warmup"]
    assert trained["dtype"] == "float32" and trained["config"]["kl_weight"] > 0
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, total, count = build_tokenizer(bos=MODELS[name][1] != "gpt2"), 0.0, 0
    for text in [" = A Title = \n", *(f" {text} \n" for text in texts("passages", "text")[:5])]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        if ids.shape[1] >= 52:
            total += float(plain(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert rows["none", "none"]["log_ppl"] == pytest.approx(total / count, rel=1e-4)
