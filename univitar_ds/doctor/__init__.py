"""Checks of machines, network, disks and run file before a run: `univitar-ds doctor`, which calls `run.examine`."""

__all__ = ["run"]
