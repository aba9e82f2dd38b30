"""Search methods, a file each."""

from .best_of_n import BestOfN
from .blockwise import Blockwise
from .rbf import RBF
from .search_over_paths import SearchOverPaths
from .smc import SMC, log_z
from .svdd import SVDD

__all__ = ["RBF", "SMC", "SVDD", "BestOfN", "Blockwise", "SearchOverPaths", "log_z"]
