"""Where checkpoints come from: a local folder, or the Hugging Face Hub with its cache.

The Hub client itself reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, and shows the progress bar.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.errors import ModelLoadError, one_line

_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]
_TOKENIZER_FILES = [
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.jinja",
]
# One of these holds the vocabulary.
_VOCABULARY_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"]
_PROCESSOR_FILES = ["processor_config.json", "preprocessor_config.json"]

# Folders, and second copies of the weights in another layout or type: what is needed stands at the top.
_NEVER = ["*/*", "consolidated*", "*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors"]

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_CLOSED_DISK = (errno.EACCES, errno.EPERM, errno.EROFS)


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, downloaded from the Hub if `model` is not a local folder.

    Without `weights` only configuration and tokenizer are downloaded, which is enough for dummy weights.

    Raises:
        ModelLoadError: there is no such checkpoint or it cannot be had; the message says what to do.
    """
    folder = _local_folder(model, "model")
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ModelLoadError(f"model {model} is a folder without config.json: name a checkpoint's folder")
        return folder
    folder = _download(model, revision, _CONFIG_FILES + (_WEIGHT_FILES if weights else []), "model")
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"model {model} has no config.json on the Hub: name a repository of transformers' layout")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"model {model} has no *.safetensors weights on the Hub, and no other format is loaded: "
            "name a repository that has them, or convert it"
        )
    return folder


def resolve_tokenizer(name: str) -> Path:
    """Return a folder that holds a tokenizer, downloading no more than that from the Hub.

    Raises:
        ModelLoadError: there is no such tokenizer or it cannot be had; the message says what to do.
    """
    folder = _local_folder(name, "tokenizer")
    folder = folder or _download(name, None, _TOKENIZER_FILES, "tokenizer")
    if not any((folder / file).is_file() for file in _VOCABULARY_FILES):
        raise ModelLoadError(f"tokenizer {name} holds none of {', '.join(_VOCABULARY_FILES)}")
    return folder


def resolve_processor_config(model_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Return the image processor's settings from a local folder or a Hub id.

    They stand in `preprocessor_config.json`, or in newer checkpoints under `image_processor` in
    `processor_config.json`; where both are there the newer one counts, as it does in transformers.

    Raises:
        ModelLoadError: there are no such settings or they cannot be had; the message says what to do.
    """
    folder = _local_folder(model_or_path, "image processor")
    folder = folder or _download(model_or_path, revision, _PROCESSOR_FILES, "image processor")
    nested = _read_json(folder / "processor_config.json").get("image_processor")
    settings = nested or _read_json(folder / "preprocessor_config.json")
    if not isinstance(settings, dict) or not settings:
        raise ModelLoadError(
            f"image processor {model_or_path} has neither preprocessor_config.json nor image_processor "
            "in processor_config.json: name another with --image-processor"
        )
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} cannot be read: it holds no JSON object")
    return content


def _local_folder(name: str, what: str) -> Path | None:
    """The folder that `name` means, or None if it can only be a Hub id."""
    if not name:
        raise ModelLoadError(f"the {what} has an empty name: give a Hub id or a local folder")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{what} {name} is a file: name the folder that holds it")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelLoadError(f"{what} {name} does not exist: give a local folder or a Hub id such as org/name")
    return None


def _download(repo: str, revision: str | None, patterns: list[str], what: str) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=_NEVER)
        )
    # The client lets errors of its HTTP and storage libraries through, which differ from version to version.
    except Exception as error:
        raise ModelLoadError(f"{what} {repo} {_explain(error, repo, revision)}") from error


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """What went wrong and what to do about it, to follow the name of what was asked for."""
    match error:
        case HFValidationError():
            return "is neither a local folder nor a Hub id: an id looks like org/name"
        case GatedRepoError():
            return (
                f"is gated: accept its licence on {constants.ENDPOINT}/{repo}, then set HF_TOKEN to a token "
                f"of the account that did{_token_seen()}"
            )
        case RepositoryNotFoundError():
            return (
                "is neither a local folder nor on the Hub, or is private: check the name; for a private one "
                f"set HF_TOKEN to a token that may read it{_token_seen()}"
            )
        case RevisionNotFoundError():
            return f"has no revision {revision or 'main'}: name a branch, tag or commit with --revision"
        case LocalEntryNotFoundError():
            return _explain_unreachable(error)
        case HfHubHTTPError():
            return _explain_status(error.response.status_code)
        case _:
            return _explain_interrupted(error)


def _explain_unreachable(error: Exception) -> str:
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return (
            f"is not wholly in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            "unset it once to download, or name a local folder (there is none of this name)"
        )
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause.response.status_code)
    return (
        f"is not in the cache, and the Hub, {constants.ENDPOINT}, cannot be reached: "
        "check network and proxy, or name a local folder (there is none of this name)"
    )


def _explain_status(status: int) -> str:
    if status == 401:
        return f"cannot be downloaded: the Hub refuses the token: renew HF_TOKEN or unset it{_token_seen()}"
    if status == 403:
        return f"cannot be downloaded: the Hub forbids it: set HF_TOKEN to one that may read it{_token_seen()}"
    if status == 429:
        return "cannot be downloaded: the Hub limits the rate of requests: wait some minutes, or set HF_TOKEN"
    return f"cannot be downloaded: the Hub answered with status {status}: try again later"


def _explain_interrupted(error: Exception) -> str:
    numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)}
    if numbers.intersection(_FULL_DISK) or "No space left" in str(error):
        return (
            f"does not fit on the disk of the cache, {constants.HF_HUB_CACHE}: "
            "free some space, or set HF_HOME to a folder on a larger disk"
        )
    if numbers.intersection(_CLOSED_DISK):
        return f"cannot be stored: {constants.HF_HUB_CACHE} cannot be written: set HF_HOME to a folder that can"
    return (
        f"cannot be downloaded ({type(error).__name__}: {one_line(error)}): check network and proxy, then "
        "start again: finished files are kept"
    )


def _token_seen() -> str:
    return "" if huggingface_hub.get_token() else " (no token is set)"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
