"""What a script works on: the base model and the texts, and for each seed a probe, a model after DPO and their means.

`begin` checks what was given, makes what is missing, and opens the output folder. `Inputs` and `Run` are what the
script then reads; `lib.table` measures the conditions that it adds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lib import (
    artifacts,
    chain,
    checkpoints,
    controls,
    dry_run,
    evaluation,
    generation,
    models,
    neurons,
    offsets,
    probes,
    released,
    remote,
)
from lib.cli import default_scorer
from lib.controls import Control
from lib.data import Dataset
from lib.errors import UserError
from lib.interventions import Plan
from lib.probes import Probe
from lib.protocol import Protocol, chosen_protocol

HOSTED_BATCH = 48  # prompts at once on a server with --batch-size auto: its memory is not known here
ENOUGH_LEFT = 0.99  # cosine of DPO's update, as rounded, with itself; below it is said
# Of options that a script does not have.
DEFAULTS = {
    "seeds": None, "preset": None, "updates": None, "probe": None, "post": None, "controls": "none", "holdout": False,
    "protocol": "sound", "released": [], "raw_text": False, "export": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed's probe, model after DPO, and both models' mean activations; None is what the script does not need."""

    seed: int
    means_from: str  # prompts that means and groups come from: those of the effects (`same`), or `held_out` ones
    probe: Probe | None
    probe_file: Path | None
    post: Any  # nnsight model
    post_source: models.Source | None
    pre_means: neurons.Means | None
    post_means: neurons.Means | None


@dataclass(kw_only=True)
class Inputs:
    """What one run of a script works on, and where it writes."""

    script: str
    options: dict
    protocol: Protocol
    seeds: list[int]
    source: models.Source
    base: Any  # nnsight model
    device: str
    dtype: str
    batch_size: int
    remote: Any  # False, "local" or the NDIF service
    prompts: Dataset  # that effects are measured on
    mean_prompts: dict[str, Dataset]  # `same`, and `held_out` with --holdout
    measures: evaluation.Measures | None  # None: the script edits nothing
    probe_files: dict[int, Path | None]  # of each seed
    posts: dict[int, models.Source | None]  # models after DPO, of each seed
    first_post: Any  # the first seed's, as an nnsight model, until its run
    given_means: neurons.Means | None  # after DPO, from --post means:FILE: there is no model after DPO then
    update_left: dict | None  # of the first seed's DPO in this dtype; see `lib.weights.update_left`
    work: Path
    out: Path
    settings: dict
    started: float
    directions: dict[int, list] = field(default_factory=dict)  # seed -> controls of its probe

    def runs(self, means: bool = True) -> Iterator[Run]:
        """For every seed, and with --holdout for both choices of prompts that means come from.

        means: whether the script needs the models' mean activations.
        """
        for seed, post_source in self.posts.items():
            post, self.first_post = self.first_post, None
            if post is None and post_source:
                post = self.like_base(post_source)
            probe_file = self.probe_files[seed]
            probe = probes.load_probe(probe_file, self.base._module.config.hidden_size) if probe_file else None
            for means_from, prompts in self.mean_prompts.items():
                pre = self.means(self.base, self.source, prompts, seed) if means else None
                after = self.means(post, post_source, prompts, seed) if post and means else self.given_means
                yield Run(
                    seed=seed,
                    means_from=means_from,
                    probe=probe,
                    probe_file=probe_file,
                    post=post,
                    post_source=post_source,
                    pre_means=pre,
                    post_means=after,
                )

    def like_base(self, source: models.Source):
        """A model that was trained from the base model; see `lib.models.load_like`."""
        return models.load_like(self.base, source, self.device, self.dtype, bool(self.remote))

    def means(self, model, source: models.Source, prompts: Dataset, seed: int) -> neurons.Means:
        """A model's mean activations, as the protocol takes them, from the cache where they are."""
        return self.fitting(
            lambda: neurons.cached_means(model, source, prompts, self.batch_size, self.protocol, seed, self.remote)
        )

    def attribute(
        self, run: Run, direction: Probe | None = None, after: neurons.Means | None = None
    ) -> neurons.Attribution:
        """Attribution (Yang eq. 2) and groups (table 4) by the run's probe and means after DPO, or by others."""
        direction, means = direction or run.probe, (run.pre_means, after or run.post_means)
        return neurons.attribute(self.base, run.post, direction, *means, self.protocol, self.remote)

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

    def draws(self, run: Run) -> list[int]:
        """The draws of each random control that this run's seed measures; over all seeds those of --controls."""
        return controls.draws(self.options["controls"], self.seeds.index(run.seed), len(self.seeds))

    def edit_controls(
        self, run: Run, plan: Plan, features: list[torch.Tensor], direction: Probe | None = None
    ) -> Iterator[Control]:
        """The controls of an edit at --controls, but those that are selected anew: see `lib.controls`.

        Args:
            features: see `lib.controls.of_plan`.
            direction: that the edit was chosen by; None: the run's probe.
        """
        if self.options["controls"] == "none":
            return
        drawn = list(controls.of_plan(plan, self.draws(run), run.seed, features))
        yield from drawn
        if plan.kind == "shift":
            every = torch.ones_like(plan.mask)
            dosed = [control for control in drawn if control.name in controls.DOSED]
            edits = [replace(plan, mask=every).edit(), plan.edit(), *(control.edit for control in dosed)]
            full, real, *own = self.at_weights(offsets.offsets, edits)
            yield from controls.at_dose(dosed, own, real, full)
            shift = self.at_weights(offsets.away_from, (direction or run.probe).direction, real)
            yield Control("probe_direction", plan=Plan("shift", every, 0 * shift, shift))

    def random_neurons(self, run: Run, plan: Plan) -> Iterator[Control]:
        """The control `random` alone, at --controls."""
        for draw in self.draws(run):
            generator = torch.Generator().manual_seed(controls.hash_seed(run.seed, draw))
            yield Control("random", draw, replace(plan, mask=controls.random_mask(plan.mask, generator)))

    def other_attributions(self, run: Run) -> Iterator[tuple[Control, neurons.Attribution]]:
        """What the groups are chosen anew by, at --controls: other directions, and changes of other neurons."""
        for control in self.other_directions(run):
            yield control, self.attribute(run, control.direction)
        for draw in self.draws(run):
            after = controls.reselected(run.pre_means, run.post_means, run.seed, draw)
            yield Control("reselected", draw), self.attribute(run, after=after)

    def other_directions(self, run: Run, direction: Probe | None = None) -> list[Control]:
        """What stands in the place of the run's probe, or of a `direction` that has no labels, at --controls."""
        if self.options["controls"] == "none":
            return []
        if direction:
            return list(controls.of_direction(direction, None, self.draws(run), run.seed))
        if run.seed not in self.directions:  # fitting a probe takes half a minute
            in_its_place = controls.of_direction(run.probe, run.probe_file, self.draws(run), run.seed)
            self.directions[run.seed] = list(in_its_place)
        return self.directions[run.seed]

    @property
    def circumstances(self) -> dict:
        """For a record: in what and where the numbers were computed, and how long it took."""
        return {
            "dtype": str(self.base.dtype).removeprefix("torch."),
            **({"update_left": self.update_left} if self.update_left else {}),
            "device": self.device,
            "seconds": round(time.monotonic() - self.started, 1),
            **({"remote": self.remote.record()} if self.hosted else {}),
        }

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
                say(f"Out of memory: going on with --batch-size {self.batch_size}.")


@contextmanager
def begin(
    script: str,
    options: dict,
    plan: dry_run.Workload,
    needs: tuple[str, ...] = ("probe", "post"),
    means_suffice: bool = False,
    protocol: Protocol | None = None,
) -> Iterator[Inputs]:
    """Check the options, make what is missing, load the base model, and open the output folder.

    What can be wrong with the input is found before anything is written. With --dry-run the plan is told instead, and
    the command ends.

    Args:
        plan: what the script will measure.
        needs: of `probe` and `post` (the model after DPO), what the script stands on; the rest is not made.
        means_suffice: of the model after DPO only its mean activations are needed.
        protocol: None: by --protocol and --released.
    """
    started = time.monotonic()
    options = {**DEFAULTS, **options}
    out = artifacts.resolved(Path(options["out"] or f"runs/{script}/{models.short_name(options['model'])}"))
    artifacts.check_output(out, options["overwrite"])
    if options["export"] and artifacts.resolved(Path(options["export"])).is_relative_to(out):
        raise UserError(f"--export {options['export']}: lies in the run's own folder {out}; choose a place beside it.")
    if "scorer" in options:
        options["scorer"] = default_scorer(options["model"], options["scorer"])
    protocol = protocol or chosen_protocol(options)
    if "post" in needs and (options["post"] or "").startswith("means:") and not means_suffice:
        raise UserError(f"--post {options['post']}: {script}.py runs the model after DPO itself; give lora:FOLDER.")
    seeds = options["seeds"] or [options["seed"]]

    # 1. The texts.
    prompts = chain.prompts(options)
    passages = chain.passages(options) if "scorer" in options else None
    chain.check_data(options, needs)
    mean_prompts = {"same": prompts}
    if options["holdout"]:
        if len(prompts.items) < 2:
            raise UserError("--holdout: needs at least two prompts; raise --limit or give more.")
        mean_prompts = {"held_out": prompts.half(0), "same": prompts.half(1)}
        prompts = mean_prompts["same"]

    # 2. The base model's files, and everything else that was given.
    server = remote.connect(options)
    source = chain.base_source(options)
    tokenizer, shape = chain.check_given(options, source, needs)
    measures = None
    if passages:
        choices = released.choices(protocol, shape.model_type)
        measures = evaluation.make_measures(options, choices, tokenizer, shape.max_positions, prompts, passages)
    if options["dry_run"]:
        n_post = len(seeds) * ("post" in needs and not (options["post"] or "").startswith("means:"))
        longest = shape.max_positions - generation.NEW_TOKENS
        passes, n_conditions = dry_run.passes_of(
            plan,
            tokenizer,
            [dataset.items for dataset in mean_prompts.values()],
            measures,
            batch_size=options["batch_size"],
            n_seeds=len(seeds),
            n_post=n_post,
            given_post=bool(options["post"]),
            released=longest if protocol.means_over == "last20" else None,
            hosted=bool(options["remote"]),
        )
        dry_run.tell(
            options,
            source,
            passes,
            n_conditions=n_conditions,
            n_models=2 if n_post else 1,
            first=chain.commands(options, seeds, needs, plan.commands),
            uncounted=plan.uncounted,
        )
    hosted = options["remote"] == "ndif"
    if hosted:
        remote.report(server, models.MODELS.get(options["model"], options["model"]))

    # 3. The models after DPO and the probes, made where they are missing.
    posts = {seed: chain.post_source(options, seed) if "post" in needs else None for seed in seeds}
    first = posts[seeds[0]]
    device, dtype = "cpu", options["dtype"]
    if not hosted:
        device = models.pick_device(options["device"])
        dtype = models.pick_dtype(dtype, device, [source, *([first] if first else [])])
    with_dtype = {**options, "dtype": dtype}
    probe_files = {seed: chain.probe_file(with_dtype, seed, protocol) if "probe" in needs else None for seed in seeds}
    for file in {file for file in probe_files.values() if file}:  # what is wrong with it is told now
        probes.load_probe(file, shape.d_model)

    # 4. The models in memory.
    base = models.load(source, device, dtype, hosted)
    first_post = models.load_like(base, first, device, dtype, bool(server)) if first else None
    given_means = chain.given_means(options, shape) if "post" in needs else None
    left = checkpoints.update_left(source, first, dtype) if first and not hosted else None
    if left and left["cosine"] < ENOUGH_LEFT:
        say(
            f"In {dtype} {100 * left['entries']:.0f} % of the weights that DPO changed still differ, and what is left "
            f"of its update has a cosine of {left['cosine']:.2f} with it; --dtype float32 keeps all of it."
        )

    # 5. The output folder.
    texts = {"prompts": prompts, **({"passages": passages} if passages else {})}
    determining = {**with_dtype, **(measures.identities if measures else {})}
    settings = chain.settings(determining, source, probe_files, posts, texts, device)
    with artifacts.output(out, settings, options["overwrite"]) as work:
        say(f"Output: {out}   (until it is finished: {work.name})")
        yield Inputs(
            script=script,
            options=options,
            protocol=protocol,
            seeds=seeds,
            source=source,
            base=base,
            device=device,
            dtype=dtype,
            batch_size=first_batch_size(options, base, len(prompts.items), hosted),
            remote=server,
            prompts=prompts,
            mean_prompts=mean_prompts,
            measures=measures,
            probe_files=probe_files,
            posts=posts,
            first_post=first_post,
            given_means=given_means,
            update_left=left,
            work=work,
            out=out,
            settings=settings,
            started=started,
        )


def first_batch_size(options: dict, base, n_prompts: int, hosted: bool) -> int:
    """Prompts at once: --batch-size, or what memory allows."""
    if options["batch_size"] != "auto":
        return options["batch_size"]
    return HOSTED_BATCH if hosted else min(generation.fitting_batch_size(base), n_prompts)


def say(line: str) -> None:
    """A line on stderr."""
    Console(stderr=True).print(line, soft_wrap=True, markup=False)
