"""Training: engine, step, curriculum, checkpoints, metrics and the loop that joins them."""
