"""Copies models from S3 and from the Hugging Face hub to this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG
from univitar_ds.data.storage.address import is_path_below
from univitar_ds.data.storage.base import Storage, StorageSettings
from univitar_ds.data.storage.session import session_folder
from univitar_ds.errors import CheckpointError, DataError, first_line, writing
from univitar_ds.formats import checkpoint_dir
from univitar_ds.regular_files import read_utf8

_HUB_FILES = (
    "*.json", "*.safetensors", "*.bin", "*.txt", "*.model",
    "latest*", "*_states.pt", "*zero/*.pt",  # DeepSpeed's
    "*.metadata", "*.distcp", "*common.pt",  # dcp and Megatron-Core's
)  # fmt: skip
"""Patterns of the files of all formats, by their paths in a repository."""
_POINTERS = ("latest", "latest_universal")
"""Files of DeepSpeed with the name of the newest checkpoint's folder."""
_IN_RUN = re.compile(rf"(.+/){CHECKPOINTS}/(step-\d{{8,}})/")
_COPIED = 1 << 24


def from_s3(prefix: str, settings: StorageSettings) -> Path:
    """Copies a model on S3 into a folder, which is removed when the process ends. Returns the folder.

    Copied are the files directly below `prefix`, which ends with "/"; of a run also its last checkpoint, of a
    checkpoint in a run also the files of the run, of DeepSpeed's checkpoints also the folder of the newest one.
    Raises: CheckpointError if there are no files, or they cannot be read; StorageError if they cannot be written.
    """
    from univitar_ds.data.storage.s3 import shared_storage  # imported here, because boto3 takes a second

    in_run = _IN_RUN.fullmatch(prefix)
    root = prefix if in_run is None else in_run[1]
    folder = Path(session_folder(), "models", blake2b(root.encode(), digest_size=16).hexdigest())
    try:
        storage = shared_storage(settings)
        if not _copy(storage, storage.list(root), root, folder):
            raise CheckpointError(f"{root} has no files of its own; check the address")
        step = None if in_run is None else in_run[2]
        if step is not None or (folder / CONFIG).is_file():
            return _checkpoint(storage, root, folder, step)
        tags = [read_utf8(folder / name).strip() for name in _POINTERS if (folder / name).is_file()]
        # `zero` is part of a universal checkpoint whose own folder is named.
        for name in ("zero", *(tag for tag in tags if re.fullmatch(r"\w[\w.-]*", tag))):
            below = f"{root}{name}/"
            _copy(storage, storage.pinned_below(below), below, folder / name)
    except (DataError, UnicodeDecodeError) as error:
        raise CheckpointError(str(error)) from error
    return folder


def _checkpoint(storage: Storage, root: str, folder: Path, step: str | None) -> Path:
    """Copies the checkpoint `step` of a run, or its last one. Returns the checkpoint's folder, or the run's."""
    parent, asked = folder / CHECKPOINTS, step
    if step is None:
        _copy(storage, storage.list(f"{root}{CHECKPOINTS}/"), f"{root}{CHECKPOINTS}/", parent)
        step = checkpoint_dir.named_in(parent / checkpoint_dir.LATEST)
    below = f"{root}{CHECKPOINTS}/{step}/"
    if step is None or not _copy(storage, storage.list(below), below, parent / step):
        missing = f"{root}{CHECKPOINTS}/ has no complete checkpoint" if asked is None else f"{below} holds no files"
        raise CheckpointError(f"{missing}; copy one there")
    return folder if asked is None else parent / step


def _copy(storage: Storage, urls: Iterable[str], prefix: str, folder: Path) -> int:
    """Copies files below `prefix` to the same places in `folder`. Returns their number.

    Raises: CheckpointError if the name of an object leads out of `folder`.
    """
    count = 0
    for url in urls:
        name = url.removeprefix(prefix)
        if not name or name.endswith("/"):  # the mark of a folder
            continue
        if not is_path_below(name):
            raise CheckpointError(f"{url} would be written outside of a model's folder; rename the object")
        path = folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(url) as stream, path.open("wb") as file:
                while part := stream.read(_COPIED):
                    file.write(part)
        count += 1
    return count


def from_hub(name: str) -> Path:
    """Copies a model on the Hugging Face hub to the hub's cache, where it stays. Returns its folder there.

    Args: name: owner/name. Raises: CheckpointError if it cannot be fetched.
    """
    from huggingface_hub import errors, snapshot_download  # a dependency of transformers

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of several libraries: no connection, no such model, no permission
        remedy = "without a connection to the hub, fetch it elsewhere (hf download), and name its folder"
        if isinstance(error, errors.GatedRepoError):
            remedy = f"accept its terms on https://huggingface.co/{name}, and log in (hf auth login)"
        elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            remedy = "check the name; for a private model, log in (hf auth login)"
        raise CheckpointError(
            f"{name} is no folder here, and cannot be fetched from the hub as a model ({first_line(error)}); {remedy}"
        ) from error
