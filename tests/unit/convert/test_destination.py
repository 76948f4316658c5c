"""The folder of a conversion: complete or absent, also after a kill at any point, and no file of the user is lost."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.distributed import RankFailed, run_distributed
from tests.support.finished import run_config, write_run
from tests.support.full import small_disk
from tests.support.golden import CASES, golden
from univitar_ds import owned
from univitar_ds.config.run_folder import EXPORT_FILES
from univitar_ds.convert import destination
from univitar_ds.convert.conversion import PROGRAMS, WRITTEN, Options, convert, write
from univitar_ds.convert.destination import KIND, new_folder
from univitar_ds.errors import CheckpointError, StorageError
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.stored_model import Tensors

ENCODER = golden(CASES[0]).folder
ALL = [*WRITTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def options(to: str, **changes) -> Options:
    return Options(grids=((1, 4, 4),) if to == "onnx" else (), **changes)


def _kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(source: Path, out: Path, to: str, reads: int = 0, call: tuple[str, str, str, int] | None = None) -> None:
    """Converts, in a process that is killed when it reads so many tensors, or at a call.

    Args: call: module, function, a part of the path that is its first argument, and the number of such calls.
    """
    read, count = Tensors.__getitem__, [0]

    def counted(self, name):
        count[0] += 1
        return _kill() if count[0] == reads else read(self, name)

    Tensors.__getitem__ = counted
    if call is not None:
        module, name, part, left = {"destination": destination, "os": os}[call[0]], *call[1:]
        function = getattr(module, name)

        def patched(path, *arguments, **named):
            nonlocal left
            left -= part in str(path)
            return _kill() if left == 0 else function(path, *arguments, **named)

        setattr(module, name, patched)
    convert(source, out, to, options(to, replace=True))


@pytest.mark.distributed
@pytest.mark.parametrize("to", ALL)
def test_after_a_kill_no_result_is_incomplete_and_the_next_conversion_works(run, tmp_path, to):
    before, out, partial = content(run), tmp_path / "out", tmp_path / ".out.partial"
    for reads in (1, 9):
        with pytest.raises(RankFailed, match="exit code -9"):
            run_distributed(killed, 1, run, out, to, reads)
        assert not out.exists()
        assert partial.is_dir()
    write(open_stored(run) if to != "release" else open_stored(run).encoder_only(), partial / "x", to, options(to))
    for path in (partial / "x").iterdir():  # as a kill after the last file leaves it
        shutil.rmtree(partial / path.name, ignore_errors=True)
        path.rename(partial / path.name)
    (partial / "x").rmdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.txt, which no conversion wrote"):
        convert(run, out, "release")
    assert len(content(partial)) > 3
    (partial / "thesis.txt").unlink()
    convert(run, out, "release")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(run) == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    "call",
    [
        ("destination", "mark", ".out.partial", 1),
        ("destination", "move_into_place", ".out.partial", 1),
        ("os", "unlink", ".out.earlier", 1),
        ("os", "unlink", ".out.earlier", 4),
        ("os", "rmdir", ".out.earlier", 1),
    ],
)
def test_a_kill_while_an_earlier_result_is_replaced_loses_neither(tmp_path, call):
    out = tmp_path / "out"
    convert(ENCODER, out, "dcp")
    before = content(out)
    with pytest.raises(RankFailed, match="exit code -9"):
        run_distributed(killed, 1, ENCODER, out, "dcp", 0, call)
    if call[1] == "move_into_place":
        assert not out.exists()
    with pytest.raises(CheckpointError, match="--force"):
        convert(ENCODER, out, "release")
    assert content(out).keys() == before.keys()
    convert(ENCODER, out, "release", Options(replace=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").is_file()


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, replace=False) as folder:
        (folder / "config.json").write_text("mine")
        with pytest.raises(CheckpointError, match="another process writes"), new_folder(out, replace=True):
            pass
        assert (folder / "config.json").read_text() == "mine"
    assert (out / "config.json").read_text() == "mine"


def test_a_conversion_works_after_a_kill_before_the_marker_file(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / f"{owned.MARK}.partial").write_text("{")
    convert(ENCODER, tmp_path / "out", "release")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "files",
    [["thesis.txt"], ["../kept/thesis.txt"], ["/etc/passwd"], ["a/b", "a"], "a", [7, None], ["model/thesis.txt"]],
)
def test_a_foreign_list_of_files_affects_nothing_outside_of_its_folder(tmp_path, files):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    convert(ENCODER, tmp_path / "out", "release")
    names = json.dumps(EXPORT_FILES)
    (tmp_path / "out" / ".univitar-ds-files").write_text(json.dumps(files))
    convert(ENCODER, tmp_path / "out", "release", Options(replace=True))
    assert content(tmp_path / "kept") == {"thesis.txt": b"mine"}
    assert json.dumps(EXPORT_FILES) == names


@pytest.mark.parametrize("to", ["hf", *ALL[2:]])
def test_a_full_disk_is_one_error_message_and_leaves_what_was_there(run, tmp_path, to):
    with small_disk(tmp_path / "disk", 12) as disk:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("univitar_ds.convert.conversion.check_space", lambda *_: None)
            convert(ENCODER, disk / "out", "release")
        before = content(disk)
        with pytest.raises(StorageError, match=r"needs 0\.1 GB and .* has 0\.0 GB free"):
            convert(run, disk / "out", to, options(to, replace=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("univitar_ds.convert.conversion.check_space", lambda *_: None)
            with pytest.raises(StorageError, match="No space left on device"):
                convert(run, disk / "out", to, options(to, replace=True))
        assert content(disk) == before


def test_a_read_only_disk_is_one_error_message(run, tmp_path):
    with small_disk(tmp_path / "disk", 100) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only file system; name a place that can be written"):
            convert(run, disk / "out", "release")


def limited(source: Path, out: Path, to: str) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        convert(source, out, to, options(to))
    except StorageError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize("to", ALL)
def test_a_limit_on_the_size_of_files_is_one_error_message(tmp_path, run, to):
    (said,) = run_distributed(limited, 1, run, tmp_path / "out", to)
    assert os.strerror(errno.EFBIG) in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to", ALL)
def test_all_files_have_the_rights_of_any_new_file(run, tmp_path, to):
    before = os.umask(0o027)
    try:
        convert(run, tmp_path / "out", to, options(to))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}
    assert owned.is_marked(tmp_path / "out", KIND)


@pytest.mark.parametrize(
    ("place", "said"),
    [("", "or a folder above"), ("..", "or a folder above"), ("inner", "is inside of"), ("a/b", "is inside of")],
)
def test_the_result_is_not_in_its_source(tmp_path, place, said):
    source = tmp_path / "all" / "model"
    for to in ("dcp", "universal"):
        shutil.rmtree(tmp_path / "all", ignore_errors=True)
        convert(ENCODER, source, to)
        before = content(tmp_path)
        with pytest.raises(CheckpointError, match=said):
            convert(source, source / place, "release", Options(replace=True))
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(CheckpointError, match=said):
            convert(source, tmp_path / "link" / place, "release", Options(replace=True))
        (tmp_path / "link").unlink()
        assert content(tmp_path) == before


def test_a_result_in_a_run_s_folder_is_allowed_beside_its_checkpoints(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "own")
    convert(own, own / "hf", "hf")
    with pytest.raises(CheckpointError, match=r"is inside of .*checkpoints"):
        convert(own, own / "checkpoints" / "hf", "hf")
