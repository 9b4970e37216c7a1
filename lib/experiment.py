"""What every script that makes a causal claim does around its own trace: inputs, seeds, conditions, controls, record.

A script says which edits it tests and how a trace applies one; this module finds the probe, the DPO model and the mean
activations for every seed, measures each condition once, compares it with its controls and writes the record.
"""

import dataclasses
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nnsight
import torch
from rich.console import Console
from rich.progress import track

from lib import (
    artifacts,
    chain,
    checkpoints,
    controls,
    evaluation,
    families,
    generation,
    metrics,
    models,
    neurons,
    probes,
    remote,
    results,
    tables,
    tokens,
    weights,
)
from lib.data import Dataset
from lib.errors import UserError
from lib.interventions import NO_EDIT, Plan
from lib.probes import Probe
from lib.protocol import PROTOCOLS, Protocol, with_released
from lib.statistics import Bootstrap

HOSTED_BATCH = 48  # prompts at once on a server with --batch-size auto: its memory is not known here
ENOUGH_LEFT = 0.99  # cosine of DPO's update, as rounded, with itself; below it is said
SHOWN_DRAWS = 1  # of each control that generations.jsonl keeps; the numbers of all are in measurements.jsonl


class Condition(NamedTuple):
    """What one measurement was made of."""

    name: str
    kind: str = "none"  # of edit
    of: str = ""  # the condition that a control belongs to
    means: str = "same"  # prompts that means and groups come from: those of the effects, or `held_out` ones
    seed: int = 0  # of probe and DPO run
    draw: int = 0  # of a random control

    @property
    def row(self) -> tuple:
        """What one row of the table holds together: all but seed and draw."""
        return self[:4]

    @property
    def file(self) -> str:
        """A file name."""
        return "__".join(str(part).replace("/", "_") for part in self) + ".json"


@dataclass(frozen=True)
class Stage:
    """One seed's probe, model after DPO, and both models' mean activations; None is what the script does not need."""

    seed: int
    means: str
    probe: Probe | None
    probe_file: Path | None
    post: Any  # nnsight model
    pre_means: neurons.Means | None
    post_means: neurons.Means | None

    def condition(self, name: str, kind: str, of: str = "", draw: int = 0) -> Condition:
        """A condition of this stage."""
        return Condition(name, kind, of, self.means, self.seed, draw)


@dataclass
class Experiment:
    """One run of a script."""

    script: str
    options: dict
    protocol: Protocol
    seeds: list[int]
    source: models.Source
    base: Any  # nnsight model
    device: str
    dtype: str
    batch_size: int
    prompts: Dataset  # that effects are measured on
    mean_prompts: dict[str, Dataset]  # `same`, and `held_out` with --holdout
    passages: Dataset
    texts: evaluation.Texts
    toxicity: metrics.Scorer
    second: metrics.Scorer | None
    artifacts_of: dict[int, tuple]  # seed -> (probe file or None, source of the model after DPO or None)
    work: Path
    out: Path
    settings: dict
    started: float
    first_post: Any  # the first seed's model after DPO until its stage, or None
    remote: Any  # False, "local" or the NDIF service
    given_means: neurons.Means | None  # after DPO, from --post means:FILE: there is no model after DPO then
    update_left: dict | None  # of the first seed's DPO in this dtype; see `lib.weights.update_left`
    measured: dict[Condition, dict] = dataclasses.field(default_factory=dict)
    neurons: dict[Condition, int] = dataclasses.field(default_factory=dict)
    directions: dict[int, list] = dataclasses.field(default_factory=dict)  # seed -> control directions of its probe

    def stages(self, means: bool = True) -> Iterator[Stage]:
        """For every seed, and with --holdout for both choices of prompts that means come from.

        means: whether the script needs the models' mean activations.
        """
        for seed, (probe_file, post_source) in self.artifacts_of.items():
            post, self.first_post = self.first_post, None
            if post is None and post_source:
                post = self.like_base(post_source)
            probe = probes.load_probe(probe_file, self.base._module.config.hidden_size) if probe_file else None
            for name, prompts in self.mean_prompts.items():

                def mean(model, source, prompts=prompts, seed=seed):
                    settings = (prompts, self.batch_size, self.protocol, seed, self.remote)
                    return neurons.cached_means(model, source, *settings)

                pre = self.fitting(partial(mean, self.base, self.source)) if means else None
                after = self.fitting(partial(mean, post, post_source)) if post and means else self.given_means
                yield Stage(seed, name, probe, probe_file, post, pre, after)

    def like_base(self, source: models.Source):
        """A model that was trained from the base model; see `lib.models.load_like`."""
        return models.load_like(self.base, source, self.device, self.dtype, bool(self.remote))

    def cosines(self, direction: Probe) -> torch.Tensor:
        """Cosine of each of the base model's value vectors with a direction, as the protocol sees them.

        Returns: `[n_layers, d_mlp]` float64.
        """
        written = self.protocol.value_vectors == "written"
        return self.at_weights(neurons.value_projections, direction.unit, written)[1]

    def at_weights(self, function: Callable, *arguments):
        """`function(base model, *arguments)`, computed where its weights are; see `lib.remote.at_weights`."""
        return remote.at_weights(function, self.base, *arguments, remote=self.remote)

    @property
    def hosted(self) -> bool:
        """Whether the traces run on NDIF."""
        return isinstance(self.remote, remote.Server)

    def measure(
        self,
        stage: Stage,
        edits: dict[Condition, Any],
        generate: Callable,
        likelihood: Callable,
        on: tuple[Any, models.Source] | None = None,
    ) -> None:
        """Measure the base model, the model after DPO, and the base model under every edit.

        Args:
            edits: condition -> what the script's trace applies; NO_EDIT: the model that `on` names, as it is.
            generate: the script's `(model, batch, edit, where) -> ids [batch, NEW_TOKENS]`.
            likelihood: the script's `(model, batch, edit, where) -> [batch]`, nats.
            on: (nnsight model, its source) that the edits apply to; None: the base model.
        """
        none, dpo = Condition("none", seed=self.seeds[0]), Condition("dpo", seed=stage.seed)
        whole = {none: NO_EDIT, **({dpo: NO_EDIT} if stage.post else {}), **edits}
        edited, source = on or (self.base, self.source)
        todo = {key: edit for key, edit in whole.items() if key not in self.measured}
        if self.hosted:
            self.remote.say(f"{len(todo)} conditions, each one request at most.")
        for condition, edit in track(list(todo.items()), f"Conditions, seed {stage.seed}", console=_stderr()):
            if condition in (none, dpo):
                which = (stage.post, self.artifacts_of[stage.seed][1]) if condition == dpo else (self.base, self.source)
                self.measured[condition] = self._unedited(*which, generate, likelihood)
                continue
            if edit is NO_EDIT:
                self.measured[condition] = self._unedited(edited, source, generate, likelihood)
                continue
            file = self.work / "conditions" / condition.file
            with self.remote.remembering(file.with_suffix(".request")) if self.hosted else nullcontext():
                self.measured[condition] = results.once(
                    file,
                    partial(self._measure, edited, edit, generate, likelihood, self._brief(condition), condition.kind),
                )
            self.neurons[condition] = getattr(edit, "n_neurons", 0)

    def log_perplexity(self, model, edit: Any, likelihood: Callable) -> float:
        """Nats a token over all passages, with the edit at every position: what a search for a strength asks for.

        likelihood: as in `measure`.
        """
        rows = max(1, evaluation.PERPLEXITY_TOKENS // max(map(len, self.texts.windows)))
        batches = list(generation.right_padded(self.texts.windows, rows, families.input_device(self.base)))
        where = evaluation.EVERYWHERE  # a name of its own: what is shipped would take the whole module along
        with remote.session(model, self.remote):
            sums = nnsight.save([])
            for batch in batches:
                sums.append(likelihood(model, batch, edit, where).sum())
        return float(sum(sums)) / sum(len(ids) - 1 for ids in self.texts.windows)

    def _brief(self, condition: Condition) -> bool:
        """F1 and the second perplexity are measured once, for what is not a control."""
        return bool(condition.of) or condition.seed != self.seeds[0]

    def _unedited(self, model, source: models.Source, generate, likelihood) -> dict:
        """A model as it is, measured once for all scripts and kept in the cache."""
        fields = {
            "model": source.revision,
            "texts": hashlib.sha256(json.dumps(dataclasses.astuple(self.texts)).encode()).hexdigest(),
            "protocol": dataclasses.asdict(self.protocol),
            "scorer": self.toxicity.identity,
            "dtype": self.dtype,
            "remote": self.remote.host if self.hosted else self.remote or None,
            "device": self.device,
            "batch_size": self.batch_size,
            "code": artifacts.code_version(
                *(module.__file__ for module in (evaluation, generation, metrics, tokens, checkpoints))
            ),
            "traces": [inspect.getsource(trace) for trace in (generate, likelihood)],
            "versions": artifacts.versions("torch", "transformers", "nnsight", "peft"),
        }

        def build(folder: Path) -> None:
            measured = self._measure(model, NO_EDIT, generate, likelihood, brief=False, kind="none")
            results.write_json(folder / "measured.json", measured)

        return json.loads((artifacts.make("unedited", fields, build) / "measured.json").read_text(encoding="utf-8"))

    def _measure(self, model, edit, generate, likelihood, brief: bool, kind: str) -> dict:
        def measure() -> dict:
            return evaluation.measure(
                model, self.texts, self.toxicity, self.batch_size, self.protocol, generate, likelihood, edit,
                brief=brief, position_0=kind == "clamp", remote=self.remote,
            )  # fmt: skip

        if rehearsal := self.options.get("rehearsal"):
            return rehearsal.once((brief, kind == "clamp", edit is NO_EDIT), measure)
        return self.fitting(measure)

    def fitting(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns; with --batch-size auto again with half as many prompts at once while memory runs out.

        Raises:
            UserError: out of memory with a batch size that the user chose, or with one prompt.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:  # torch.OutOfMemoryError is one too
                if not generation.out_of_memory(error):
                    raise
                if self.options["batch_size"] != "auto" or self.batch_size == 1:
                    raise UserError(
                        f"--batch-size {self.batch_size}: does not fit into this machine's memory; "
                        "give a smaller one, or auto."
                    ) from error
                self.batch_size //= 2
                _stderr().print(f"Out of memory: going on with --batch-size {self.batch_size}.")

    def controlled(
        self,
        stage: Stage,
        name: str,
        plan: Plan,
        replan: controls.Replan,
        features: list[torch.Tensor],
        direction: Probe | None = None,
    ) -> dict[Condition, Any]:
        """The controls of one condition at --controls: see `lib.controls` for what each takes away.

        With several seeds the random draws are spread over them.

        Args:
            name: the condition's name; its kind is the plan's.
            replan: the script's own way from a direction to the plan, for directions in the probe's place.
            features: what the `matched` control holds alike, `[n_layers, d_mlp]` each.
            direction: what stands in the probe's place already, such as a contrastive vector; None: the probe.
        """
        level, found = self.options["controls"], {}
        if level == "none":
            return found
        for control, draw, other, strength in controls.of_plan(plan, self.draws(stage), stage.seed, features):
            unedited = control == "zero"
            found[stage.condition(f"control:{control}", plan.kind, name, draw)] = (
                NO_EDIT if unedited else other.edit(strength)
            )
        for control, draw, probe in self.other_directions(stage, direction):
            found[stage.condition(f"control:{control}", plan.kind, name, draw)] = replan(probe).edit()
        return found

    def draws(self, stage: Stage) -> list[int]:
        """The draws of each random control that this stage's seed measures."""
        return controls.draws(self.options["controls"], self.seeds.index(stage.seed), len(self.seeds))

    def other_directions(self, stage: Stage, direction: Probe | None = None) -> list[tuple[str, int, Probe]]:
        """(control, draw, direction) in place of the stage's probe, or of a `direction` that has no labels."""
        if direction:
            return list(controls.of_direction(direction, None, self.draws(stage), stage.seed))
        if stage.seed not in self.directions:  # fitting a probe takes half a minute
            found = controls.of_direction(stage.probe, stage.probe_file, self.draws(stage), stage.seed)
            self.directions[stage.seed] = list(found)
        return self.directions[stage.seed]

    def rows(self, published: Callable[[str, str], dict]) -> list[dict]:
        """The table: one row for each condition, averaged over seeds and draws, controls below what they belong to.

        published: (condition, kind) -> `{"published": ...}` or nothing.
        """
        over_prompts = Bootstrap(len(self.prompts.items), self.options["seed"])
        together: dict[tuple, list[Condition]] = {}
        for condition in self.measured:
            together.setdefault(condition.row, []).append(condition)
        mean = {row: evaluation.average([self.measured[c] for c in found]) for row, found in together.items()}
        none, dpo = (mean.get(Condition(name).row) for name in ("none", "dpo"))
        over_passages = Bootstrap(len(none["tokens"]), self.options["seed"])
        order = sorted(together, key=lambda row: _place(row, list(together)))
        rows = []
        for name, kind, of, means in order:
            found = together[name, kind, of, means]
            row = {
                "condition": name,
                "kind": kind,
                "of": of,
                "means": means if len(self.mean_prompts) > 1 and kind != "none" else None,
                "positions": self.protocol.edit_positions if kind != "none" else None,
                "neurons": self.neurons.get(found[0], 0),
                **evaluation.make_row(mean[name, kind, of, means], none, dpo, over_prompts, over_passages),
                "runs": [self._run(c) for c in found],
            }
            if of:
                real = mean[of, kind, "", means]
                row["difference_from_real"] = over_prompts.difference(
                    mean[name, kind, of, means]["toxicity"], real["toxicity"]
                )
                if self.options["controls"] == "full" and len(found) > 1:
                    level = sum(real["toxicity"]) / len(real["toxicity"])
                    row["percent_of_draws_above_real"] = (
                        100 * sum(run["toxicity"] > level for run in row["runs"]) / len(row["runs"])
                    )
            else:
                row |= published(name, kind)
            rows.append(row)
        return rows

    def _run(self, condition: Condition) -> dict:
        measured = self.measured[condition]
        nll = measured.get("nll", measured.get("nll_first"))
        return {
            "seed": condition.seed,
            "draw": condition.draw,
            "toxicity": sum(measured["toxicity"]) / len(measured["toxicity"]),
            "log_ppl": sum(nll) / sum(measured["tokens"]),
        }

    def finish(self, published: Callable[[str, str], dict], **more) -> dict:
        """Score with the second scorer, write run.json, generations.jsonl and measurements.jsonl; returns the record.

        more: the script's own entries of the record.
        """
        if self.second:
            for measured in track(list(self.measured.values()), "Second scorer", console=_stderr()):
                if "second" not in measured:
                    measured["second"] = self.second(measured["continuations"]).tolist()
        shown = {
            c: m for c, m in self.measured.items() if c.draw < SHOWN_DRAWS and (not c.of or c.seed == self.seeds[0])
        }
        results.write_lines(self.work / "generations.jsonl", _generations(shown, self.prompts.items))
        results.write_lines(self.work / "measurements.jsonl", _measurements(self.measured))
        names = ("protocol", "released", "scorer", "second_scorer", "controls", "holdout")
        record = {
            "script": self.script,
            "model": self.options["model"],
            "params": {
                "limit": len(self.prompts.items),
                "seed": self.options["seed"],
                "seeds": self.seeds,
                "batch_size": self.batch_size,
                **{name: self.options[name] for name in names},
            },
            "protocol": dataclasses.asdict(self.protocol),
            "rows": self.rows(published),
            **more,
            "provenance": results.provenance(
                settings=self.settings,
                data={"prompts": self.prompts.provenance, "passages": self.passages.provenance},
                dtype=str(self.base.dtype).removeprefix("torch."),
                **({"update_left": self.update_left} if self.update_left else {}),
                device=self.device,
                seconds=round(time.monotonic() - self.started, 1),
                **({"remote": self.remote.record()} if self.hosted else {}),
            ),
        }
        results.write_json(self.work / "run.json", record)
        shutil.rmtree(self.work / "conditions", ignore_errors=True)
        return record

    def report(self, record: dict, shown: tuple[str, ...], before: Callable[[Console], None] | None = None) -> None:
        """Print the table, one prompt's continuations under the `shown` conditions, and where everything lies."""
        console, params = tables.wide_console(), record["params"]
        if before:
            before(console)
        seeds = f", seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) > 1 else ""
        title = (
            f"{record['model']}, {params['limit']} prompts{seeds}, toxicity by {params['scorer']}, "
            f"{params['protocol']} protocol ({self.protocol.edit_positions} positions edited)"
        )
        published = [row["published"]["model"] for row in record["rows"] if row.get("published")]
        table = tables.conditions(record, title, published[0] if published else None)
        # Wide enough for every cell: rich would cut numbers off on a narrow screen.
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=400)).maximum
        )
        console.print(table)
        first = {
            f"{c.name}, {c.kind}" if c.kind != "none" else c.name: m
            for c, m in self.measured.items()
            if c.name in shown and not c.of and c.seed == self.seeds[0]
        }
        console.print(tables.continuations(self.prompts.items, first, self.options["raw_text"]))
        console.print(f"Record, raw generations, tensors and figures: {self.out}", soft_wrap=True)


def chosen_protocol(options: dict) -> Protocol:
    """What --protocol and --released say. Raises UserError when they contradict each other."""
    if not options["released"]:
        return PROTOCOLS[options["protocol"]]
    if options["protocol"] == "faithful":
        raise UserError(
            "--released: every choice of --protocol faithful is as released already; leave one of them out."
        )
    return with_released(*options["released"])


@contextmanager
def begin(
    script: str, options: dict, needs: tuple[str, ...] = ("probe", "post"), means_suffice: bool = False
) -> Iterator[Experiment]:
    """Check the options, make what is missing, load the base model, and open the output folder.

    What can be wrong with the input is found before anything is written.

    needs: of `probe` and `post` (the model after DPO), what the script stands on; the rest is not made.
    means_suffice: of the model after DPO only its mean activations are needed.
    """
    from lib.cli import default_scorer

    started = time.monotonic()
    name = options["model"]
    out = artifacts.resolved(Path(options["out"] or f"runs/{script}/{models.short_name(name)}"))
    artifacts.check_output(out, options["overwrite"])
    if options["dry_run"] and "rehearsal" not in options:
        from lib.rehearsal import rehearsed

        with rehearsed(options) as given, begin(script, given, needs, means_suffice) as run:
            yield run  # and no further: the rehearsal ends the command
    options = {**options, "scorer": default_scorer(name, options["scorer"])}
    protocol = chosen_protocol(options)
    if "post" in needs and (options["post"] or "").startswith("means:") and not means_suffice:
        raise UserError(f"--post {options['post']}: {script}.py runs the model after DPO itself; give lora:FOLDER.")
    seeds = options["seeds"] or [options["seed"]]
    prompts, passages = chain.texts(options, needs)
    mean_prompts = {"same": prompts}
    if options["holdout"]:
        if len(prompts.items) < 2:
            raise UserError("--holdout: needs at least two prompts; raise --limit or give more.")
        mean_prompts = {"held_out": prompts.half(0), "same": prompts.half(1)}
        prompts = mean_prompts["same"]
    hosted = options["remote"] == "ndif"
    server = remote.connect(options)
    source = chain.base_source(options)
    tokenizer, shape = chain.check_given(options, source, needs)
    texts = evaluation.make_texts(
        tokenizer, shape.max_positions, prompts.items, passages.items, f"--passages {passages.source}", protocol
    )
    toxicity = metrics.scorer(options["scorer"])
    second = metrics.scorer(options["second_scorer"]) if options["second_scorer"] else None
    scorers = {"scorer": toxicity.identity, "second_scorer": second and second.identity}
    device = "cpu" if hosted else models.pick_device(options["device"])
    if hosted:
        remote.report(server, models.MODELS.get(name, name))

    posts = {seed: chain.post_source(options, seed) if "post" in needs else None for seed in seeds}
    first = posts[seeds[0]]
    dtype = options["dtype"]
    if not hosted:
        dtype = models.pick_dtype(dtype, device, [source, *([first] if first else [])])
    probe_files = {
        seed: chain.probe_file({**options, "dtype": dtype}, seed, protocol) if "probe" in needs else None
        for seed in seeds
    }
    made = {seed: (probe_files[seed], posts[seed]) for seed in seeds}
    base = models.load(source, device, dtype, hosted)
    batch_size = options["batch_size"]
    if batch_size == "auto" and hosted:
        batch_size = HOSTED_BATCH
    elif batch_size == "auto":
        batch_size = min(generation.fitting_batch_size(base), len(prompts.items))
    for file in {file for file in probe_files.values() if file}:  # what is wrong with it is told now
        probes.load_probe(file, shape.d_model)
    first_post = models.load_like(base, first, device, dtype, bool(server)) if first else None
    given_means = chain.given_means(options, shape) if "post" in needs else None
    kept = None
    if first and not hosted and dtype != "float32":
        after = weights.stored_weights(Path(first.path))
        if first.adapter:  # merged once more, in float32: the loaded one is rounded
            after = weights.plain_names(dict(checkpoints.read_module(first, "float32", "cpu").named_parameters()))
        kept = weights.update_left(weights.stored_weights(Path(source.path)), after, dtype)
    if kept and kept["cosine"] < ENOUGH_LEFT:
        _stderr().print(
            f"In {dtype} {100 * kept['entries']:.0f} % of the weights that DPO changed still differ, and what is left "
            f"of its update has a cosine of {kept['cosine']:.2f} with it; --dtype float32 keeps all of it.",
            soft_wrap=True,
        )
    settings = chain.settings({**options, **scorers, "dtype": dtype}, source, made, prompts, passages, device)
    with artifacts.output(out, settings, options["overwrite"]) as work:
        if "rehearsal" not in options:
            _stderr().print(f"Output: {out}   (until it is finished: {work.name})", soft_wrap=True, markup=False)
        yield Experiment(
            script, options, protocol, seeds, source, base, device, dtype, batch_size, prompts, mean_prompts, passages,
            texts, toxicity, second, made, work, out, settings, started, first_post, server, given_means, kept,
        )  # fmt: skip


def _place(row: tuple, rows: list[tuple]) -> tuple:
    """Where a row stands: a control after the condition that it belongs to."""
    name, kind, of, means = row
    return (rows.index((of, kind, "", means)), 1, rows.index(row)) if of else (rows.index(row), 0, 0)


def _generations(measured: dict[Condition, dict], prompts: list[str]) -> Iterator[dict]:
    """Lines of generations.jsonl: raw text of conditions and prompts, with its score."""
    for condition, values in measured.items():
        about = condition._asdict()
        for prompt, text, toxicity in zip(prompts, values["continuations"], values["toxicity"], strict=True):
            yield about | {"prompt": prompt, "continuation": text, "toxicity": toxicity}


def _measurements(measured: dict[Condition, dict]) -> Iterator[dict]:
    """Lines of measurements.jsonl: every number of every measurement, over prompts and over passages."""
    digits = {"nll": 4, "nll_first": 4}
    for condition, values in measured.items():
        numbers = {
            key: [round(x, digits.get(key, 5)) for x in column]
            for key, column in values.items()
            if key != "continuations"
        }
        yield condition._asdict() | numbers


def _stderr() -> Console:
    return Console(stderr=True)
