"""Writes checkpoints to S3. Each rank uploads an object of its own from memory.

S3 cannot rename objects, so the manifest is written last: without a manifest there is no checkpoint. Both the manifest
and `latest` are written conditionally, the manifest only if there is none, `latest` only if it is unchanged since the
save began. If two runs write to the same place, one of them therefore stops. A removal begins with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.run_folder import CHECKPOINT_FILES, CHECKPOINTS
from univitar_ds.data.storage.s3_upload import holds, put_bytes, put_content, put_if, remove
from univitar_ds.errors import DataError, StorageError, writing
from univitar_ds.formats.checkpoint.store import CheckpointStore
from univitar_ds.formats.checkpoint_dir import BEST, LATEST, MANIFEST, named_in, step_of
from univitar_ds.run_lock import still_ours
from univitar_ds.training.checkpoint.protocol import (
    CHUNK_BYTES,
    Entry,
    NotAsWritten,
    Part,
    Retention,
    Target,
    manifest_of,
)

_WRITTEN = re.compile("|".join(CHECKPOINT_FILES))


class S3Folder(Target):
    """Creates `store.url/step-<step>`, then removes the checkpoints that are not kept."""

    shares_files = False

    def __init__(self, run: Path, store: CheckpointStore, step: int, retention: Retention) -> None:
        super().__init__()
        self._run, self._store, self._step, self._retention = run, store, step, retention
        self._storage = store.storage
        self._name = f"step-{step:08d}"
        self._latest: str | None = None

    @property
    def place(self) -> str:
        return self._url(self._name)

    def begin(self, needed: int) -> None:
        still_ours(self._run)
        with writing(self._run):
            (self._run / CHECKPOINTS).mkdir(exist_ok=True)  # marks the folder of a run
        with self._storing():
            version = self._storage.present(self._url(LATEST))
            self._latest = None if version is None else version.etag
            self._remove(self._name)

    def put(self, part: Part) -> Entry:
        content, digest = memoryview(part.content), hashlib.sha256()
        assert part.offset == 0, "objects are not shared"
        for begin in range(0, len(content), CHUNK_BYTES):
            self.check_wanted()
            digest.update(content[begin : begin + CHUNK_BYTES])
        with self._storing():
            put_content(self._storage, self._url(self._name, part.name), content, digest.hexdigest(), self.check_wanted)
        return Entry(part.name, 0, len(content), digest.hexdigest())

    def check(self, entries: Sequence[Entry]) -> None:
        """Compares sizes and checksums of the stored objects with their entries. Downloads nothing: the store compared
        the bytes with the checksum when it received them.

        Raises: CheckpointError if an object is missing or differs."""
        with self._storing():
            for entry in entries:
                if not holds(self._storage, self._url(self._name, entry.name), entry.bytes, entry.sha256):
                    raise NotAsWritten(
                        f"{self._url(self._name, entry.name)} is missing or altered right after writing; let only one "
                        "run write there, and resume"
                    )

    def publish(self, entries: Sequence[Entry]) -> None:
        still_ours(self._run)
        manifest = json.dumps({"version": 1, "files": manifest_of(entries)}, indent=1)
        with self._storing():
            put_if(self._storage, self._url(self._name, MANIFEST), manifest.encode(), None)
            put_if(self._storage, self._url(LATEST), f"{self._name}\n".encode(), self._latest)
            replace_text(self._run / CHECKPOINTS / LATEST, f"{self._name}\n")  # job scripts resume if this file exists
            self.published = True
            names = {step_of(name): name for name in self._store.complete()}
            best = names.get(self._retention.best)
            if best is not None and named_in(self._run / CHECKPOINTS / BEST) != best:
                put_bytes(self._storage, self._url(BEST), f"{best}\n".encode())
                replace_text(self._run / CHECKPOINTS / BEST, f"{best}\n")
            for step in self._retention.outdated(names):
                if step != self._step:
                    self._remove(names[step])

    def clear(self) -> None:
        with suppress(Exception):  # the store does not answer, or another launch has the run
            still_ours(self._run)
            if self._storage.present(self._url(self._name, MANIFEST)) is None:
                self._remove(self._name)

    def _remove(self, name: str) -> None:
        """Removes the objects of a checkpoint, the manifest first. Other objects at its address stay."""
        urls = self._storage.below(self._url(name))
        for url in sorted(urls, key=lambda url: url != self._url(name, MANIFEST)):
            if _WRITTEN.fullmatch(url.removeprefix(f"{self._url(name)}/")):
                remove(self._storage, url)

    def _url(self, *names: str) -> str:
        return "/".join([self._store.url, *names])

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Raises: StorageError instead of a DataError of the body."""
        try:
            yield
        except DataError as error:
            sentence = StorageError(f"the checkpoint of step {self._step} was not saved: {error}")
            sentence.transient = error.transient
            raise sentence from error
