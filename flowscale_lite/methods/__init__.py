"""Search methods, a file each."""

from .best_of_n import BestOfN
from .blockwise import Blockwise
from .funnel import Funnel
from .gradient import DPS, Guide
from .rbf import RBF
from .refine import Refine
from .search_over_paths import SearchOverPaths
from .smc import SMC, log_z
from .svdd import SVDD
from .zero_order import ZeroOrder

__all__ = [
    "DPS",
    "RBF",
    "SMC",
    "SVDD",
    "BestOfN",
    "Blockwise",
    "Funnel",
    "Guide",
    "Refine",
    "SearchOverPaths",
    "ZeroOrder",
    "log_z",
]
