"""Predicts what a run needs on a cluster: memory, time, loading, checkpoints, and scaling."""

__all__ = ["cluster", "drawing", "dry_run", "items", "plan", "simulated", "step_load", "sweep", "text"]
