"""What a run writes while it trains: metrics, events, keys of samples, images."""

__all__ = ["metrics", "run_logs", "writers"]
