"""A GPU in pretence: the training step on `cuda:0` of a machine without a GPU, computing nothing on the device."""
