"""The operations as Triton kernels, with the names and signatures of `kernels.reference`."""

from univitar_ds.kernels.add_norm import add_norm
from univitar_ds.kernels.patch_embed import patch_embed
from univitar_ds.kernels.rms_norm import rms_norm
from univitar_ds.kernels.rope2d_qk_norm import rope2d_qk_norm
from univitar_ds.kernels.sigmoid_pairs import sigmoid_pairs
from univitar_ds.kernels.softmax_pairs import softmax_norms, softmax_pairs
from univitar_ds.kernels.swiglu_norm import swiglu_norm

__all__ = [
    "add_norm", "patch_embed", "rms_norm", "rope2d_qk_norm", "sigmoid_pairs", "softmax_norms", "softmax_pairs",
    "swiglu_norm",
]  # fmt: skip
