"""Peers: models of other projects that are measured for comparison, with the forward pass of transformers.

They are CLIP, SigLIP, SigLIP 2 and DINOv2/3: `families.FAMILIES` lists them. `setup.PeerSetup` computes their features
in the way of `inference.workers`.
"""

__all__ = ["families", "limits", "model", "processing", "setup", "sizes"]
