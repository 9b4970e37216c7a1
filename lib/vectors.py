"""Directions and what they mean: from words, from value vectors, by SVD, and read in the vocabulary (Lee 3.1, 3.2).

Vectors that leave a function here are float64 on the CPU, whatever the model's device and dtype; a `Probe` holds
float32, as its file does.
"""

import os
from pathlib import Path

import torch

from lib.errors import UserError
from lib.families import family_of, parse_neuron, reach, value_vectors, write_gain
from lib.neurons import top, value_projections
from lib.probes import Probe
from lib.protocol import Protocol
from lib.remote import at_weights
from lib.tokens import inner_ids

SPANNED = {"sound": (128, None), "faithful": (512, 100)}  # best value vectors of an SVD; of each layer at most (Lee)


def read_words(given: str | None, option: str) -> list[str]:
    """Words of an option: a file's, separated by white space, or those between commas."""
    if given is None:
        return []
    try:
        text = Path(given).read_text(encoding="utf-8") if os.path.isfile(given) else given.replace(",", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {given}: not readable as UTF-8 text ({error}).") from error
    if not text.split():
        raise UserError(f"{option} {given}: holds no word; give some, separated by commas.")
    return text.split()


def contrast(model, away: list[str], towards: list[str], both: bool, remote=False) -> Probe:
    """Mean embedding of the `away` words minus that of the `towards` words (Yang table 7), as a direction `[d_model]`.

    A word is the mean of its sub-tokens' rows, written without a leading space, as in the released code.

    Args:
        model: nnsight.
        both: of the unembedding and the input embedding, each difference at length 1 (often one matrix). False: of the
            unembedding alone, as in the released code.
    """
    ids = [inner_ids(model.tokenizer, words) for words in (away, towards)]
    direction = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for table in ("output", "input") if both else ("output",):
        first, second = at_weights(mean_rows, model, table, ids, remote=remote)
        direction += (first - second) / (first - second).norm()
    return Probe(direction.float(), 0.0)


def concept(model, words: list[str], remote=False) -> Probe:
    """Mean unembedding of a concept's words minus the mean of all tokens, as a direction `[d_model]`."""
    own, every = at_weights(mean_rows, model, "output", [inner_ids(model.tokenizer, words), None], remote=remote)
    return Probe((own - every).float(), 0.0)


def mean_rows(model, table: str, sets: list[list[list[int]] | None]) -> torch.Tensor:
    """For each set of words the mean over words of the mean over each word's sub-tokens, `[n_sets, d_model]` float64.

    table: `output`, the unembedding, or `input`. sets: sub-tokens of each word of each set; None: every token's row.
    """
    module = model._module
    rows = (module.get_output_embeddings() if table == "output" else module.get_input_embeddings()).weight.detach()

    def mean(words: list[list[int]]) -> torch.Tensor:
        return torch.stack([rows[ids].cpu().double().mean(0) for ids in words]).mean(0)

    return torch.stack([rows.mean(0).cpu().double() if words is None else mean(words) for words in sets])


def named(model, name: str, probe: Probe, seed: int, protocol: str, written: bool, remote=False) -> Probe:
    """A direction by its name, with its own length, `[d_model]`.

    Args:
        name: `probe`; `random`, by the seed; `value:L19.N770`, a value vector; `value`, that best aligned with the
            probe; `svd:0`, a direction of the best aligned value vectors' SVD.
        protocol: `sound` or `faithful`; how many vectors SVD takes (SPANNED).
        written: value vectors as the residual stream sees them, through Gemma's norm; else raw rows.

    Raises:
        UserError: no such neuron or direction.
    """
    kind, _, rest = name.partition(":")
    if kind == "probe":
        return probe
    if kind == "random":
        return Probe(torch.randn(probe.direction.shape, generator=torch.Generator().manual_seed(seed)), 0.0)
    _, cosine = at_weights(value_projections, model, probe.unit, written, remote=remote)
    if kind == "value":
        place = int(cosine.argmax())
        if rest:
            layer, index = parse_neuron(rest, *cosine.shape, f"--vector {name}")
            place = layer * cosine.shape[1] + index
        row = at_weights(rows_of, model, torch.tensor([place]), written, remote=remote)[0]
        return Probe(row.float(), 0.0)
    n, per_layer = SPANNED[protocol]
    rows = at_weights(unit_vectors, model, ranked(cosine, per_layer)[:n], written, remote=remote)
    at = int(rest)
    if at >= min(rows.shape):
        raise UserError(f"--vector {name}: {len(rows)} value vectors have directions 0 to {min(rows.shape) - 1}.")
    return Probe(subspace(rows, at + 1)[0][at].float(), 0.0)


def ranked(cosine: torch.Tensor, per_layer: int | None = None) -> torch.Tensor:
    """Places in a flattened `[n_layers, d_mlp]` of the largest cosines first.

    per_layer: only the so many best of each layer compete, as in Lee's released code (100).
    """
    if per_layer:
        among = torch.stack([top(layer, per_layer) for layer in cosine])
        cosine = torch.where(among, cosine, -torch.inf)
    return cosine.flatten().argsort(descending=True)[: int(cosine.isfinite().sum())]


def rows_of(model, flat: torch.Tensor, written: bool) -> torch.Tensor:
    """Value vectors, `[n, d_model]` float64.

    Args:
        model: torch or nnsight.
        flat: `[n]`, places in a flattened `[n_layers, d_mlp]`.
        written: as the residual stream sees them, through Gemma's norm; else raw rows.
    """
    vectors = torch.zeros(len(flat), model.config.hidden_size, dtype=torch.float64)
    for layer in range(model.config.num_hidden_layers):
        rows = value_vectors(model, layer)  # [d_mlp, d_model]
        here = flat // len(rows) == layer
        gain = write_gain(model, layer).cpu().double() if written else 1
        vectors[here] = rows[(flat[here] % len(rows)).to(rows.device)].cpu().double() * gain
    return vectors


def unit_vectors(model, flat: torch.Tensor, written: bool) -> torch.Tensor:
    """Value vectors at length 1, `[n, d_model]` float64; see `rows_of`."""
    vectors = rows_of(model, flat, written)
    return vectors / vectors.norm(dim=1, keepdim=True)


def subspace(vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k right singular vectors of `vectors` `[n, d_model]`, `[k, d_model]`, and their shares of variance.

    SVD leaves each one's sign open: here the mean projection of `vectors` on it is above 0.
    """
    _, values, rows = torch.linalg.svd(vectors, full_matrices=False)
    directions = rows[:k] * (rows[:k] @ vectors.mean(0)).sign()[:, None]
    return directions, values[:k].square() / values.square().sum()


def nearest_tokens(model, directions: torch.Tensor, n: int = 10, normed: bool = False, remote=False) -> list[list[str]]:
    """The n tokens whose unembedding has the largest product with each direction (the logit lens; Yang table 1).

    directions `[n_directions, d_model]`. normed: after the model's final norm, as the released code projects value
    vectors (its toxic-token lists); the norm's weight changes which tokens come first.
    """
    ids = at_weights(nearest_ids, model, directions, n, normed, remote=remote)
    return [[model.tokenizer.decode([i]) for i in row] for row in ids]


def nearest_ids(model, directions: torch.Tensor, n: int, normed: bool) -> list[list[int]]:
    """Token ids of `nearest_tokens`."""
    unembedding = model._module.get_output_embeddings().weight
    directions = directions.to(unembedding.device, unembedding.dtype)
    nearest = []
    with torch.no_grad():
        if normed:
            directions = reach(model._module, family_of(model).final_norm)(directions)
        for part in directions.split(16):  # products over 262,144 tokens are 1 MB a direction
            nearest += (part @ unembedding.T).float().topk(n).indices.tolist()
    return nearest


def lenses(model, directions: torch.Tensor, protocol: Protocol, n: int = 10, remote=False) -> dict[str, list]:
    """The n nearest tokens of each direction, by each way that the protocol reads them: `raw`, `normed` or both."""
    ways = {"raw": False, "normed": True} if protocol.lens == "both" else {"normed": True}
    return {name: nearest_tokens(model, directions, n, normed, remote) for name, normed in ways.items()}
