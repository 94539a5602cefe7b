"""What the openai package makes of the rest: headers, usage, errors, log-probabilities, models, text completions."""

import asyncio

import openai
import pytest
from conftest import data_url, drawing

MODEL = "phi-3-vision"
PARTS = [
    {"type": "text", "text": "What is shown in this image?"},
    {"type": "image_url", "image_url": {"url": data_url(drawing("blue", "square"))}},
]
ASK = {"model": MODEL, "messages": [{"role": "user", "content": PARTS}]}
ENDLESS = {"frequency_penalty": -2, "extra_body": {"repetition_penalty": 10}}  # the demo model finds no end so
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello, world!"}]}


@pytest.fixture(scope="module")
def client(server, key, context):
    http_client = openai.DefaultHttpxClient(verify=context)
    with openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, http_client=http_client) as client:
        yield client


def test_a_whole_answer_has_every_part_that_the_package_names(client):
    reply = client.chat.completions.create(**ASK)
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint.startswith("demo-")
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "A blue square.")
    assert reply.usage.prompt_tokens > 144 and reply.usage.completion_tokens > 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert client.chat.completions.create(**ASK).usage.prompt_tokens_details.cached_tokens > 144


def test_a_streamed_answer_adds_up_to_the_whole_one(client):
    whole = client.chat.completions.create(**ASK)
    first, *chunks, last, usage = client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *chunks])
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in [first, *chunks, last, usage]}) == 1


def test_the_packages_own_accumulator_takes_the_stream(client):
    with client.chat.completions.stream(**ASK) as events:
        done = [event for event in events if event.type == "content.done"]
        assert [event.content for event in done] == ["A blue square."]
        assert events.get_final_completion().choices[0].message.content == "A blue square."


def test_many_asynchronous_requests_run_side_by_side(server, key, context):
    async def ask_all() -> list:
        http_client = openai.DefaultAsyncHttpxClient(verify=context)
        async with openai.AsyncOpenAI(base_url=server.url, api_key=key, http_client=http_client) as client:
            return await asyncio.gather(*[client.chat.completions.create(**ASK) for _ in range(16)])

    assert {reply.choices[0].message.content for reply in asyncio.run(ask_all())} == {"A blue square."}


def test_raw_responses_show_the_limit_and_the_id_that_the_client_gave(client):
    raw = client.chat.completions.with_raw_response.create(**HELLO, extra_headers={"X-Request-Id": "mine-1"})
    assert raw.headers["X-Request-Id"] == raw.request_id == "mine-1"
    assert raw.headers["X-RateLimit-Limit"] == "1000000"
    assert int(raw.headers["X-RateLimit-Remaining"]) < 1_000_000 and 0 < int(raw.headers["X-RateLimit-Reset"]) <= 60
    assert raw.headers["Content-Type"] == "application/json"
    assert raw.parse().choices[0].message.content.startswith("Hello!")
    with client.chat.completions.with_streaming_response.create(**HELLO, stream=True) as raw:
        assert raw.headers["Content-Type"] == "text/event-stream" and raw.headers["Cache-Control"] == "no-cache"
        *_, done = (line for line in raw.iter_lines() if line)
        assert done == "data: [DONE]"


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"temperature": 9}, "temperature", "from 0 to 2, not 9"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"messages": []}, "messages", "1 to 256, not a list of 0"),
        ({"messages": [{"role": "user", "content": [PARTS[0], {"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
         "messages[0].content[1]", "not fetched"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(client, body, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**ASK | body)
    error = caught.value
    assert (error.status_code, error.code, error.type, error.param) == (400, "400", "invalid_request_error", param)
    assert error.request_id == error.response.headers["X-Request-Id"]


def test_there_is_one_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert (caught.value.code, caught.value.type) == ("404", "model_not_found")


def test_what_clients_send_unasked_is_taken(client):
    function = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    reply = client.chat.completions.create(
        **ASK | {"model": "gpt-4o"}, max_tokens=3000, tools=[function], tool_choice="auto", user="me", store=False,
        metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto", response_format={"type": "text"},
    )  # fmt: skip
    assert (reply.model, reply.choices[0].message.content) == (MODEL, "A blue square.")
    reply = client.chat.completions.create(**ASK, max_completion_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def test_log_probabilities_several_answers_seed_stop_and_choices(client):
    reply = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "A blue square."
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob >= token.logprob for token in tokens)
    wild = {"messages": HELLO["messages"], "max_tokens": 20, "n": 3, "temperature": 2, "seed": 7} | ENDLESS
    tries = [client.chat.completions.create(model=MODEL, **wild).choices for _ in range(2)]
    texts = [[choice.message.content for choice in choices] for choices in tries]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert client.chat.completions.create(**ASK, stop=" square").choices[0].message.content == "A blue"
    reply = client.chat.completions.create(**ASK, extra_body={"choices": ["A red circle.", "A blue square."]})
    assert reply.choices[0].message.content == "A blue square."
    assert sum(reply.choices[0].logprobs.scores.values()) == pytest.approx(1)


def test_text_completions_take_several_prompts_and_pictures(client):
    pictures = [[PARTS[1]["image_url"]["url"]], []]
    asked = {"model": MODEL, "prompt": [PARTS[0]["text"], "What is 3 + 4?"], "extra_body": {"images": pictures}}
    whole = client.completions.create(**asked, max_tokens=20)
    assert [choice.text for choice in whole.choices] == ["A blue square.", "3 + 4 = 7."] == whole.responses
    texts = ["", ""]
    for chunk in client.completions.create(**asked, max_tokens=20, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole.responses
    with pytest.raises(openai.BadRequestError, match="from 1 to 1024, not 1025"):
        client.completions.create(**asked, max_tokens=1025)


def test_a_stream_that_is_left_early_leaves_the_server_free_for_the_next(narrow, key, context):
    http_client = openai.DefaultHttpxClient(verify=context)
    with openai.OpenAI(base_url=narrow.url, api_key=key, max_retries=1, http_client=http_client) as client:
        endless = {"model": MODEL, "prompt": ["Hello, world!"] * 32, "max_tokens": 1024} | ENDLESS
        with client.completions.create(**endless, stream=True) as chunks:  # in all the places that a key has there
            assert next(chunks).choices[0].text
        assert client.chat.completions.create(**ASK).choices[0].message.content == "A blue square."
