"""Attribution and grouping of 458,752 neurons (Llama-3.1-8B's) against rows of a data frame in Python.

python tests/bench/bench_grouping.py              # half a minute
"""

import click

SHAPE = 32, 14336  # layers, neurons a layer


@click.command(help=__doc__.split("\n")[0])
def main():
    import pandas
    import torch
    from timing import in_turn, medians, paired, row, say

    from lib.neurons import attribution, groups

    generator = torch.Generator().manual_seed(0)
    names = ("pre", "projection_pre", "post", "projection_post")
    given = {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}
    cosine = given["projection_pre"] / 10
    places = torch.cartesian_prod(torch.arange(SHAPE[0]), torch.arange(SHAPE[1]))
    frame = pandas.DataFrame(
        {"layer": places[:, 0], "neuron": places[:, 1], "cosine": cosine.flatten()}
        | {name: tensor.flatten() for name, tensor in given.items()}
    )
    found = {}

    def theirs():
        members = {"TP": [], "TN": [], "AP": [], "AN": []}
        for _, one in frame.iterrows():
            if one["pre"] * one["projection_pre"] - one["post"] * one["projection_post"] > 0:
                name = ("T" if one["cosine"] > 0 else "A") + ("P" if one["pre"] > 0 else "N")
                members[name].append((int(one["layer"]), int(one["neuron"])))
        found["theirs"] = members

    def ours():
        found["ours"] = groups(cosine, given["pre"], attribution(*given.values()))

    ours()
    seconds = in_turn({"rival": theirs, "ours": ours}, 1, warm=0)
    many = in_turn({"ours": ours}, 20)
    seconds["ours"] = [medians(many)["ours"]]
    for name, members in found["theirs"].items():
        assert [tuple(place) for place in found["ours"][name].nonzero().tolist()] == members
    say(
        row(
            "grouping 458,752 neurons",
            "data-frame rows in Python",
            paired(seconds, "rival"),
            ">= 100",
            unit="times as fast",
            seconds=medians(seconds),
        )
    )


if __name__ == "__main__":
    main()
