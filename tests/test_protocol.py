"""The shapes on the wire, as tables: what is taken, what is refused, and with which field and words."""

import json
from datetime import UTC, datetime

import pytest

from phi3v import protocol
from phi3v.errors import RequestError
from phi3v.request import Chat, Delta, Picture, Request, SamplingParams

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
        (b'{"a": -0.5e1, "b": [true, null]}', {"a": -5.0, "b": [True, None]}),
        (b'{"a": 1e400}', {"a": float("inf")}),  # a number, if a large one: its field refuses it
        (nested(1), {"a": 1}),
        (nested(32), json.loads(nested(32))),
        (nested(32, '{"b":', "}"), json.loads(nested(32, '{"b":', "}"))),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_json_object_is_taken(raw, body):
    assert protocol.parse_json(raw) == body


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
        (b'{"a":' + b"9" * 4301 + b"}", NUMBER),
        (nested(33), DEEP),
        (nested(33, '{"b":', "}"), DEEP),
        (b"[" * 100_000, DEEP),
        (nested(100_000), DEEP),
        (nested(100_000, '{"b":', "}"), DEEP),
        (b"[]", "the body must be a JSON object, not a list"),
        (b'"prompt"', "the body must be a JSON object, not a string"),
        (b"1.5", "the body must be a JSON object, not a number"),
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


MISSING = "prompt is missing: a string, or a list of strings"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", MISSING),
        ({"prompt": None}, "prompt", MISSING),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": 5}, "prompt", "prompt must be a string, not a number"),
        ({"prompt": False}, "prompt", "prompt must be a string, not true or false"),
        ({"prompt": {"text": "hi"}}, "prompt", "prompt must be a string, not an object"),
        ({"prompt": []}, "prompt", "prompt must be a string or a list of 1 to 32, not 0"),
        ({"prompt": ["a"] * 33}, "prompt", "prompt must be a string or a list of 1 to 32, not 33"),
        ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1] is empty"),
        ({"prompt": ["a", None]}, "prompt[1]", "prompt[1] must be a string, not null"),
        ({"prompt": [["a"]]}, "prompt[0]", "prompt[0] must be a string, not a list"),
        ({"prompt": [1, 2, 3]}, "prompt[0]", "prompt[0] must be a string, not a number"),  # token ids, as OpenAI takes
        ({"prompt": "a\ud800"}, "prompt", "prompt holds half a surrogate pair (\\ud800 to \\udfff)"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]", "prompt[1] holds half a surrogate pair (\\ud800 to \\udfff)"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_message_says_what_is_allowed(body, param, message):
    refused(body, param, message)


@pytest.mark.parametrize("value", [0, -1, 1025, "5", True, False, 1.0, 1e400, 10**4000, [5], {"a": "\ud800" * 99}])
def test_a_number_that_is_no_whole_one_in_range_is_refused(value):
    shown = json.dumps(value)[:40]
    for name, most in (("max_tokens", 1024), ("num_crops", 16)):
        refused({"prompt": "a", name: value}, name, f"{name} must be a whole number from 1 to {most}, not {shown}")


NO_BASE64 = ["YQ", "Y Q==", "YQ==\n", "_-8=", "YWJj====", "ÿQ==", "/etc/passwd", "file:/etc/passwd", "data:;base64,YQ"]


@pytest.mark.parametrize("image", NO_BASE64)
def test_a_picture_that_is_no_strict_base64_is_refused(image):
    message = "the picture is not valid base64 (alphabet A-Z a-z 0-9 + /, padded with =)"
    refused({"prompt": "a", "images": ["YQ==", image]}, "images[1]", message)
    refused({"prompt": ["a", "b"], "images": [[], ["YQ==", image]]}, "images[1][1]", message)


PICTURES = "must be a list of pictures (data: URLs or base64), not"
LISTS = "images must be a list of 2 lists, one for each prompt, not"
URL = "a data: URL must read data:image/…;base64,…"
FETCH = "…: send a data: URL or base64"


@pytest.mark.parametrize(
    ("prompt", "images", "param", "message"),
    [
        ("a", "YQ==", "images", f"images {PICTURES} a string"),
        ("a", [["YQ=="]], "images[0]", "images[0] must be a data: URL or base64, not a list"),
        ("a", ["YQ==", None], "images[1]", "images[1] must be a data: URL or base64, not null"),
        ("a", ["YQ=="] * 16 + [5], "images", "images has 17 pictures, at most 16 are allowed"),
        ("a", ["data:image/png,YQ=="], "images[0]", URL),
        ("a", ["data:image/png;base64"], "images[0]", URL),
        ("a", ["data:image/svg+xml;utf8,<svg/>"], "images[0]", URL),
        ("a", ["http://127.0.0.1/a.png"], "images[0]", f"pictures are not fetched from http://1{FETCH}"),
        (["a", "b"], [[], ["FILE:///etc"]], "images[1][0]", f"pictures are not fetched from FILE:///{FETCH}"),
        (["a", "b"], [["YQ=="]], "images", f"{LISTS} 1"),
        (["a", "b"], [[], [], []], "images", f"{LISTS} 3"),
        (["a", "b"], {}, "images", f"{LISTS} an object"),
        (["a", "b"], ["YQ==", "YQ=="], "images[0]", f"images[0] {PICTURES} a string"),
        (["a", "b"], [[], None], "images[1]", f"images[1] {PICTURES} null"),
        (["a", "b"], [[], ["YQ=="] * 17], "images[1]", "images[1] has 17 pictures, at most 16 are allowed"),
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
    assert protocol.error(400, "no", "invalid_request_error", "prompt[1]") == {"error": error}
    assert protocol.error(400, "no", "invalid_request_error") == {"error": error | {"param": None}}


def test_a_rendered_body_is_one_line_of_utf_8():
    assert protocol.render({"a": ["ä\n\r\u2028🎉\0", None]}) == '{"a":["ä\\n\\r\u2028🎉\\u0000",null]}'.encode()


def test_a_message_that_repeats_half_a_surrogate_pair_can_still_be_sent():
    with pytest.raises(RequestError) as caught:
        protocol.parse_completion({"prompt": "a", "images": ["\ud800://a"]}, 1024)
    sent = protocol.render(protocol.error(400, caught.value.message, "invalid_request_error", caught.value.param))
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
