"""A whole table, 15 conditions by toxicity, perplexity and F1, against the papers' procedure.

The procedure: mean activations of both models by generating and then reading everything again; neurons grouped in
data-frame rows; then a run for each metric, which loads the model, and in it each condition with texts scored and
passages read and continued one at a time. (Prompts are generated from in batches there too.) Both end with the same
toxicity and perplexities. The model after DPO is the base model with noise in its weights: its quality costs nothing.

    python tests/bench/bench_table.py --model smollm2 # about five minutes on two CPU cores
"""

import tempfile
from pathlib import Path

import click

from lib import evaluation
from lib.cli import options

STRENGTHS = (0.5, 1.0, 1.5)  # of four sets; with one more and the two models: 15 conditions


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
@click.option("--prompts", "n_prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--passages", "n_passages", type=click.IntRange(1), default=11, show_default=True)
def main(model, device, dtype, n_prompts, n_passages):
    from timing import in_turn, medians, paired, row, say

    from lib.models import resolve

    with tempfile.TemporaryDirectory() as folder:
        files = [resolve(model).path, moved(resolve(model).path, Path(folder) / "post")]
        found = {}

        def ours():
            found["ours"] = our_table(files, device, dtype, n_prompts, n_passages)

        def theirs():
            found["rival"] = their_table(files, device, dtype, n_prompts, n_passages)

        seconds = in_turn({"rival": theirs, "ours": ours}, 1, warm=0)
    for name, one in found["ours"].items():
        other = found["rival"][name]
        assert abs(one["log_ppl"] - other["log_ppl"]) < 1e-3, (name, one, other)
        assert abs(one["toxicity"] - other["toxicity"]) < 0.02, (
            name,
            one,
            other,
        )  # a near tie of tokens may fall apart
    say(
        row(
            f"a table of {len(found['ours'])} conditions, 3 metrics",
            "the papers' procedure",
            paired(seconds, "rival"),
            ">= 3",
            unit="times as fast",
            seconds=medians(seconds),
            prompts=n_prompts,
            passages=n_passages,
        ),
        model=model,
    )


def moved(folder: str, out: Path) -> Path:
    """A copy of a model with noise in its MLPs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight += 0.02 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


class OnePerplexity(evaluation.Choices):
    """The papers' procedure has one perplexity of an edit."""

    def perplexities(self, kind: str, brief: bool) -> dict[str, slice]:
        return self.compared


def plans_of(groups: dict, pre, post, delta) -> dict:
    """The table's edits: growing unions of the four groups, each at some strengths, and the noisiest thousand."""
    from lib import interventions, neurons

    plans, mask = {}, False
    for name, group in groups.items():
        mask = group | mask
        plan = interventions.clamp(mask, pre, post)
        plans |= {f"{name} x{at}": plan.edit(at) for at in STRENGTHS}
    top = neurons.top(delta.abs(), 1000)
    return plans | {"top": interventions.clamp(top, pre, post).edit()}


def inputs(n_prompts: int, n_passages: int, d_model: int):
    """Prompts, passages, and a direction in the probe's place."""
    import torch

    from lib import data
    from lib.probes import Probe

    direction = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    return data.prompts().items[:n_prompts], data.passages().items[:n_passages], Probe(direction, 0.0)


def our_table(files, device, dtype, n_prompts, n_passages) -> dict:
    from bench_generation import patch_script

    from lib import metrics, neurons
    from lib.interventions import NO_EDIT
    from lib.models import load, resolve
    from lib.protocol import with_released

    script = patch_script()
    base, post = (load(resolve(str(file)), device, dtype) for file in files)
    prompts, passages, probe = inputs(n_prompts, n_passages, base._module.config.hidden_size)
    means = []
    for model in (base, post):
        *_, last = neurons.mean_activations(model, prompts, n_prompts)
        means.append(last)
    found = neurons.attribute(base, post, probe, *means, with_released("value_vectors"))  # as the papers' code does
    measures = evaluation.Measures(
        passages=None,
        choices=OnePerplexity(**vars(evaluation.SOUND)),
        texts=evaluation.make_texts(base.tokenizer, 1024, prompts, passages, evaluation.SOUND),
        scorer=metrics.scorer("profanity-check"),
        second_scorers={},
    )
    traces, table = (script.generate, script.likelihood), {}
    plans = plans_of(found.groups, found.pre, found.post, found.delta)
    for name, edit in {"none": NO_EDIT, "dpo": NO_EDIT, **plans}.items():
        model = post if name == "dpo" else base
        measured = evaluation.measure(model, edit, measures, *traces, batch_size=n_prompts + n_passages)
        table[name] = {
            "toxicity": sum(measured["toxicity"]) / n_prompts,
            "log_ppl": sum(measured["nll"]) / sum(measured["tokens"]),
            "f1": sum(measured["f1"]) / len(measured["f1"]),
        }
    return table


def their_table(files, device, dtype, n_prompts, n_passages) -> dict:
    import pandas
    import rival
    import torch

    from lib import metrics, models
    from lib.generation import batches, decode, greedy, until_end
    from lib.interventions import NO_EDIT
    from lib.neurons import value_projections

    device = models.pick_device(device)
    dtype = getattr(torch, models.pick_dtype(dtype, device, []))
    (base, tokenizer), (post, _) = (rival.load(file, device, dtype) for file in files)
    prompts, passages, probe = inputs(n_prompts, n_passages, base.config.hidden_size)
    pre, after = (rival.generate_then_read(network, tokenizer, prompts, n_prompts) for network in (base, post))
    columns = {"pre": pre, "post": after}
    columns["before"], columns["cosine"] = value_projections(base, probe.unit, False)
    columns["after"] = value_projections(post, probe.unit, False)[0]
    frame = pandas.DataFrame({name: tensor.flatten() for name, tensor in columns.items()})
    masks = {name: torch.zeros(pre.numel(), dtype=torch.bool) for name in ("TP", "TN", "AP", "AN")}
    delta = torch.zeros(pre.numel(), dtype=torch.float64)
    for at, one in frame.iterrows():
        delta[at] = one["pre"] * one["before"] - one["post"] * one["after"]
        if delta[at] > 0 and one["pre"] != 0:
            masks[("T" if one["cosine"] > 0 else "A") + ("P" if one["pre"] > 0 else "N")][at] = True
    groups = {name: mask.view_as(pre) for name, mask in masks.items()}
    plans = plans_of(groups, pre, after, delta.view_as(pre))
    conditions = {"none": NO_EDIT, "dpo": NO_EDIT, **plans}
    table = {name: {} for name in conditions}
    for metric in ("toxicity", "log_ppl", "f1"):  # a run each
        (base, tokenizer), (post, _) = (rival.load(file, device, dtype) for file in files)
        windows, continued = texts_of(tokenizer, passages)
        ends, scorer = set(rival.end_ids(base)), metrics.scorer("profanity-check")
        for name, edit in conditions.items():
            network = post if name == "dpo" else base
            values = []
            with rival.hooked(network, rival.clamping(edit, slice(None), device)), torch.no_grad():
                if metric == "toxicity":
                    for batch in batches(tokenizer, prompts, n_prompts, device):
                        new = network.generate(**batch, **greedy())[:, batch["input_ids"].shape[1] :]
                        values += [float(scorer([text])[0]) for text in decode(tokenizer, until_end(new, ends))]
                elif metric == "log_ppl":
                    for ids in windows:
                        ids = torch.tensor([ids], device=device)
                        values += [float(network(ids, labels=ids).loss)] * (ids.shape[1] - 1)
                else:
                    for ids, reference in continued:
                        ids = torch.tensor([ids], device=device)
                        new = network.generate(ids, attention_mask=torch.ones_like(ids), **greedy())[:, ids.shape[1] :]
                        values.append(metrics.token_f1(until_end(new, ends)[0], reference))
            table[name][metric] = sum(values) / len(values)
    return table


def texts_of(tokenizer, passages: list[str]):
    """The windows and F1's prompts and references, as `lib.evaluation.make_texts` cuts them."""
    texts = evaluation.make_texts(tokenizer, 1024, [], passages, evaluation.SOUND)
    return texts.windows, texts.continued


if __name__ == "__main__":
    main()
