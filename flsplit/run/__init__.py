"""What all methods run on: their base classes, the step, options, callbacks, results."""

from flsplit.run.callbacks import Callback, EarlyStopping, FinishedRound, KeepBest, PrintMetrics
from flsplit.run.decoupled import DecoupledStrategy
from flsplit.run.options import LearningRate, Reduction, Shares, SplitOptions
from flsplit.run.parallel import ParallelStrategy
from flsplit.run.registry import make_strategy, strategy_names
from flsplit.run.result import SplitResult
from flsplit.run.round import Round
from flsplit.run.shares import ceil_fraction
from flsplit.run.step import Step
from flsplit.run.strategy import SplitStrategy
from flsplit.server.client_batch import ClientBatch
from flsplit.server.gradients import StepGradients

__all__ = [
    "Callback",
    "ClientBatch",
    "DecoupledStrategy",
    "EarlyStopping",
    "FinishedRound",
    "KeepBest",
    "LearningRate",
    "ParallelStrategy",
    "PrintMetrics",
    "Reduction",
    "Round",
    "Shares",
    "SplitOptions",
    "SplitResult",
    "SplitStrategy",
    "Step",
    "StepGradients",
    "ceil_fraction",
    "make_strategy",
    "strategy_names",
]
