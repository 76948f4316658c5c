"""Images to look at: sheets of items and their patch features as colours."""

__all__ = ["sheet", "training_images"]
