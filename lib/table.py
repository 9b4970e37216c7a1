"""The table of a causal claim: conditions, added one by one, measured by the script's two traces, saved, printed."""

import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nnsight
import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from lib import (
    artifacts,
    checkpoints,
    evaluation,
    export,
    generation,
    metrics,
    model_card,
    models,
    released,
    remote,
    results,
    tables,
)
from lib.controls import Control
from lib.experiment import Inputs, Run
from lib.families import input_device
from lib.interventions import NO_EDIT, Edit, shift
from lib.offsets import against, offsets

SHOWN_DRAWS = 1  # of each control that generations.jsonl keeps; the numbers of all are in measurements.jsonl


class Condition(NamedTuple):
    """What one measurement was made of."""

    name: str
    kind: str = "none"  # of its edit
    control_of: str = ""  # the condition that a control belongs to
    means_from: str = "same"  # prompts that means and groups come from: those of the effects, or `held_out` ones
    seed: int = 0  # of probe and DPO run
    draw: int = 0  # of a random control

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What one row of the table holds together: all but seed and draw."""
        return self[:4]

    @property
    def file(self) -> str:
        """A file name."""
        return "__".join(str(part).replace("/", "_") for part in self) + ".json"

    @property
    def fields(self) -> dict:
        """As lines of generations.jsonl and measurements.jsonl name it."""
        return dict(zip(("name", "kind", "of", "means", "seed", "draw"), self, strict=True))


class Subject(NamedTuple):
    """What a condition is measured on: an edit of a model, or a model as it is (NO_EDIT)."""

    edit: Any
    model: Any  # nnsight
    source: models.Source


class Table:
    """The conditions of a run."""

    def __init__(self, inputs: Inputs, generate: Callable, likelihood: Callable, wanted: export.Export | None = None):
        """The script's two traces.

        Args:
            generate: `(model, batch, edit, where) -> ids [batch, NEW_TOKENS]`.
            likelihood: `(model, batch, edit, where, base) -> [2, batch]`, nats: `lib.generation.token_losses`.
            wanted: what `save` exports.
        """
        self.inputs, self.generate, self.likelihood, self.wanted = inputs, generate, likelihood, wanted
        self.exported: tuple[Condition, Subject] | None = None  # the first seed's of what is wanted
        self.waiting: dict[Condition, Subject] = {}
        self.measured: dict[Condition, dict] = {}
        self.neurons: dict[Condition, int] = {}
        self.offsets: dict[Condition, dict] = {}  # of shifts; see `lib.offsets.against`
        self.known: list[torch.Tensor] | None = None  # the base model's predictions; see `evaluation.measure`
        self.full_shifts: dict[tuple, Edit] = {}  # (seed, choice of means) -> the shift of all neurons

    def add(self, name: str, kind: str = "none", edit: Any = NO_EDIT, *, run: Run | None = None,
            model=None, source: models.Source | None = None) -> None:  # fmt: skip
        """Add a condition.

        Args:
            kind: of the edit, as the table names it.
            edit: what the traces apply; NO_EDIT: the model as it is.
            run: whose seed and means it was made of; None: of no run's.
            model, source: what is edited; None: the base model.
        """
        if kind == "shift" and run and run.pre_means and run.post_means:
            pre, post = run.pre_means.activation, run.post_means.activation
            every = torch.ones_like(pre, dtype=torch.bool)
            self.full_shifts.setdefault((run.means_from, run.seed), shift(every, pre, post).edit())
        self._add(Condition(name, kind, "", *self._origin(run, kind)), edit, model, source)

    def add_control(self, control: Control, kind: str, edit: Any, *, run: Run, control_of: str,
                    model=None, source: models.Source | None = None) -> None:  # fmt: skip
        """Add a control of the condition `control_of` of the same kind; the rest as in `add`."""
        condition = Condition(f"control:{control.name}", kind, control_of, *self._origin(run, kind), control.draw)
        self._add(condition, edit, model, source)

    def _origin(self, run: Run | None, kind: str) -> tuple[str, int]:
        if run is None:
            return "same", self.inputs.seeds[0]
        return (run.means_from if kind != "none" else "same"), run.seed

    def _add(self, condition: Condition, edit, model, source) -> None:
        if condition not in self.measured:
            inputs = self.inputs
            self.waiting[condition] = Subject(edit, model or inputs.base, source or inputs.source)
            if self.wanted and condition == Condition(*self.wanted.condition, seed=inputs.seeds[0]):
                self.exported = condition, self.waiting[condition]

    def measure(self) -> None:
        """Measure what was added since; each condition is kept when it is finished."""
        inputs, todo = self.inputs, list(self.waiting.items())
        if inputs.hosted:
            inputs.remote.say(f"{len(todo)} conditions, each one request at most.")
        self._compare_offsets()
        for condition, subject in track(todo, "Conditions", console=Console(stderr=True)):
            if subject.edit is NO_EDIT:
                self.measured[condition] = self._unedited(subject)
                continue
            file = inputs.work / "conditions" / condition.file
            # F1 and the second perplexity are measured once, for what is not a control.
            brief = bool(condition.control_of) or condition.seed != inputs.seeds[0]
            with inputs.remote.remembering(file.with_suffix(".request")) if inputs.hosted else nullcontext():
                self.measured[condition] = results.once(file, partial(self._measure, subject, brief))
            self.neurons[condition] = getattr(subject.edit, "n_neurons", 0)
        self.waiting.clear()

    def _compare_offsets(self) -> None:
        """What each shift that waits adds to the MLPs' output, against the shift of all neurons."""
        for origin, full_shift in self.full_shifts.items():
            edits = {
                condition: subject.edit
                for condition, subject in self.waiting.items()
                if condition.kind == "shift" and (condition.means_from, condition.seed) == origin
            }
            if edits:
                full, *rows = self.inputs.at_weights(offsets, [full_shift, *edits.values()])
                self.offsets |= {condition: against(own, full) for condition, own in zip(edits, rows, strict=True)}

    def _measure(self, subject: Subject, brief: bool) -> dict:
        inputs, measures = self.inputs, self.inputs.measures
        if (
            self.known is None
            and not inputs.remote
            and (subject.edit is not NO_EDIT or subject.model is not inputs.base)
        ):
            self.known = evaluation.known_predictions(inputs.base, measures.texts)
        return inputs.fitting(
            lambda: evaluation.measure(
                subject.model,
                subject.edit,
                measures,
                self.generate,
                self.likelihood,
                base=inputs.base,
                batch_size=inputs.batch_size,
                known=self.known,
                brief=brief,
                remote=inputs.remote,
            )
        )

    def _unedited(self, subject: Subject) -> dict:
        """A model as it is, measured once for all scripts and kept in the cache."""
        inputs, measures = self.inputs, self.inputs.measures
        code = [module.__file__ for module in (evaluation, generation, metrics, released)]
        fields = {
            "model": subject.source.revision,
            "base": inputs.source.revision,
            "texts": hashlib.sha256(json.dumps(dataclasses.astuple(measures.texts)).encode()).hexdigest(),
            "protocol": dataclasses.asdict(inputs.protocol),
            "scorer": measures.scorer.identity,
            "dtype": inputs.dtype,
            "remote": inputs.remote.host if inputs.hosted else inputs.remote or None,
            "device": inputs.device,
            "batch_size": inputs.batch_size,
            "code": artifacts.code_version(*code, *checkpoints.CODE),
            "traces": [*with_helpers(self.generate), *with_helpers(self.likelihood)],
            "versions": artifacts.versions("torch", "transformers", "nnsight", "peft"),
        }

        def build(folder: Path) -> None:
            results.write_json(folder / "measured.json", self._measure(subject, brief=False))

        return json.loads((artifacts.make("unedited", fields, build) / "measured.json").read_text(encoding="utf-8"))

    def log_perplexity(self, model, edit: Any) -> float:
        """Nats a token over all passages, with the edit at every position: what a search for a strength asks for."""
        texts, likelihood = self.inputs.measures.texts, self.likelihood
        batches = list(generation.right_padded(texts.windows, texts.windows_at_once, input_device(model)))
        where = evaluation.EVERYWHERE  # a name of its own: what is shipped would take the whole module along
        with remote.session(model, self.inputs.remote):
            sums = nnsight.save([])
            for batch in batches:
                sums.append(likelihood(model, batch, edit, where)[0].sum())
        return float(sum(sums)) / sum(len(ids) - 1 for ids in texts.windows)

    def rows(self, published: Callable[[str, str], dict]) -> list[dict]:
        """One row for each condition, averaged over seeds and draws, controls below what they belong to.

        published: (condition, kind) -> `{"published": ...}` or nothing.
        """
        inputs = self.inputs
        grouped: dict[tuple, list[Condition]] = {}
        for condition in self.measured:
            grouped.setdefault(condition.row, []).append(condition)
        measured = {
            row: [(condition.seed, condition.draw, self.measured[condition]) for condition in conditions]
            for row, conditions in grouped.items()
        }
        full = inputs.options["controls"] == "full"
        entries = evaluation.row_entries(measured, inputs.seeds, inputs.options["seed"], full)
        rows = []
        for key in sorted(grouped, key=lambda row: place(row, list(grouped))):
            (name, kind, control_of, means_from), conditions = key, grouped[key]
            row = {
                "condition": name,
                "kind": kind,
                "of": control_of,
                "means": means_from if len(inputs.mean_prompts) > 1 and kind != "none" else None,
                "positions": inputs.protocol.edit_positions if kind != "none" else None,
                "neurons": self.neurons.get(conditions[0], 0),
                **entries[key],
                "runs": [self._run(condition) for condition in conditions],
            }
            if conditions[0] in self.offsets:
                row["offset"] = mean_offset([self.offsets[condition] for condition in conditions])
            if not control_of:
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

    def save(self, published: Callable[[str, str], dict], **entries) -> dict:
        """Score with the second scorers, write run.json, generations.jsonl and measurements.jsonl; returns the record.

        entries: the script's own of the record.
        """
        inputs, measures = self.inputs, self.inputs.measures
        for name, second in measures.second_scorers.items():
            for measured in track(list(self.measured.values()), f"Scores by {name}", console=Console(stderr=True)):
                measured[evaluation.SECOND + name] = second(measured["continuations"]).tolist()
        results.write_lines(inputs.work / "generations.jsonl", self._generations())
        results.write_lines(inputs.work / "measurements.jsonl", self._measurements())
        names = ("protocol", "released", "scorer", "second_scorer", "controls", "holdout")
        record = {
            "script": inputs.script,
            "model": inputs.options["model"],
            "params": {
                "limit": len(inputs.prompts.items),
                "seed": inputs.options["seed"],
                "seeds": inputs.seeds,
                "batch_size": inputs.batch_size,
                **{name: inputs.options[name] for name in names},
            },
            "protocol": dataclasses.asdict(inputs.protocol),
            "rows": self.rows(published),
            **entries,
            "provenance": results.provenance(
                settings=inputs.settings,
                data={"prompts": inputs.prompts.provenance, "passages": measures.passages.provenance},
                **inputs.circumstances,
            ),
        }
        results.write_json(inputs.work / "run.json", record)
        if self.wanted:
            self._export(record)
        shutil.rmtree(inputs.work / "conditions", ignore_errors=True)
        return record

    def _export(self, record: dict) -> None:
        """Write what --export asks for, a checkpoint with what it gave when it was loaded again."""
        inputs, (condition, (edit, model, source)) = self.inputs, self.exported
        with export.placed(self.wanted) as place:
            if self.wanted.is_vector:
                export.save_vectors(model, edit, place, model.config.model_type)
                return
            export.save_checkpoint(model, edit, place)
            export.save_tokenizer(inputs.source, place)
            exported = models.Source(str(self.wanted.path), str(place), "")
            loaded = Subject(NO_EDIT, models.load(exported, inputs.device, inputs.dtype), exported)
            here, there = self.measured[condition], self._measure(loaded, brief=True)
            pairs = list(zip(here["continuations"], there["continuations"], strict=True))
            likelihoods = "nll" if "nll" in here and "nll" in there else "nll_first"
            difference = sum(there[likelihoods]) - sum(here[likelihoods])
            check = {
                "same": sum(ours == theirs for ours, theirs in pairs),
                "prompts": len(pairs),
                "log_ppl_difference": abs(difference) / sum(there["tokens"]),
            }
            config = model.config.to_dict()
            card = model_card.model_card(record, self.wanted.condition, source, config, check)
            (place / "README.md").write_text(card, encoding="utf-8")
            model_card.copy_licence(Path(inputs.source.path), place)

    def _generations(self) -> Iterator[dict]:
        """Lines of generations.jsonl: raw text of conditions and prompts, with its score."""
        for condition, measured in self.measured.items():
            if condition.draw < SHOWN_DRAWS and (not condition.control_of or condition.seed == self.inputs.seeds[0]):
                columns = (self.inputs.prompts.items, measured["continuations"], measured["toxicity"])
                for prompt, text, toxicity in zip(*columns, strict=True):
                    yield condition.fields | {"prompt": prompt, "continuation": text, "toxicity": toxicity}

    def _measurements(self) -> Iterator[dict]:
        """Lines of measurements.jsonl: every number of every measurement, over prompts and over passages."""
        for condition, measured in self.measured.items():
            digits = {key: 4 if key.startswith(("nll", "kl")) else 5 for key in measured if key != "continuations"}
            yield condition.fields | {key: [round(x, n) for x in measured[key]] for key, n in digits.items()}

    def show(self, record: dict, conditions: tuple[str, ...]) -> None:
        """Print the table, one prompt's continuations under some conditions, and where everything lies."""
        inputs, console, params = self.inputs, tables.wide_console(), record["params"]
        seeds = f", seeds {', '.join(map(str, inputs.seeds))}" if len(inputs.seeds) > 1 else ""
        title = (
            f"{record['model']}, {params['limit']} prompts{seeds}, toxicity by {params['scorer']}, "
            f"{params['protocol']} protocol ({inputs.protocol.edit_positions} positions edited)"
        )
        published = [row["published"]["model"] for row in record["rows"] if row.get("published")]
        table = tables.conditions(record, title, published[0] if published else None)
        # Wide enough for every cell: rich would cut numbers off on a narrow screen.
        wide = console.measure(table, options=console.options.update(max_width=400)).maximum
        console.width = max(console.width, wide)
        console.print(table)
        shown = {
            f"{condition.name}, {condition.kind}" if condition.kind != "none" else condition.name: measured
            for condition, measured in self.measured.items()
            if condition.name in conditions and not condition.control_of and condition.seed == inputs.seeds[0]
        }
        console.print(tables.continuations(inputs.prompts.items, shown, inputs.options["raw_text"]))
        console.print(f"Record, raw generations, tensors and figures: {inputs.out}", soft_wrap=True)
        if self.wanted:
            console.print(f"Exported: {self.wanted.path}", soft_wrap=True)


def mean_offset(offsets_of_runs: list[dict[str, list[float]]]) -> dict:
    """Cosine and projection of a row's offset: the mean over layers, and of each layer, averaged over runs."""
    row = {}
    for name in ("cosine", "projection"):
        by_layer = np.mean([offset[name] for offset in offsets_of_runs], axis=0)
        row |= {name: float(by_layer.mean()), f"{name}_by_layer": by_layer.tolist()}
    return row


def with_helpers(trace: Callable) -> list[str]:
    """The source of a trace and of the functions of its file that it calls, such as its intervention."""
    called = (trace.__globals__.get(name) for name in trace.__code__.co_names)
    own = [function for function in called if getattr(function, "__module__", None) == trace.__module__]
    return [inspect.getsource(function) for function in (trace, *own)]


def place(row: tuple, rows: list[tuple]) -> tuple:
    """Where a row stands: a control after the condition that it belongs to."""
    _, kind, control_of, means_from = row
    if not control_of:
        return rows.index(row), 0, 0
    return rows.index((control_of, kind, "", means_from)), 1, rows.index(row)
