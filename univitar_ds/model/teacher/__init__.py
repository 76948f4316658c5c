"""Frozen teachers and their features."""

__all__ = ["teacher"]
