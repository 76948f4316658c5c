"""The token-wise operations as Triton kernels, with the names and signatures of `kernels.reference`."""

from kernels.add_norm import add_norm
from kernels.patch_embed import patch_embed
from kernels.rms_norm import rms_norm
from kernels.rope2d_qk_norm import rope2d_qk_norm
from kernels.swiglu_norm import swiglu_norm

__all__ = ["add_norm", "patch_embed", "rms_norm", "rope2d_qk_norm", "swiglu_norm"]
