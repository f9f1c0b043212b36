"""Generated requests against the OpenAPI document: whatever is sent, the server does not fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fakes import word_probe
from unembed.demo.app import create_app
from unembed.encoders.base import FakeEncoder

from .tiny import tiny_demo

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 40  # requests of each kind to each operation
WORK = ["/encode", "/decode", "/invert", "/words"]
PATHS = [*WORK, "/models", "/random", "/queue", "/health", "/metrics"]
KINDS = [(path, GenerationMode.POSITIVE) for path in PATHS]
KINDS += [(path, GenerationMode.NEGATIVE) for path in WORK]


@pytest.fixture(scope="module")
def operations(_saved, tmp_path_factory):
    probe = tmp_path_factory.mktemp("probe")
    word_probe(FakeEncoder()).save(probe)
    demo = tiny_demo([_saved], probes=[str(probe)])
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(demo, ["testserver"]))
    yield {result.ok().path: result.ok() for result in schema.get_all_operations()}
    for model in demo.models.values():
        model.close()


@pytest.mark.slow
def test_every_operation_is_in_the_document(operations):
    assert sorted(operations) == sorted(PATHS)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "mode"), KINDS)
def test_no_request_makes_the_server_fail(operations, path, mode):
    """Requests as the document allows them, and such as it does not."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[path].as_strategy(generation_mode=mode))
    def ask(case):
        case.validate_response(case.call(), checks=CHECKS)

    ask()
