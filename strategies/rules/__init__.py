"""Gradient rules: what papers do to a step's gradients between pass and optimizer."""

from flsplit.server.rules import GradientRule
from flsplit.strategies.rules.cut_gradient_averaging import CutGradientAveraging
from flsplit.strategies.rules.leader_alignment import LeaderAlignment
from flsplit.strategies.rules.split_lr import SplitLr

__all__ = ["CutGradientAveraging", "GradientRule", "LeaderAlignment", "SplitLr"]
