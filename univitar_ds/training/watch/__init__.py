"""Observes a run: what each rank does and for how long, ranks that are slow or hang, profiles, memory."""

__all__ = ["flight_recorder", "phases", "slow_ranks", "watchdog", "watching"]
