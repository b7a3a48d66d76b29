"""Many requests on one engine: queue, continuous batching, cancellation, prefixes read once. Token ids only."""

from onekernel.scheduler.request import Interruption, Request, Ticket
from onekernel.scheduler.scheduler import QueueFull, Scheduler, ShuttingDown

__all__ = ["Interruption", "QueueFull", "Request", "Scheduler", "ShuttingDown", "Ticket"]
