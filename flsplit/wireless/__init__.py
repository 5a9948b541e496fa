"""Planning for a network: the cut, subchannels and powers, and what a round then costs.

Our model, after Lin et al. (https://arxiv.org/abs/2303.15991). What a round consists of, each
strategy says in words of `flsplit.wireless.phases`.
"""

from flsplit.wireless.fleet import Device, Fleet, Radio, Server
from flsplit.wireless.fleet_file import load_fleet
from flsplit.wireless.fleet_plan import FleetPlan, format_plan, make_plan
from flsplit.wireless.latency import round_seconds, stage_breakdown
from flsplit.wireless.optimise import Freedom, Optimiser, Solution, optimise
from flsplit.wireless.phases import Method, Phase, Stage, Training, Where, Work
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import ModelProfile, Place, profile_model
from flsplit.wireless.rates import Allocation, Rates

__all__ = [
    "Allocation",
    "Device",
    "Fleet",
    "FleetPlan",
    "Freedom",
    "Method",
    "ModelProfile",
    "Optimiser",
    "Phase",
    "Place",
    "Problem",
    "Radio",
    "Rates",
    "Server",
    "Solution",
    "Stage",
    "Training",
    "Where",
    "Work",
    "format_plan",
    "load_fleet",
    "make_plan",
    "optimise",
    "profile_model",
    "round_seconds",
    "stage_breakdown",
]
