"""docs/openapi.json says what the code does: its routes, bounds and errors, and what it takes and answers."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import phi3v
from phi3v import errors, protocol, request, server
from phi3v.keys import KeyStore
from phi3v.request import Delta, SamplingParams, TokenLogprob

DOCUMENT = json.loads((Path(__file__).parent.parent / "docs" / "openapi.json").read_text())
SCHEMAS, RESPONSES = DOCUMENT["components"]["schemas"], DOCUMENT["components"]["responses"]
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
KINDS["number"] = int | float
NOTES = {"description", "default", "format", "examples", "contentMediaType"}  # which hold a value to nothing
CHECKS = {
    "$ref": lambda wanted, value, _: valid(found(wanted), value),
    "type": lambda wanted, value, _: any(is_a(k, value) for k in ([wanted] if isinstance(wanted, str) else wanted)),
    "const": lambda wanted, value, _: json.dumps(value) == json.dumps(wanted),  # so that true is not 1
    "enum": lambda wanted, value, _: json.dumps(value) in map(json.dumps, wanted),
    "anyOf": lambda wanted, value, _: any(valid(schema, value) for schema in wanted),
    "not": lambda wanted, value, _: not valid(wanted, value),
    "minimum": lambda wanted, value, _: not is_a("number", value) or value >= wanted,
    "maximum": lambda wanted, value, _: not is_a("number", value) or value <= wanted,
    "minLength": lambda wanted, value, _: not is_a("string", value) or len(value) >= wanted,
    "maxLength": lambda wanted, value, _: not is_a("string", value) or len(value) <= wanted,
    "pattern": lambda wanted, value, _: not is_a("string", value) or re.search(re.sub(r"\$$", r"\\Z", wanted), value),
    "contentSchema": lambda wanted, value, _: valid(wanted, json.loads(value)),
    "minItems": lambda wanted, value, _: not is_a("array", value) or len(value) >= wanted,
    "maxItems": lambda wanted, value, _: not is_a("array", value) or len(value) <= wanted,
    "uniqueItems": lambda _, value, __: not is_a("array", value) or len(set(map(json.dumps, value))) == len(value),
    "items": lambda wanted, value, _: not is_a("array", value) or all(valid(wanted, item) for item in value),
    "maxProperties": lambda wanted, value, _: not is_a("object", value) or len(value) <= wanted,
    "required": lambda wanted, value, _: not is_a("object", value) or set(wanted) <= set(value),
    "properties": lambda wanted, value, _: (
        not is_a("object", value) or all(valid(wanted[name], value[name]) for name in wanted.keys() & value.keys())
    ),
    "additionalProperties": lambda wanted, value, schema: (
        not is_a("object", value) or all(valid(wanted, value[k]) for k in value.keys() - schema.get("properties", {}))
    ),
}


def is_a(kind: str, value) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def valid(schema: dict | bool, value) -> bool:
    """Whether a value is what a schema wants; a keyword that is not known here is a KeyError."""
    if isinstance(schema, bool):
        return schema
    return all(CHECKS[word](wanted, value, schema) for word, wanted in schema.items() if word not in NOTES)


def found(reference: str) -> dict:
    assert reference.startswith("#/")
    node = DOCUMENT
    for name in reference[2:].split("/"):
        node = node[name]
    return node


def followed(node: dict) -> dict:
    return found(node["$ref"]) if "$ref" in node else node


def nodes(node):
    """A node and all that it holds, inner ones last."""
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(inner)


OPERATIONS = {(path, method): op for path, methods in DOCUMENT["paths"].items() for method, op in methods.items()}
COMPLETION, CHAT = (SCHEMAS[name]["properties"] for name in ("CompletionRequest", "ChatRequest"))
ROUTES = [(protocol.parse_completion, SCHEMAS["CompletionRequest"]), (protocol.parse_chat, SCHEMAS["ChatRequest"])]


def test_the_document_has_the_servers_routes_and_version():
    assert set(OPERATIONS) == {(path, method.lower()) for path, (method, _) in server.ROUTES.items()}
    assert DOCUMENT["info"]["version"] == phi3v.__version__ and DOCUMENT["openapi"].startswith("3.1.")
    assert [path for (path, _), op in OPERATIONS.items() if op.get("security") == []] == ["/", "/health"]
    assert [*OPERATIONS["/metrics", "get"]["responses"]["200"]["content"]] == [server.METRICS_TYPE]
    sizes = [
        f"{size >> 20} MB ({size:,} bytes)"
        for size in (server.Server.max_content_length, server.Server.max_chat_content_length)
    ]
    for path, size in zip(("/v1/completions", server.CHAT), sizes, strict=True):
        assert size in OPERATIONS[path, "post"]["description"]


def test_every_reference_leads_somewhere_and_every_component_is_referred_to():
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node, dict) and "$ref" in node}
    assert all(isinstance(found(reference), dict) for reference in references)
    shared = ((kind, name) for kind in ("schemas", "responses", "headers") for name in DOCUMENT["components"][kind])
    assert {f"#/components/{kind}/{name}" for kind, name in shared} == references


def test_every_option_has_the_bounds_and_the_default_of_the_code():
    others = {"stream", "stream_options", "model", *protocol.UNSUPPORTED}
    options = {option.name: option for option in fields(SamplingParams)}
    assert set(COMPLETION) == {"prompt", "images", *options, *others}
    assert set(CHAT) == {"messages", "max_completion_tokens", "top_logprobs", *options, *others}
    documented = [(name, followed(COMPLETION[name])) for name in options]
    documented += [(name, followed(CHAT[name])) for name in options if name not in ("max_tokens", "logprobs")]
    for name, schema in documented:
        bounds = options[name].metadata
        if "low" in bounds:
            high, default = bounds.get("high"), options[name].default
            if name == "max_tokens":
                high, default = server.Server.max_tokens, request.DEFAULT_MAX_TOKENS
            assert schema["type"] == ["number" if bounds.get("kind") is float else "integer", "null"], name
            assert (schema["minimum"], schema["maximum"], schema["default"]) == (bounds["low"], high, default), name
        else:
            one, several = schema["anyOf"]
            assert one == {"type": ["string", "null"], "minLength": 1, "maxLength": bounds["longest"]}, name
            assert several["items"] == one | {"type": "string"} and several["maxItems"] == bounds["most"], name
            assert several.get("minItems", 0) == bounds["least"] and schema["default"] is None, name
    for name in ("max_tokens", "max_completion_tokens"):
        assert (CHAT[name]["minimum"], CHAT[name]["default"]) == (
            1,
            server.Server.max_tokens,
        ) and "maximum" not in CHAT[name]
    assert CHAT["logprobs"]["type"] == ["boolean", "null"]
    shown = options["logprobs"].metadata
    assert (CHAT["top_logprobs"]["minimum"], CHAT["top_logprobs"]["maximum"]) == (shown["low"], shown["high"])


def test_limits_roles_and_what_is_not_supported_are_those_of_the_code():
    assert COMPLETION["prompt"]["anyOf"][1]["maxItems"] == protocol.MAX_PROMPTS
    assert f"at most {protocol.MAX_PROMPTS} answers" in COMPLETION["prompt"]["description"]
    assert f"at most {protocol.MAX_PICTURES} in all" in COMPLETION["images"]["description"]
    assert SCHEMAS["Pictures"]["maxItems"] == protocol.MAX_IMAGES
    assert CHAT["messages"]["maxItems"] == protocol.MAX_MESSAGES
    assert f"at most {protocol.MAX_IMAGES} pictures" in CHAT["messages"]["description"]
    assert f"at most {protocol.MAX_DEPTH} levels" in DOCUMENT["info"]["description"]
    roles = SCHEMAS["Message"]["properties"]["role"]["enum"] + [
        SCHEMAS["AssistantMessage"]["properties"]["role"]["const"]
    ]
    assert sorted(roles) == sorted(protocol.ROLES)
    for name, harmless in protocol.UNSUPPORTED.items():
        taken = [None, *harmless]
        for value in [*taken, 0, 2, True, "a", "required", {"a": 1}, {"type": "json_object"}, ["audio"], []]:
            assert valid(followed(CHAT[name]), value) == (json.dumps(value) in map(json.dumps, taken)), (name, value)


def test_every_error_of_the_code_is_there_with_its_status_and_type():
    kinds = [errors.RequestError, *errors.RequestError.__subclasses__()]
    known = {(kind.status, kind.type) for kind in kinds}
    types = {str(status): {of for its, of in known if its == status} for status, _ in known}
    documented = {}
    for (path, method), operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            response = followed(response)
            assert "X-Request-Id" in response["headers"]
            if status != "200" and (path, status) != ("/health", "503"):
                documented.setdefault(status, []).append((path, method))
                schema = response["content"]["application/json"]["schema"]
                for kind in {of for _, of in known} | {"other"}:
                    error = errors.RequestError("no")
                    error.status, error.type = int(status), kind
                    assert valid(schema, protocol.error(error)) == (kind in types[status]), (path, status, kind)
    everywhere, posts = set(OPERATIONS), {key for key in OPERATIONS if key[1] == "post"}
    keyed, named = everywhere - {("/", "get"), ("/health", "get")}, {(server.MODEL, "get")}
    where = dict.fromkeys(types, everywhere) | dict.fromkeys(("411", "415", "429"), posts)
    where |= dict.fromkeys(("401", "403", "503"), keyed) | {"404": named}
    assert {status: set(operations) for status, operations in documented.items()} == where


def test_a_refusal_has_the_headers_that_are_described(tmp_path):
    def named(response: str) -> set[str]:
        return set(RESPONSES[response]["headers"]) - {"X-Request-Id"}

    keys = KeyStore(tmp_path / "keys.db")
    key, _ = keys.create("a", rate_limit=1)
    granted = keys.take(key).headers()
    with pytest.raises(errors.RateLimited) as refused:
        keys.take(key)
    keys.close()
    assert named("RateLimited") == set(refused.value.headers)
    for name, value in (granted | refused.value.headers).items():
        assert valid(DOCUMENT["components"]["headers"][name]["schema"], int(value))
    assert named("Unavailable") == set(errors.Unavailable("later").headers)
    for (path, method), operation in OPERATIONS.items():
        wanted = set() if path in ("/", "/health") else set(granted)
        assert set(operation["responses"]["200"]["headers"]) == {"X-Request-Id", *wanted}, (path, method)


SHOWN = [TokenLogprob(b"a", -0.5, [(b"a", -0.5), (b"\xff", float("-inf"))]), TokenLogprob(b"\xc3", -1, [])]
ANSWERS = {
    "plain": [Delta(0, "a"), None, Delta(0, "b", "stop", 3, 2, 1), Delta(1, "", "length", 3, 1)],
    "logprobs": [Delta(0, "a", None, 3, 1, 0, SHOWN), Delta(0, "", "stop", 3, 2, 0, SHOWN), Delta(1, "", "stop", 3)],
    "scores": [Delta(k, "cat", "stop", 3, 1, scores={"cat": 1.0, "dog": 0.0}) for k in (1, 0)],
}


@pytest.mark.parametrize("deltas", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_an_answer_is_as_described_whole_and_in_pieces(chat, deltas):
    content = OPERATIONS[server.CHAT if chat else "/v1/completions", "post"]["responses"]["200"]["content"]
    schema = content["application/json"]["schema"]
    reply = protocol.Answer(chat, "demo-1", n=2).whole(delta for delta in deltas if delta)
    assert valid(schema, json.loads(protocol.render(reply)))
    for name in reply:
        assert not valid(schema, {k: v for k, v in reply.items() if k != name})
    assert not valid(schema, protocol.Answer(not chat, "demo-1", n=2).whole(delta for delta in deltas if delta))
    pieces = content["text/event-stream"]["schema"]
    for usage in (False, True):
        sent = b"".join(protocol.Answer(chat, "demo-1", n=2).events(deltas, usage)).decode().split("\n\n")
        events = [event.removeprefix("data: ") for event in sent if event.startswith("data: ")]
        assert events[-1] == "[DONE]" and ('"usage"' in events[-2]) == usage and len(events) > 2
        events.append(protocol.render(protocol.error(errors.Unavailable("later"))).decode())
        assert [event for event in events if not valid(pieces, {"data": event})] == []
    assert not valid(pieces, {"data": protocol.render(reply | {"object": "other"}).decode()})


def user(content, **more) -> dict:
    return {"messages": [{"role": "user", "content": content}], **more}


def part(image, **more) -> dict:
    return user([{"type": "image_url", "image_url": image, **more}])


A, B = {"prompt": "a"}, {"prompt": ["a", "b"]}
COMPLETIONS = [
    A, B, {}, {"prompt": None}, {"prompt": ""}, {"prompt": 5}, {"prompt": []},
    {"prompt": ["a", ""]}, {"prompt": [1]}, {"prompt": ["a"]},
    {"prompt": ["a"] * 32}, {"prompt": ["a"] * 33}, A | {"model": 5, "user": ["x"], "unknown": {}},
    A | {"images": []}, A | {"images": ["YQ==", "DATA:image/png;x;BASE64,YWJj"]}, A | {"images": ["YQ==\n"]},
    A | {"images": "YQ=="}, A | {"images": [["YQ=="]]}, A | {"images": [None]}, A | {"images": ["AAAA"] * 16},
    A | {"images": ["AAAA"] * 17}, A | {"images": ["YQ"]}, A | {"images": ["data:image/png,YQ=="]},
    A | {"images": ["http://localhost/a.png"]}, A | {"images": ["_-8="]}, A | {"images": ["YQ==YQ=="]},
    B | {"images": [[], ["YQ=="]]}, B | {"images": ["YQ==", "YQ=="]}, B | {"images": []}, B | {"images": [[], None]},
    B | {"images": None, "n": None}, A | {"max_tokens": 1024}, A | {"max_tokens": 1025}, A | {"max_tokens": 1.0},
    A | {"logprobs": True}, A | {"logprobs": 20, "top_logprobs": 50}, A | {"logprobs": 21},
]  # fmt: skip
CHATS = [
    user("a"), user(""), user(None), user([]), user(5), user([{}]), user(["a"]), user("a", max_tokens=9000),
    {}, {"messages": []}, {"messages": user("a")["messages"] * 256}, {"messages": user("a")["messages"] * 257},
    {"messages": [{"role": "assistant"}]}, {"messages": [{"role": "assistant", "content": None}]},
    {"messages": [{"role": "tool"}]}, {"messages": [{"role": "bot", "content": "a"}]}, {"messages": [{"content": "a"}]},
    {"messages": [{"role": "developer", "content": "a", "name": 5}]}, {"messages": ["a"]}, {"messages": "a"},
    user([{"type": "text", "text": ""}]), user([{"type": "text"}]), user([{"type": "audio", "text": "a"}]),
    part("YQ=="), part("YQ==", detail="low"), part("YQ==", detail="fine"), part("YQ==", detail=None), part(None),
    part({"url": "YQ=="}, detail="fine"), part({"url": "YQ==", "detail": "high"}), part({"url": "YQ==", "detail": "x"}),
    part({}), part("https://localhost/a.png"), part("YQ==") | {"prompt": 5, "images": 5},
    user("a", logprobs=True), user("a", logprobs=1), user("a", logprobs=True, top_logprobs=20),
    user("a", logprobs=True, top_logprobs=21), user("a", top_logprobs=0), user("a", logprobs=False, top_logprobs=2),
    user("a", logprobs=None, top_logprobs=2), user("a", top_logprobs=None),
    user("a", max_tokens=0), user("a", max_completion_tokens="5"),
    user("a", logit_bias={"5": 1}), user("a", tools=[{}], tool_choice="required"), user("a", modalities=["text"]),
]  # fmt: skip
OPTIONS = [
    {"temperature": 2}, {"temperature": 2.1}, {"temperature": "1"}, {"top_p": -0.1}, {"top_k": 1.5}, {"top_k": 5.0},
    {"min_p": None}, {"repetition_penalty": 0}, {"presence_penalty": -2}, {"frequency_penalty": 3}, {"seed": 2**63},
    {"seed": -(2**63)}, {"n": 8}, {"n": 9}, {"n": True}, {"num_crops": 16}, {"num_crops": 0}, {"stop": ""},
    {"stop": []}, {"stop": ["a"] * 8}, {"stop": ["a"] * 9}, {"stop": "é" * 256}, {"stop": "a" * 257}, {"stop": [None]},
    {"choices": []}, {"choices": "a"}, {"choices": ["ab"], "n": 1}, {"choices": ["a"] * 2}, {"choices": "a", "n": 2},
    {"choices": None, "n": 2}, {"choices": ["a" * 1024]}, {"choices": ["a" * 1025]}, {"choices": list("ab" * 33)},
    {"choices": [str(k) for k in range(64)]}, {"choices": [str(k) for k in range(65)]}, {"stream": 1}, {"stream": None},
    {"stream": True, "stream_options": {"include_usage": True, "x": 1}}, {"stream_options": {"include_usage": "a"}},
    {"best_of": True}, {"echo": 0}, {"stream_options": 0}, {"stream_options": False}, {"ignore_eos": True},
    {"stream_options": "a"}, {"stream_options": None}, {"best_of": 1}, {"best_of": 2}, {"suffix": "a"},
]  # fmt: skip


def taken(parse, body: dict) -> bool:
    try:
        body = protocol.parse_json(json.dumps(body).encode())
        parse(body, server.Server.max_tokens)
        protocol.streaming(body)
    except errors.RequestError:
        return False
    return True


def test_what_is_described_is_taken_and_what_is_not_is_refused():
    for (parse, schema), bodies, plain in zip(ROUTES, (COMPLETIONS, CHATS), (A, user("a")), strict=True):
        bodies = bodies + [plain | options for options in OPTIONS]
        described = [valid(schema, protocol.parse_json(json.dumps(body).encode())) for body in bodies]
        assert [b for b, yes in zip(bodies, described, strict=True) if taken(parse, b) != yes] == []
        assert 30 < sum(described) < len(bodies) - 30


def test_the_examples_are_taken():
    for (parse, schema), path in zip(ROUTES, ("/v1/completions", server.CHAT), strict=True):
        content = OPERATIONS[path, "post"]["requestBody"]["content"]["application/json"]
        assert found(content["schema"]["$ref"]) is schema
        for example in content["examples"].values():
            assert valid(schema, example["value"]) and taken(parse, example["value"])
