"""Sheets of examples: items with the captions that the model finds for them, and captions with the items."""

__all__ = ["item_sheet", "text_sheet"]
