"""Where the checkpoint of a model lies: a local directory, or a snapshot in the hub's cache.

No torch here: whoever needs only the tokeniser resolves the model the same way.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.environment import Environment

# Nothing that could hold code or a pickle, and nothing below the top: repositories keep the same
# weights there once more in other formats.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
UNWANTED_FILES = ("*/*", "consolidated*")

COMMIT = re.compile(r"[0-9a-f]{40}")
LOCAL_PREFIXES = ("/", ".", "~")

# requests, httpx or httpx2, as the version of huggingface_hub has it: the client's base error,
# found without importing a package that may not be there.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__


def resolve_model(
    config: ModelConfig,
    environment: Environment,
    *,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The directory of a model: `config.model` itself, or the snapshot of that hub id.

    An existing path wins over a hub id of the same name. Without `config.offline` what is missing
    is downloaded, and unless the revision is a full commit an unreachable hub is an error: the
    cache may hold another commit than the branch names today.

    cache_dir, endpoint: default: huggingface_hub's own (HF_HUB_CACHE, HF_ENDPOINT).

    Raises ModelError with the fix for: not there, not in the cache, gated, unknown revision, no
    network; ConfigError for a revision of a local directory.
    """
    path = Path(os.path.expanduser(config.model))
    # os.path, because pathlib raises for names too long for a file or with a NUL in them
    if config.model and os.path.exists(path):
        if config.revision is not None:
            raise ConfigError(
                f"revision: {config.revision!r} cannot be chosen for the local path {path}",
                field="revision",
                hint="leave it out, or name a hub id",
            )
        if not path.is_dir():
            raise ModelError(
                f"{path}: a file", hint=f"name the directory that holds it: {path.parent}"
            )
        return path
    _check_hub_id(config)
    token = environment.hf_token
    try:
        pinned = config.revision is not None and COMMIT.fullmatch(config.revision)
        if not config.offline and not pinned:
            # snapshot_download answers from the cache when the hub does not: ask the hub first.
            HfApi(endpoint=endpoint, token=token).model_info(config.model, revision=config.revision)
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                cache_dir=cache_dir,
                endpoint=endpoint,
                token=token,
                local_files_only=config.offline,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except HFValidationError as error:
        raise ModelError(
            f"{config.model!r}: no such file or directory, and not a hub id (organisation/name)",
            field="model",
        ) from error
    except CONNECTION_ERRORS as error:
        raise _explain(config, error) from error


def _check_hub_id(config: ModelConfig) -> None:
    model, revision = config.model, config.revision
    if model.startswith(LOCAL_PREFIXES):
        raise ModelError(f"{model}: no such file or directory", field="model")
    # The revision becomes part of a path in the cache.
    if revision is not None and (not revision or ".." in revision or revision.startswith("/")):
        raise ConfigError(
            f"revision: {revision!r} is not a branch, tag or commit", field="revision"
        )


def _explain(config: ModelConfig, error: BaseException) -> ModelError:
    """What went wrong with the hub, and what to do about it."""
    model = config.model
    wanted = f"{model} at revision {config.revision}" if config.revision else model
    revision = f" --revision {config.revision}" if config.revision else ""
    fetch = f"run `hf download {model}{revision}` where there is a network"
    match error:
        case GatedRepoError():
            problem = "the hub gives it only to accounts that accepted its terms"
            hint = f"accept them at https://huggingface.co/{model} and set HF_TOKEN"
        case RepositoryNotFoundError():
            problem = "neither a local directory nor a model on the hub"
            hint = "check the spelling; a private model needs HF_TOKEN"
        case RevisionNotFoundError():
            problem = "the hub has the model, but not this revision"
            hint = f"see https://huggingface.co/{model}/commits for its branches, tags and commits"
        case LocalEntryNotFoundError() if config.offline:
            problem = "not a local directory, and not (completely) in the hub's cache"
            hint = f"{fetch}, or leave out --offline"
        case OfflineModeIsEnabled():
            problem = "HF_HUB_OFFLINE forbids to ask the hub"
            hint = "add --offline to serve what is in the cache, or unset HF_HUB_OFFLINE"
        case _:
            problem = f"no local directory, and the hub fails: {type(error).__name__}: {error}"
            hint = "check the network, or add --offline to serve what is in the cache"
    return ModelError(f"{wanted}: {problem}", field="model", hint=hint)
