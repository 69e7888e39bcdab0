"""The server against its own description: whatever schemathesis makes of it is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import serving
from stand_in_engine import StandInEngine

MAX_EXAMPLES = 25


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(StandInEngine()) as found:
        yield found


def test_every_request_that_the_description_allows_is_answered_as_it_says(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    num_operations = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        num_operations += 1
        # What it allows, and what it forbids.
        for mode in schemathesis.GenerationMode:

            @hypothesis.seed(0)
            @hypothesis.settings(
                max_examples=MAX_EXAMPLES if operation.body else 1,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=checks)

            if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
                check()
    assert num_operations == 5
