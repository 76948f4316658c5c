"""What a run needs on a cluster before it is started: memory, time, loading, checkpoints, and where it scales to."""

__all__ = ["cluster", "drawing", "dry_run", "items", "plan", "step_load", "sweep", "text"]
