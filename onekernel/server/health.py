"""GET /health, /ready, /version, /props and /metrics: what runs here, and how it is doing."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import onekernel
from onekernel.server.service import Service


async def health(request: Request) -> Response:
    """200 while the process can serve requests at all."""
    service: Service = request.app.state.service
    if service.scheduler.failure is not None:
        return JSONResponse({"status": "failed", "error": repr(service.scheduler.failure)}, 503)
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 if a request would be taken on now."""
    scheduler = request.app.state.service.scheduler
    status = {"waiting": scheduler.waiting, "running": scheduler.running}
    if scheduler.accepts:
        return JSONResponse({"status": "ready", **status})
    return JSONResponse({"status": "busy", **status}, 503, {"retry-after": "1"})


async def version(request: Request) -> Response:
    return JSONResponse({"version": onekernel.__version__})


async def props(request: Request) -> Response:
    """The facts that llama.cpp's clients read here, and more about the engine."""
    service: Service = request.app.state.service
    sampling = service.model.tokenizer.default_sampling
    scheduler, settings, engine = service.scheduler, service.settings, service.model.engine
    facts: dict[str, Any] = {
        "model_alias": settings.model_name,
        "model_path": service.model.name,
        "build_info": f"onekernel {onekernel.__version__}",
        "total_slots": scheduler.most_running,
        "default_generation_settings": {
            "n_ctx": service.max_context,
            "params": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,
            },
        },
        "modalities": {"vision": False, "audio": False},
        "backend": engine.name,
        "device": service.device,
        "slots_of_a_step": engine.most_slots,
        "memory": {
            "free": engine.memory_free(),
            "state_bytes": {"empty": engine.state_bytes(0), "full": engine.state_bytes(service.max_context)},
        },
        "queue": {
            "most_running": scheduler.most_running,
            "most_waiting": scheduler.most_waiting,
            "running": scheduler.running,
            "parked": scheduler.parked,
            "waiting": scheduler.waiting,
        },
        "prefix_cache": {
            "entries": len(scheduler.cache),
            "bytes": scheduler.cache.used,
            "most_bytes": settings.cache_bytes,
        },
    }
    return JSONResponse(facts)


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
