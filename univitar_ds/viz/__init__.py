"""Images for people: sheets of items beside their patch features as colours."""

__all__ = ["sheet", "training_images"]
