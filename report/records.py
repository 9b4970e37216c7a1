"""The records under results/: what the report reads, and nothing else."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.numpy import load_file

from lib.errors import UserError
from lib.evaluation import by_run
from lib.statistics import Bootstrap


@dataclass(frozen=True)
class Record:
    """One run's record, and the folder it lies in."""

    name: str  # such as `patch_four_groups/gemma-270m`
    folder: Path
    data: dict

    @property
    def model(self) -> str:
        """The model's name."""
        return self.data["model"]

    @property
    def anchor(self) -> str:
        """The id of its provenance on the page."""
        return "record-" + self.name.replace("/", "-")

    @property
    def rows(self) -> list[dict]:
        """One entry a condition or a seed."""
        return self.data["rows"]

    @property
    def command(self) -> str:
        """The command that made it."""
        return " ".join(self.provenance.get("argv", []))

    @property
    def provenance(self) -> dict:
        """Commit, versions, data hashes, seeds."""
        return self.data["provenance"]

    def row(self, condition: str, kind: str, of: str = "") -> dict | None:
        """The row of a condition under one kind of edit."""
        wanted = (condition, kind, of)
        return next((row for row in self.rows if (row["condition"], row["kind"], row["of"]) == wanted), None)

    @cached_property
    def generations(self) -> list[dict]:
        """Lines of generations.jsonl; empty where the script generates nothing."""
        return lines(self.folder / "generations.jsonl")

    @cached_property
    def vectors(self) -> list[dict]:
        """Lines of vectors.jsonl; empty where the script reads no vectors' tokens."""
        return lines(self.folder / "vectors.jsonl")

    @cached_property
    def measurements(self) -> list[dict]:
        """Lines of measurements.jsonl, every number over prompts and passages; empty where there are none."""
        return lines(self.folder / "measurements.jsonl")

    def paired(self, first: tuple[str, str, str], second: tuple[str, str, str]) -> dict | None:
        """The difference in toxicity of two rows, with its interval over prompts and runs, as run.json's are made.

        first, second: (condition, kind, of). None where one of them was not measured.
        """
        compared = []
        for wanted in (first, second):
            measured = [line for line in self.measurements if (line["name"], line["kind"], line["of"]) == wanted]
            if not measured:
                return None
            compared.append(
                by_run(
                    [{"toxicity": line["toxicity"], "continuations": []} for line in measured],
                    [line["seed"] for line in measured],
                )
            )
        values, baseline = (of_row["toxicity"] for of_row in compared)
        return Bootstrap(values.shape[1], self.data["params"]["seed"]).difference(values, baseline)

    @property
    def shares(self) -> dict:
        """Sizes and shares of the four groups (`lib.neurons.group_summary`), of the first seed."""
        return self.data if "group_shares" in self.data else self.rows[0]

    @property
    def activations(self) -> dict | None:
        """`pre`, `post`, `cosine`, `delta` `[n_layers, d_mlp]` of the first seed, where the run left them."""
        path = self.folder / "activations.safetensors"
        return load_file(path) if path.exists() else None

    @property
    def figures(self) -> list[Path]:
        """Its figures, by name."""
        return sorted((self.folder / "figures").glob("*.png"))


def lines(path: Path) -> list[dict]:
    """What a file of JSON lines holds; nothing where there is no such file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def unbounded(found: dict) -> dict:
    """An interval's missing ends as infinities: a share of DPO's cut has none where DPO's cut may be 0."""
    ends = {"mean": math.nan, "low": -math.inf, "high": math.inf}
    return (
        {key: ends[key] if value is None else value for key, value in found.items()}
        if ends.keys() <= found.keys()
        else found
    )


class Records:
    """Every record under a folder."""

    def __init__(self, root: Path):
        """Raises UserError when there is none, or when one cannot be read."""
        self.folder = root.resolve().name
        self.every: dict[str, Record] = {}
        for path in sorted(root.rglob("run.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"), object_hook=unbounded)
                known = {"script", "model", "rows", "provenance"} <= data.keys()
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{path}: not a record ({error}); run its script again or remove it.") from error
            if not known:
                raise UserError(f"{path}: no record of a script (it lacks script, model, rows or provenance).")
            name = path.parent.relative_to(root).as_posix()
            self.every[name] = Record(name, path.parent, data)
        if not self.every:
            raise UserError(f"--results {root}: holds no record (run.json); run a script first, or `make results`.")

    def get(self, name: str) -> Record | None:
        """A record by name, or None where it was not run."""
        return self.every.get(name)

    def of(self, script: str) -> list[Record]:
        """A script's main record on each model that it was run on: `<script>/<model>`, or else a sound one."""

        def second_choice(one: Record) -> tuple:
            own_place = one.name == f"{script}/{one.model.rstrip('/').split('/')[-1]}"
            return (not own_place, one.data.get("params", {}).get("protocol") == "faithful", one.name)

        main = {}
        for one in sorted((one for one in self.every.values() if one.data["script"] == script), key=second_choice):
            main.setdefault(one.model, one)
        return [main[model] for model in sorted(main)]

    def of_groups(self) -> list[Record]:
        """On each model the record of four_groups.py, or else that of patch_four_groups.py, which holds the shares."""
        by_model = {record.model: record for name in ("patch_four_groups", "four_groups") for record in self.of(name)}
        return [by_model[model] for model in sorted(by_model)]

    def row(self, run: Record, condition: str, kind: str) -> tuple[Record, dict | None]:
        """A row of a run, or of another with the same settings but for sets and controls; and which run's it is."""

        def settings(one: Record) -> dict:
            own = one.provenance.get("settings", {})
            return {key: value for key, value in own.items() if key not in ("sets", "controls")}

        alike = [one for one in self.every.values() if one.data["script"] == run.data["script"]]
        for one in [run, *(one for one in alike if settings(one) == settings(run))]:
            if row := one.row(condition, kind):
                return one, row
        return run, None

    def probes(self) -> dict[str, list[Record]]:
        """The records of `train_probe.py` as it is by default, by model, in the order of their seeds."""
        found = {}
        for one in self.every.values():
            if one.data["script"] == "train_probe" and one.data["params"]["protocol"] == "sound":
                found.setdefault(one.model, []).append(one)
        return {model: sorted(found[model], key=lambda one: one.data["params"]["seed"]) for model in sorted(found)}
