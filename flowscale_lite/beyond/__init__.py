"""Search methods that are not in the paper: ours, a file each, in the manner of `methods`."""

from .draft import Cascade, Draft
from .refine import Refine
