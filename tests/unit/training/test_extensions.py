import os
import time

from univitar_ds.training.extensions import prepare_extensions


def locked(folder, age_s: float):
    (folder / "op").mkdir()
    lock = folder / "op" / "lock"
    for path in (folder / "op" / "build.ninja", lock):
        path.write_text("")
        os.utime(path, (time.time() - age_s,) * 2)
    return lock


def test_a_lock_that_nobody_holds_in_a_still_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = locked(tmp_path, age_s=1000)
    assert prepare_extensions() == tmp_path
    assert not lock.exists()
    assert (tmp_path / "op" / "build.ninja").exists()


def test_a_young_lock_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = locked(tmp_path, age_s=0)
    monkeypatch.setattr("univitar_ds.training.extensions.time.sleep", lambda _: lock.unlink())
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
    monkeypatch.setattr("univitar_ds.training.extensions.time.sleep", release)
    prepare_extensions()
    assert waits == [True]
    assert not lock.exists()


def test_the_folder_belongs_to_the_environment_unless_one_is_named(monkeypatch):
    import sys

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(prepare_extensions()).startswith(sys.prefix)
