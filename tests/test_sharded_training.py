"""Two processes that share a model train as one does, and go on where the other number of processes stopped."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import run, write_lines
from safetensors.torch import load_file
from test_dpo_training import PAIRS, QUICK, Stop, same, start

from dpo.train import train
from lib.errors import UserError

CALM = replace(QUICK, learning_rate=1e-4, batch_size=4, steps=6)  # RMSprop's first steps enlarge rounding
JOBS = {
    "llama": ("llama", CALM),
    "gpt2, tied": ("gpt2", CALM),
    "gemma3, tied, adamw": ("gemma3_text", replace(CALM, optimizer="adamw")),
    "kl": ("llama", replace(CALM, kl_weight=0.3)),
    "accumulated": ("llama", replace(CALM, batch_size=2, accumulate=2)),
    "values": ("gpt2", replace(CALM, trainable="values:L1.N3,L2.N5")),
    "biases": ("llama", replace(CALM, trainable="biases")),
    "late": ("gemma3_text", replace(CALM, trainable="late:1")),
    "lora": ("llama", replace(CALM, trainable="lora:2")),
}


class Folders:
    """The `tiny` fixture's answers, for processes that have no fixtures."""

    def __init__(self, tiny, families):
        self.known = {family: tiny(family) for family in families}

    def __call__(self, family):
        return self.known[family]


def stop_at(step):
    def progress(done, total, record):
        if done == step:
            raise Stop

    return progress if step else None


def work(rank: int, meet: str, tiny, jobs: list[tuple]) -> None:
    """One of two processes: train every (family, config, folder, update after which to stop or None)."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    for family, config, folder, stop in jobs:
        try:
            train(*start(tiny, family), PAIRS, config, folder, {}, stop_at(stop))
        except Stop:
            pass
        except UserError as error:
            (folder.parent / f"error{rank}").write_text(error.message)
    torch.distributed.destroy_process_group()


def two_processes(tmp_path, tiny, jobs: list[tuple]) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / f"meet{len(jobs)}"), tiny, jobs), nprocs=2)


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def known(tiny):
    return Folders(tiny, {family for family, _ in JOBS.values()})


def test_two_processes_train_as_one(known, tmp_path):
    """Losses to 1e-5, weights, and what transformers and PEFT load afterwards."""
    for name, (family, config) in JOBS.items():
        train(*start(known, family), PAIRS, config, tmp_path / "one" / name, {})
    odd = ("llama", replace(CALM, batch_size=3), tmp_path / "odd", None)
    jobs = [(family, config, tmp_path / "two" / name, None) for name, (family, config) in JOBS.items()]
    two_processes(tmp_path, known, [*jobs, odd])
    for name in JOBS:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for here, there in zip(log(one), log(two), strict=True):
            for key in here.keys() - {"seconds", "accuracy", "valid_accuracy"}:  # ties at the start go either way
                assert there[key] == pytest.approx(here[key], rel=1e-4, abs=1e-5), (name, here, there)
        names = {file.name for file in one.iterdir()}
        assert {file.name for file in two.iterdir()} == names
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        found, expected = (saved(folder / file) for folder in (two, one))
        assert same(found, expected, atol=2e-5), name
        config = "adapter_config.json" if name == "lora" else "config.json"
        one_says, two_says = (json.loads((folder / config).read_text()) for folder in (one, two))
        for said in (one_says, two_says):
            said["target_modules"] = sorted(said.get("target_modules", []))  # PEFT's set
        assert one_says == two_says
        about = [json.loads((folder / "training.json").read_text()) for folder in (one, two)]
        assert [a.pop("processes") for a in about] == [1, 2]
        assert about[0].keys() == about[1].keys() and about[0]["trained_entries"] == about[1]["trained_entries"]
    for rank in (0, 1):
        assert "2 processes" in (tmp_path / f"error{rank}").read_text()
    assert not (tmp_path / "odd").exists()


def saved(file) -> dict[str, torch.Tensor]:
    """Weights, but GPT-2's key biases: a softmax does not feel them, and an optimizer enlarges what rounding leaves."""
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("attn.c_attn.bias"):
            tensors[name].chunk(3)[1].zero_()
    return tensors


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_another_number_of_processes_goes_on(known, tmp_path, optimizer):
    config = replace(CALM, optimizer=optimizer)
    for name in ("whole", "by two"):
        stop = 5 if name == "by two" else None
        try:
            train(*start(known, "gpt2"), PAIRS, config, tmp_path / name, {}, stop_at(stop))
        except Stop:
            pass
    jobs = [("gpt2", config, tmp_path / "by two", None), ("gpt2", config, tmp_path / "by one", 5)]
    two_processes(tmp_path, known, jobs)
    steps = []
    train(*start(known, "gpt2"), PAIRS, config, tmp_path / "by one", {}, lambda done, total, record: steps.append(done))
    assert steps == [5, 6], "it goes on from the state of update 4"
    for name in ("by two", "by one"):
        assert same(*(saved(tmp_path / folder / "model.safetensors") for folder in ("whole", name)), atol=2e-5), name
        losses = [[record["loss"] for record in log(tmp_path / folder)] for folder in ("whole", name)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_torchrun(tiny, tmp_path, cache):
    """The command line in two processes, killed, goes on in one; a finished checkpoint is found by both."""
    pairs = write_lines(
        tmp_path / "pairs.jsonl",
        [{"prompt_text": p.prompt, "unpert_gen_text": p.chosen, "pert_gen_text": p.rejected} for p in PAIRS],
    )
    options = ["-m", "dpo", "--model", tiny("llama"), "--pairs", pairs, "--steps", 40, "--save-every", 2]
    options += ["--valid-every", 20, "--learning-rate", 1e-5, "--preset", "embedded"]
    whole = run(*options)
    assert whole.returncode == 0, whole.stderr
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = run(*torchrun, *options)
    assert found.returncode == 0 and found.stdout == whole.stdout, found.stderr
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, *map(str, [*torchrun, *options, "--out", broken])],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ},
    )  # fmt: skip
    state = tmp_path / "broken.partial" / "state" / "progress.json"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    for one in [process, *workers]:
        try:
            one.kill()
        except psutil.NoSuchProcess:  # a worker may end by itself when another one is gone
            pass
    process.wait()
    psutil.wait_procs(workers, 10)
    assert not broken.exists() and state.parent.parent.exists()
    again = run(*options, "--out", broken)
    assert again.returncode == 0, again.stderr
    kept = tmp_path.joinpath(*whole.stdout.split()[-1:])  # in the cache
    assert same(*(saved(folder / "model.safetensors") for folder in (kept, broken)), atol=1e-4)
    wrong = run(*torchrun, *options, "--out", broken)
    assert wrong.returncode != 0 and "exists" in wrong.stderr
