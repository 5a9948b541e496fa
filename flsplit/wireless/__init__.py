"""Planning for a network: the cut, subchannels and powers, and what a round then costs.

Our model, after EPSL (https://arxiv.org/abs/2303.15991). The methods' latency models are in
`flsplit.wireless.rounds`, since they are called as the strategies are.
"""

from flsplit.wireless.clock import Costs, FleetClock
from flsplit.wireless.descent import Freedom
from flsplit.wireless.fleet import Device, Fleet, Radio, Server
from flsplit.wireless.fleet_file import load_fleet
from flsplit.wireless.latency import round_seconds, stage_breakdown
from flsplit.wireless.optimise import Optimiser, Solution, optimise
from flsplit.wireless.plan import Plan, format_plan, make_plan
from flsplit.wireless.problem import Problem
from flsplit.wireless.profile import ModelProfile, Place, profile_model
from flsplit.wireless.rates import Allocation, Rates
from flsplit.wireless.rounds import Method, Training, method_of

__all__ = [
    "Allocation",
    "Costs",
    "Device",
    "Fleet",
    "FleetClock",
    "Freedom",
    "Method",
    "ModelProfile",
    "Optimiser",
    "Place",
    "Plan",
    "Problem",
    "Radio",
    "Rates",
    "Server",
    "Solution",
    "Training",
    "format_plan",
    "load_fleet",
    "make_plan",
    "method_of",
    "optimise",
    "profile_model",
    "round_seconds",
    "stage_breakdown",
]
