"""The training loop, its optimiser with averaged weights, checkpoints and logs."""
