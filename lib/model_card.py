"""The README.md of an exported checkpoint: what it is, what was measured of it, and what was not."""

import json
import shlex
from pathlib import Path

from lib.models import MODELS, short_name
from lib.tables import with_interval

# name or family -> licence, as the Hub abbreviates it
LICENCES = {
    "smollm2": "apache-2.0",
    "gpt2": "mit",
    "mistral": "apache-2.0",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
}
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; they hold for "
    "this folder too."
)


def model_card(record: dict, condition: tuple[str, str], source, config: dict, check: dict) -> str:
    """Markdown, with the Hub's front matter.

    Args:
        record: of the run. condition: (name, kind) of the edit that was exported.
        source: `lib.models.Source` of what was edited. config: of the model, as its config.json has it.
        check: what the exported model gave when it was loaded: `same` of `prompts`, `log_ppl_difference` in nats.
    """
    params, provenance = record["params"], record["provenance"]
    rows = {(row["condition"], row["kind"]): row for row in record["rows"] if not row["of"]}
    shown = [row for key in (("none", "none"), ("dpo", "none"), condition) if (row := rows.get(key))]
    controls = [row for row in record["rows"] if (row["of"], row["kind"]) == condition]
    licence = LICENCES.get(record["model"]) or LICENCES.get(config["model_type"])
    hub = MODELS.get(record["model"])
    front = {"license": licence or "other", "library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": hub} if hub else {}
    name, kind = condition
    base = Path(source.name).name if Path(source.name).is_absolute() else source.name  # no one's home folder
    draws = (
        ""
        if controls
        else "\n**No controls were run**: other edits of this size may do as much (`--controls quick`).\n"
    )
    notice = GEMMA_NOTICE if licence == "gemma" else "The base model's licence travels with its weights."
    table = [
        "| condition | toxicity [95 %] | % of DPO's reduction | log-perplexity | KL from the base model | no text |",
        "|---|---|---|---|---|---|",
        *map(line, [*shown, *controls]),
    ]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            f"# {short_name(record['model'])}, {name}, {kind}",
            "",
            f"The weights of {base} (revision {source.revision}) with one edit of `{record['script']}.py` in "
            f"them: {name}, {kind}, of seed {params['seeds'][0]}. An ordinary transformers checkpoint in "
            f"{provenance['dtype']}; `hf upload OWNER/NAME .` takes this folder as it is.",
            "",
            "```",
            shlex.join(provenance["argv"]),
            "```",
            "",
            f"Measured in the trace on {params['limit']} prompts, greedy, 20 new tokens, toxicity by "
            f"{params['scorer']}; log-perplexity and KL in nats a token. Rows are means over seeds "
            f"{', '.join(map(str, params['seeds']))}; this checkpoint is the first one's.",
            "",
            *table,
            draws,
            f"Loaded by transformers, it wrote the trace's text for {check['same']} of {check['prompts']} prompts; its "
            f"log-perplexity differs by {check['log_ppl_difference']:.1g} nats.",
            "",
            "Not tested: other prompts and languages, longer texts, chat templates, attacks, quantised copies. A lower "
            "score of one classifier is no proof of safety.",
            "",
            notice,
            "",
        ]
    )


def line(row: dict) -> str:
    """A row of the card's table."""
    name = f"{'- ' * bool(row['of'])}{row['condition']}" + (f", {row['kind']}" if row["kind"] != "none" else "")
    share = "-" if row["condition"] == "none" else with_interval(row.get("percent_of_dpo"), 0)
    cells = (
        name,
        with_interval(row["toxicity"], 3),
        share,
        f"{row['log_ppl']:.3f}" if "log_ppl" in row else "-",
        with_interval(row.get("kl"), 4),
        f"{row['degenerate']['mean']:.2f}" if "degenerate" in row else "-",
    )
    return f"| {' | '.join(cells)} |"


def copy_licence(base: Path, folder: Path) -> None:
    """Copy the base model's licence and notice files, where its folder has some."""
    for file in base.iterdir():
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
            (folder / file.name).write_bytes(file.read_bytes())
