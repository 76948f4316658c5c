"""Uploads a written model to the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType

from univitar_ds.errors import CheckpointError, InstallationError, StorageError, first_line
from univitar_ds.formats.recognise import HUB_NAME
from univitar_ds.formats.weight_files import WEIGHT_NAME
from univitar_ds.owned import MARK

_MOST_CHARACTERS = 300
"""Maximum length of a quoted error."""


def check_name(name: str) -> None:
    """Checks, before a long conversion, that a model can be uploaded as `name`. Nothing is sent.

    Raises: CheckpointError if `name` is not owner/name or there is no token; InstallationError without huggingface_hub.
    """
    if not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is no name on the hub; give owner/name, such as lab/photos-encoder")
    hub = _library()
    if hub.get_token() is None:
        raise CheckpointError(
            f"{name} cannot be written without a token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, name: str, *, weights_only_from_here: bool) -> str:
    """Uploads the files in `folder` in one commit. A new repository is private; an existing one keeps its visibility.

    The marker files of a conversion are left out.
    Args: weights_only_from_here: whether the commit removes weights of an earlier upload that these files do not
        replace, such as additional shards, which a loader could load instead. Other files of the repository stay.
    Returns: a sentence with the address.
    Raises: StorageError if the hub cannot be reached or rejects the upload. `folder` is kept.
    """
    hub = _library()
    try:
        api = hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        new = {
            str(path.relative_to(folder)): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(MARK)
        }
        old = api.list_repo_files(name) if weights_only_from_here else ()
        # Not `upload_folder`: it may make several commits, between which a reader gets files of two models.
        operations = [
            *(hub.CommitOperationDelete(path) for path in old if WEIGHT_NAME.fullmatch(path) and path not in new),
            *(hub.CommitOperationAdd(name, str(path)) for name, path in new.items()),
        ]
        commit = api.create_commit(name, operations, commit_message="Upload of a model by univitar-ds")
    except Exception as error:  # of several libraries: no connection, no permission, no space
        raise StorageError(
            f"{name} cannot be written on the hub ({_reason(error, hub.get_token())}); the result is whole in "
            f"{folder}. Check the name, the token and the connection, then upload it with `hf upload {name} {folder}`"
        ) from None  # the libraries' errors hold requests with the token
    return f"uploaded to {commit.commit_url}"


def _reason(error: Exception, token: str | None) -> str:
    """Returns the first line of an error, without the token."""
    text = first_line(error)
    return (text.replace(token, "***") if token else text)[:_MOST_CHARACTERS]


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InstallationError(
            f"an upload needs huggingface_hub, which cannot be imported ({error}); pip install huggingface_hub"
        ) from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request
    return huggingface_hub
