"""Fault suites: each module is a command that runs whole trainings and breaks them."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
