"""Toxic vectors in the vocabulary (Lee et al. 2024, 3.1, 3.2, table 1; Yang et al. 2025, tables 1, 6, 14, 15, 16).

The claim: the value vectors that align best with the toxicity probe, and the directions that span them (SVD), promote
toxic tokens. Shown are the tokens nearest to the probe, to the best value vectors, to the sign-reversed worst ones, and
to the first SVD directions of the --top best, by the product with the unembedding (`raw`) and after the model's final
norm (`normed`; Yang's lists). What the papers do not have, and this adds:

random     value vectors drawn at random, and random directions: how many of them show a listed word
ranks      where the listed vectors of GPT2-medium stand in our ranking (--model gpt2)

A listed word is one that --judge finds among a vector's 10 nearest tokens by either lens (default: the word list that
masks screens).

sound:    value vectors as the residual stream sees them (through Gemma's norm), the N = 128 best of all layers.
faithful: raw rows, the 100 best of each layer and then the N = 512 best, as in Lee's released code.

--concept-words puts any concept's direction in the probe's place: the words' mean unembedding minus that of all tokens.

Needs a probe, made when missing or given (--probe). Writes run.json and vectors.jsonl (RAW tokens: profanity),
neurons.txt (the N best, for `python -m dpo --trainable values:FILE`), directions.safetensors and figures/ to
runs/toxic_vectors/<model>/.

    python experiments/toxic_vectors.py
    python experiments/toxic_vectors.py --concept-words happy,joy,delight
"""

import click

from lib.cli import LOOKING, check, options

UNREAD = ("prompts", "limit", "batch-size-or-auto", "pairs", "post")  # only weights are looked at
SHOWN = 7  # vectors of each kind on the screen: as many as Lee's table 1 has
K = 3  # SVD directions
DRAWS = 3  # times as many random vectors


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in LOOKING if name not in UNREAD), "raw-text")
@click.option("--top", type=click.IntRange(K), help="Value vectors.  [default: 128, or 512 with faithful]")
@click.option("--judge", default="words", show_default=True, help="Scorer that says which tokens count: see --scorer.")
@click.option("--concept-words", help="Words, or a file of them: their direction instead of the probe.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from lib import experiment, metrics, observation, paper, plots_neurons, results, tables, vectors
from lib.dry_run import Workload


def main(top, judge, concept_words, **options):
    words = vectors.read_words(concept_words, "--concept-words")
    scorer = metrics.scorer("words" if options["dry_run"] else judge)
    best_of_all, best_of_layer = vectors.SPANNED[options["protocol"]]
    options |= {"judge": judge, "words": words, "prompts": "embedded", "limit": 1, "batch_size": 1}
    needs = () if words else ("probe",)

    with experiment.begin("toxic_vectors", options, Workload(means=False), needs=needs) as inputs:
        rows, lines, written = [], [], inputs.protocol.value_vectors == "written"
        for run in inputs.runs(means=False):  # one for each seed
            direction = vectors.concept(inputs.base, words, inputs.remote) if words else run.probe
            cosine = inputs.cosines(direction)
            best, worst = vectors.ranked(cosine, best_of_layer), vectors.ranked(-cosine, best_of_layer)
            n = min(top or best_of_all, len(best))
            generator = torch.Generator().manual_seed(run.seed)
            drawn = torch.randperm(cosine.numel(), generator=generator)[: DRAWS * n]
            places = torch.cat([best[:n], worst[:n], drawn])
            unit = inputs.at_weights(vectors.unit_vectors, places, written)  # [n_places, d_model]
            svd, shares = vectors.subspace(unit[:n], K)
            kinds = {
                "probe": direction.unit[None],
                "svd": svd,
                "best": unit[:n],
                "worst, reversed": -unit[n : 2 * n],
                "random": unit[2 * n :],
                "random directions": torch.randn(DRAWS * n, svd.shape[1], generator=generator).double(),
            }
            nearest = {kind: nearest_tokens(inputs, of_kind, scorer) for kind, of_kind in kinds.items()}
            row = {"seed": run.seed, "top": n, "counts": {kind: count(of_kind) for kind, of_kind in nearest.items()}}
            cosines = [float(vector @ direction.unit) for vector in svd]
            row["svd"] = [{"share": s, "cosine": c} for s, c in zip(shares.tolist(), cosines, strict=True)]
            row["ranks_of_published"] = ranks_of_published(options["model"], best.tolist(), cosine.shape[1])
            rows.append(row)
            lines += listed(run.seed, nearest, cosine, {"best": best, "worst, reversed": worst})
            if run.seed == inputs.seeds[0]:
                tensors = {"direction": direction.direction.float(), "svd": svd.float().contiguous()}
                save_file(tensors, inputs.work / "directions.safetensors")

        first = [line for line in lines if line["seed"] == inputs.seeds[0]]
        names = [line["neuron"] for line in first if line["kind"] == "best"]
        (inputs.work / "neurons.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        results.write_lines(inputs.work / "vectors.jsonl", lines)
        plots_neurons.listed_vectors(rows, inputs.work / "figures" / "listed_vectors.png")
        record = observation.write(inputs, rows, {}, judge=judge, concept_words=words, top=rows[0]["top"])
    show(inputs, record, first)


def nearest_tokens(inputs, directions: torch.Tensor, scorer) -> list[dict]:
    """Nearest tokens of each direction `[n, d_model]`, by each lens, and those that the scorer finds."""
    by_lens = vectors.lenses(inputs.base, directions, inputs.protocol, remote=inputs.remote)
    every = sorted({token for lists in by_lens.values() for tokens in lists for token in tokens})
    toxic = {token for token, score in zip(every, scorer(every).tolist(), strict=True) if score > 0.5}
    lines = []
    for at in range(len(directions)):
        tokens = {lens: lists[at] for lens, lists in by_lens.items()}
        lines.append({"tokens": tokens, "found": sorted(toxic.intersection(sum(tokens.values(), [])))})
    return lines


def count(lines: list[dict]) -> dict[str, int]:
    """How many vectors there are, and how many of them show a listed word."""
    return {"vectors": len(lines), "listed": sum(bool(line["found"]) for line in lines)}


def listed(seed: int, nearest: dict[str, list[dict]], cosine: torch.Tensor, places: dict[str, torch.Tensor]) -> list:
    """Lines of vectors.jsonl: what `nearest_tokens` found of each kind that is not random, with neurons and cosines.

    cosine: of all value vectors, `[n_layers, d_mlp]`. places: in it, flattened, of each kind of value vectors.
    """
    lines = []
    for kind in (kind for kind in nearest if not kind.startswith("random")):
        for at, line in enumerate(nearest[kind]):
            lines.append({**line, "seed": seed, "kind": kind, "rank": at + 1})
            if kind in places:
                layer, index = divmod(int(places[kind][at]), cosine.shape[1])
                lines[-1] |= {"neuron": f"L{layer}.N{index}", "cosine": float(cosine[layer, index])}
    return lines


def ranks_of_published(model: str, best: list[int], d_mlp: int) -> dict[str, int | None]:
    """Where Lee's vectors stand among ours; None: not among those that compete. Empty but for his own model.

    best: places in a flattened `[n_layers, d_mlp]`, the best first.
    """
    if model != "gpt2":
        return {}
    ranks = {place: rank for rank, place in enumerate(best, start=1)}
    return {f"L{layer}.N{index}": ranks.get(layer * d_mlp + index) for layer, index in paper.LEE_TOXIC_VECTORS}


def show(inputs, record: dict, lines: list[dict]) -> None:
    """Print tokens, and how many vectors of each kind show a listed word. lines: of the first seed."""
    console, row = tables.wide_console(), record["rows"][0]
    lenses = list(lines[0]["tokens"])
    table = Table(title=f"{record['model']}: nearest tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("vector", "cosine", *lenses):
        table.add_column(name, no_wrap=name != lenses[-1], overflow="ellipsis", max_width=48)
    for kind in ("probe", "svd", "best", "worst, reversed"):
        for line in [line for line in lines if line["kind"] == kind][:SHOWN]:
            of_svd = row["svd"][line["rank"] - 1]["cosine"] if kind == "svd" else 1.0
            name = line.get("neuron", f"SVD[{line['rank'] - 1}]" if kind == "svd" else "probe")
            texts = [" ".join(" ".join(line["tokens"][lens]).split()) for lens in lenses]
            shown = [Text(text if inputs.options["raw_text"] else metrics.mask(text)) for text in texts]
            sign = "-" if kind == "worst, reversed" else ""
            table.add_row(sign + name, f"{line.get('cosine', of_svd):.3f}", *shown)
    console.print(table)
    for kind, counts in row["counts"].items():
        share = f"{counts['listed']} of {counts['vectors']}"
        console.print(f"{kind}: {share} have a listed word among their nearest tokens")
    for name, rank in row["ranks_of_published"].items():
        console.print(f"{name} (Lee table 1): rank {rank or 'none'} here")
    console.print(f"Record, tokens, neurons and directions: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
