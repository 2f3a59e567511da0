"""Diffusion and flow matching: paths, time samplers, losses, samplers, guidance, exact fields and likelihood.

Convention: t = 0 is pure noise, t = 1 is data, z = alpha(t) x + sigma(t) eps. This package knows nothing
of text, tokens or transformers.
"""

from mmgen.flow.field import Field, FiniteSet, GaussianMixture
from mmgen.flow.guide import classifier, classifier_free
from mmgen.flow.likelihood import decode, encode, interpolate, log_likelihood
from mmgen.flow.loss import WEIGHTS, flow_loss
from mmgen.flow.path import KINDS, Path
from mmgen.flow.schedule import PATHS, CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
from mmgen.flow.solve import SOLVERS, build_solver, normal, solve_adaptive
from mmgen.flow.time import TIMES, cosine_grid, log_snr_grid, shifted, shifted_grid, stratified, uniform_grid

__all__ = [
    "KINDS",
    "PATHS",
    "SOLVERS",
    "TIMES",
    "WEIGHTS",
    "CosinePath",
    "DDPMPath",
    "Field",
    "FiniteSet",
    "GaussianMixture",
    "LinearBetaPath",
    "LinearPath",
    "Path",
    "ScaledNoise",
    "VEPath",
    "build_solver",
    "classifier",
    "classifier_free",
    "cosine_grid",
    "decode",
    "encode",
    "flow_loss",
    "interpolate",
    "log_likelihood",
    "log_snr_grid",
    "normal",
    "shifted",
    "shifted_grid",
    "solve_adaptive",
    "stratified",
    "uniform_grid",
]
