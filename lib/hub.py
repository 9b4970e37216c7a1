"""Everything that talks to the Hugging Face Hub: pinned downloads, and its failures as one clear line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

from lib.errors import UserError

MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]  # no .bin or .pth: those are pickles


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the Hub's and the network's failures inside the block into a UserError about `name`."""
    try:
        yield
    # HTTPError: of whichever HTTP library this version of the Hub's client uses.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{name}: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    answers = [e.response for e in causes if isinstance(e, errors.HfHubHTTPError)]
    refused = any(answer is not None and answer.status_code in {401, 403} for answer in answers)
    if refused or any(isinstance(e, errors.GatedRepoError) for e in causes):
        return "the Hub refuses access; accept its licence on its Hub page and log in (`hf auth login` or HF_TOKEN)."
    if any(isinstance(e, errors.RevisionNotFoundError) for e in causes):
        return "the Hub has no such revision; check --revision."
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in causes):
        return "the Hub has no such repository (or it is private); check the spelling, or log in with `hf auth login`."
    local = errors.LocalEntryNotFoundError
    if any(isinstance(e, errors.EntryNotFoundError) and not isinstance(e, local) for e in causes):
        return "the repository lacks a file that is needed; is it a transformers model with safetensors weights?"
    if "Consistency check failed" in str(error) or "peer closed connection" in " ".join(map(str, causes)):
        return "a download broke off; run the command again to go on with it."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the files are not in the local cache; unset it once, or give a local folder."
    return (
        "the Hub cannot be reached and the files are not in the local cache; check the network (and HF_ENDPOINT), "
        "or use --model gemma-270m with the embedded data, which need none."
    )


def model_folder(
    repository: str, revision: str | None, check: Callable[[Path, str], object], weights: bool = True
) -> tuple[Path, str]:
    """Download a model's configuration, tokenizer and safetensors (or find them in the Hub cache).

    weights: False leaves the safetensors out. `check` gets the folder with the configuration before any weight is
    fetched, and raises what is wrong with it.

    Returns: the folder and the commit. Raises UserError.
    """
    with hub_errors(repository):
        check(Path(hf_hub_download(repository, "config.json", revision=revision)).parent, repository)
        patterns = MODEL_FILES if weights else MODEL_FILES[1:]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(f"{repository}: the repository has no safetensors weights; choose a --revision that has.")
    return folder, folder.name


def dataset_file(repository: str, filename: str) -> Path:
    """Download one file of a Hub dataset (or find it in the Hub cache)."""
    with hub_errors(f"dataset {repository}"):
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
