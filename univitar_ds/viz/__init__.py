"""Sheets of items and of their patch features as colours."""

__all__ = ["sheet", "training_images"]
