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

from lib.cli import options
from lib.families import mlp_out
from lib.observation import OPTIONS

BEST = 3  # neurons by cosine, and as many by delta, where none are named
PROMPTS = 5  # of a card


@click.command(help=__doc__.split("\n")[0])
@click.argument("neurons", nargs=-1)
@options(*(name for name in OPTIONS if name != "seeds"), "raw-text")
def main(neurons, **options):
    from lib import observation
    from lib.families import d_mlp, n_layers, parse_neuron

    with observation.begin("neuron_card", {**options, "seeds": None, "neurons": neurons}) as run:
        sizes = n_layers(run.base), d_mlp(run.base)
        places = [parse_neuron(name, *sizes, "NEURONS") for name in neurons]
        (stage,) = run.stages()
        record = observation.write(run, cards(run, stage, places), {})
    report(run, record)


def cards(run, stage, places: list[tuple[int, int]]) -> list[dict]:
    """One row of the record for each neuron (layer, index)."""
    import torch

    from lib import neurons, vectors

    found = neurons.attribute(
        run.base, stage.post, stage.probe, stage.pre_means, stage.post_means, run.protocol, run.remote
    )
    width = found["cosine"].shape[1]
    orders = {name: found[name].flatten().argsort(descending=True) for name in ("cosine", "delta")}
    places = places or [divmod(int(at), width) for order in orders.values() for at in order[:BEST]]
    flat = torch.tensor([layer * width + index for layer, index in places])
    units = run.at_weights(vectors.unit_vectors, flat, run.protocol.value_vectors == "written")
    tokens = vectors.lenses(run.base, units, run.protocol, remote=run.remote)
    prompts = firing(run, places)
    rows = []
    for at, (layer, index) in enumerate(places):
        one = {name: float(found[name][layer, index]) for name in ("cosine", "pre", "post", "delta")}
        ranks = {name: int((order == flat[at]).nonzero()) + 1 for name, order in orders.items()}
        side, sign = "T" if one["cosine"] > 0 else "A", "P" if one["pre"] > 0 else "N"
        rows.append(
            {
                "neuron": f"L{layer}.N{index}",
                "group": side + sign + ("↓" if one["delta"] > 0 else "↑"),
                **one,
                "rank": ranks["cosine"],
                "delta_rank": ranks["delta"],
                "of": len(orders["cosine"]),
                "tokens": {name: lists[at] for name, lists in tokens.items()},
                "prompts": prompts[at],
            }
        )
    return rows


def firing(run, places: list[tuple[int, int]]) -> list[list[dict]]:
    """For each neuron the prompts with its largest activations in the base model, largest first."""
    import torch

    from lib.observation import prompts_of

    columns: dict[int, list[int]] = {}
    for layer, index in sorted(set(places)):
        columns.setdefault(layer, []).append(index)
    every = prompts_of(run)
    values, positions = largest(run.base, every, columns, run.remote)  # [prompts, neurons] each
    order = [(layer, index) for layer, indices in columns.items() for index in indices]
    token = [row[at] for batch, found in zip(every, positions, strict=True)
             for row, at in zip(batch["input_ids"].cpu(), found, strict=True)]  # fmt: skip
    activation = torch.cat(values)
    cards = []
    for place in places:
        column = order.index(place)
        best = activation[:, column].argsort(descending=True)[:PROMPTS].tolist()
        cards.append(
            [
                {
                    "prompt": run.prompts.items[at],
                    "token": run.base.tokenizer.decode([int(token[at][column])]),
                    "activation": float(activation[at, column]),
                }
                for at in best
            ]
        )
    return cards


def largest(model, batches: list[dict], columns: dict[int, list[int]], remote=False):
    """Each row's largest activation of each neuron over its tokens but BOS, and where: lists of `[batch, n]` tensors.

    columns: layer -> indices; the neurons stand in this order. All batches are one request.
    """
    import nnsight
    import torch

    from lib.remote import session

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
                values.append(torch.cat([one.values for one in best], 1).cpu())
                positions.append(torch.cat([one.indices for one in best], 1).cpu())
    return values, positions


def report(run, record: dict) -> None:
    """Print the cards."""
    from lib.tables import clean, wide_console

    console, raw = wide_console(), run.options["raw_text"]
    for card in record["rows"]:
        console.print(f"[bold]{card['neuron']}[/bold]  {card['group']}")
        console.print(
            f"  cosine with the probe {card['cosine']:.3f}, rank {card['rank']:,} of {card['of']:,}\n"
            f"  mean activation {card['pre']:.4f} before DPO, {card['post']:.4f} after; "
            f"delta {card['delta']:.4f}, rank {card['delta_rank']:,}"
        )
        for name, tokens in card["tokens"].items():
            console.print(f"  nearest tokens, {name}:", clean(" ".join(" ".join(tokens).split()), raw))
        for one in card["prompts"]:
            console.print(f"  {one['activation']:8.3f} at", clean(f"{one['token']!r} in: {one['prompt']}", raw))
    console.print(f"Record: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
