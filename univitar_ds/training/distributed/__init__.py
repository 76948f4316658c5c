"""The ranks of a run: launchers, rendezvous, process groups, errors that end all ranks, and stop requests."""

__all__ = ["alarm", "groups", "launchers", "orphans", "ports", "preemption", "process_group", "rendezvous", "slurm"]
