"""Training: the loop, the engines for one or many processes, the optimiser, checkpoints and logs."""
