"""What smashed data and gradients give away: attacks and estimators, on arrays and on runs."""

from flsplit.client_parts.distance import distance_correlation
from flsplit.privacy.accountant import epsilon, gaussian_epsilon
from flsplit.privacy.dependence import dcor_unbiased, mutual_information
from flsplit.privacy.hijack import Hijack
from flsplit.privacy.inversion import invert
from flsplit.privacy.label_inference import auc, cluster_attack, cosine_attack, norm_attack
from flsplit.privacy.membership import loss_membership, nearest_membership
from flsplit.privacy.reconstruction import Reconstruction, reconstruct, ssim
from flsplit.privacy.recording import Record, RecordedRun, RecordedStep, read_recording
from flsplit.privacy.replay import Smashing, attack_inputs, attack_labels
from flsplit.privacy.same_run import check_undefended
from flsplit.privacy.simulation import Simulation, simulate

__all__ = [
    "Hijack",
    "Reconstruction",
    "Record",
    "RecordedRun",
    "RecordedStep",
    "Simulation",
    "Smashing",
    "attack_inputs",
    "attack_labels",
    "auc",
    "check_undefended",
    "cluster_attack",
    "cosine_attack",
    "dcor_unbiased",
    "distance_correlation",
    "epsilon",
    "gaussian_epsilon",
    "invert",
    "loss_membership",
    "mutual_information",
    "nearest_membership",
    "norm_attack",
    "read_recording",
    "reconstruct",
    "simulate",
    "ssim",
]
