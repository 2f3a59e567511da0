"""Diffusion and flow matching: paths, timestep distributions, losses, solvers, guidance, exact fields, likelihood.

Convention: t = 0 is pure noise, t = 1 is data, z = alpha(t) x + sigma(t) eps. The package does not depend on text,
tokens or transformers and can be used alone.

Shapes in docstrings: R samples in a batch (the first axis of z), D numbers per sample, K mixture components, N solver
steps. A time t is a scalar or has as many axes as z, so that it broadcasts against z.
"""

from mmgen.flow.adaptive import solve_adaptive
from mmgen.flow.bridge import drive
from mmgen.flow.field import Field, FiniteSet, GaussianMixture
from mmgen.flow.guide import (
    ClassifierGuide,
    Guidance,
    Guide,
    RewardGuide,
    classifier,
    classifier_free,
    combine,
    gradient_of,
)
from mmgen.flow.likelihood import Ode, bits_per_dim, slerp
from mmgen.flow.loss import WEIGHTS, FlowLoss, min_snr
from mmgen.flow.path import KINDS, Path
from mmgen.flow.schedule import PATHS, CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
from mmgen.flow.solvers import LEVELS, SOLVERS, build_solver, runge_kutta, solve
from mmgen.flow.steps import normal
from mmgen.flow.time import TIMES, cosine_grid, discrete, log_snr_grid, shifted, shifted_grid, stratified, uniform_grid

__all__ = [
    "KINDS",
    "LEVELS",
    "PATHS",
    "SOLVERS",
    "TIMES",
    "WEIGHTS",
    "ClassifierGuide",
    "CosinePath",
    "DDPMPath",
    "Field",
    "FiniteSet",
    "FlowLoss",
    "GaussianMixture",
    "Guidance",
    "Guide",
    "LinearBetaPath",
    "LinearPath",
    "Ode",
    "Path",
    "RewardGuide",
    "ScaledNoise",
    "VEPath",
    "bits_per_dim",
    "build_solver",
    "classifier",
    "classifier_free",
    "combine",
    "cosine_grid",
    "discrete",
    "drive",
    "gradient_of",
    "log_snr_grid",
    "min_snr",
    "normal",
    "runge_kutta",
    "shifted",
    "shifted_grid",
    "slerp",
    "solve",
    "solve_adaptive",
    "stratified",
    "uniform_grid",
]
