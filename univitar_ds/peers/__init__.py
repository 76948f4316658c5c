"""Models of others that are measured beside our own: CLIP, SigLIP, SigLIP 2 and DINOv2/3, by transformers' own forward.

`families.FAMILIES` lists them, and `setup.PeerSetup` computes features of units as
`inference.workers` does.
"""

__all__ = ["families", "limits", "model", "setup"]
