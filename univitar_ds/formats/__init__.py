"""Formats of stored models (release, Hugging Face, runs, DeepSpeed and others), read and written tensor by tensor."""

__all__ = [
    "checkpoint_dir",
    "configuration",
    "elastic",
    "hf",
    "recognise",
    "release",
    "run",
    "sidecar",
    "slices",
    "stored_model",
    "weight_files",
]
