"""Results that are written part by part, so that another process can continue: `destination.Destination`."""

__all__ = ["destination", "parts"]
