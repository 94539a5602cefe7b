"""The server is as docs/openapi.json describes it: schemathesis asks for what that allows, and for what it does not."""

from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

EXAMPLES = 200
ENOUGH = 4  # tokens of an answer: as good as more, and sooner there
# Why a body that has the right form may be refused all the same: what a schema has no words for.
BEYOND_FORM = ("picture", "one for each prompt", "answers", "with choices", "the context", "too many for")

schema = schemathesis.openapi.from_path(Path(__file__).parents[2] / "docs" / "openapi.json")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_server_is_as_described(case, server, key):
    if isinstance(case.body, dict) and case.body.get("max_tokens", 512) in range(ENOUGH, 1025):
        case.body["max_tokens"] = ENOUGH
    tls = {"verify": str(server.certificate)}
    response = case.call(base_url=server.url.removesuffix("/v1"), headers={"X-API-Key": key}, **tls)
    beyond = response.status_code == 400 and any(words in response.text for words in BEYOND_FORM)
    case.validate_response(response, excluded_checks=[positive_data_acceptance] if beyond else [], transport_kwargs=tls)
