"""Dense probe: a linear head on the patch features, scored by semantic segmentation."""

__all__ = ["files", "probe"]
