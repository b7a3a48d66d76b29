"""GET /openapi.json: the OpenAPI 3.1 document, made from the table of routes and the structs that check the bodies."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import onekernel
from onekernel.server.routes import EVENTS, JSON, OPERATIONS, Operation

PATH = "/openapi.json"
REFERENCE = "#/components/schemas/{name}"
# Beside 200: of every path, then of those with a body.
ERRORS = {"401": "The key is missing or wrong", "403": "The Host or the Origin is not allowed"}
BODY_ERRORS = {
    "400": "A field is wrong, or the prompt does not fit; the message names it",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "429": "The queue is full; Retry-After says when to try again",
    "503": "The server is shutting down",
}


async def openapi(request: Request) -> Response:
    return JSONResponse(document())


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    structs = {operation.fields for operation in OPERATIONS if operation.fields is not None}
    ordered = sorted(structs, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        if operation.shown:
            path = operation.path.replace(":path", "")
            paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    paths[PATH] = {
        "get": {
            "summary": "This document",
            "responses": {"200": _answer("It", JSON, {"type": "object"}), **_errors(PATH)},
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "onekernel", "version": onekernel.__version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **ERROR_SCHEMAS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


# Of one event of a stream; comments keep the connection alive.
EVENT_SCHEMA = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}

ERROR_SCHEMAS: dict[str, Any] = {
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def _operation(operation: Operation) -> dict[str, Any]:
    schema = {"type": "object", "required": list(operation.required)}
    forms = {JSON: schema, EVENTS: EVENT_SCHEMA}
    content = {kind: {"schema": forms.get(kind, {"type": "string"})} for kind in operation.content}
    made: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(operation.path)},
    }
    if operation.fields is not None:
        reference = {"$ref": REFERENCE.format(name=operation.fields.__name__)}
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": reference}}}
        made["responses"] |= {status: _error(text, operation.path) for status, text in BODY_ERRORS.items()}
    if "{model" in operation.path:
        made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        made["responses"]["404"] = _error("There is no such model", operation.path)
    if operation.path == "/ready":
        made["responses"]["503"] = _answer("The queue is full", JSON, schema)
    if operation.path == "/health":
        made["responses"]["503"] = _answer("The engine has failed", JSON, schema)
    return made


def _errors(path: str) -> dict[str, Any]:
    return {status: _error(text, path) for status, text in ERRORS.items()}


def _error(text: str, path: str) -> dict[str, Any]:
    form = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
    return _answer(text, JSON, {"$ref": REFERENCE.format(name=form)})


def _answer(text: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema}}}
