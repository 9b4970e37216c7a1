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

from lib.cli import options
from lib.observation import OPTIONS

SHOWN = 7  # vectors of each kind on the screen: as many as Lee's table 1 has
K = 3  # SVD directions
DRAWS = 3  # times as many random vectors
UNREAD = {"prompts": "embedded", "limit": 1, "batch-size-or-auto": 1, "pairs": "embedded", "post": None}


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in OPTIONS if name not in UNREAD), "raw-text")
@click.option("--top", type=click.IntRange(K), help="Value vectors.  [default: 128, or 512 with faithful]")
@click.option("--judge", default="words", show_default=True, help="Scorer that says which tokens count: see --scorer.")
@click.option("--concept-words", help="Words, or a file of them: their direction instead of the probe.")
def main(top, judge, concept_words, **options):
    from lib import metrics, observation, vectors

    words = vectors.read_words(concept_words, "--concept-words")
    verdict = metrics.scorer(judge)
    top = top or vectors.SPANNED[options["protocol"]][0]
    given = {**options, **{name.removesuffix("-or-auto").replace("-", "_"): value for name, value in UNREAD.items()}}
    needs = () if words else ("probe",)
    with observation.begin("toxic_vectors", {**given, "judge": judge, "words": words}, needs) as run:
        found = [measure(run, seed, words, top, verdict) for seed in run.seeds]
        record = write(run, found, words)
    report(run, record, found[0]["listed"])


def measure(run, seed: int, words: list[str], top: int, verdict) -> dict:
    """One seed's vectors with their tokens, and how many of each kind show a listed word."""
    import torch

    from lib import probes, vectors

    written, file = run.protocol.value_vectors == "written", run.artifacts_of[seed][0]
    width = run.base._module.config.hidden_size
    probe = vectors.concept(run.base, words, run.remote) if words else probes.load_probe(file, width)
    cosine = run.cosines(probe)
    _, per_layer = vectors.SPANNED[run.options["protocol"]]
    best, worst = vectors.ranked(cosine, per_layer), vectors.ranked(-cosine, per_layer)
    top = min(top, len(best))
    generator = torch.Generator().manual_seed(seed)
    rows = run.at_weights(vectors.unit_vectors, best[:top], written)
    directions, shares = vectors.subspace(rows, K)
    kinds = {
        "probe": probe.unit[None],
        "svd": directions,
        "best": rows,
        "worst, reversed": -run.at_weights(vectors.unit_vectors, worst[:top], written),
    }
    drawn = torch.randperm(cosine.numel(), generator=generator)[: DRAWS * top]
    kinds["random"] = run.at_weights(vectors.unit_vectors, drawn, written)
    kinds["random directions"] = torch.randn(DRAWS * top, rows.shape[1], generator=generator).double()
    listed, counts = [], {}
    for kind, some in kinds.items():
        lines = tokens_of(run, some, verdict)
        counts[kind] = {"vectors": len(lines), "listed": sum(bool(line["found"]) for line in lines)}
        places = {"best": best, "worst, reversed": worst}.get(kind)
        for at, line in enumerate(lines if not kind.startswith("random") else []):
            line |= {"seed": seed, "kind": kind, "rank": at + 1}
            if places is not None:
                layer, index = divmod(int(places[at]), cosine.shape[1])
                line |= {"neuron": f"L{layer}.N{index}", "cosine": float(cosine[layer, index])}
            listed.append(line)
    order = {int(place): rank for rank, place in enumerate(best.tolist(), start=1)}
    ranks = ranks_of_published(run.options["model"], order, cosine.shape[1])
    row = {
        "seed": seed,
        "top": top,
        "counts": counts,
        "svd": [
            {"share": float(share), "cosine": float(direction @ probe.unit)}
            for direction, share in zip(directions, shares, strict=True)
        ],
        "ranks_of_published": ranks,
    }
    return {"row": row, "listed": listed, "direction": probe.direction, "directions": directions}


def tokens_of(run, some, verdict) -> list[dict]:
    """Nearest tokens of each of `some` `[n, d_model]`, by each lens, and those that the judge finds."""
    from lib import vectors

    found = vectors.lenses(run.base, some, run.protocol, remote=run.remote)
    every = sorted({token for lists in found.values() for tokens in lists for token in tokens})
    score = dict(zip(every, verdict(every).tolist(), strict=True))
    lines = []
    for at in range(len(some)):
        own = {name: lists[at] for name, lists in found.items()}
        lines.append({"tokens": own, "found": sorted({t for tokens in own.values() for t in tokens if score[t] > 0.5})})
    return lines


def ranks_of_published(model: str, order: dict[int, int], d_mlp: int) -> dict[str, int | None]:
    """Where Lee's vectors stand among ours; None: not among those that compete. Empty but for his own model."""
    from lib import paper

    if model != "gpt2":
        return {}
    return {f"L{layer}.N{index}": order.get(layer * d_mlp + index) for layer, index in paper.LEE_TOXIC_VECTORS}


def write(run, found: list[dict], words: list[str]) -> dict:
    """The record and the vectors' tokens of all seeds; neurons and directions of the first."""
    from safetensors.torch import save_file

    from lib import observation, plots, results

    first = found[0]
    results.write_lines(run.work / "vectors.jsonl", [line for one in found for line in one["listed"]])
    best = [line["neuron"] for line in first["listed"] if line["kind"] == "best"]
    (run.work / "neurons.txt").write_text("\n".join(best) + "\n", encoding="utf-8")
    tensors = {"direction": first["direction"].float(), "svd": first["directions"].float().contiguous()}
    save_file(tensors, run.work / "directions.safetensors")
    plots.listed_vectors([one["row"] for one in found], run.work / "figures" / "listed_vectors.png")
    more = {"judge": run.options["judge"], "concept_words": words, "top": first["row"]["top"]}
    return observation.write(run, [one["row"] for one in found], {}, **more)


def report(run, record: dict, listed: list[dict]) -> None:
    """Print tokens, and how many vectors of each kind show a listed word."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lib.metrics import mask
    from lib.tables import wide_console

    console, row = wide_console(), record["rows"][0]
    lenses = list(listed[0]["tokens"])
    view = Table(title=f"{record['model']}: nearest tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("vector", "cosine", *lenses):
        view.add_column(name, no_wrap=name != lenses[-1], overflow="ellipsis", max_width=48)
    for kind in ("probe", "svd", "best", "worst, reversed"):
        for line in [line for line in listed if line["kind"] == kind][:SHOWN]:
            svd = row["svd"][line["rank"] - 1]["cosine"] if kind == "svd" else 1.0
            name = line.get("neuron", f"SVD[{line['rank'] - 1}]" if kind == "svd" else "probe")
            texts = [" ".join(" ".join(line["tokens"][lens]).split()) for lens in lenses]
            shown = [Text(text if run.options["raw_text"] else mask(text)) for text in texts]
            view.add_row(("-" if kind == "worst, reversed" else "") + name, f"{line.get('cosine', svd):.3f}", *shown)
    console.print(view)
    for kind, count in row["counts"].items():
        console.print(f"{kind}: {count['listed']} of {count['vectors']} have a listed word among their nearest tokens")
    for name, rank in row["ranks_of_published"].items():
        console.print(f"{name} (Lee table 1): rank {rank or 'none'} here")
    console.print(f"Record, tokens, neurons and directions: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
