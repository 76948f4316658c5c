"""What a run needs on a cluster before it is started: memory, time, loading, checkpoints, and how it scales."""

__all__ = ["cluster", "drawing", "dry_run", "items", "plan", "step_load", "sweep", "text"]
