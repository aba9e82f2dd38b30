"""Diffusers pipelines, tiny-flux, FLUX.1 and its relatives, as search problems."""

from diffusers import SchedulerMixin  # where a pipeline saved with our scheduler looks for it

from .hub import load
from .model import FlowModel
from .scheduler import FlowSDEScheduler
