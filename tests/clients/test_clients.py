"""Every client asks about pictures and gets its own exceptions, over TLS that it verifies."""

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, OPENAI2_PYTHON, Client, drawing, png
from PIL import Image

PYTHON = [sys.executable, "clients.py"]  # with the newest openai package
PYTHON2 = [OPENAI2_PYTHON, "clients.py"]  # with openai 2, which some still need
NODE = ["node", "clients.mjs"]

OPENAI = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}
OPENAI |= {413: "APIStatusError", 429: "RateLimitError", 503: "InternalServerError"}
OPENAI_NODE = OPENAI | {413: "APIError"}
LANGCHAIN = {400: "OpenAIInvalidRequestError", 401: "OpenAIAuthenticationError", 403: "OpenAIPermissionDeniedError"}
LANGCHAIN |= {404: "OpenAIModelNotFoundError", 413: "APIStatusError", 429: "OpenAIRateLimitError"}
LANGCHAIN |= {503: "OpenAIAPIError"}
LITELLM = OPENAI | {403: "APIError", 413: "BadRequestError", 503: "ServiceUnavailableError"}
AI_SDK = dict.fromkeys(OPENAI, "APICallError")
HTTPX = dict.fromkeys(OPENAI, "HTTPStatusError")

CLIENTS = {
    "openai": ([*PYTHON, "openai_sync"], OPENAI),
    "openai async": ([*PYTHON, "openai_async"], OPENAI),
    "openai 2": ([*PYTHON2, "openai_sync"], OPENAI),
    "openai 2 async": ([*PYTHON2, "openai_async"], OPENAI),
    "langchain": ([*PYTHON, "langchain"], LANGCHAIN),
    "litellm": ([*PYTHON2, "litellm"], LITELLM),
    "llama-index": ([*PYTHON2, "llama_index"], OPENAI),
    "llm": ([*PYTHON, "llm"], OPENAI),
    "httpx": ([*PYTHON, "httpx"], HTTPX),
    "openai in node": ([*NODE, "openai"], OPENAI_NODE),
    "AI SDK": ([*NODE, "aiSdk"], AI_SDK),
}
OWN_OPTION = [name for name in CLIENTS if name not in ("llm", "openai in node", "AI SDK")]
RETRYING = [name for name in CLIENTS if name != "httpx"]

DRAWINGS = {
    ("red", "circle"): "A red circle.",
    ("blue", "square"): "A blue square.",
    ("green", "triangle"): "A green triangle.",
    ("orange", "diamond"): "An orange diamond.",
    ("purple", "circle"): "A purple circle.",
    ("black", "triangle"): "A black triangle.",
}
QUESTION, OTHER_QUESTION = "What is shown in this image?", "What is in the picture?"
CIRCLE = drawing("red", "circle")
OURS = {  # what our messages say
    400: "picture",
    401: "API key is missing",
    403: "API key is unknown",
    404: "there is no",
    413: "bytes, at most",
    429: "requests per minute are used up",
    503: "try again in",
}


@pytest.fixture(scope="module", params=CLIENTS)
def client(request, server):
    command, errors = CLIENTS[request.param]
    with Client(*command, certificate=server.certificate) as running:
        running.errors = errors
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("question", [QUESTION, OTHER_QUESTION])
@pytest.mark.parametrize("color, shape", DRAWINGS)
def test_a_drawing_is_recognised(client, server, key, color, shape, question, stream):
    reply = client.ask(server.url, key, question, drawing(color, shape), stream=stream)
    assert reply == {"text": DRAWINGS[color, shape]}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 503])
def test_an_error_is_the_clients_own_and_says_what_ours_says(client, server, key, status, stream, request):
    job = {"url": server.url, "key": key, "question": QUESTION, "picture": CIRCLE, "stream": stream}
    if status == 400:
        job["picture"] = CIRCLE[:200]
    elif status == 401:
        job["key"] = ""
    elif status == 403:
        job["key"] = "phi3v_" + "0" * 36
    elif status == 404:
        job["url"] += "/nowhere"
    elif status == 413:
        job["picture"] = png(Image.effect_noise((1600, 1600), 99))
    elif status == 429:
        job["key"] = server.key(rate_limit=1)
        assert "text" in client.ask(**job)
    elif status == 503:
        job["url"] = request.getfixturevalue("busy")
    reply = client.ask(**job)
    assert (reply["error"], reply["status"]) == (client.errors[status], status)
    assert OURS[status] in reply["message"]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_certificate_that_nothing_vouches_for_is_refused(name, server, key):
    with Client(*CLIENTS[name][0]) as stranger:
        reply = stranger.ask(server.url, key, QUESTION, CIRCLE)
    assert re.search("certificate|connect", reply["message"], re.IGNORECASE)


@pytest.mark.parametrize("name", OWN_OPTION)
def test_the_certificate_may_be_trusted_by_an_option_of_the_client_too(name, server, key):
    with Client(*CLIENTS[name][0]) as stranger:
        reply = stranger.ask(server.url, key, QUESTION, CIRCLE, cafile=str(server.certificate))
    assert reply == {"text": "A red circle."}


def test_llm_answers_on_the_command_line(server, key, tmp_path):
    model = {"model_id": "phi3v", "model_name": "phi-3-vision", "api_base": server.url, "vision": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model | {"api_key_name": "phi3v"}]))
    (tmp_path / "circle.png").write_bytes(CIRCLE)
    command = [Path(sys.executable).with_name("llm"), "-m", "phi3v", "--key", key, QUESTION, "-a", "circle.png"]
    environment = ENVIRONMENT | {"LLM_USER_PATH": str(tmp_path), "SSL_CERT_FILE": str(server.certificate)}
    assert subprocess.check_output(command, cwd=tmp_path, env=environment, text=True) == "A red circle.\n"


@pytest.fixture(scope="module")
def patient(server):
    """What clients that retry get with a key whose requests are used up: they all wait together."""
    with ExitStack() as stack:
        open_ = {name: Client(*CLIENTS[name][0], certificate=server.certificate) for name in RETRYING}
        clients = {name: stack.enter_context(client) for name, client in open_.items()}
        asked = {name: (server.url, server.key(name, rate_limit=1), QUESTION, CIRCLE) for name in RETRYING}
        for _ in range(2):
            for name, client in clients.items():
                client.begin(*asked[name], retries=2)
            replies = {name: client.end() for name, client in clients.items()}
        return replies


@pytest.mark.parametrize("name", RETRYING)
def test_a_client_that_waits_as_long_as_it_is_told_gets_through(name, server, patient):
    assert patient[name] == {"text": "A red circle."}
    first, *refused, last = server.statuses(name)
    assert (first, last) == (200, 200)
    assert refused == [429] or (name, refused) == ("AI SDK", [429, 429])  # it waits 2 s first if told a whole minute
