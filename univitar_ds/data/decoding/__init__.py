"""Decoding in other processes, which may die or hang of what they read, into memory that the trainer shares."""

__all__ = ["decode_job", "pipeline", "task_pool"]
