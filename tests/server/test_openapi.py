"""The OpenAPI document is true: requests made from it get the answers that it foretells, and never a 5xx."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import ServerThread, scripted_model

from onekernel.server.openapi import document
from onekernel.server.routes import OPERATIONS

EXAMPLES = 15  # of each operation
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

schema = schemathesis.openapi.from_dict(document())


def test_the_document_names_every_path() -> None:
    shown = {operation.path.replace(":path", "") for operation in OPERATIONS if operation.shown}
    assert set(document()["paths"]) == {*shown, "/openapi.json"}


class TestRequests:
    """One server for all of them."""

    server: ServerThread

    @classmethod
    def setup_class(cls) -> None:
        cls.server = ServerThread(scripted_model("yes", max_context=512), max_tokens=4)

    @classmethod
    def teardown_class(cls) -> None:
        cls.server.stop()

    @schema.parametrize()
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def test_requests_made_from_the_document_are_answered_as_it_says(self, case: schemathesis.Case) -> None:
        response = case.call(base_url=self.server.url)
        case.validate_response(response, checks=CHECKS)
