"""One card for each neuron: what it writes, how DPO moves it, and where it fires.

The two papers speak of single neurons (Lee et al. 2024, table 1; Yang et al. 2025, tables 1, 6, 14, 15). A card holds
what their tables say of one, and what they leave out:

tokens      nearest to its value vector, raw and after the final norm
cosine      of its value vector with the toxicity probe, and its rank among all neurons
group       TP, TN, AP or AN; `↓` when DPO lowered its toxic projection (delta above 0), `↑` when it raised it
activation  its mean over generated tokens before and after DPO, delta (Yang eq. 2) and the rank of delta
prompts     those in which it fires most, and the token at which it does (the BOS token, alike in all, does not count)

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json (RAW prompts and
tokens: profanity) to runs/neuron_card/<model>/; `make report` shows the cards of results/.

    python experiments/neuron_card.py L16.N223 L5.N1304
    python experiments/neuron_card.py              # the neurons best aligned with the probe, and those with most delta
"""

import click

from lib.cli import LOOKING, check, options


@click.command(help=__doc__.split("\n")[0])
@click.argument("neurons", nargs=-1)
@options(*(name for name in LOOKING if name != "seeds"), "raw-text")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import nnsight
import torch

from lib import experiment, observation, vectors
from lib.dry_run import Traces, Workload
from lib.families import d_mlp, mlp_out, n_layers, parse_neuron
from lib.remote import session
from lib.tables import clean, wide_console

BEST = 3  # neurons by cosine, and as many by delta, where none are named
PROMPTS = 5  # of a card


def main(neurons, **options):
    plan = Workload(traces=[Traces("read")])  # where the neurons fire
    with experiment.begin("neuron_card", options | {"neurons": neurons}, plan) as inputs:
        sizes = {"layers": n_layers(inputs.base), "neurons": d_mlp(inputs.base)}
        places = [parse_neuron(name, **sizes, given="NEURONS") for name in neurons]
        (run,) = inputs.runs()
        record = observation.write(inputs, make_cards(inputs, run, places), published={})
    report(inputs, record)


def make_cards(inputs, run, places: list[tuple[int, int]]) -> list[dict]:
    """One row of the record for each neuron (layer, index); without any the best by cosine and by delta."""
    attribution = inputs.attribute(run)
    width = attribution.cosine.shape[1]
    orders = {name: getattr(attribution, name).flatten().argsort(descending=True) for name in ("cosine", "delta")}
    places = places or [divmod(int(at), width) for order in orders.values() for at in order[:BEST]]
    flat = torch.tensor([layer * width + index for layer, index in places])
    units = inputs.at_weights(vectors.unit_vectors, flat, inputs.protocol.value_vectors == "written")
    tokens = vectors.lenses(inputs.base, units, inputs.protocol, remote=inputs.remote)
    prompts = firing(inputs, places)
    rows = []
    for at, (layer, index) in enumerate(places):
        numbers = {name: float(getattr(attribution, name)[layer, index]) for name in ("cosine", "pre", "post", "delta")}
        ranks = {name: int((order == flat[at]).nonzero()) + 1 for name, order in orders.items()}
        side, sign = "T" if numbers["cosine"] > 0 else "A", "P" if numbers["pre"] > 0 else "N"
        rows.append(
            {
                "neuron": f"L{layer}.N{index}",
                "group": side + sign + ("↓" if numbers["delta"] > 0 else "↑"),
                **numbers,
                "rank": ranks["cosine"],
                "delta_rank": ranks["delta"],
                "of": len(orders["cosine"]),
                "tokens": {name: lists[at] for name, lists in tokens.items()},
                "prompts": prompts[at],
            }
        )
    return rows


def firing(inputs, places: list[tuple[int, int]]) -> list[list[dict]]:
    """For each neuron the prompts with its largest activations in the base model, largest first."""
    in_order = sorted(set(places))
    columns: dict[int, list[int]] = {}
    for layer, index in in_order:
        columns.setdefault(layer, []).append(index)
    batches = observation.prompts_of(inputs)
    values, positions = largest(inputs.base, batches, columns, inputs.remote)
    activation = torch.cat(values)  # [n_prompts, n_neurons]
    pairs = zip(batches, positions, strict=True)
    token = torch.cat([batch["input_ids"].cpu().gather(1, position) for batch, position in pairs])  # as activation
    prompts = []
    for place in places:
        column = in_order.index(place)
        prompts.append(
            [
                {
                    "prompt": inputs.prompts.items[at],
                    "token": inputs.base.tokenizer.decode([int(token[at, column])]),
                    "activation": float(activation[at, column]),
                }
                for at in activation[:, column].argsort(descending=True)[:PROMPTS].tolist()
            ]
        )
    return prompts


def largest(model, batches: list[dict], columns: dict[int, list[int]], remote=False):
    """Each row's largest activation of each neuron over its tokens but BOS, and where: lists of `[batch, n]` tensors.

    columns: layer -> indices; the neurons stand in this order. All batches are one request.
    """
    bos = -1 if model.tokenizer.bos_token_id is None else model.tokenizer.bos_token_id
    real = [batch["attention_mask"].bool() & (batch["input_ids"] != bos) for batch in batches]
    with session(model, remote):
        values, positions = nnsight.save([]), nnsight.save([])
        for batch, mask in zip(batches, real, strict=True):
            with model.trace(batch, logits_to_keep=1):
                best = []
                for layer, indices in columns.items():
                    m = mlp_out(model, layer).input[:, :, indices]  # [batch, positions, n]
                    best.append(m.float().masked_fill(~mask[:, :, None].to(m.device), -torch.inf).max(1))
                values.append(torch.cat([of_layer.values for of_layer in best], 1).cpu())
                positions.append(torch.cat([of_layer.indices for of_layer in best], 1).cpu())
    return values, positions


def report(inputs, record: dict) -> None:
    """Print the cards."""
    console, raw = wide_console(), inputs.options["raw_text"]
    for card in record["rows"]:
        console.print(f"[bold]{card['neuron']}[/bold]  {card['group']}")
        console.print(
            f"  cosine with the probe {card['cosine']:.3f}, rank {card['rank']:,} of {card['of']:,}\n"
            f"  mean activation {card['pre']:.4f} before DPO, {card['post']:.4f} after; "
            f"delta {card['delta']:.4f}, rank {card['delta_rank']:,}"
        )
        for name, tokens in card["tokens"].items():
            console.print(f"  nearest tokens, {name}:", clean(" ".join(" ".join(tokens).split()), raw))
        for prompt in card["prompts"]:
            where = f"{prompt['token']!r} in: {prompt['prompt']}"
            console.print(f"  {prompt['activation']:8.3f} at", clean(where, raw))
    console.print(f"Record: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
