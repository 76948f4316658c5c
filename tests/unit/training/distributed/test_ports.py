"""Free ports: different ones, outside the range that the system gives to outgoing connections."""

import socket
from pathlib import Path

import pytest

from univitar_ds.training.distributed import ports
from univitar_ds.training.distributed.ports import free_ports


def test_the_ports_are_different_and_can_be_opened():
    found = free_ports(50)
    assert len(set(found)) == 50
    for port in found:
        with socket.socket() as server:
            server.bind(("", port))


def test_no_outgoing_connection_gets_such_a_port():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first <= ports._FIRST:
        pytest.skip(f"this system gives outgoing connections all ports from {first}")
    assert max(free_ports(50)) < first


def test_a_port_in_use_is_not_free(tmp_path, monkeypatch):
    (port,) = free_ports()
    (tmp_path / "range").write_text(f"{port + 1}\t60999\n")
    monkeypatch.setattr(ports, "_FIRST", port)
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    assert free_ports() == [port]
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        assert free_ports() != [port]


@pytest.mark.parametrize("text", ["", "1024\t65535\n", "nothing"])
def test_without_a_range_below_the_system_chooses(tmp_path, monkeypatch, text):
    (tmp_path / "range").write_text(text)
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    assert len(set(free_ports(3))) == 3
