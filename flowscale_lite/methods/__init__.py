"""Search methods, a file each: frozen dataclasses, which refuse a field out of range with a ValueError."""

from .beam import Beam
from .best_of_n import BestOfN
from .blockwise import Blockwise
from .gradient import Guide
from .rbf import RBF
from .search_over_paths import SearchOverPaths
from .smc import SMC, log_z
from .stopping import BestOfEnough, BestOfQuota, FirstImprovement
from .svdd import SVDD
from .zero_order import ZeroOrder
