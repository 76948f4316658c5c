"""Packages of the contenders of the CPU benchmark are not in the environment of the project."""

import importlib.util
import sys

from benchmarks.cpu.contenders import peers_first


def test_a_peer_is_imported_from_its_own_folder_and_found_by_nothing_else(tmp_path):
    (tmp_path / "peer_of_ours.py").write_text("VALUE = 7")
    before = list(sys.path)
    with peers_first(tmp_path):
        import peer_of_ours
    assert peer_of_ours.VALUE == 7
    assert sys.path == before
    del sys.modules["peer_of_ours"]
    assert importlib.util.find_spec("peer_of_ours") is None
