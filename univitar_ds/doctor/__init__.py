"""Checks of machines, network, disks and run file before a run: `univitar-ds doctor`. One file per kind of check."""

__all__ = ["run"]
