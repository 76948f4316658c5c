"""A simulated GPU: training steps run on `cuda:0` of a machine without a GPU, and the device computes nothing.

It needs Linux on x86-64, a CUDA build of torch, and a C compiler. Stubs replace CUDA's libraries and the driver. They
are compiled for the installed torch.
"""

__all__ = ["attention", "gpu", "libraries", "patches", "process", "program", "step"]
