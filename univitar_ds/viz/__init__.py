"""Draws pages of images and videos with their patch features as colours."""

__all__ = ["cards", "fonts", "sheet", "training_images"]
