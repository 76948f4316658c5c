"""Decodes media in other processes, which a file may crash or hang, into memory shared with the trainer."""

__all__ = ["children", "decode_job", "pipeline", "shared_slots", "task_pool"]
