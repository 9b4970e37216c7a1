"""How time and memory grow with prompts, edited neurons and conditions: growth.json and growth.png in results/bench.

Each point is a process of its own on SmolLM2-135M: mean activations, then the conditions, as every table has them
(patched generation, perplexity). The slope in log-log of the upper half of the points says how it grows: 1 is linear.

    python tests/bench/bench_growth.py                # about 9 minutes on two CPU cores
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
OUT = ROOT / "results" / "bench"
START = {"prompts": 64, "neurons": 1_000, "conditions": 1}
GRIDS = {
    "prompts": (64, 128, 256, 512, 1199),
    "neurons": (1_000, 4_000, 16_000, 46_080),
    "conditions": (1, 2, 4, 8),
}
BARE = {"prompts": 16}  # the prompts of the grids of neurons and conditions


@click.command(help=__doc__.split("\n")[0])
@click.option("--point", help="One point alone, as JSON.", hidden=True)
def main(point):
    if point:
        print(json.dumps(measure(**json.loads(point))))
        return
    from lib import results

    rows = []
    for name, grid in GRIDS.items():
        for value in grid:
            given = {**START, **(BARE if name != "prompts" else {}), name: value}
            done = subprocess.run(
                [sys.executable, __file__, "--point", json.dumps(given)], capture_output=True, text=True, check=True
            )
            rows.append({"grows": name, **given, **json.loads(done.stdout.splitlines()[-1])})
            click.echo(json.dumps(rows[-1]), err=True)
    slopes = {
        name: {what: slope([row for row in rows if row["grows"] == name], name, what) for what in ("seconds", "peak")}
        for name in GRIDS
    }
    results.write_json(OUT / "growth.json", {"rows": rows, "slopes": slopes, "provenance": results.provenance()})
    draw(rows, slopes, OUT / "growth.png")
    click.echo(json.dumps(slopes))


def measure(prompts: int, neurons: int, conditions: int) -> dict:
    """Seconds and peak bytes of one process's work."""
    import torch
    from bench_generation import patch_script
    from timing import peak_memory

    from lib import data, evaluation, interventions, metrics
    from lib.models import load, resolve
    from lib.neurons import mean_activations

    model = load(resolve("smollm2"))
    known = data.pair_prompts().items + data.prompts().items
    asked = (known * -(-prompts // len(known)))[:prompts]
    script, passages = patch_script(), data.passages().first(4)
    measures = evaluation.Measures(
        passages=passages,
        choices=evaluation.SOUND,
        texts=evaluation.make_texts(model.tokenizer, 1024, asked, passages.items, evaluation.SOUND),
        scorer=metrics.scorer("profanity-check"),
        second_scorers={},
    )
    started = time.perf_counter()
    *_, means = mean_activations(model, asked, 64)
    places = torch.randperm(means.activation.numel(), generator=torch.Generator().manual_seed(0))[:neurons]
    mask = torch.zeros(means.activation.numel(), dtype=torch.bool)
    mask[places] = True
    plan = interventions.clamp(mask.view_as(means.activation), means.activation, 0.9 * means.activation)
    for at in range(conditions):
        traces = script.generate, script.likelihood
        evaluation.measure(model, plan.edit(1 + at), measures, *traces, batch_size=64, brief=True)
    return {"seconds": round(time.perf_counter() - started, 2), "peak": peak_memory()}


def slope(rows: list[dict], name: str, what: str) -> float:
    """Between the middle point and the last, in log-log."""
    first, last = rows[len(rows) // 2 - 1], rows[-1]
    return round(math.log(last[what] / first[what]) / math.log(last[name] / first[name]), 3)


def draw(rows: list[dict], slopes: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GRIDS), figsize=(11, 3.4), layout="constrained")
    for place, name in zip(axes, GRIDS, strict=True):
        found = [row for row in rows if row["grows"] == name]
        x = [row[name] for row in found]
        seconds = [row["seconds"] for row in found]
        place.loglog(x, seconds, "o-", color="C0", label="seconds")
        place.loglog(x, [seconds[0] * at / x[0] for at in x], ":", color="grey", label="linear")
        place.set_ylim(1, 1000)
        place.yaxis.set_major_formatter("{x:,.0f}")
        place.legend(frameon=False, fontsize=7, loc="upper left")
        place.set_xlabel(name)
        place.set_ylabel("seconds", color="C0")
        place.set_title(f"slopes: time {slopes[name]['seconds']}, memory {slopes[name]['peak']}", fontsize=9)
        other = place.twinx()
        other.semilogx(x, [row["peak"] / 1e9 for row in found], "s--", color="C1")
        other.set_ylim(0, 2)
        other.set_ylabel("peak GB", color="C1")
        place.set_xticks(x, [f"{value:,}" for value in x], fontsize=7)
        place.minorticks_off()
        other.minorticks_off()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
