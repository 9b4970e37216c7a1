"""Seconds of one warm condition here and on the service, in one process, as JSON. Usage: MODEL FOLDER ROUNDS."""

import json
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from lib import data, evaluation, metrics, remote
from lib.families import d_mlp, n_layers
from lib.interventions import shift
from lib.models import load, resolve

ROOT = Path(__file__).parents[2]


def main(name: str, folder: str, rounds: int) -> None:
    spec = spec_from_file_location("patch_four_groups", ROOT / "experiments" / "patch_four_groups.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    server = remote.Server(600, False)
    models = {"here": load(resolve(folder)), "remote": load(resolve(name, weights=False), hosted=True)}
    prompts, passages = data.prompts("embedded").first(4), data.passages("embedded").first(2)
    tokenizer, sound = models["here"].tokenizer, evaluation.SOUND
    measures = evaluation.Measures(
        passages=passages,
        choices=sound,
        texts=evaluation.make_texts(tokenizer, 1024, prompts.items, passages.items, sound),
        scorer=metrics.scorer("words"),
        second_scorers={},
    )
    traces = script.generate, script.likelihood
    zero = torch.zeros(n_layers(models["here"]), d_mlp(models["here"]))
    edit = shift(zero == 0, zero, zero + 0.1).edit()  # every neuron of every layer
    seconds = {place: [] for place in models}
    for _ in range(rounds + 1):  # the first deploys the model and fills caches
        for place, model in models.items():
            started = time.monotonic()
            where = server if place == "remote" else False
            found = evaluation.measure(model, edit, measures, *traces, batch_size=4, brief=True, remote=where)
            seconds[place].append(round(time.monotonic() - started, 3))
        assert found["continuations"]
    warm = server.log[1:]
    print(json.dumps({
        "model": name, "prompts": 4, "passages": 2, "edited_neurons": edit.n_neurons,
        "here_seconds": seconds["here"][1:], "remote_seconds": seconds["remote"][1:],
        **{name: max(one[name] for one in warm) for name in ("sent_bytes", "returned_bytes")},
    }))  # fmt: skip


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
