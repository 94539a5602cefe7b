"""How answers are sampled, ended, scored and cut into pieces, with the embedded model and a tiny random one."""

import math
import random
import threading

import numpy as np
import pytest
import test_parity as parity

import phi3v
from phi3v import model
from phi3v.errors import RequestError
from phi3v.request import Chat, Request, SamplingParams, question
from phi3v.sequences import Prompt
from phi3v.tokenizer import Decoder

# The random checkpoint says anything: byte tokens, broken characters, other scripts.
PROMPTS = [
    "Hello",
    "日本語で",
    "😀🎉",
    "Ünïcode",
    "x = 1\n",
    "Grüße aus Köln",
    "한국어 문장",
    "naïve café",
    "a",
    "«Привет»",
]


@pytest.fixture(scope="module")
def llm():
    with phi3v.load("demo") as llm:
        yield llm


@pytest.fixture(scope="module")
def wild():
    with phi3v.load(str(parity.PARITY / "tiny-su")) as llm:
        yield llm


def ids_of(llm, text: str, choice: str = "") -> list[int]:
    parts = llm.tokenizer.chat(question(text, []).messages)
    return llm.tokenizer.encode([*parts, choice] if choice else parts, [], 10**6)


def folded(llm, request: Request) -> list[tuple]:
    """(text, finish reason, tokens made) of each answer, and that the pieces were right on their way."""
    texts, last = {}, {}
    with llm.answer(request) as deltas:
        for delta in deltas:
            assert delta.index not in last or last[delta.index].finish_reason is None
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            last[delta.index] = delta
    return [(texts[i], last[i].finish_reason, last[i].completion_tokens) for i in sorted(texts)]


def ask(llm, text: str, **params) -> tuple:
    return folded(llm, Request([question(text, [])], SamplingParams(**params)))[0]


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_of_16_and_after_a_restart(wild):
    params = {"temperature": 1.5, "top_p": 0.95, "top_k": 200, "min_p": 0.001, "presence_penalty": 0.5}
    params |= {"max_tokens": 40, "seed": 11}
    alone = [ask(wild, f"Number {k}", **params) for k in range(16)]
    assert len(set(alone)) == 16
    batch = Request([question(f"Number {k}", []) for k in range(16)], SamplingParams(**params))
    assert folded(wild, batch) == alone
    crowd = {}

    def one(k: int) -> None:  # each a request of its own, beside others that are greedy
        crowd[k] = ask(wild, f"Number {k}", **params) if k < 16 else ask(wild, f"Number {k}", max_tokens=k)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [crowd[k] for k in range(16)] == alone
    with phi3v.load(str(parity.PARITY / "tiny-su"), cache_bytes=0) as again:
        assert [ask(again, f"Number {k}", **params) for k in (0, 15)] == [alone[0], alone[15]]
    assert ask(wild, "Number 0", **params | {"seed": 12}) != alone[0]


def test_n_answers_differ_are_those_of_the_seed_and_leave_the_greedy_one_as_it_is(wild):
    params = {"temperature": 1.5, "seed": 3, "max_tokens": 12}
    several = Request([question(p, []) for p in PROMPTS[:3]], SamplingParams(**params, n=4))
    answers = folded(wild, several)
    assert len(set(answers[:4])) == 4 and [answers[4 * k] for k in range(3)] == [
        ask(wild, p, **params) for p in PROMPTS[:3]
    ]
    greedy = wild.generate("Hello", n=3, max_tokens=9)
    assert greedy == [wild.generate("Hello", max_tokens=9)] * 3


def test_temperature_0_with_every_other_option_at_its_default_is_greedy(wild):
    greedy = ask(wild, "Hello", max_tokens=20)
    assert ask(wild, "Hello", max_tokens=20, temperature=1.0, top_k=1, seed=5) == greedy
    assert ask(wild, "Hello", max_tokens=20, temperature=0, top_p=0.1, min_p=0.5, seed=5) == greedy
    assert ask(wild, "Hello", max_tokens=20, repetition_penalty=1.8) != greedy


def exact(ids: list[int]) -> np.ndarray:
    """Log-probabilities of what follows each id, computed without the engine: (ids, vocabulary)."""
    phi, _ = parity.checkpoint("tiny-su")
    logits = np.array(parity.logits_of(phi, ids, [], parity.cache_of(phi)), float)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def test_log_probabilities_are_the_models_whatever_is_sampled(wild):
    ids = ids_of(wild, "Hello")
    for params in ({}, {"temperature": 1.3, "seed": 2, "repetition_penalty": 1.4}):
        asked = SamplingParams(logprobs=3, **params)
        generation = wild._engine.submit([Prompt(ids, [], 6, params=asked)])
        tokens = [token for _, token, _ in generation]
        rows = exact([*ids, *tokens])[len(ids) - 1 :]
        for row, token, (own, best) in zip(rows[:-1], tokens, generation.logprobs[0], strict=True):
            assert math.isclose(own, row[token], abs_tol=1e-3)
            assert [i for i, _ in best] == list(np.argsort(-row)[:3])
            assert np.allclose([value for _, value in best], np.sort(row)[::-1][:3], atol=1e-3)


def test_shown_tokens_make_up_the_text_and_alternatives_are_sorted(wild):
    with wild.stream("日本", max_tokens=60, logprobs=5, temperature=1.2, seed=1) as deltas:
        pieces = list(deltas)
    shown = [entry for delta in pieces for entry in delta.logprobs]
    text = b"".join(entry.token for entry in shown).decode(errors="replace")
    assert text == "".join(delta.text for delta in pieces)
    assert len(shown) == pieces[-1].completion_tokens == 60
    for entry in shown:
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True) and len(values) == 5 and entry.logprob <= values[0] <= 0


def test_choices_are_the_most_probable_of_their_list_on_100_cases(wild):
    """Against scores that are summed up token by token, without the engine."""
    rng = random.Random(8)
    words = ["cat", "dog", "a bird", "日本", "yes", "no", "yes, please", "42", "é", "cat and dog", "<|end|>", "a bir"]
    end = wild.tokenizer.special["<|end|>"]
    for k in range(100):
        text, choices = f"{rng.choice(PROMPTS)} {k}", rng.sample(words, rng.randint(2, 4))
        with wild.stream(text, choices=choices) as deltas:
            (delta,) = deltas
        start, scores = len(ids_of(wild, text)), []
        for choice in choices:
            ids = ids_of(wild, text, choice)
            rows = exact(ids)[start - 1 :]
            scores.append(sum(row[token] for row, token in zip(rows, [*ids[start:], end], strict=True)))
        assert (delta.text, delta.finish_reason) == (choices[int(np.argmax(scores))], "stop")
        probabilities = np.exp(scores - np.logaddexp.reduce(scores))
        assert np.allclose([delta.scores[choice] for choice in choices], probabilities, atol=1e-4)


def test_choices_may_be_asked_of_several_prompts(llm):
    choices = ["Paris", "Berlin", "The capital of France is Paris.", "The capital of France is Oslo."]
    text = "What is the capital of France?"
    with llm.stream([text, "What is 3 + 4?", text], choices=[*choices, "3 + 4 = 7."]) as deltas:
        answers = {delta.index: delta for delta in deltas}
    assert [answers[k].text for k in range(3)] == [choices[2], "3 + 4 = 7.", choices[2]]
    assert answers[0].prompt_tokens == len(ids_of(llm, text))
    assert all(math.isclose(sum(answer.scores.values()), 1, abs_tol=1e-6) for answer in answers.values())


@pytest.mark.parametrize("choices", [["Hello! I am", " x"], ["Hello! I am", "Hello! I was"], ["Hello! I am"]])
def test_what_choices_share_is_of_the_answer_not_of_the_prompt(llm, choices):
    with llm.stream("Hello, world!", choices=choices) as deltas:
        (delta,) = deltas
    assert (delta.text, delta.prompt_tokens, delta.completion_tokens) == ("Hello! I am", 20, 4)


def test_choices_that_are_the_same_tokens_are_refused(llm):
    with pytest.raises(RequestError, match="two of the choices are the same tokens") as caught:
        llm.stream("Hello, world!", choices=["cat", " cat", "dog"])
    assert caught.value.param == "choices"


def test_choices_that_were_cancelled_are_no_answer(llm):
    deltas = llm.stream("Hello, world!", choices=[f"{k} x" for k in range(10)])
    deltas.__exit__()
    assert [(delta.text, delta.finish_reason, delta.scores) for delta in deltas] in ([("", "cancelled", None)], [])


def test_special_tokens_among_the_alternatives_have_their_names(llm):
    decoder, end = llm.tokenizer.decoder(), llm.tokenizer.special["<|end|>"]
    for token in ids_of(llm, "Hello"):
        decoder.push(token, (-0.1, [(token, -0.1), (end, -3.0)]))
    assert [name for name, _ in decoder.logprobs()[-1].top][1] == b"<|end|>"


@pytest.mark.parametrize("length", [300, 900])
def test_the_prompt_of_choices_is_read_once(llm, monkeypatch, length):
    read, call = [], model.Phi3V.__call__

    def counting(self, embeddings, parts, rows=None):
        read.append(sum(part.tokens for part in parts))
        return call(self, embeddings, parts, rows)

    monkeypatch.setattr(model.Phi3V, "__call__", counting)
    long = f"{length} " + "x y " * length + "What is 3 + 4?"
    choices = [f"{'3 + 4 = ' * min(length // 5, 120)}{k}." for k in range(10)]
    assert llm.generate(long, choices=choices)
    prompt, each = len(ids_of(llm, long)), len(ids_of(llm, long, choices[0])) - len(ids_of(llm, long))
    assert 900 < prompt < sum(read) < prompt + 10 * (each + 2)


def test_choices_continue_what_the_assistant_began(llm):
    chat = Chat([("user", ["What is the capital of Norway?"]), ("assistant", ["The capital of Norway"])], [])
    request = Request([chat], SamplingParams(choices=(" is Oslo.", " is Paris.")))
    assert folded(llm, request)[0][0] == " is Oslo."
    ((text, reason, _),) = folded(llm, Request([chat], SamplingParams()))
    assert (text, reason) == (" is Oslo.", "stop")


def test_an_answer_never_has_text_past_an_end_token_even_if_it_is_the_first(wild):
    ids = ids_of(wild, "Hello")
    first = int(np.argmax(exact(ids)[-1]))
    ends, wild._end_ids = wild._end_ids, frozenset([first])
    try:
        assert ask(wild, "Hello") == ("", "stop", 0)
        assert ask(wild, "Hello", max_tokens=1, stop="x", logprobs=2) == ("", "stop", 0)
    finally:
        wild._end_ids = ends


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The definition: read on character by character until the text ends with a stop string."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_a_streams_pieces_are_the_whole_answer_for_200_prompts_with_stop_strings(wild):
    rng = random.Random(5)
    stopped = 0
    for at in range(0, 200, 25):
        texts = [f"{rng.choice(PROMPTS)} {rng.choice(PROMPTS)} {at + k}" for k in range(25)]
        params = {"max_tokens": 24, "temperature": 1.4, "seed": at}
        plain = wild.generate(texts, **params)
        stops = set()
        for text in plain:  # of characters that do come, also across tokens
            begin = rng.randrange(len(text) or 1)
            stops.add(text[begin : begin + rng.randint(1, 4)] or "x")
        stops = rng.sample(sorted(stops), 8)
        expected = [cut_at_stop(text, stops) for text in plain]
        stopped += sum(a != b for a, b in zip(expected, plain, strict=True))
        for whole in (wild.generate(texts, **params, stop=stops), pieces_of(wild, texts, **params, stop=stops)):
            assert [t.encode() for t in whole] == [t.encode() for t in expected]
    assert stopped > 50


def pieces_of(llm, texts: list[str], **params) -> list[str]:
    pieces = {k: [] for k in range(len(texts))}
    with llm.stream(texts, **params) as deltas:
        for delta in deltas:
            pieces[delta.index].append(delta)
    for each in pieces.values():
        reasons = [delta.finish_reason for delta in each]
        assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    return ["".join(delta.text for delta in each) for each in pieces.values()]


def test_one_answer_that_is_stopped_leaves_the_others_running(llm):
    texts = ["Hello, world!", "What is 3 + 4?", "Hello, world!"]
    answers = folded(llm, Request([question(t, []) for t in texts], SamplingParams(stop=(" 4",))))
    assert [a[:2] for a in answers[1:2]] == [("3 +", "stop")] and answers[0] == answers[2]
    assert answers[0][0] == llm.generate("Hello, world!") and llm.stats()["running"] == 0


TABLE = {k: bytes([k]) for k in range(256)}


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        ([b"ab", b"cd"], ("bc",), ["a", None]),
        ([b"ab", b"cd"], ("cd",), ["ab", None]),
        ([b"a", b"b", b"x"], ("abc",), ["", "", "abx"]),
        ([b"aab", b"c"], ("aabx", "abc"), ["", None]),
        ([b"abcd"], ("abcd", "bc"), [None]),
        ([b"x\xe2\x82", b"\xacy"], ("€",), ["x", None]),
        ([b"\xff", b"z"], ("\ufffdz",), ["", None]),
        ([b"stop"], (), ["stop"]),
    ],
)
def test_what_a_stop_string_may_begin_with_is_held_back(pieces, stop, shown):
    decoder = Decoder(dict(enumerate(pieces)), stop, goes_on=True)
    for k, text in enumerate(shown):
        got = decoder.push(k)
        assert decoder.stopped == (text is None)
        assert text is None or got == text


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_end_at_the_same_character_however_the_tokens_cut_the_text(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab€") for _ in range(30))
    stops = tuple({"".join(rng.choice("ab€") for _ in range(rng.randint(2, 5))) for _ in range(3)})
    data = text.encode()
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(data)), 6))
        decoder = Decoder(dict(enumerate(data[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True))), stops)
        made = ""
        for k in range(len(cuts) + 1):
            made += decoder.push(k)
            if decoder.stopped:
                break
        assert made + ("" if decoder.stopped else decoder.finish()) == cut_at_stop(text, list(stops))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2, not 2.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 2, not NaN"),
        ({"top_p": -0.1}, "top_p must be a number from 0 to 1, not -0.1"),
        ({"top_k": 1.5}, "top_k must be a whole number from 0 to 1000000, not 1.5"),
        ({"n": 9}, "n must be a whole number from 1 to 8, not 9"),
        ({"n": True}, "n must be a whole number from 1 to 8, not true"),
        ({"stop": [""]}, r"stop\[0\] is empty"),
        ({"stop": ["a"] * 9}, "stop must be a string or a list of 0 to 8, not a list of 9"),
        ({"stop": "a" * 257}, r"stop\[0\] has 257 characters, at most 256 are allowed"),
        ({"choices": []}, "choices must be a string or a list of 1 to 64, not a list of 0"),
        ({"choices": ["a", "b", "a"]}, "choices must differ from each other"),
        ({"choices": ["a"], "n": 2}, "n must be 1, not 2"),
    ],
)
def test_options_out_of_bounds_are_refused_in_words(params, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)
