"""Logs of a run during training: metrics, events, keys of samples, images."""

__all__ = ["board", "metrics", "run_logs", "trackers", "writers"]
