"""What the experiments stand on: the probe and the model after DPO, from the shared options.

Each artifact is made by its own command when it is missing (`experiments/train_probe.py`, `python -m dpo`) and found in
the cache afterwards. `commands` names those commands.
"""

import signal
import subprocess
import sys
from pathlib import Path

import click

from lib import checkpoints, data, neurons, probes
from lib.artifacts import file_sha256
from lib.cli import default_data, default_limit
from lib.errors import UserError
from lib.families import Shape, shape_of
from lib.models import Source, on_hub, resolve
from lib.protocol import PROTOCOLS, Protocol
from lib.tokens import check_vocabulary


def prompts(options: dict) -> data.Dataset:
    """Prompts by --prompts and --limit."""
    name = options["model"]
    return data.prompts(default_data(name, options["prompts"])).first(default_limit(name, options["limit"]))


def passages(options: dict) -> data.Dataset:
    """Passages by --passages, a third as many as prompts."""
    name = options["model"]
    limit = default_limit(name, options["limit"])
    return data.passages(default_data(name, options["passages"])).first(limit and (limit + 2) // 3)


def check_data(options: dict, needs: tuple[str, ...]) -> None:
    """Read pairs and comments that will be needed, so that a fault in them is told now and not after minutes."""
    if "post" in needs and not options["post"]:
        data.pairs(options["pairs"])
    if "probe" in needs and not options["probe"]:
        data.comments(options["comments"])


def base_source(options: dict) -> Source:
    """The base model by --model and --revision."""
    return resolve(options["model"], options["revision"], weights=needs_weights(options))


def needs_weights(options: dict) -> bool:
    """Whether the base model's weights have to be on this machine."""
    name = options["model"]
    fetched = on_hub(name) and not Path(name).is_dir()
    return options["remote"] != "ndif" and not (fetched and options["dry_run"])


def commands(options: dict, seeds: list[int], needs: tuple[str, ...], more: list[list[str]]) -> list[str]:
    """What a run begins with where the cache lacks it; more: arguments of `python -m dpo`, of each further model."""
    lines = []
    for seed in seeds:
        common = f"--model {options['model']} --seed {seed}"
        if "probe" in needs and not options["probe"]:
            lines.append(f"python experiments/train_probe.py {common}")
        if "post" in needs:
            trained = [[], *more] if not options["post"] else more
            common = " ".join([common, *dose(options)])
            lines += [" ".join([f"python -m dpo {common}", *arguments]) for arguments in trained]
    return lines


def dose(options: dict) -> list[str]:
    """Arguments of `python -m dpo` by --preset and --updates."""
    given = (("--preset", options["preset"]), ("--steps", options["updates"]))
    return [part for name, value in given if value for part in (name, str(value))]


def probe_file(options: dict, seed: int, protocol: Protocol) -> Path:
    """--probe, or the file that train_probe.py makes for a seed."""
    if options["probe"]:
        return given_probe(options)
    features = next(name for name, known in PROTOCOLS.items() if known.probe_features == protocol.probe_features)
    chosen = ["--comments", options["comments"], "--protocol", features, "--seed", str(seed)]
    return trained_probe(*_common(options), *_remotely(options), *chosen)


def given_probe(options: dict) -> Path:
    """The file of --probe. Raises UserError: there is none."""
    if not Path(options["probe"]).is_file():
        raise UserError(f"--probe {options['probe']}: no such file; give a probe's safetensors file.")
    return Path(options["probe"])


def trained_probe(*arguments: str) -> Path:
    """The file that train_probe.py makes, or has made, with these arguments."""
    script = Path(__file__).parents[1] / "experiments" / "train_probe.py"
    if not script.is_file():
        raise UserError(f"{script} is not there to train a probe; work in a checkout of dpo-neurons, or give --probe.")
    return run(str(script), *arguments) / "probe.safetensors"


def post_source(options: dict, seed: int, *more: str) -> Source | None:
    """--post, or the checkpoint that `python -m dpo` makes for a seed; more: further arguments of that command.

    None for `--post means:FILE`: there is no model then.
    """
    hosted = options["remote"] == "ndif"
    kind, _, rest = (options["post"] or "").partition(":")
    if kind == "means":
        return None
    if kind == "lora" and not (Path(rest) / "adapter_config.json").is_file():
        raise UserError(f"--post {options['post']}: holds no adapter_config.json; give a folder in PEFT's format.")
    if options["post"]:
        return resolve(rest if kind == "lora" else options["post"], option="--post", weights=not hosted)
    if hosted:
        raise UserError(
            "--remote: DPO does not train on a server. Give --post lora:FOLDER (`python -m dpo --trainable lora:16`, "
            "where the weights are) or --post means:FILE (a model's mean activations after DPO)."
        )
    chosen = [*_common(options), *dose(options), "--pairs", options["pairs"], "--seed", str(seed)]
    return resolve(str(run("-m", "dpo", *chosen, *more)))


def given_means(options: dict, shape: Shape) -> neurons.Means | None:
    """Mean activations after DPO of --post means:FILE (see `lib.neurons.load_activations`), else None."""
    kind, _, file = (options["post"] or "").partition(":")
    return neurons.load_activations(file, (shape.n_layers, shape.d_mlp)) if kind == "means" else None


def check_given(options: dict, source: Source, needs: tuple[str, ...]):
    """Check what was given before anything is made from it: model, tokenizer, probe, model or means after DPO.

    Returns: the base model's tokenizer and its shape (`lib.families.Shape`). Raises UserError.
    """
    hosted = options["remote"] == "ndif"
    tokenizer, shape = checkpoints.read_tokenizer(source), shape_of(Path(source.path), source.name)
    check_vocabulary(tokenizer, shape.vocabulary, source.name)
    if needs_weights(options):
        checkpoints.check(source)
    if "probe" in needs and options["probe"]:
        probes.load_probe(given_probe(options), shape.d_model)
    if "post" in needs and options["post"]:
        given_means(options, shape)
        if not hosted and not (options["dry_run"] and would_be_fetched(options["post"])):
            post = post_source(options, 0)
            if post:
                check_like_base(post, tokenizer, shape, f"--post {post.name}")
    return tokenizer, shape


def check_like_base(source: Source, tokenizer, shape: Shape, given: str) -> None:
    """Check a model that was trained from the base model. Raises UserError: unreadable, or of another model.

    tokenizer, shape: the base model's. given: names the model in a message.
    """
    checkpoints.check(source)
    checkpoints.check_same_vocabulary(tokenizer, source, given)
    theirs = shape_of(Path(source.path), source.name)
    for name in vars(shape).keys() - {"max_positions"}:  # models of one kind may have been trained for other lengths
        if getattr(theirs, name) != getattr(shape, name):
            raise UserError(
                f"{given}: its {name} is {getattr(theirs, name)}, the base model's is {getattr(shape, name)}; "
                "it is another model."
            )


def would_be_fetched(post: str) -> bool:
    """Whether --post is a model of the Hub, or an adapter, whose base model may be."""
    return (
        (Path(post) / "adapter_config.json").is_file()
        or post.startswith("lora:")
        or (on_hub(post) and not Path(post).is_dir())
    )


def run(*command: str) -> Path:
    """Run one of the project's own commands (its progress goes to the screen); its last line of output is a path.

    Raises:
        click.exceptions.Exit: with the command's exit code; it has said on stderr what was wrong.
    """
    # A SIGTERM ends the command too. While that starts, the signal is only noted: an exception would lose its handle.
    noted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
            try:
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
                if noted:
                    sys.exit(128 + noted[0])
                said, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        raise click.exceptions.Exit(process.returncode)
    return Path(said.strip().splitlines()[-1])


def settings(
    options: dict,
    source: Source,
    probe_files: dict[int, Path | None],
    posts: dict[int, Source | None],
    texts: dict[str, data.Dataset],
    device: str,
) -> dict:
    """All that determines a run's numbers, as hashes and values: an unfinished run goes on only under the same.

    Args:
        probe_files, posts: of each seed; None where the script needs none.
        texts: `prompts`, and `passages` where effects are measured.
    """
    texts_and_models = {"model", "revision", "device", "prompts", "passages", "comments", "pairs", "limit"}
    own = texts_and_models | {"preset", "updates", "probe", "post"}
    screen = {"out", "overwrite", "dry_run", "raw_text", "verbose", "remote_timeout", "export", "export_condition"}
    chosen = {key: value for key, value in options.items() if key not in own | screen}
    hashes = {name: dataset.sha256 for name, dataset in texts.items()}
    counts = {f"n_{name}": len(dataset.items) for name, dataset in texts.items()}
    kind, _, file = (options["post"] or "").partition(":")
    means = f"means:{file_sha256(Path(file))}" if kind == "means" else None
    seeds = {
        str(seed): {
            "probe": probe_files[seed] and file_sha256(probe_files[seed]),
            "post": post.revision if post else means,
        }
        for seed, post in posts.items()
    }
    return {**chosen, **hashes, **counts, "model": source.revision, "runs": seeds, "device": device}


def _common(options: dict) -> list[str]:
    names = ("model", "revision", "device", "dtype")
    return [part for name in names if options[name] for part in (f"--{name}", options[name])]


def _remotely(options: dict) -> list[str]:
    if options["remote"] != "ndif":
        return []
    return ["--remote", "--remote-timeout", str(options["remote_timeout"])]
