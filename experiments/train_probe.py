"""Train the linear toxicity probe (Lee et al. 2024, section 3.1; Yang et al. 2025, section 3.2, tables 1 and 11).

Each comment becomes one vector: the mean over its tokens of the residual stream after the last layer. An L2 logistic
regression on 90 % of the comments gives the toxic direction; the other 10 % measure it. 90 % of Jigsaw's comments are
not toxic, so accuracy alone (91-96 % in Yang table 11) says little there: balanced accuracy and AUROC stand beside it,
and AUROC on the comments without a listed profane word tells whether the probe is more than a word list.

sound:    real tokens only (no padding, no BOS), before the final norm, L2 strength by cross-validation.
faithful: as the papers' code: padded on the left to 128, mean over all positions, after the final norm, C = 1.

Writes probe.safetensors (`direction` [d_model], `bias` [1]), features.safetensors, run.json and figures/.

    python experiments/train_probe.py        # about a minute on two CPU cores; later runs reuse it
"""

import click

from lib.cli import REMOTE, check, options

TEST_SHARE = 0.1  # Lee 3.1, Yang 3.2
SPLIT_SEED = 42  # of the papers' code; the sound protocol splits by --seed


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "comments", "protocol", "raw-text")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write.  [default: the cache]")
@options("overwrite", *REMOTE, "dry-run")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from lib import artifacts, chain, checkpoints, data, dry_run, generation, models, paper, probes, remote, results
from lib.metrics import mask, profane_pattern
from lib.plots_training import probe_scores
from lib.protocol import PROTOCOLS
from lib.tokens import encode
from lib.vectors import nearest_tokens


def main(out, overwrite, raw_text, **options):
    hosted = options["remote"] == "ndif"
    comments = data.comments(options["comments"])
    source, server = chain.base_source(options), remote.connect(options)
    device = "cpu" if hosted else models.pick_device(options["device"])
    dtype = options["dtype"] if hosted else models.pick_dtype(options["dtype"], device, [source])
    settings = {
        "model": source.revision,
        "comments": comments.sha256,
        "protocol": options["protocol"],
        "seed": options["seed"],
        "device": device,
        "dtype": dtype,
        "remote": server.host if hosted else server,
        "code": artifacts.code_version(__file__, probes.__file__, generation.__file__, *checkpoints.CODE),
        "versions": artifacts.versions("torch", "transformers", "nnsight", "scikit-learn", "peft"),
    }
    if out:
        artifacts.check_output(Path(out), overwrite)
    if options["dry_run"]:
        if not out and artifacts.is_whole(artifacts.folder_of("probe", settings)):
            click.echo("The cache holds this probe already; nothing would be run.")
            return
        tokenizer, _ = chain.check_given(options, source, needs=())
        dry_run.tell(options, source, passes(tokenizer, comments, options["protocol"], options["batch_size"]))
    if hosted:
        remote.report(server, models.MODELS.get(options["model"], options["model"]))

    build = partial(
        train, source=source, comments=comments, settings=settings, batch_size=options["batch_size"], server=server
    )
    if out:
        folder = Path(out)
        with artifacts.output(folder, settings, overwrite) as work:
            build(work)
    else:
        folder = artifacts.make("probe", settings, build)
    show(folder, options["model"], raw_text)
    click.echo(folder)


def passes(tokenizer, comments: data.Dataset, protocol: str, batch_size: int) -> list[dry_run.Pass]:
    """The forward passes of `lib.probes.mean_residuals`, which stops before the head."""
    texts = sorted((text for text, _ in comments.items), key=len)
    rows = encode(tokenizer, texts, probes.TEXT_LENGTH)
    if PROTOCOLS[protocol].probe_features == "padded":
        rows = [[0] * probes.PADDED_LENGTH] * len(rows)
    return [(through_layers, 0) for through_layers, _ in dry_run.reading(rows, batch_size)]


def train(folder: Path, *, source, comments: data.Dataset, settings: dict, batch_size: int, server) -> None:
    """Features in traces, the fit, and its measures on held-out comments, written to `folder`."""
    from sklearn import metrics, model_selection  # a second that a probe in the cache does not need

    seed, device, dtype = settings["seed"], settings["device"], settings["dtype"]
    faithful = settings["protocol"] == "faithful"
    model = models.load(source, device, dtype, hosted=isinstance(server, remote.Server))
    texts, labels = [text for text, _ in comments.items], np.array([label for _, label in comments.items])
    over = PROTOCOLS[settings["protocol"]].probe_features
    features = probes.mean_residuals(model, texts, batch_size, over, server)
    fitted, held_out = model_selection.train_test_split(
        np.arange(len(texts)),
        test_size=max(2, round(TEST_SHARE * len(texts))),  # at least one comment of each class
        stratify=labels,
        random_state=SPLIT_SEED if faithful else seed,
    )
    probe = probes.fit(features[fitted], labels[fitted], seed, inverse_l2=1.0 if faithful else None)

    logits, truth = probes.scores(probe, features[held_out]), labels[held_out]
    profane = np.array([profane_pattern().search(texts[i]) is not None for i in held_out])
    clean, clean_truth = logits[~profane], truth[~profane]
    measured = {
        "accuracy": metrics.accuracy_score(truth, logits > 0),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, logits > 0),
        "auroc": metrics.roc_auc_score(truth, logits),
        "auroc_without_profane_words": metrics.roc_auc_score(clean_truth, clean) if clean_truth.any() else None,
        "auroc_of_word_list": metrics.roc_auc_score(truth, profane),
        "majority_rate": max(truth.mean(), 1 - truth.mean()),
        "train": len(fitted),
        "test": len(held_out),
    }
    probe_scores(logits, truth, profane, folder / "figures" / "probe_scores.png")
    probe.save(folder / "probe.safetensors")
    tensors = {"features": features, "labels": labels, "held_out": held_out}
    save_file({name: torch.tensor(array) for name, array in tensors.items()}, folder / "features.safetensors")
    record = {
        "script": "train_probe",
        "model": source.name,
        "params": {"protocol": settings["protocol"], "seed": seed},
        "rows": [{"condition": "probe", **{k: v if v is None else float(v) for k, v in measured.items()}}],
        "held_out": [
            {"comment": int(at), "logit": round(float(logit), 5), "label": int(label)}
            for at, logit, label in zip(held_out, logits, truth, strict=True)
        ],
        "top_tokens": nearest_tokens(model, probe.direction[None], remote=server)[0],
        "provenance": results.provenance(
            model_revision=source.revision, data={"comments": comments.provenance}, dtype=dtype, device=device
        ),
    }
    results.write_json(folder / "run.json", record)


def show(folder: Path, model: str, raw_text: bool) -> None:
    """Print the measures beside Yang table 11."""
    record = json.loads((folder / "run.json").read_text())
    row = record["rows"][0]
    title = f"Toxicity probe of {model}, {row['test']:.0f} held-out comments"
    table = Table(title=title, title_justify="left", box=None)
    table.add_row("accuracy", f"{row['accuracy']:.3f}", f"the larger class alone: {row['majority_rate']:.2f}")
    if published := paper.PROBE_ACCURACY.get(model):
        table.add_row("", f"{published:.3f}", "Yang table 11, on Jigsaw")
    table.add_row("balanced accuracy", f"{row['balanced_accuracy']:.3f}")
    table.add_row("AUROC", f"{row['auroc']:.3f}", f"of a profane-word list: {row['auroc_of_word_list']:.3f}")
    if (clean := row["auroc_without_profane_words"]) is not None:
        table.add_row("", f"{clean:.3f}", "on the comments without a listed word")
    console = Console(stderr=True)
    console.print(table)
    top_tokens = [token.strip() for token in record["top_tokens"]]
    console.print("Top tokens:", ", ".join(top_tokens if raw_text else map(mask, top_tokens)), markup=False)


if __name__ == "__main__":
    command()
