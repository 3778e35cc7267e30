"""Callbacks, one concern each: samples as text, throughput, the learning rate, the progress bar, results as files."""

from lit_palm.callbacks.collapse import CollapseGuard
from lit_palm.callbacks.files import MetricsFile, PredictionWriter, RolloutWriter
from lit_palm.callbacks.finite import NonFiniteGuard
from lit_palm.callbacks.last_checkpoint import LastCheckpoint
from lit_palm.callbacks.learning_rate import LearningRate
from lit_palm.callbacks.mixture import MixtureShares
from lit_palm.callbacks.preemption import Preemption
from lit_palm.callbacks.progress import ProgressBar
from lit_palm.callbacks.samples import SampleLogger
from lit_palm.callbacks.spikes import SpikeRewind
from lit_palm.callbacks.throughput import Throughput
from lit_palm.callbacks.timeline import Timeline
from lit_palm.callbacks.watchdog import Watchdog

__all__ = [
    "DEFAULTS",
    "NEED_LOGGER",
    "CollapseGuard",
    "LastCheckpoint",
    "LearningRate",
    "MetricsFile",
    "MixtureShares",
    "NonFiniteGuard",
    "PredictionWriter",
    "Preemption",
    "ProgressBar",
    "RolloutWriter",
    "SampleLogger",
    "SpikeRewind",
    "Throughput",
    "Timeline",
    "Watchdog",
]

DEFAULTS = (LearningRate, Throughput, Timeline, MixtureShares, SampleLogger, ProgressBar)
"""What the CLI adds to every run, unless the configuration has a callback of the type that `replaces()` names."""

NEED_LOGGER = (LearningRate, Throughput, Timeline, MixtureShares, SampleLogger)
"""Those of them that have nothing to do without a logger."""
