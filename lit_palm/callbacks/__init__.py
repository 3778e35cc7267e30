"""Callbacks, one concern each: samples as text, throughput, the learning rate, the progress bar, results as files."""

from lit_palm.callbacks.files import MetricsFile, PredictionWriter, RolloutWriter
from lit_palm.callbacks.last_checkpoint import LastCheckpoint
from lit_palm.callbacks.learning_rate import LearningRate
from lit_palm.callbacks.mixture import MixtureShares
from lit_palm.callbacks.progress import ProgressBar
from lit_palm.callbacks.samples import SampleLogger
from lit_palm.callbacks.throughput import Throughput

__all__ = [
    "DEFAULTS",
    "NEED_LOGGER",
    "LastCheckpoint",
    "LearningRate",
    "MetricsFile",
    "MixtureShares",
    "PredictionWriter",
    "ProgressBar",
    "RolloutWriter",
    "SampleLogger",
    "Throughput",
]

DEFAULTS = (LearningRate, Throughput, MixtureShares, SampleLogger, ProgressBar)
"""What the CLI adds to every run, unless the configuration has a callback of the type that `replaces()` names."""

NEED_LOGGER = (LearningRate, Throughput, MixtureShares, SampleLogger)
"""Those of them that have nothing to do without a logger."""
