"""The shapes on the wire, as tables: what is taken, what is refused, and with which field and words."""

import json
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v import protocol
from phi3v.errors import RateLimited, RequestError
from phi3v.request import Chat, Delta, Picture, Request, SamplingParams, TokenLogprob
from phi3v.tokenizer import Decoder

DEEP = "the body is nested deeper than 32 levels"
NUMBER = "the body holds a number that is none, or too long"


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    """An object of `depth` levels, itself being the first."""
    return f'{{"a":{opening * (depth - 1)}1{closing * (depth - 1)}}}'.encode()


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"{}", {}),
        (b' \r\n\t{"a": 1} \n', {"a": 1}),
        ('{"ä": "日本 🎉"}'.encode(), {"ä": "日本 🎉"}),
        (rb'{"a": "\ud83c\udf89\u0000"}', {"a": "🎉\0"}),
        (b'{"a": -0.5e1, "b": [true, null]}', {"a": -5, "b": [True, None]}),
        (b'{"a": [5.0, -0.0, 1e2, 5.5]}', {"a": [5, 0, 100, 5.5]}),
        (b'{"a": 1e308}', {"a": int(1e308)}),
        (b'{"a": ' + b"9" * 400 + b"}", {"a": 10**400 - 1}),
        (nested(1), {"a": 1}),
        (nested(32), json.loads(nested(32))),
        (nested(32, '{"b":', "}"), json.loads(nested(32, '{"b":', "}"))),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_json_object_is_taken(raw, body):
    assert repr(protocol.parse_json(raw)) == repr(body)  # 5 and 5.0 are told apart


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the body is not JSON from line 1 column 1 on"),
        (b"prompt=hello", "the body is not JSON from line 1 column 1 on"),
        (b'{"a": 1', "the body is not JSON from line 1 column 8 on"),
        (b'{"a": 1}\n{"b": 2}', "the body is not JSON from line 2 column 1 on"),
        (b'{"a": "b\nc"}', "the body is not JSON from line 1 column 9 on"),
        (b'{"a": 0x10}', "the body is not JSON from line 1 column 8 on"),
        (b'\xef\xbb\xbf{"a": 1}', "the body is not JSON from line 1 column 1 on"),
        (b'{"a": "\xff"}', "the body is not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "the body is not UTF-8"),  # half a surrogate pair, encoded
        (b'{"a": "\xc0\xaf"}', "the body is not UTF-8"),  # overlong
        ('{"a": 1}'.encode("utf-16"), "the body is not UTF-8"),
        (b'{"a": NaN}', NUMBER),
        (b'{"a": Infinity}', NUMBER),
        (b'{"a": -Infinity}', NUMBER),
        (b'{"a": 1e400}', NUMBER),  # as large as Infinity
        (b'{"a":' + b"9" * 401 + b"}", NUMBER),
        (b'{"a":0.' + b"9" * 401 + b"}", NUMBER),
        (nested(33), DEEP),
        (nested(33, '{"b":', "}"), DEEP),
        (b"[" * 100_000, DEEP),
        (nested(100_000), DEEP),
        (nested(100_000, '{"b":', "}"), DEEP),
        (b"[]", "the body is JSON, but not an object"),
        (b'"prompt"', "the body is JSON, but not an object"),
        (b"1.5", "the body is JSON, but not an object"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_json_object_is_refused_and_the_message_says_why(raw, message):
    with pytest.raises(RequestError) as caught:
        protocol.parse_json(raw)
    assert (caught.value.message, caught.value.status, caught.value.param) == (message, 400, None)


def asked(*prompts: list[str | int] | str, pictures: list[list] | None = None, **params) -> Request:
    """The request for these prompts; what they say and show, picture by picture with its field."""
    contents = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    chats = [Chat([("user", c)], p) for c, p in zip(contents, pictures or [[]] * len(contents), strict=True)]
    return Request(chats, SamplingParams(**params))


def shown(text: str, sources: list[bytes]) -> Request:
    """The request for one prompt with pictures in front of it."""
    content = [part for k in range(1, len(sources) + 1) for part in (-k, "\n")] + [text]
    return asked(content, pictures=[[Picture(source, f"images[{k}]") for k, source in enumerate(sources)]])


ONE = asked("hi")


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ({"prompt": "hi"}, ONE),
        ({"prompt": "hi", "images": None, "max_tokens": None, "num_crops": None}, ONE),
        ({"prompt": "hi", "model": 5, "user": ["x"], "prompts": {}, "temperatur": "hot"}, ONE),
        ({"prompt": ["hi"]}, ONE),
        ({"prompt": " "}, asked(" ")),
        ({"prompt": "<|end|>\0\n日本🎉"}, asked("<|end|>\0\n日本🎉")),
        ({"prompt": ["a", "b", "a"]}, asked("a", "b", "a")),
        ({"prompt": ["a"] * 32}, asked(*"a" * 32)),
        ({"prompt": "hi", "max_tokens": 1}, asked("hi", max_tokens=1)),
        ({"prompt": "hi", "max_tokens": 1024}, asked("hi", max_tokens=1024)),
        ({"prompt": "hi", "num_crops": 16}, asked("hi", num_crops=16)),
        ({"prompt": "hi", "images": ["YWJj"]}, shown("hi", [b"abc"])),
        ({"prompt": "hi", "images": ["data:image/png;base64,YWI=", "YQ=="]}, shown("hi", [b"ab", b"a"])),
        ({"prompt": "hi", "images": ["DATA:;BASE64,YWJj"]}, shown("hi", [b"abc"])),
        ({"prompt": "hi", "images": ["data:image/svg+xml;base64,PHN2Zy8+"]}, shown("hi", [b"<svg/>"])),
        ({"prompt": "hi", "images": ["L2V0Yy9wYXNzd2Q="]}, shown("hi", [b"/etc/passwd"])),  # bytes, no path
        ({"prompt": "hi", "images": ["YWJj"] * 16}, shown("hi", [b"abc"] * 16)),
        (
            {"prompt": ["a", "b <|image_2|> <|image_1|>"], "images": [[], ["YQ==", "YWI="]]},
            asked(
                "a",
                ["b ", -2, " ", -1, ""],
                pictures=[[], [Picture(b"a", "images[1][0]"), Picture(b"ab", "images[1][1]")]],
            ),
        ),
        ({"prompt": ["a"], "images": [["YQ=="]]}, asked([-1, "\n", "a"], pictures=[[Picture(b"a", "images[0][0]")]])),
        ({"prompt": "hi", "stop": "a", "seed": -1, "n": 8}, asked("hi", stop=("a",), seed=-1, n=8)),
        ({"prompt": "hi", "stop": ["a", "b"], "top_p": 1, "top_k": 0}, asked("hi", stop=("a", "b"))),
        ({"prompt": "hi", "temperature": 0, "logprobs": 0, "stop": []}, asked("hi", logprobs=0)),
        ({"prompt": "hi", "choices": ["a", "b"], "echo": False, "best_of": 1}, asked("hi", choices=("a", "b"))),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_request_is_read_as_it_was_meant(body, request_):
    assert protocol.parse_completion(body, 1024) == request_


def refused(body: dict, param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        protocol.parse_completion(body, 1024)
    assert (caught.value.param, caught.value.message, caught.value.status) == (param, message, 400)


MISSING = "prompt must be a string or a list of strings, not null"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", MISSING),
        ({"prompt": None}, "prompt", MISSING),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": 5}, "prompt", "prompt must be a string, not 5"),
        ({"prompt": False}, "prompt", "prompt must be a string, not false"),
        ({"prompt": {"text": "hi"}}, "prompt", 'prompt must be a string, not {"text": "hi"}'),
        ({"prompt": []}, "prompt", "prompt must be a string or a list of 1 to 32, not a list of 0"),
        ({"prompt": ["a"] * 33}, "prompt", "prompt must be a string or a list of 1 to 32, not a list of 33"),
        ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1] is empty"),
        ({"prompt": ["a", None]}, "prompt[1]", "prompt[1] must be a string, not null"),
        ({"prompt": [["a"]]}, "prompt[0]", "prompt[0] must be a string, not a list of 1"),
        ({"prompt": [1, 2, 3]}, "prompt[0]", "prompt[0] must be a string, not 1"),  # token ids, as OpenAI takes
        ({"prompt": "a\ud800"}, "prompt", "prompt holds half a surrogate pair (\\ud800 to \\udfff)"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]", "prompt[1] holds half a surrogate pair (\\ud800 to \\udfff)"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_message_says_what_is_allowed(body, param, message):
    refused(body, param, message)


@pytest.mark.parametrize("value", [0, -1, 1025, "5", True, False, 1.0, 1e400, 10**4000, [5], {"a": "\ud800" * 99}])
def test_a_number_that_is_no_whole_one_in_range_is_refused(value):
    shown = "a list of 1" if isinstance(value, list) else json.dumps(value)[:40]
    for name, most in (("max_tokens", 1024), ("num_crops", 16)):
        refused({"prompt": "a", name: value}, name, f"{name} must be a whole number from 1 to {most}, not {shown}")


NO_BASE64 = ["YQ", "Y Q==", "YQ==\n", "_-8=", "YWJj====", "ÿQ==", "/etc/passwd", "file:/etc/passwd", "data:;base64,YQ"]
NO_BASE64 += [
    "YQ=",
    "=YQ=",
    "Y=Q=",
    "YQ==YQ==",
    "YWJj=",
    "YWJ\u200bj",
    "YWJj\0",
    "YWJj,YWJj",
    "file:YWJj",
    "~/a.png",
    "a.png",
]
NO_BASE64 += [
    "data:image/png;base64, YQ==",
    "data:image/png;base64,YQ%3D%3D",
    "data:image/png;base64,_-8=",
]


@pytest.mark.parametrize("image", NO_BASE64)
def test_a_picture_that_is_no_strict_base64_is_refused(image):
    message = "the picture is not valid base64 (alphabet A-Z a-z 0-9 + /, padded with =)"
    refused({"prompt": "a", "images": ["YQ==", image]}, "images[1]", message)
    refused({"prompt": ["a", "b"], "images": [[], ["YQ==", image]]}, "images[1][1]", message)


PICTURES = "must be a list of at most 16 pictures (data: URLs or base64), not"
LISTS = "images must be a list of 2 lists, one for each prompt, not"
URL = "a data: URL must read data:image/…;base64,…"
FETCH = "…: send a data: URL or base64"


@pytest.mark.parametrize(
    ("prompt", "images", "param", "message"),
    [
        ("a", "YQ==", "images", f'images {PICTURES} "YQ=="'),
        ("a", [["YQ=="]], "images[0]", "images[0] must be a data: URL or base64, not a list of 1"),
        ("a", ["YQ==", None], "images[1]", "images[1] must be a data: URL or base64, not null"),
        ("a", ["YQ=="] * 16 + [5], "images", f"images {PICTURES} a list of 17"),
        ("a", ["data:image/png,YQ=="], "images[0]", URL),
        ("a", ["data:image/png;base64"], "images[0]", URL),
        ("a", ["data:image/svg+xml;utf8,<svg/>"], "images[0]", URL),
        ("a", ["http://127.0.0.1/a.png"], "images[0]", f"pictures are not fetched from http://1{FETCH}"),
        (["a", "b"], [[], ["FILE:///etc"]], "images[1][0]", f"pictures are not fetched from FILE:///{FETCH}"),
        (["a", "b"], [["YQ=="]], "images", f"{LISTS} a list of 1"),
        (["a", "b"], [[], [], []], "images", f"{LISTS} a list of 3"),
        (["a", "b"], {}, "images", f"{LISTS} {{}}"),
        (["a", "b"], ["YQ==", "YQ=="], "images[0]", f'images[0] {PICTURES} "YQ=="'),
        (["a", "b"], [[], None], "images[1]", f"images[1] {PICTURES} null"),
        (["a", "b"], [[], ["YQ=="] * 17], "images[1]", f"images[1] {PICTURES} a list of 17"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_pictures_are_refused_and_the_message_says_what_is_allowed(prompt, images, param, message):
    refused({"prompt": prompt, "images": images}, param, message)


def test_the_servers_own_maximum_of_tokens_counts():
    assert protocol.parse_completion({"prompt": "a", "max_tokens": 2000}, 2000).params.max_tokens == 2000
    with pytest.raises(RequestError, match="from 1 to 7, not 8"):
        protocol.parse_completion({"prompt": "a", "max_tokens": 8}, 7)


def test_interleaved_pieces_of_several_answers_become_one_reply():
    deltas = [
        Delta(2, "c"),
        Delta(0, "a1 "),
        Delta(1, "", "length", 7, 1),
        Delta(0, "ä2"),
        Delta(2, "3", "stop", 5, 4, 3),
        Delta(0, "", "stop", 10, 20, 8),
    ]
    now = datetime(2026, 11, 22, 10, 8, 53, 64652, tzinfo=UTC)
    reply = protocol.Answer(False, "demo-1", 3, now=now).whole(iter(deltas))
    number = reply.pop("id").removeprefix("cmpl-")
    assert len(number) == 32 and int(number, 16)
    assert reply == {
        "object": "text_completion",
        "created": 1795342133,
        "model": "phi-3-vision",
        "system_fingerprint": "demo-1",
        "choices": [
            {"index": 0, "text": "a1 ä2", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"},
            {"index": 2, "text": "c3", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {
            "prompt_tokens": 22,
            "completion_tokens": 25,
            "total_tokens": 47,
            "prompt_tokens_details": {"cached_tokens": 11},
        },
        "responses": ["a1 ä2", "", "c3"],
        "timestamp": "2026-11-22T10:08:53.064652+00:00",
    }


def test_each_reply_has_an_id_of_its_own_and_the_present_time():
    before = datetime.now(UTC)
    replies = [protocol.Answer(False, "x").whole([Delta(0, "a", "stop", 1, 1)]) for _ in range(2)]
    assert replies[0]["id"] != replies[1]["id"]
    assert before <= datetime.fromisoformat(replies[0]["timestamp"]) <= datetime.now(UTC)


def test_an_error_is_the_documented_one_with_type_and_param():
    error = {"code": "400", "message": "no", "type": "invalid_request_error", "param": "prompt[1]"}
    assert protocol.error(RequestError("no", "prompt[1]")) == {"error": error}
    other = {"code": "429", "type": "rate_limit_error", "param": None}
    assert protocol.error(RateLimited("no")) == {"error": error | other}


def test_a_rendered_body_is_one_line_of_utf_8():
    assert protocol.render({"a": ["ä\n\r\u2028🎉\0", None]}) == '{"a":["ä\\n\\r\u2028🎉\\u0000",null]}'.encode()


def test_a_message_that_repeats_half_a_surrogate_pair_can_still_be_sent():
    with pytest.raises(RequestError) as caught:
        protocol.parse_completion({"prompt": "a", "images": ["\ud800://a"]}, 1024)
    sent = protocol.render(protocol.error(caught.value))
    assert json.loads(sent)["error"]["message"] == "pictures are not fetched from ?://a…: send a data: URL or base64"


def test_a_request_has_at_most_32_pictures_in_all():
    body = {"prompt": ["a", "b", "c"], "images": [["AAAA"] * 16, ["AAAA"] * 16, []]}
    assert sum(len(chat.pictures) for chat in protocol.parse_completion(body, 1024).chats) == 32
    body["images"][2].append("AAAA")
    with pytest.raises(RequestError, match="images has 33 pictures, at most 32 may be"):
        protocol.parse_completion(body, 1024)


def test_the_default_of_max_tokens_keeps_to_a_smaller_limit_of_the_server():
    assert protocol.parse_completion({"prompt": "x"}, 100).params.max_tokens == 100
    assert protocol.parse_completion({"prompt": "x"}, 1024).params.max_tokens is None


def chat(*messages: tuple[str, list[str | int]], pictures: list[Picture] = (), **params) -> Request:
    return Request([Chat(list(messages), list(pictures))], SamplingParams(**{"max_tokens": 1024} | params), True)


def user(content, **more) -> dict:
    return {"messages": [{"role": "user", "content": content}], **more}


TEXT = {"type": "text", "text": "hi"}
URL_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}
BARE = {"type": "image_url", "image_url": "YWJj", "detail": "low"}
INPUT = {"type": "input_image", "image_url": "data:image/png;base64,YWJj", "detail": "high"}
LOW = {"type": "image_url", "image_url": {"url": "YWJj", "detail": "low"}}


def pictures(*where: str, crops: int | None = None) -> list[Picture]:
    return [Picture(b"abc", place, crops) for place in where]


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        (user("hi"), chat(("user", ["hi"]))),
        (user("<|image_1|> <|end|>"), chat(("user", ["<|image_1|> <|end|>"]))),  # typed into chat, it is text
        (user(""), chat(("user", []))),
        (user([TEXT]), chat(("user", ["hi"]))),
        (user([TEXT, TEXT]), chat(("user", ["hi", "\n", "hi"]))),
        (user([{"type": "text", "text": ""}, TEXT]), chat(("user", ["", "\n", "hi"]))),
        (user([URL_PART, TEXT]), chat(("user", [-1, "\n", "hi"]), pictures=pictures("messages[0].content[0]"))),
        (user([TEXT, INPUT]), chat(("user", ["hi", -1, "\n"]), pictures=pictures("messages[0].content[1]"))),
        (user([LOW]), chat(("user", [-1, "\n"]), pictures=pictures("messages[0].content[0]", crops=1))),
        (user([BARE]), chat(("user", [-1, "\n"]), pictures=pictures("messages[0].content[0]", crops=1))),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be kind."},
                    {"role": "user", "content": [TEXT, URL_PART]},
                    {"role": "user", "content": "and", "name": "Ann"},
                    {"role": "assistant", "content": None, "tool_calls": []},
                    {"role": "tool", "content": [URL_PART, TEXT], "tool_call_id": "x"},
                    {"role": "assistant", "content": "It"},
                ]
            },
            chat(
                ("system", ["Be kind."]),
                ("user", ["hi", -1, "\n"]),
                ("user", ["and"]),
                ("assistant", []),
                ("user", [-2, "\n", "hi"]),
                ("assistant", ["It"]),
                pictures=pictures("messages[1].content[1]", "messages[4].content[0]"),
            ),
        ),
        (user("a", max_tokens=3000), chat(("user", ["a"]))),
        (user("a", max_tokens=9), chat(("user", ["a"]), max_tokens=9)),
        (user("a", max_completion_tokens=8, max_tokens=None), chat(("user", ["a"]), max_tokens=8)),
        (user("a", max_completion_tokens=10**9, max_tokens=7), chat(("user", ["a"]), max_tokens=7)),
        (user("a", logprobs=True), chat(("user", ["a"]), logprobs=0)),
        (user("a", logprobs=True, top_logprobs=20), chat(("user", ["a"]), logprobs=20)),
        (user("a", logprobs=False, top_logprobs=None), chat(("user", ["a"]))),
        (user("a", user="b", store=True, metadata={"a": "b"}, tools=[{"type": "function"}]), chat(("user", ["a"]))),
        (user("a", tool_choice="auto", logit_bias={}, response_format={"type": "text"}), chat(("user", ["a"]))),
        (user("a", presence_penalty=1, choices=["b"]), chat(("user", ["a"]), presence_penalty=1, choices=("b",))),
        (user("a", model="gpt-4o", parallel_tool_calls=True, stream_options=None), chat(("user", ["a"]))),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_conversation_is_read_as_it_was_meant(body, request_):
    assert protocol.parse_chat(body, 1024) == request_


ROLES = "must be one of system, developer, user, tool, assistant, not"
TYPES = "type must be one of text, image_url, input_image, not"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages must be a list of 1 to 256, not null"),
        ({"messages": []}, "messages", "messages must be a list of 1 to 256, not a list of 0"),
        ({"messages": [{}] * 257}, "messages", "messages must be a list of 1 to 256, not a list of 257"),
        ({"messages": ["a"]}, "messages[0]", 'messages[0] must be an object, not "a"'),
        ({"messages": [{"content": "a"}]}, "messages[0].role", f"messages[0].role {ROLES} null"),
        ({"messages": [{"role": "bot"}]}, "messages[0].role", f'messages[0].role {ROLES} "bot"'),
        ({"messages": [{"role": ["user"]}]}, "messages[0].role", f"messages[0].role {ROLES} a list of 1"),
        (user(None), "messages[0].content", "messages[0].content must be a string or a list of parts, not null"),
        (user([]), "messages[0].content", "messages[0].content must be a string or a list of parts, not a list of 0"),
        (user("\ud800"), "messages[0].content", "messages[0].content holds half a surrogate pair (\\ud800 to \\udfff)"),
        (user(["a"]), "messages[0].content[0]", 'messages[0].content[0] must be an object, not "a"'),
        (user([{}]), "messages[0].content[0].type", f"messages[0].content[0].{TYPES} null"),
        (
            user([TEXT, {"type": "audio"}]),
            "messages[0].content[1].type",
            f'messages[0].content[1].{TYPES} "audio"',
        ),
        (user([{"type": "text"}]), "messages[0].content[0]", "messages[0].content[0] must be a string, not null"),
        (
            user([TEXT, {"type": "image_url", "image_url": {}}]),
            "messages[0].content[1]",
            "messages[0].content[1] must be a data: URL or base64, not null",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]),
            "messages[0].content[0]",
            "pictures are not fetched from https://…: send a data: URL or base64",
        ),
        (
            user([URL_PART | {"image_url": {"url": "YQ==", "detail": "fine"}}]),
            "messages[0].content[0].detail",
            'messages[0].content[0].detail must be one of auto, low, high, not "fine"',
        ),
        (user([URL_PART] * 17), "messages", "messages has 17 pictures, at most 16 are allowed"),
        (user("a", max_tokens=0), "max_tokens", "max_tokens must be a whole number of at least 1, not 0"),
        (user("a", logprobs=1), "logprobs", "logprobs must be true or false, not 1"),
        (user("a", top_logprobs=5), "top_logprobs", "top_logprobs needs logprobs to be true"),
        (
            user("a", logprobs=True, top_logprobs=21),
            "top_logprobs",
            "top_logprobs must be a whole number from 0 to 20, not 21",
        ),
        (
            user("a", response_format={"type": "json_object"}),
            "response_format",
            'response_format is not supported with this value: leave it out or {"type": "text"}',
        ),
        (
            user("a", tool_choice="required"),
            "tool_choice",
            'tool_choice is not supported with this value: leave it out or "none" or "auto"',
        ),
        (
            user("a", logit_bias={"5": 1}),
            "logit_bias",
            "logit_bias is not supported with this value: leave it out or {}",
        ),
        (user("a", temperature=3), "temperature", "temperature must be a number from 0 to 2, not 3"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_bad_conversation_is_refused_and_the_message_says_what_is_allowed(body, param, message):
    with pytest.raises(RequestError) as caught:
        protocol.parse_chat(body, 1024)
    assert (caught.value.param, caught.value.message) == (param, message)


def test_more_than_32_answers_are_refused_however_they_are_asked_for():
    assert protocol.parse_completion({"prompt": ["a"] * 4, "n": 8}, 1024).params.n == 8
    refused({"prompt": ["a"] * 5, "n": 7}, "n", "5 prompts with n 7 are over 32 answers")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (False, False)),
        ({"stream": None, "stream_options": None}, (False, False)),
        ({"stream": True, "stream_options": {}}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True)),
    ],
)
def test_a_stream_is_made_when_it_is_asked_for(body, expected):
    assert protocol.streaming(body) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": [1]}, "stream_options"),
        ({"stream_options": 0}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_a_bad_wish_for_a_stream_is_refused(body, param):
    with pytest.raises(RequestError) as caught:
        protocol.streaming(body)
    assert caught.value.param == param


ENTRY = TokenLogprob("é".encode(), -0.5, [("é".encode(), -0.5), (b"\xc3", float("-inf"))])
DELTAS = [
    Delta(1, "b", None, 7, 1),
    None,
    Delta(0, "a", None, 5, 1, 2, [ENTRY]),
    Delta(1, "", "length", 7, 2),
    Delta(0, "é", "stop", 5, 2, 2, [ENTRY._replace(start=1)]),
]


def events(is_chat: bool, deltas: list, usage: bool = False, **counts) -> list:
    """The events of an answer, each as what a client's parser makes of it."""
    raw = b"".join(protocol.Answer(is_chat, "demo-1", **counts).events(iter(deltas), usage)).decode()
    assert raw.endswith("\n\n") and "\r" not in raw
    blocks = raw[:-2].split("\n\n")
    assert all(block.startswith((": ", "data: ")) and "\n" not in block for block in blocks)
    return [b if b.startswith(":") or b == "data: [DONE]" else json.loads(b.removeprefix("data: ")) for b in blocks]


def test_a_chat_stream_has_its_chunks_in_the_order_that_clients_need():
    """Without a role in the first delta, an index or a reason at the end a client breaks: found by leaving each out."""
    first, *chunks, last, done = events(True, DELTAS, usage=True, prompts=2)
    assert (first, done, chunks.index(": keep-alive")) == (": keep-alive", "data: [DONE]", 3)
    chunks.remove(": keep-alive")
    heads = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in [*chunks, last]}
    ((name, kind, created, *rest),) = heads
    assert name.startswith("chatcmpl-") and created > 1.7e9
    assert [kind, *rest] == ["chat.completion.chunk", "phi-3-vision", "demo-1"]
    assert all(set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"} for chunk in chunks)
    seen = [(c["choices"][0]["index"], c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks]
    opened = {"role": "assistant", "content": ""}
    assert seen == [
        (0, opened, None),
        (1, opened, None),
        (1, {"content": "b"}, None),
        (0, {"content": "a"}, None),
        (1, {}, "length"),
        (0, {"content": "é"}, None),
        (0, {}, "stop"),
    ]
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 16
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    one = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    other = {"token": "bytes:\\xc3", "logprob": -9999.0, "bytes": [195]}
    assert chunks[5]["choices"][0]["logprobs"] == {"content": [one | {"top_logprobs": [one, other]}], "refusal": None}


def test_a_text_stream_carries_the_reason_in_its_last_chunks_and_offsets_in_characters():
    first, *chunks, done = events(False, DELTAS, prompts=2)
    assert (first, done) == (": keep-alive", "data: [DONE]")
    chunks.remove(": keep-alive")
    choices = [chunk["choices"][0] for chunk in chunks]
    seen = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices]
    assert seen == [(1, "b", None), (0, "a", None), (1, "", "length"), (0, "é", "stop")]
    assert [choices[k]["logprobs"]["text_offset"] for k in (1, 3)] == [[0], [1]]
    assert choices[1]["logprobs"] == {
        "tokens": ["é"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"é": -0.5, "bytes:\\xc3": -9999.0}],
        "text_offset": [0],
    }
    assert {chunk["object"] for chunk in chunks} == {"text_completion"} and "responses" not in chunks[0]


def test_offsets_count_a_character_that_several_tokens_make_once():
    entries, decoder = [], Decoder(dict(enumerate([b"a", b"\xc3", b"\xa9", b"\xff", b"b", b"c"])))
    for token in range(6):
        decoder.push(token, (-1.0, []))
        entries += decoder.logprobs()
    choice = protocol.Answer(False, "x").whole([Delta(0, "aé\ufffdbc", "stop", logprobs=entries)])["choices"][0]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4]


def test_of_alternatives_that_read_the_same_the_best_is_shown():
    entry = TokenLogprob(b"+", -0.1, [(b"+", -0.1), (b"-", -2.0), (b"+", -7.0)])
    choice = protocol.Answer(False, "x").whole([Delta(0, "+", "stop", logprobs=[entry])])["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"+": -0.1, "-": -2.0}]


def test_no_event_has_a_character_that_ends_a_line_for_somebody():
    text = "a\u2028b\u2029c\x85d\n\re"
    for is_chat in (True, False):
        raw = b"".join(protocol.Answer(is_chat, "x").events([Delta(0, text, "stop")], False)).decode()
        sent = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
        bodies = [event["choices"][0] for event in sent]
        assert "".join(body.get("text") or body.get("delta", {}).get("content", "") for body in bodies) == text


def test_a_body_of_marks_alone_is_refused_before_it_is_read():
    with pytest.raises(RequestError, match="over 500,000 brackets, commas and colons"):
        protocol.parse_json(b'{"x":[' + b"[]," * 200_000 + b"1" + b",1" * 200_000 + b"]}")


def test_a_chat_answer_has_what_clients_break_without():
    reply = protocol.Answer(True, "demo-1", prompts=2).whole(delta for delta in DELTAS if delta)
    assert reply["object"] == "chat.completion" and "responses" not in reply and reply["usage"]["total_tokens"] == 16
    choice = reply["choices"][1]
    assert choice == {
        "index": 1,
        "message": {"role": "assistant", "content": "b", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert [entry["token"] for entry in reply["choices"][0]["logprobs"]["content"]] == ["é", "é"]


def test_a_prompt_that_is_answered_n_times_is_counted_once():
    deltas = [Delta(k, "a", "stop", 10, 3, 4) for k in range(4)]
    answer = protocol.Answer(True, "demo-1", prompts=2, n=2)
    assert answer.whole(deltas)["usage"]["total_tokens"] == 32
    assert answer.counts == {"prompt_tokens": 20, "completion_tokens": 12, "cached_tokens": 8}


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_scores_of_choices_are_in_the_answer_and_in_its_stream(is_chat):
    scores = {"cat": 0.75, "dog": 0.25}
    delta = Delta(0, "cat", "stop", 9, 1, scores=scores)
    choice = protocol.Answer(is_chat, "demo-1").whole([delta])["choices"][0]
    assert (choice["logprobs"]["scores"], choice["finish_reason"]) == (scores, "stop")
    chunks = [event["choices"][0] for event in events(is_chat, [delta]) if isinstance(event, dict)]
    assert [chunk["logprobs"]["scores"] for chunk in chunks if chunk["logprobs"]] == [scores]


TOO_MUCH = {
    "n": [9, 0, True, "2", 1.5],
    "stop": [["a"] * 9, "a" * 257, ["a" * 257], [""], [1], True, {}, "\udc00"],
    "choices": [["a"] * 65, ["a" * 1025], [], ["a", "a"], "a" * 1025, [None], {"a": 1}],
    "seed": [2**63, -(2**63) - 1, True, "1", 0.5],
    "top_k": [-1, 1_000_001, False],
    "temperature": [2.1, -0.1, True, "1", [], 10**400, float("inf")],
    "top_p": [1.1, -1, True],
    "min_p": [1.1, -1, True],
    "presence_penalty": [2.1, -2.1, True],
    "frequency_penalty": [2.1, -2.1, True],
    "repetition_penalty": [0, 10.1, True],
    "num_crops": [0, 17, True, "4"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TOO_MUCH.items() for value in values])
def test_every_option_has_a_least_and_a_most_on_both_routes(name, value):
    for parse, body in ((protocol.parse_completion, {"prompt": "a"}), (protocol.parse_chat, user("a"))):
        with pytest.raises(RequestError) as caught:
            parse(body | {name: value}, 1024)
        assert caught.value.param.partition("[")[0] == name and caught.value.status == 400
    assert set(TOO_MUCH) | {"max_tokens", "logprobs"} == {option.name for option in fields(SamplingParams)}


@pytest.mark.parametrize(
    "more",
    [
        {"n": 8},
        {"stop": ["a" * 256] * 8},
        {"choices": [f"{k:01024}" for k in range(64)]},
        {"seed": -(2**63)},
        {"top_k": 10**6},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_at_its_most_is_taken_on_both_routes(more):
    assert protocol.parse_completion({"prompt": "a"} | more, 1024).chats
    assert protocol.parse_chat(user("a") | more, 1024).chats
    assert len(protocol.parse_chat({"messages": [{"role": "user", "content": "a"}] * 256} | more, 1024).chats) == 1


NAMES = [
    *TOO_MUCH,
    *protocol.UNSUPPORTED,
    "prompt",
    "images",
    "messages",
    "role",
    "content",
    "type",
    "text",
    "image_url",
]
NAMES += [
    "url",
    "detail",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
]
TEXTS = st.text(max_size=5) | st.sampled_from(
    ["user", "assistant", "text", "image_url", "YWJj", "data:;base64,YQ==", "\ud800"]
)
VALUES = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
KEYS = st.sampled_from(NAMES) | st.text(max_size=3)
ANY = st.recursive(VALUES | TEXTS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))
PART = st.fixed_dictionaries({}, optional={"type": TEXTS, "text": ANY, "image_url": ANY, "detail": ANY})
MESSAGE = st.fixed_dictionaries(
    {"role": TEXTS | ANY, "content": TEXTS | st.lists(PART | ANY, max_size=3)}, optional={"name": ANY}
)
BODY = st.fixed_dictionaries(
    {},
    optional={"prompt": TEXTS | ANY, "messages": st.lists(MESSAGE, max_size=3) | ANY}
    | {name: ANY for name in NAMES[2:]},
)


@settings(max_examples=150, deadline=None)
@given(BODY | st.dictionaries(KEYS, ANY) | ANY)
def test_any_json_is_a_request_or_refused_in_one_line_that_can_be_sent(value):
    raw = json.dumps(value).encode()
    for read in (protocol.parse_completion, protocol.parse_chat):
        try:
            body = protocol.parse_json(raw)
            request, _ = read(body, 1024), protocol.streaming(body)
            assert isinstance(request, Request) and 1 <= len(request.chats) <= 32
        except RequestError as error:
            assert error.status == 400 and "\n" not in error.message and len(error.message) < 400
            assert json.loads(protocol.render(protocol.error(error)))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u \n', max_size=80).map(str.encode))
def test_any_bytes_are_an_object_or_refused(raw):
    with suppress(RequestError):
        assert isinstance(protocol.parse_json(raw), dict)
