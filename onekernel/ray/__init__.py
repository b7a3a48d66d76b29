"""More machines, through Ray: replicas on Ray Serve (`serve run onekernel.ray:app`), batch jobs on Ray Data.

All that distributes is Ray's own; see docs/ray.md.
"""

try:
    import ray as _ray  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError("Ray is not installed here: pip install 'onekernel[ray]'", name="ray") from None

from onekernel.ray.data import answer
from onekernel.ray.serve import app

__all__ = ["answer", "app"]
