"""Diffusion and flow matching: paths, time samplers, losses, solvers and guidance.

Convention: t = 0 is pure noise, t = 1 is data, z = alpha(t) x + sigma(t) eps. This package knows nothing
of text, tokens or transformers.
"""
