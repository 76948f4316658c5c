"""The folder for optimizer states on a disk."""

import shutil
from types import SimpleNamespace

import pytest

from univitar_ds.errors import ConfigError, StorageError
from univitar_ds.training.engine.disk import PREFIX, check_space, folder_for, with_folder


def on(path, **section):
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": path, **section}}}


def test_each_use_has_its_own_folder_and_removes_it_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DISK_OF_TEST", str(tmp_path))
    (tmp_path / f"{PREFIX}of-the-user").mkdir()
    (tmp_path / "file").write_text("kept")
    one, two = folder_for(on("$DISK_OF_TEST")), folder_for(on(str(tmp_path)))
    assert one.path != two.path
    (one.path / "state.swp").write_text("written")
    one.remove()
    one.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", two.path.name, f"{PREFIX}of-the-user"])
    two.remove()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_of_a_process_that_has_ended_is_removed_by_the_next(tmp_path):
    left = folder_for(on(str(tmp_path)))
    kept = tmp_path / f"{PREFIX}left"
    shutil.copytree(left.path, kept)  # with a lock that no process holds
    folder_for(on(str(tmp_path))).remove()
    assert not kept.exists()
    assert left.path.exists()
    left.remove()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$NOT_SET_OF_TEST", "nvme_path names a folder on a local disk: .* the variable NOT_SET_OF_TEST is not set"),
        ("/nowhere/of/test", r"nvme_path is /nowhere/of/test, and there is no folder .*; make it, on a local disk"),
        ("/proc", r"/proc cannot be written \(.*\); name a folder on a local disk"),
    ],
)
def test_a_place_that_cannot_be_used_is_named_with_the_remedy(path, said):
    with pytest.raises(ConfigError, match=said):
        folder_for(on(path))


def test_a_disk_without_room_for_all_ranks_of_the_machine_is_named_with_both_numbers(tmp_path, monkeypatch):
    folder = folder_for(on(str(tmp_path)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7e9))
    check_space(folder, 3e9, 2)
    with pytest.raises(StorageError, match=r"has 7\.0 GB free, .* need 9\.0 GB for 3 ranks of this machine; free some"):
        check_space(folder, 3e9, 3)
    folder.remove()


def test_deepspeed_gets_the_folder_and_a_buffer_for_each_kind_of_state(tmp_path):
    folder = folder_for(on(str(tmp_path)))
    section = with_folder(on(str(tmp_path)), folder, 4)["zero_optimization"]["offload_optimizer"]
    assert section == {"device": "nvme", "nvme_path": str(folder.path), "buffer_count": 4}
    given = on(str(tmp_path), buffer_count=6)
    assert with_folder(given, folder, 4)["zero_optimization"]["offload_optimizer"]["buffer_count"] == 6
    assert given["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path)
    folder.remove()
