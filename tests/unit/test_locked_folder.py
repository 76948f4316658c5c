"""Temporary folders with a lock, while another process removes those that it takes for abandoned."""

import fcntl
import shutil

from univitar_ds.locked_folder import LockedFolder


def test_a_folder_that_is_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(lock, kind):
        if not removed:
            removed.extend(tmp_path.iterdir())
            shutil.rmtree(removed[0])
        flock(lock, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    folder = LockedFolder(tmp_path, "of-a-rank-")
    assert folder.path.is_dir()
    assert folder.path != removed[0]
    folder.remove()
    assert list(tmp_path.iterdir()) == []
