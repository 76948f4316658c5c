"""Pages of items and of their patch features as colours."""

__all__ = ["cards", "fonts", "sheet", "training_images"]
