"""What a method has its clients do beside the plain split step, inside autograd."""

from flsplit.client_parts.both_cuts import check_places, warn_of_second_cut
from flsplit.client_parts.client_part import ClientPart, ClientWhere, PartWhere
from flsplit.client_parts.compression import (
    Compression,
    Difference,
    HalfPrecision,
    Int8,
    LowRank,
    TopK,
)
from flsplit.client_parts.defences import LabelNoise, NoPeek, Shuffle
from flsplit.client_parts.finding import describe_parts, make_part, part_names
from flsplit.client_parts.stock import Clip, Noise, Proximal

__all__ = [
    "ClientPart",
    "ClientWhere",
    "Clip",
    "Compression",
    "Difference",
    "HalfPrecision",
    "Int8",
    "LabelNoise",
    "LowRank",
    "NoPeek",
    "Noise",
    "PartWhere",
    "Proximal",
    "Shuffle",
    "TopK",
    "check_places",
    "describe_parts",
    "make_part",
    "part_names",
    "warn_of_second_cut",
]
