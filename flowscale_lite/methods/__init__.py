"""Search methods, a file each."""

from .best_of_n import BestOfN
from .rbf import RBF

__all__ = ["RBF", "BestOfN"]
