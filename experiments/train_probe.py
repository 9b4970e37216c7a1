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

from pathlib import Path

import click

from lib.cli import REMOTE, options

TEST_SHARE = 0.1  # Lee 3.1, Yang 3.2
SPLIT_SEED = 42  # of the papers' code; the sound protocol splits by --seed


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "comments", "protocol", "raw-text")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write.  [default: the cache]")
@options("overwrite", *REMOTE, "dry-run")
def main(model, revision, device, dtype, seed, batch_size, comments, protocol, raw_text, out, overwrite, **options):
    from lib import artifacts, chain, data, remote
    from lib.models import MODELS, pick_device, pick_dtype, resolve

    hosted = options["remote"] == "ndif"
    device = "cpu" if hosted else pick_device(device)
    loaded = data.comments(comments)
    source, server = resolve(model, revision, weights=not hosted), remote.connect(options)
    if hosted:
        remote.report(server, MODELS.get(model, model))
    else:
        dtype = pick_dtype(dtype, device, [source])
    code = [Path(artifacts.__file__).with_name(name) for name in ("probes.py", "tokens.py", "checkpoints.py")]
    settings = {
        "model": source.revision,
        "comments": loaded.sha256,
        "protocol": protocol,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "remote": server.host if hosted else server,
        "code": artifacts.code_version(__file__, *code),
        "versions": artifacts.versions("torch", "transformers", "nnsight", "scikit-learn", "peft"),
    }

    if options["dry_run"]:
        from lib.rehearsal import rehearsed

        if not out and artifacts.is_whole(artifacts.folder_of("probe", settings)):
            click.echo("The cache holds this probe already; nothing would be run.")
            return
        given = {**options, "model": model, "revision": revision, "device": device, "dtype": dtype, "limit": None}
        with rehearsed({**given, "batch_size": batch_size}) as stand_in:
            folder = Path(stand_in["out"])
            folder.mkdir()
            train(chain.base_source(stand_in), loaded, protocol, seed, device, dtype, batch_size, False, folder)

    def build(folder: Path) -> None:
        train(source, loaded, protocol, seed, device, dtype, batch_size, server, folder)

    if out:
        with artifacts.output(Path(out), settings, overwrite) as folder:
            build(folder)
        folder = Path(out)
    else:
        folder = artifacts.make("probe", settings, build)
    report(folder, model, raw_text)
    click.echo(folder)


def train(source, comments, protocol: str, seed: int, device: str, dtype: str, batch_size: int, server, folder) -> None:
    """Features in traces, the fit, and its measures on held-out comments, written to `folder`."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import train_test_split

    from lib import plots, probes, vectors
    from lib.metrics import profane_pattern
    from lib.models import load
    from lib.protocol import PROTOCOLS
    from lib.remote import Server
    from lib.results import provenance, write_json

    model = load(source, device, dtype, hosted=isinstance(server, Server))
    texts, labels = zip(*comments.items, strict=True)
    labels = np.array(labels)
    features = probes.mean_residuals(model, list(texts), batch_size, PROTOCOLS[protocol].probe_features, server)
    n_test = max(2, round(TEST_SHARE * len(texts)))  # at least one comment of each class
    fitted, held_out = train_test_split(
        np.arange(len(texts)),
        test_size=n_test,
        stratify=labels,
        random_state=SPLIT_SEED if protocol == "faithful" else seed,
    )
    probe = probes.fit(features[fitted], labels[fitted], seed, 1.0 if protocol == "faithful" else None)
    logits = probes.scores(probe, features[held_out])
    truth = labels[held_out]
    profane = profane_pattern()
    clean = np.array([profane.search(texts[i]) is None for i in held_out])
    measured = {
        "accuracy": accuracy_score(truth, logits > 0),
        "balanced_accuracy": balanced_accuracy_score(truth, logits > 0),
        "auroc": roc_auc_score(truth, logits),
        "auroc_without_profane_words": roc_auc_score(truth[clean], logits[clean]) if truth[clean].any() else None,
        "auroc_of_word_list": roc_auc_score(truth, ~clean),
        "majority_rate": max(truth.mean(), 1 - truth.mean()),
        "train": len(fitted),
        "test": len(held_out),
    }
    plots.probe_scores(logits, truth, ~clean, folder / "figures" / "probe_scores.png")
    probe.save(folder / "probe.safetensors")
    save_file(
        {"features": torch.tensor(features), "labels": torch.tensor(labels), "held_out": torch.tensor(held_out)},
        folder / "features.safetensors",
    )
    write_json(
        folder / "run.json",
        {
            "script": "train_probe",
            "model": source.name,
            "params": {"protocol": protocol, "seed": seed},
            "rows": [{"condition": "probe", **{k: v if v is None else float(v) for k, v in measured.items()}}],
            "top_tokens": vectors.nearest_tokens(model, probe.direction[None], remote=server)[0],
            "provenance": provenance(
                model_revision=source.revision, data={"comments": comments.provenance}, dtype=dtype, device=device
            ),
        },
    )


def report(folder: Path, model: str, raw_text: bool) -> None:
    """Print the measures beside Yang table 11."""
    import json

    from rich.console import Console
    from rich.table import Table

    from lib import paper
    from lib.metrics import mask

    record = json.loads((folder / "run.json").read_text())
    row = record["rows"][0]
    published, clean = paper.PROBE_ACCURACY.get(model), row["auroc_without_profane_words"]
    table = Table(
        title=f"Toxicity probe of {model}, {row['test']:.0f} held-out comments", title_justify="left", box=None
    )
    table.add_row("accuracy", f"{row['accuracy']:.3f}", f"the larger class alone: {row['majority_rate']:.2f}")
    if published:
        table.add_row("", f"{published:.3f}", "Yang table 11, on Jigsaw")
    table.add_row("balanced accuracy", f"{row['balanced_accuracy']:.3f}")
    table.add_row("AUROC", f"{row['auroc']:.3f}", f"of a profane-word list: {row['auroc_of_word_list']:.3f}")
    if clean is not None:
        table.add_row("", f"{clean:.3f}", "on the comments without a listed word")
    console = Console(stderr=True)
    console.print(table)
    tokens = [token.strip() for token in record["top_tokens"]]
    console.print("Top tokens:", ", ".join(tokens if raw_text else map(mask, tokens)), markup=False)


if __name__ == "__main__":
    main()
