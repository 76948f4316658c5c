"""The files of a result: parts, an index, a list of items that were left out, and a folder for progress.

For `features.safetensors` the parts are `features-00000.safetensors` and so on, the index is
`features.safetensors.index.json`, and items that were left out are in `features.safetensors.bad.jsonl`. While the
result is incomplete, `.features.safetensors.progress` has the settings and a file for each finished part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from univitar_ds.atomic_write import replace_text, replacing
from univitar_ds.errors import ConfigError, writing
from univitar_ds.inference.reading import Kind, LeftOut, Rows
from univitar_ds.inference.sources import Position
from univitar_ds.inference.writing.parts import SUFFIXES, Part, check_suffix, open_part
from univitar_ds.owned import remove
from univitar_ds.regular_files import read_bytes

FORMAT = 1
_SETTINGS, _LOCK = "settings.json", "lock"
_NAMES = {r"part-\d{5,}\.json|settings\.json|lock": None}


@dataclass
class FinishedPart:
    """The record of a finished part: file, position after it, keys of its rows, and items that were left out."""

    file: str
    after: Position
    keys: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the record that `Destination.finish` has written to `path`. Raises: ConfigError for a damaged one."""
        try:
            content = json.loads(read_bytes(path))
            if content.pop("crc32", None) not in (None, _sum_of(content)):  # None: of an earlier version
                raise ValueError("other bytes than were written")
            left_out = [LeftOut(*one) for one in content["left_out"]]
            found = cls(content["file"], Position(*content["after"]), content["keys"], left_out)
            texts = [found.file, *found.keys, *(text for one in left_out for text in one)]
            if not all(isinstance(text, str) for text in texts) or not all(isinstance(at, int) for at in found.after):
                raise TypeError("a value of another type")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged; remove {path.parent} and the parts, and start again") from error
        return found


class Destination:
    """A result that is written part by part. Parts that an earlier process has finished are kept."""

    def __init__(self, out: Path) -> None:
        """Raises: ConfigError if `out` has another suffix or its folder does not exist; InstallationError if pyarrow is
        needed and not installed."""
        if out.suffix not in SUFFIXES:
            raise ConfigError(f"--out {out}: the name must end in {' or '.join(SUFFIXES)}")
        if not out.absolute().parent.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
        check_suffix(out)
        self.out = out
        self.index = out.with_name(f"{out.name}.index.json")
        self.report = out.with_name(f"{out.name}.bad.jsonl")
        self._progress = out.with_name(f".{out.name}.progress")
        self._settings: Mapping[str, Any] = {}

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[int]:
        """Locks the result for this process while the body runs. Yields the number of finished parts.

        Args: settings: everything that determines the result.
        Raises: ConfigError if there are files of another result, or another process is writing this one; StorageError
            if the folder cannot be written.
        """
        self._settings = settings
        with writing(self._progress):
            if not self._progress.is_dir():
                self._refuse_others()
                self._progress.mkdir()
            with (self._progress / _LOCK).open("ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"another process is writing {self.out}; wait for it, or end it") from None
                self._check_settings()
                yield self._count()

    def completed(self, settings: Mapping[str, Any]) -> int | None:
        """Returns the number of rows if an earlier process has completed this result, else None.

        Raises: ConfigError for the result of other settings.
        """
        if self._progress.is_dir() or not self.index.exists():
            return None
        try:
            content = json.loads(read_bytes(self.index))
            found, rows = dict(content["settings"]), sum(part["rows"] for part in content["parts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self.index} is not an index of this command; name another --out") from error
        self._compare(found, settings, f"remove {self.index.name} and its parts, or name another --out")
        return rows

    def part(self, number: int) -> FinishedPart:
        """Returns the record of a finished part. Raises: ConfigError for a damaged one."""
        return FinishedPart.read(self._record(number))

    def after(self, done: int, lengths: Sequence[int]) -> Position:
        """Returns the position after the first `done` parts.

        Args: lengths: number of files, or of bytes, of each place.
        Raises: ConfigError if a part ends before it begins, or outside of the places."""
        found = Position()
        for number in range(done):
            at = self.part(number).after
            inside = (at.place < len(lengths) and at.offset < lengths[at.place]) or at == (len(lengths), 0)
            if not (inside and found < at and at.offset >= 0):
                raise ConfigError(
                    f"{self._record(number)} is damaged: its part begins at {list(found)} and ends at {list(at)} of "
                    f"{len(lengths)} places; remove {self._progress} and the parts, and start again"
                )
            found = at
        return found

    def begin(self, number: int, kind: Kind, width: int) -> Part:
        """Returns a new part to be written. Raises: StorageError."""
        return open_part(self._path(number), kind, width)

    def finish(self, number: int, part: Part, about: FinishedPart) -> None:
        """Completes a part. Raises: StorageError."""
        part.finish()
        content = {"file": about.file, "after": about.after, "keys": about.keys, "left_out": about.left_out}
        replace_text(self._record(number), json.dumps({**content, "crc32": _sum_of(content)}))

    def name_of(self, number: int) -> str:
        """Returns the file name of a part."""
        return self._path(number).name

    def complete(self) -> tuple[int, int, int]:
        """Writes the index and the list of items that were left out, after the last part.

        Returns: the numbers of parts, rows and items left out.

        Raises: StorageError.
        """
        count = self._count()
        parts, bad = [], 0
        with replacing(self.report) as partial, partial.open("w", encoding="utf-8") as file:
            for number in range(count):
                about = self.part(number)
                parts.append({"file": about.file, "rows": len(about.keys)})
                bad += len(about.left_out)
                file.writelines(json.dumps(one._asdict()) + "\n" for one in about.left_out)
        if not bad:
            self.report.unlink()
        with replacing(self.index) as partial, partial.open("w", encoding="utf-8") as file:
            head = {"format": FORMAT, "settings": self._settings, "left_out": bad, "parts": parts}
            file.write(json.dumps(head)[:-1])
            for column in ("key", "part", "row"):
                file.write(f', "{column}": [')
                file.writelines(_joined(self._column(column, number) for number in range(count)))
                file.write("]")
            file.write("}\n")
        remove(self._progress, _NAMES)
        return count, sum(part["rows"] for part in parts), bad

    def _column(self, column: str, number: int) -> list[Any]:
        keys = self.part(number).keys
        return {"key": keys, "part": [number] * len(keys), "row": list(range(len(keys)))}[column]

    def _path(self, number: int) -> Path:
        return self.out.with_name(f"{self.out.stem}-{number:05d}{self.out.suffix}")

    def _record(self, number: int) -> Path:
        return self._progress / f"part-{number:05d}.json"

    def _count(self) -> int:
        """Returns the number of finished parts, whose files exist."""
        count = 0
        while self._record(count).is_file() and self._path(count).is_file():
            count += 1
        return count

    def _refuse_others(self) -> None:
        parts = re.compile(re.escape(self.out.stem) + r"-\d{5,}" + re.escape(self.out.suffix))
        names = sorted(os.listdir(self.out.absolute().parent))
        others = [name for name in names if parts.fullmatch(name) or name in (self.index.name, self.report.name)]
        if others:
            raise ConfigError(
                f"{self.out.with_name(others[0])} is part of another result; remove it, or name another --out"
            )

    def _check_settings(self) -> None:
        path = self._progress / _SETTINGS
        if not path.is_file():
            replace_text(path, json.dumps(self._settings))
            return
        try:
            found = dict(json.loads(read_bytes(path)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged; remove {self._progress} and the parts, and start again") from error
        self._compare(
            found,
            self._settings,
            f"give those of the first call, or remove {self._progress} and the parts to start again",
        )

    def _compare(self, found: Mapping[str, Any], settings: Mapping[str, Any], remedy: str) -> None:
        wanted = json.loads(json.dumps(settings))
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if differing:
            raise ConfigError(f"{self.out} was begun with different {' and '.join(sorted(differing))}; {remedy}")


def _sum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _joined(lists: Iterator[list[Any]]) -> Iterator[str]:
    """Yields the entries of all lists as JSON, with commas."""
    comma = ""
    for values in lists:
        if values:
            yield comma + json.dumps(values)[1:-1]
            comma = ", "


def add_rows(part: Part, about: FinishedPart, rows: Rows) -> None:
    """Appends the rows of a unit to a part, and records them in `about`. Raises: StorageError."""
    part.add(rows)
    about.keys += rows.keys
    about.left_out += rows.left_out
    about.after = rows.unit.after
