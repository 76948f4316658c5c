"""Watching a run: what each rank does and how long, ranks that are slow or hang, profiles, memory."""

__all__ = ["flight_recorder", "phases", "slow_ranks", "watchdog", "watching"]
