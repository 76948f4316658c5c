"""Replacements of functions of DeepSpeed's ZeRO-3 that run few Python calls for each parameter."""

__all__ = ["gradient_buckets", "hooks", "weight_fetching"]
