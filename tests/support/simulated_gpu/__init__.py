"""A simulated GPU: training steps run on `cuda:0` of a machine without a GPU, and the device computes nothing."""
