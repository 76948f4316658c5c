"""The ranks of a run: their launchers, their rendezvous, their agreement, and their common end."""

__all__ = ["launchers", "orphans", "preemption", "process_group"]
