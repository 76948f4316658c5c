"""Folders of compiled operations: read-only ones, and locks of builds that are running, dead, or on another machine."""

import errno
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from univitar_ds.training.engine import compiled_ops
from univitar_ds.training.engine.compiled_ops import prepare_extensions, wait_for


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What is taught to torch, and set in the environment, is gone after a test."""
    from torch.utils import cpp_extension

    for name in ("FileBaton", "load"):
        monkeypatch.setattr(cpp_extension, name, getattr(cpp_extension, name))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv("PATH", os.environ["PATH"])


def locked(folder, age_s: float, signature=None):
    (folder / "op").mkdir(parents=True)
    lock = folder / "op" / "lock"
    for path in (folder / "op" / "build.ninja", lock):
        path.write_text("" if signature is None else json.dumps(signature))
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return lock


def gone() -> dict:
    """The signature of a process that has ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        signature = compiled_ops.signature(process.pid)
        process.kill()
    return signature


def test_an_abandoned_lock_in_an_unchanged_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = locked(tmp_path, age_s=1000)
    assert prepare_extensions() == tmp_path
    assert not lock.exists()
    assert (tmp_path / "op" / "build.ninja").exists()


def test_a_young_lock_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = locked(tmp_path, age_s=0)
    monkeypatch.setattr("univitar_ds.training.engine.compiled_ops.time.sleep", lambda _: lock.unlink())
    prepare_extensions()
    assert not lock.exists()


def test_a_lock_that_a_live_process_holds_is_waited_for_however_old(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = locked(tmp_path, age_s=1000)
    waits = []

    def release(_):
        waits.append(lock.exists())
        holder.close()

    holder = lock.open()
    monkeypatch.setattr("univitar_ds.training.engine.compiled_ops.time.sleep", release)
    prepare_extensions()
    assert waits == [True]
    assert not lock.exists()


def test_a_lock_whose_owner_is_dead_is_removed_at_once_and_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("univitar_ds.training.engine.compiled_ops.time.sleep", lambda _: pytest.fail("waited"))
    lock = locked(tmp_path, age_s=0, signature=gone())
    wait_for(lock)
    assert not lock.exists()
    assert f"{lock} was left by a killed build" in caplog.text


@pytest.mark.parametrize(
    ("signature", "said"),
    [(None, "none of your processes on this machine holds this lock"),
     ({"host": "elsewhere", "pids": "pid:[1]", "pid": 7, "began": "1"},
      "none of your processes on this machine holds this lock"),
     ("own", f"process {os.getpid()} is compiling")],
    ids=["unsigned", "of another machine", "alive"],
)  # fmt: skip
def test_a_wait_is_reported_after_five_seconds_with_the_owner_of_the_lock(
    tmp_path, monkeypatch, caplog, signature, said
):
    lock = locked(tmp_path, 0, compiled_ops.signature(os.getpid()) if signature == "own" else signature)
    now, seen = [100.0], []

    def sleep(seconds):
        now[0] += seconds
        seen.append((now[0] - 100, "waiting for" in caplog.text))
        if now[0] > 110:
            lock.unlink()

    monkeypatch.setattr("univitar_ds.training.engine.compiled_ops.time.sleep", sleep)
    monkeypatch.setattr("univitar_ds.training.engine.compiled_ops.time.monotonic", lambda: now[0])
    caplog.set_level("INFO")
    wait_for(lock)
    assert next(seconds for seconds, reported in seen if reported) <= 5.5
    assert caplog.text.count(f"waiting for {lock}: ") == 1
    assert said in caplog.text


def test_the_folder_belongs_to_the_environment_unless_one_is_named():
    assert str(prepare_extensions()).startswith(sys.prefix)


def build_module(folder: Path, name: str, value: int) -> None:
    """A compiled operation, as torch leaves it."""
    folder.mkdir(parents=True)
    (folder / "op.c").write_text(
        "#include <Python.h>\n"
        f'static struct PyModuleDef d = {{PyModuleDef_HEAD_INIT, "{name}"}};\n'
        f"PyMODINIT_FUNC PyInit_{name}(void) {{\n"
        f'  PyObject *m = PyModule_Create(&d); PyModule_AddIntConstant(m, "value", {value}); return m; }}\n'
    )
    include = sysconfig.get_paths()["include"]
    command = ["cc", "-shared", "-fPIC", f"-I{include}", str(folder / "op.c"), "-o", str(folder / f"{name}.so")]
    subprocess.run(command, check=True)


needs_python_headers = pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    reason="needs a C compiler and Python's headers",
)


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """The environment's folder on a read-only mount, and the user's cache."""
    folder = tmp_path / "environment" / "var" / "torch_extensions"
    folder.mkdir(parents=True)

    def temporary_file(*, dir, real=tempfile.TemporaryFile):  # also root, who may write anywhere, runs this
        if dir == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(dir=dir)

    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@needs_python_headers
def test_operations_compiled_on_a_read_only_mount_are_used_without_a_lock(read_only, tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    build_module(read_only / "tried_op", "tried_op", 41)
    before = sorted(read_only.rglob("*"))
    folder = prepare_extensions()
    assert folder.parts[-3:-1] == ("univitar_ds", "torch_extensions")
    assert f"torch{importlib.metadata.version('torch')}" in folder.name
    assert cpp_extension.load("tried_op", ["nowhere.cpp"]).value == 41
    assert sorted(read_only.rglob("*")) == before
    assert not list(folder.iterdir())


@needs_python_headers
@pytest.mark.parametrize("state", ["absent", "locked", "no library"])
def test_incomplete_operations_there_are_compiled_in_the_users_cache(read_only, monkeypatch, state):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "load", lambda name, *_, **__: f"built {name}")
    if state != "absent":
        build_module(read_only / "tried_op", "tried_op", 41)
        where = read_only / "tried_op" / ("lock" if state == "locked" else "tried_op.so")
        where.write_text("")
    prepare_extensions()
    prepare_extensions()  # again, as with every engine
    assert cpp_extension.load("tried_op", ["op.cpp"]) == "built tried_op"


def test_a_build_writes_its_owner_into_the_lock(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    prepare_extensions()
    baton = cpp_extension.FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    assert json.loads((tmp_path / "lock").read_text()) == compiled_ops.signature(os.getpid())
    assert not cpp_extension.FileBaton(str(tmp_path / "lock")).try_acquire()
    baton.release()
    assert not (tmp_path / "lock").exists()


def test_no_home_and_no_writable_environment_lead_to_a_folder_of_the_users(read_only, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(compiled_ops.tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.INFO):
        folder = prepare_extensions()
    assert tmp_path / f"univitar_ds-{os.getuid()}" in folder.parents
    assert (tmp_path / f"univitar_ds-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert f"{read_only} is not writable" in caplog.text


MOUNTED = """
import os, sys
from univitar_ds.training.engine import compiled_ops
sys.prefix = sys.argv[1]
folder = compiled_ops.prepare_extensions()
from torch.utils import cpp_extension
print(folder, cpp_extension.load("tried_op", ["nowhere.cpp"]).value)
"""


@needs_python_headers
def test_a_real_read_only_mount(tmp_path):
    environment = tmp_path / "environment"
    build_module(environment / "var" / "torch_extensions" / "tried_op", "tried_op", 43)
    (tmp_path / "script.py").write_text(MOUNTED)
    mount = f"mount --bind {environment} {environment} && mount -o remount,bind,ro {environment}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    command = f"{mount} && exec {sys.executable} {tmp_path / 'script.py'} {environment}"
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_EXTENSIONS_DIR": ""}
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[0].startswith(str(tmp_path / "cache"))
    assert result.stdout.split()[1] == "43"
