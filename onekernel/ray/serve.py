"""The server as a deployment of Ray Serve: `serve run onekernel.ray:app model=Qwen/Qwen3.5-0.8B`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.applications import Starlette

from onekernel.ray.options import Options
from onekernel.scheduler.scheduler import LEAST_RUNNING
from onekernel.server.app import make_app
from onekernel.server.service import Service

# Requests with the same header X-Session-Id go to the same replica, which has read the conversation before.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
MOST_SLOTS = 256  # that a replica may come to run at a time where nothing else is said


class Replica:
    """The server on one GPU."""

    def __init__(self, options: Options) -> None:
        self._model = options.load()
        self._service = Service(self._model, options.settings())

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray Serve asks for the ASGI application here, once the constructor is done."""
        return make_app(self._service)

    def check_health(self) -> None:
        """Ray Serve calls this every few seconds, and replaces a replica where it raises."""
        if self._service.scheduler.failure is not None:
            raise RuntimeError(f"the engine has stopped on an error: {self._service.scheduler.failure!r}")

    def __del__(self) -> None:
        """Ray Serve calls this when the last request has ended, or its time is over."""
        if hasattr(self, "_service"):
            self._service.close()
            self._model.close()


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application, for `serve run onekernel.ray:app name=value ...` or the `args` of a configuration file.

    Args:
        arguments: see Options.

    Raises:
        InvalidRequest: an option that there is not, or a value of the wrong kind.
    """
    options = Options.of(arguments)
    replicas, gpus = options.replicas_and_gpus(cluster_gpus())
    running = options.max_running or max(LEAST_RUNNING, MOST_SLOTS)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="onekernel",
        num_replicas=replicas,
        # Further requests wait at the proxies. A replica that runs fewer at a time refuses with the status 429.
        max_ongoing_requests=running + options.max_waiting,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    return deployment.bind(options)


def cluster_gpus() -> int:
    """GPUs of the cluster that this process belongs to."""
    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
