"""The ranks of a run: who started them, how they find each other, agree, and end together."""

__all__ = ["launchers", "orphans", "preemption", "process_group"]
