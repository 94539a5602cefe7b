"""The engine on the reference's cases: batches, both rope regimes, caches, turns, cancellation, failure, shutdown."""

import dataclasses
import gc
import math
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import test_parity as parity

from phi3v import engine as engine_module
from phi3v import model, sequences
from phi3v.engine import Engine
from phi3v.errors import RequestError, SetupError, Unavailable
from phi3v.request import SamplingParams
from phi3v.sequences import Prompt

TINY = parity.PARITY / "tiny-su"


@pytest.fixture(scope="module")
def engines():
    """One engine for each checkpoint of the cases."""
    names = {case["checkpoint"] for case in parity.CASES.values()}
    running = {name: Engine(partial(model.load, parity.PARITY / name)) for name in sorted(names)}
    for engine in running.values():
        engine.wait()
    yield running
    for engine in running.values():
        engine.close()


@pytest.fixture
def engine():
    engine = Engine(partial(model.load, TINY), max_queue=64)
    engine.wait()
    yield engine
    engine.close()
    assert not engine._alive  # every sequence was counted off


@pytest.fixture(params=["as here", "as with CUDA"])
def shapes(request, monkeypatch):
    """Shapes filled up and rows that stay, too: how a GPU of that kind is spared new shapes must not change a token."""
    if request.param == "as with CUDA":
        monkeypatch.setattr(sequences, "GRAIN", 16)
        monkeypatch.setattr(sequences, "SPARE", 3)


@pytest.fixture
def passes(monkeypatch):
    """What each pass of any model was made of: (rows, tokens of each, those that count) for each part."""
    seen, call = [], model.Phi3V.__call__

    def watched(self, embeddings, parts, rows):
        seen.append([(len(p.cache.lengths), p.columns, p.count) for p in parts])
        return call(self, embeddings, parts, rows)

    monkeypatch.setattr(model.Phi3V, "__call__", watched)
    return seen


def single(name: str) -> tuple[Prompt, list[int]]:
    """A case as a prompt that no end token stops, and the tokens that are right."""
    expected = parity.numbers(name)
    greedy = expected["greedy"].tolist()
    return Prompt(expected["input_ids"].tolist(), parity.crops_of(name), len(greedy)), greedy


def run(engine: Engine, *prompts: Prompt) -> list[list[int]]:
    made = [[] for _ in prompts]
    for index, token, _ in engine.submit(list(prompts)):
        if token is not None:
            made[index].append(token)
    return made


@pytest.mark.parametrize("checkpoint", sorted({case["checkpoint"] for case in parity.CASES.values()}))
def test_all_cases_of_a_checkpoint_in_one_batch_make_the_tokens_they_make_alone(engines, checkpoint, shapes):
    """Texts and pictures, short, long and crossing sequences, joining and leaving at their own times."""
    cases = [single(name) for name in parity.SINGLE if parity.CASES[name]["checkpoint"] == checkpoint]
    assert len(cases) >= 2
    prompts, expected = zip(*cases, strict=True)
    assert run(engines[checkpoint], *prompts) == list(expected)


@pytest.mark.parametrize("name", parity.BATCHES)
def test_rows_of_a_batch_take_the_rope_of_their_own_length(engines, name):
    case, expected = parity.CASES[name], parity.numbers(name)
    rows = range(len(case["batch"]))
    tokenizer = parity.checkpoint(case["checkpoint"])[1]
    ids = [tokenizer.encode(parity.parts(tokenizer, text), [], 9999) for text in case["batch"]]
    assert ids == [expected[f"row{k}_input_ids"].tolist() for k in rows]
    greedy = [expected[f"row{k}_greedy"].tolist() for k in rows]
    prompts = [Prompt(ids[k], [], len(greedy[k])) for k in rows]
    assert run(engines[case["checkpoint"]], *prompts) == greedy
    phi, _ = parity.checkpoint(case["checkpoint"])
    for k in rows:
        logits = parity.prefill(phi, ids[k], [], parity.cache_of(phi))
        assert parity.off(np.array(logits), expected[f"row{k}_logits_last"]) <= parity.LOGITS


@pytest.mark.parametrize("most", [1, 5, 31])
def test_an_answer_does_not_depend_on_how_long_it_may_be(engines, most):
    prompt, greedy = single("tiny-su.text_cross")
    assert run(engines["tiny-su"], Prompt(prompt.ids, [], most)) == [greedy[:most]]


def test_a_sequence_ends_at_an_end_token_and_does_not_show_it(engines):
    prompt, greedy = single("tiny-su.text_short")
    ends = frozenset([greedy[5]])
    first = greedy.index(greedy[5])
    items = list(engines["tiny-su"].submit([Prompt(prompt.ids, [], 32, ends)]))
    assert items == [(0, token, None) for token in greedy[:first]] + [(0, None, "stop")]


def test_the_last_token_comes_with_the_reason_length(engines):
    prompt, greedy = single("tiny-su.text_short")
    items = list(engines["tiny-su"].submit([Prompt(prompt.ids, [], 2)]))
    assert items == [(0, greedy[0], None), (0, greedy[1], "length")]


def test_requests_from_many_threads_get_their_own_tokens(engines):
    cases = [single(name) for name in ("tiny-su.text_short", "tiny-su.text_64", "tiny-su.text_65", "tiny-su.text_one")]
    answers = {}

    def ask(k):
        answers[k] = run(engines["tiny-su"], cases[k % 4][0])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {k: [cases[k % 4][1]] for k in range(12)}


def test_a_cancelled_request_ends_and_makes_room_and_the_others_go_on(engine):
    prompt, greedy = single("tiny-su.text_short")
    long = engine.submit([Prompt(prompt.ids, [], 1500)])
    other = engine.submit([prompt])
    next(iter(long))
    long.cancel()
    assert [token for _, token, _ in other] == greedy
    assert list(long)[-1] == (0, None, "cancelled")
    assert run(engine, *[prompt] * 64) == [greedy] * 64  # the whole queue is free again


def test_who_is_cancelled_before_it_is_read_is_never_read(held, passes):
    engine = Engine(partial(model.load, TINY), max_batch=1)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    generation = engine.submit([prompt] * 3)
    generation.cancel(0)
    generation.cancel(2)
    held.set()
    items = list(generation)
    assert items[:2] == [(0, None, "cancelled"), (2, None, "cancelled")] or items[:2] == [
        (2, None, "cancelled"),
        (0, None, "cancelled"),
    ]
    assert [token for _, token, _ in items[2:]] == greedy and len(passes) == len(greedy)
    engine.close()


def test_a_thousand_cancelled_requests_leave_nothing(monkeypatch):
    made, threads = [], threading.active_count()

    class Followed(sequences.Sequence):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(engine_module, "Sequence", Followed)
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    for k in range(1000):
        generation = engine.submit([Prompt(prompt.ids, [], 1500)])
        items = iter(generation)
        if k % 3:
            next(items)
        generation.cancel()
        if k % 2:
            assert list(items)[-1] == (0, None, "cancelled")
    assert run(engine, prompt) == [greedy] and len(made) == 1001
    del generation, items
    deadline = time.monotonic() + 30
    while any(ref() for ref in made) and time.monotonic() < deadline:  # until the engine has seen that all is done
        gc.collect()
    assert not any(ref() for ref in made) and engine.stats()["running"] == engine.stats()["waiting"] == 0
    engine.close()
    assert threading.active_count() == threads


def test_a_full_queue_refuses_and_takes_again(engine):
    prompt, greedy = single("tiny-su.text_short")
    held = engine.submit([Prompt(prompt.ids, [], 1500)] * 63)
    with pytest.raises(Unavailable, match="the queue is full: 63 of 64 sequences") as caught:
        engine.submit([prompt, prompt])
    assert caught.value.headers == {"Retry-After": "5"}
    assert run(engine, prompt) == [greedy]
    held.cancel()
    list(held)
    assert run(engine, prompt) == [greedy]


def test_a_batch_never_holds_more_than_it_may_and_all_get_their_answers(passes, shapes):
    engine = Engine(partial(model.load, TINY), max_batch=3)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    assert run(engine, *[prompt] * 8) == [greedy] * 8
    assert max(sum(rows for rows, _, _ in parts) for parts in passes) <= 3 + sequences.SPARE
    engine.close()


@pytest.fixture
def held(monkeypatch):
    """A way to submit several requests before the engine sees any of them: none is taken until `held` is set."""
    gate, receive = threading.Event(), Engine._receive

    def patient(self):
        gate.wait()
        return receive(self)

    monkeypatch.setattr(Engine, "_receive", patient)
    return gate


def test_prompts_that_wait_together_are_read_together_and_each_in_its_own_length(held, passes):
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    prompts = [Prompt([1] * n, [], 2) for n in (33, 40, 50)]
    engine.wait()
    generations = [engine.submit([p]) for p in prompts]
    held.set()
    for generation in generations:
        assert len(list(generation)) == 2
    assert passes == [[(1, 33, 33), (1, 40, 40), (1, 50, 50)], [(3, 1, 1)]]
    engine.close()


def test_a_short_prompt_that_comes_while_a_long_one_is_read_gets_its_token_first(monkeypatch, passes):
    monkeypatch.setattr(engine_module, "ALONE", 40)
    monkeypatch.setattr(engine_module, "PIECE", 20)
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    engine.wait()
    long = engine.submit([Prompt([1] * 400, [], 1)])
    while len(passes) < 2:
        time.sleep(0)
    short = engine.submit([Prompt([1] * 7, [], 3)])
    assert len(list(short)) == 3
    seen = len(passes)
    assert len(list(long)) == 1 and len(passes) > seen
    first = next(i for i, parts in enumerate(passes) if (1, 7, 7) in parts)
    assert len(passes[first]) == 2 and passes[first][1][1] >= 20  # the long one went on in the same pass
    assert all(sum(n for _, n, _ in parts) <= 41 for parts in passes)  # nobody ever waits for more
    engine.close()


def test_owners_take_turns_and_prompts_of_a_request_wait_for_the_first_of_another(held, passes):
    engine = Engine(partial(model.load, TINY), max_batch=1, cache_bytes=0)
    engine.wait()
    asked = [("a", [10, 11, 12]), ("a", [20]), ("b", [30, 31])]
    generations = [engine.submit([Prompt([1] * n, [], 1, owner=o) for n in lengths]) for o, lengths in asked]
    held.set()
    for generation in generations:
        list(generation)
    assert [parts[0][1] for parts in passes] == [10, 20, 30, 11, 31, 12]
    engine.close()


def test_an_owner_who_runs_much_lets_another_go_first(held, passes):
    engine = Engine(partial(model.load, TINY), max_batch=3, cache_bytes=0)
    engine.wait()
    greedy_one = engine.submit([Prompt([1] * 10, [], 40, owner="a"), Prompt([1] * 11, [], 40, owner="a")])
    more = [engine.submit([Prompt([1] * n, [], 1, owner="a")]) for n in (12, 13)]
    other = engine.submit([Prompt([1] * 20, [], 1, owner="b")])
    held.set()
    for generation in (greedy_one, *more, other):
        list(generation)
    read = [n for parts in passes for _, n, _ in parts if n > 1]
    assert read.index(20) < read.index(13)
    engine.close()


def test_what_does_not_fit_in_memory_waits_and_is_not_overtaken(held, passes):
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    engine.wait()
    engine._room = 300
    prompts = [Prompt([1] * 70, [], 30), Prompt([1] * 150, [], 50), Prompt([1] * 5, [], 2)]
    generations = [engine.submit([p]) for p in prompts]
    held.set()
    for generation, prompt in zip(generations, prompts, strict=True):
        assert len(list(generation)) == prompt.max_tokens
    assert passes[0] == [(1, 70, 70)] and passes[1:30] == [[(1, 1, 1)]] * 29
    assert passes[30] == [(1, 5, 5), (1, 150, 150)]
    engine.close()


def test_room_is_counted_as_batches_hold_it_and_not_only_as_their_rows_need_it(engine):
    s = sequences.Sequence(Prompt([1] * 40, [], 20), 0, sequences.Generation(1))
    engine._room = 200
    assert engine._fits([s, s])
    engine._batches[engine._key(s)] = SimpleNamespace(cache=SimpleNamespace(slots=8, capacity=64), sequences=[])
    assert not engine._fits([s, s])
    engine._batches.clear()


def test_who_may_run_with_few_only_waits_and_is_left_alone(engine):
    runs, waits = (sequences.Sequence(Prompt([1] * 40, [], 20), 0, sequences.Generation(1)) for _ in "ab")
    runs.begin(False, 2, None)
    engine._cache.most = 0
    engine._reading, engine._waiting = [runs], [waits]
    engine._alive.update([runs, waits])
    for limits, may in (((math.inf, math.inf), True), ((math.inf, 1), False), ((1, math.inf), False), ((2, 2), True)):
        for s, together in zip((runs, waits), limits, strict=True):
            s.together = together
        assert (engine._next() is waits) == may, limits
    engine._reading, engine._waiting = [], []
    engine._alive.clear()


@pytest.mark.parametrize(
    "memory, kept, expected",
    [
        (5_000_000_000, None, (750_000_000, 5722)),  # a quarter of what the weights leave, 393,216 bytes a token
        (5_000_000_000, 0, (0, 7629)),
        (1_000_000_000, None, (0, 2048)),
    ],
)
def test_what_the_weights_leave_is_for_what_is_kept_and_for_caches(memory, kept, expected):
    real = SimpleNamespace(num_hidden_layers=32, num_key_value_heads=32, head_dim=96)
    assert engine_module.room_for(real, 2_000_000_000, 2, memory, kept) == expected


def test_limits_come_from_memory_and_may_be_set():
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    assert engine.limits["context"] == 2048 and engine.limits["batch"] == 128 and engine.limits["queue"] == 256
    assert 10**8 < engine.limits["cache_bytes"] < 10**12
    engine.close()
    engine = Engine(partial(model.load, TINY), max_batch=2, max_context=100, cache_bytes=5000)
    engine.wait()
    assert engine.limits == {"batch": 2, "queue": 256, "context": 100, "cache_bytes": 5000}
    engine.close()


@pytest.fixture
def tower(monkeypatch):
    """How many crops each run of the vision tower had."""
    seen, look = [], model.Phi3V.image_features

    def watched(self, pictures):
        seen.append([len(p.pixels) for p in pictures])
        return look(self, pictures)

    monkeypatch.setattr(model.Phi3V, "image_features", watched)
    return seen


PICTURE = "tiny-gqa.img_landscape"


def test_a_second_question_about_a_picture_reads_only_the_question(engines, passes, tower, shapes):
    prompt, greedy = single(PICTURE)
    prompt = dataclasses.replace(prompt, owner=f"second {sequences.GRAIN}")
    engine = engines["tiny-gqa"]
    for generation in [engine.submit([prompt]) for _ in "ab"]:
        assert [token for _, token, _ in generation] == greedy
    assert len(tower) == 1
    again = engine.submit([prompt])
    passes.clear()
    assert [token for _, token, _ in again] == greedy
    n = len(prompt.ids)
    assert again.cached == [(n - 1) // sequences.GRAIN * sequences.GRAIN] and len(tower) == 1
    other = dataclasses.replace(prompt, ids=[*prompt.ids[:-3], 7, 8, 9])
    generation = engine.submit([other])
    tokens = [token for _, token, _ in generation]
    assert generation.cached == [(n - 3) // sequences.GRAIN * sequences.GRAIN]
    assert run(engine, dataclasses.replace(other, owner=f"third {sequences.GRAIN}")) == [tokens]


def test_pictures_of_one_size_and_owners_share_nothing(engines):
    prompt, greedy = single(PICTURE)
    engine = engines["tiny-gqa"]
    mirrored = dataclasses.replace(prompt.images[0], pixels=prompt.images[0].pixels[:, :, ::-1].copy(), digest=-7)
    asked = [dataclasses.replace(prompt, owner="one"), dataclasses.replace(prompt, owner="two")]
    asked.append(dataclasses.replace(prompt, owner="one", images=[mirrored]))
    for p in asked:
        generation = engine.submit([p])
        tokens = [token for _, token, _ in generation]
        assert (tokens == greedy) == (p.images[0].digest != -7)
        assert generation.cached[0] < sequences.GRAIN + 5  # the ids before the picture


def test_sixteen_questions_about_one_picture_at_once_look_at_it_once_and_read_it_once(held, passes, tower):
    engine = Engine(partial(model.load, parity.PARITY / "tiny-gqa"))
    engine.wait()
    prompt, greedy = single(PICTURE)
    generations = [engine.submit([dataclasses.replace(prompt, max_tokens=10)]) for _ in range(16)]
    held.set()
    for generation in generations:
        assert [token for _, token, _ in generation] == greedy[:10]
    assert [len(run) for run in tower] == [1]
    assert sum(count for parts in passes for _, n, count in parts if n > 1) == len(
        prompt.ids
    )  # and of the others a single last token each
    assert sum(g.cached[0] == len(prompt.ids) - 1 for g in generations) == 15
    engine.close()


def test_a_conversation_goes_on_from_what_was_read_and_made(engines):
    engine, (prompt, greedy) = engines["tiny-gqa"], single(PICTURE)
    first = dataclasses.replace(prompt, owner="talk")
    assert run(engine, first) == [greedy]
    follow = dataclasses.replace(first, ids=[*first.ids, *greedy, 5, 6, 7], max_tokens=9)
    generation = engine.submit([follow])
    tokens = [token for _, token, _ in generation]
    read = len(prompt.ids) + len(greedy) - 1  # the last token was made and not read
    assert generation.cached == [read // sequences.GRAIN * sequences.GRAIN]
    assert run(engine, dataclasses.replace(follow, owner="fresh")) == [tokens]


def test_a_prefix_of_one_regime_is_not_used_in_the_other(engines):
    """tiny-su switches at 64: what was read short must be read again for a longer prompt."""
    engine, ids = engines["tiny-su"], list(range(1, 65))
    long = Prompt([*ids, *range(200, 240)], [], 8, owner="regimes")
    alone = run(engine, dataclasses.replace(long, owner="alone"))
    run(engine, Prompt(ids, [], 1, owner="regimes"))
    generation = engine.submit([long])
    assert [[token for _, token, _ in generation]] == alone and generation.cached == [0]


def test_without_room_for_prefixes_nothing_is_kept(passes):
    engine = Engine(partial(model.load, parity.PARITY / "tiny-gqa"), cache_bytes=0)
    engine.wait()
    prompt, greedy = single(PICTURE)
    prompt = dataclasses.replace(prompt, max_tokens=10)
    assert run(engine, prompt) == run(engine, prompt) == [greedy[:10]]
    assert sum(n for parts in passes for _, n, _ in parts if n > 1) == 2 * len(prompt.ids)
    assert engine.stats()["cache_bytes"] == 0 and engine.stats()["cached_tokens"] == 0
    engine.close()


def test_an_idle_model_is_freed_and_comes_back_with_the_next_request():
    loads = []
    engine = Engine(lambda: loads.append(1) or model.load(TINY), idle_unload=0.05)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    for round_ in (1, 2):
        assert run(engine, prompt) == [greedy] and len(loads) == round_
        deadline = time.monotonic() + 30
        while engine.status != "idle" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.status == "idle" and engine.stats()["cache_bytes"] == 0
    engine.close()


def test_stats_count_what_was_done(engine):
    prompt, _ = single("tiny-su.text_short")
    before = engine.stats()
    generation = engine.submit([Prompt(prompt.ids, [], 1500), prompt])
    next(iter(generation))
    now = engine.stats()
    assert now["running"] + now["waiting"] == 2
    generation.cancel()
    list(generation)
    after = engine.stats()
    assert before["tokens"] == 0 < after["tokens"] and after["running"] == after["waiting"] == 0


@pytest.mark.parametrize("owner, most", [("", 64), ("a", 32)])
def test_more_prompts_than_an_owner_may_ever_have_in_the_queue_are_refused_for_good(engine, owner, most):
    prompts = [Prompt([1], [], 1, owner=owner)] * (most + 1)
    with pytest.raises(
        RequestError, match=rf"{most + 1} sequences .*: one key may have at most {most} in the queue"
    ) as told:
        engine.submit(prompts)
    assert told.value.status == 400
    assert run(engine, *prompts[1:]) == run(engine, prompts[0]) * most


def test_an_owner_fills_half_of_the_queue_and_leaves_the_rest_to_others(engine):
    prompt, greedy = single("tiny-su.text_short")
    held = [engine.submit([Prompt(prompt.ids, [], 1500, owner="a")] * n) for n in (16, 15)]
    with pytest.raises(Unavailable, match="this key has 31 of its 32 places in the queue; try again in 5 s") as told:
        engine.submit([dataclasses.replace(prompt, owner="a")] * 2)
    assert told.value.headers == {"Retry-After": "5"}
    assert run(engine, dataclasses.replace(prompt, owner="a")) == [greedy]
    assert run(engine, *[dataclasses.replace(prompt, owner="b")] * 32) == [greedy] * 32
    for generation in held:
        generation.cancel()
        list(generation)
    assert run(engine, *[dataclasses.replace(prompt, owner="a")] * 32) == [greedy] * 32


def test_a_queue_that_could_not_hold_the_largest_request_is_refused():
    with pytest.raises(SetupError, match="--max-queue must be at least 64, not 63"):
        Engine(partial(model.load, TINY), max_queue=63)


@pytest.mark.parametrize("phase", ["_sweep", "_admit", "_look", "_launch", "_regroup", "_deliver", "begin"])
@pytest.mark.parametrize("most", [1, 9])
def test_whatever_fails_once_in_whichever_phase_costs_nobody_an_answer(monkeypatch, caplog, phase, most):
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    owner = sequences.Sequence if phase == "begin" else Engine
    whole, calls = getattr(owner, phase), []

    def broken(self, *rest):
        calls.append(phase)
        if len(calls) == 2:  # while the first have made something
            raise OSError("it happens")
        return whole(self, *rest)

    monkeypatch.setattr(owner, phase, broken)
    assert run(engine, *[Prompt(prompt.ids, [], most)] * 16) == [greedy[:most]] * 16
    assert "it happens" in caplog.text and not engine._alive
    engine.close()


def test_a_pass_that_fails_while_one_waits_for_the_token_that_takes_it_to_the_other_regime_loses_none(monkeypatch):
    engine, admit, failed = Engine(partial(model.load, TINY), cache_bytes=0), Engine._admit, []
    engine.wait()

    def broken(self):
        if not failed and any(s.flying for s in self._waiting):
            failed.append(len(self._begun()))
            raise OSError("it happens")
        return admit(self)

    monkeypatch.setattr(Engine, "_admit", broken)
    cases = [single("tiny-su.text_cross"), single("tiny-su.text_short"), single("tiny-su.text_64")]
    assert run(engine, *[prompt for prompt, _ in cases]) == [greedy for _, greedy in cases] and failed[0] >= 2
    engine.close()


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3, logprobs=2),
    SamplingParams(temperature=0.8, seed=4, top_p=0.9, presence_penalty=0.8, frequency_penalty=0.3),
    SamplingParams(repetition_penalty=1.3, logprobs=0),
]


def mixed(owner: str = "") -> list[Prompt]:
    """Eight prompts of all kinds: on both sides of the switch, greedy, drawn and penalized, and one that is scored."""
    rng = np.random.default_rng(7)
    prompts = []
    for k, n in enumerate((5, 40, 60, 70, 100, 33, 90, 64)):
        prompts.append(Prompt(rng.integers(3, 500, n).tolist(), [], 24, owner=owner, params=MIXED[k % 4], branch=k % 3))
    prompts[4] = dataclasses.replace(prompts[4], max_tokens=1, params=MIXED[0], targets=(*prompts[4].ids[-9:], 7))
    return prompts


def outcomes(generations) -> list:
    """The tokens, the log-probabilities and the score of each, or what it raised."""
    ends = []
    for generation in generations:
        try:
            tokens = [token for _, token, _ in generation]
            shown = [(own, best) for own, best in generation.logprobs[0]]
            ends.append((tokens, [own for own, _ in shown], [len(best) for _, best in shown], generation.scores[0]))
        except (RuntimeError, Unavailable) as error:
            ends.append(error)
    return ends


def same(end, lone) -> bool:
    (tokens, own, counts, score), (tokens0, own0, counts0, score0) = end, lone
    return (tokens, counts) == (tokens0, counts0) and np.allclose([*own, score], [*own0, score0], atol=1e-4)


@pytest.fixture(scope="module")
def lone():
    """What each of `mixed` gets alone."""
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    engine.wait()
    yield [outcomes([engine.submit([p])])[0] for p in mixed()]
    engine.close()


def poison(monkeypatch, engine, error, when) -> None:
    """Every pass raises `error` in which `when` says so of the sequences that have begun."""
    call = model.Phi3V.__call__

    def broken(self, embeddings, parts, rows):
        if when(engine._begun()):
            raise error
        return call(self, embeddings, parts, rows)

    monkeypatch.setattr(model.Phi3V, "__call__", broken)


# Number 4 is scored and makes no token.
@pytest.mark.parametrize("k, at", [(k, at) for at in (0, 7) for k in range(8) if (k, at) != (4, 7)])
def test_who_fails_in_a_batch_fails_alone_and_the_others_get_what_they_get_alone(
    monkeypatch, caplog, held, lone, k, at
):
    """At the first token, which reading makes, or at a later one, which is made in a batch."""
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    ids, error = mixed()[k].ids, OSError("poisoned")
    poison(
        monkeypatch,
        engine,
        error,
        lambda begun: any(s.prompt.ids == ids and len(s.made) + s.flying >= at for s in begun),
    )
    generations = [engine.submit([p]) for p in mixed()]
    held.set()
    ends = outcomes(generations)
    assert str(ends[k]) == "generation failed" and ends[k].__cause__ is error
    assert error.__traceback__ is None  # its frames would keep the caches
    assert all(same(end, expected) for i, (end, expected) in enumerate(zip(ends, lone, strict=True)) if i != k)
    assert caplog.text.count("a pass failed") <= 4  # with eight of them, four, two, one
    monkeypatch.undo()
    assert same(*outcomes([engine.submit([mixed()[0]])]), lone[0]) and not engine._alive
    engine.close()


# As MLX words it on Metal and with CUDA, and as Python and numpy do.
SHORTAGES = [
    RuntimeError("[malloc] Unable to allocate 1125899906842624 bytes."),
    RuntimeError("[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed"),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallback"),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory."),
    MemoryError(),
]


@pytest.mark.parametrize("most", [1, 2])
def test_who_does_not_fit_in_memory_together_is_answered_in_smaller_batches(monkeypatch, caplog, held, lone, most):
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    poison(monkeypatch, engine, SHORTAGES[0], lambda begun: len(begun) > most)
    generations = [engine.submit([p]) for p in mixed()]
    held.set()
    assert all(map(same, outcomes(generations), lone)) and "Unable to allocate" in caplog.text
    engine.close()


@pytest.mark.parametrize("shortage", SHORTAGES, ids=str)
def test_who_does_not_fit_in_memory_alone_is_told_to_try_again_and_what_was_kept_is_freed(monkeypatch, lone, shortage):
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    assert same(*outcomes([engine.submit([mixed()[6]])]), lone[6]) and engine.stats()["cache_bytes"] > 0
    poison(monkeypatch, engine, shortage, lambda begun: True)
    (error,) = outcomes([engine.submit([mixed()[0]])])
    assert isinstance(error, Unavailable) and error.headers == {"Retry-After": "5"}
    assert error.message == "there is not enough memory for this request now; try again in 5 s"
    assert engine.stats()["cache_bytes"] == 0 and engine.status == "ok"
    monkeypatch.undo()
    assert same(*outcomes([engine.submit([mixed()[0]])]), lone[0])
    engine.close()


def test_a_model_that_cannot_come_back_is_told_and_tried_again(caplog):
    working = [True, False, True]

    def load():
        if not working.pop(0):
            raise OSError("the disk is away")
        return model.load(TINY)

    engine = Engine(load, idle_unload=0.02)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    while engine.status != "idle":
        time.sleep(0.01)
    with pytest.raises(Unavailable, match="cannot be loaded now"):
        run(engine, prompt)
    assert engine.status == "idle" and "the disk is away" in caplog.text
    assert run(engine, prompt) == [greedy]
    engine.close()


def test_who_outgrows_the_short_factors_keeps_the_place(held, passes):
    engine = Engine(partial(model.load, TINY), max_batch=1, cache_bytes=0)
    engine.wait()
    crossing = engine.submit([Prompt([1] * 64, [], 20)])
    other = engine.submit([Prompt([1] * 9, [], 30)])
    held.set()
    assert len(list(crossing)) == 20 and len(list(other)) == 30
    read = [n for parts in passes for _, n, _ in parts if n > 1]
    assert read == [64, 65, 9]
    engine.close()


def test_later_prompts_of_a_request_are_not_overtaken_for_ever(passes):
    engine = Engine(partial(model.load, TINY), max_batch=1, cache_bytes=0)
    engine.wait()
    stop, outlasted = threading.Event(), []

    def crowd(k):
        for _ in range(3000):
            if stop.is_set():
                return
            list(engine.submit([Prompt([1] * 5, [], 1, owner=f"crowd {k}")]))
        outlasted.append(k)

    threads = [threading.Thread(target=crowd, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    both = list(engine.submit([Prompt([1] * 20, [], 1, owner="a"), Prompt([1] * 21, [], 1, owner="a")]))
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(index for index, _, _ in both) == [0, 1] and not outlasted
    engine.close()


def test_one_owner_cannot_read_in_all_places(held, passes):
    engine = Engine(partial(model.load, TINY), cache_bytes=0)
    engine.wait()
    many = [engine.submit([Prompt([1] * 700, [], 1, owner="a")]) for _ in range(12)]
    other = engine.submit([Prompt([1] * 7, [], 1, owner="b")])
    held.set()
    list(other)
    assert (1, 7, 7) in passes[0]
    for generation in many:
        list(generation)
    engine.close()


@pytest.mark.parametrize("prompt", [Prompt([], [], 5), Prompt([1] * 2000, [], 49)])
def test_what_can_never_run_is_refused_at_once(engine, prompt):
    with pytest.raises(RequestError, match="1 token or more, with its answer 2048, not"):
        engine.submit([prompt])


def die(*_):
    raise SystemExit


def lose_the_gpu(*_):
    """As CUDA does after an illegal access: whatever is asked of it from then on fails."""
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("idle_unload", [0, 60])
@pytest.mark.parametrize(
    "owner, name, fault",
    [
        (model.Phi3V, "__call__", die),
        (Engine, "_receive", lose_the_gpu),
        (Engine, "_retry", lose_the_gpu),
        (engine_module.mx, "eval", lose_the_gpu),
        (Engine, "_sweep", die),
    ],
)
def test_an_engine_that_dies_says_so_to_all_at_once_and_nothing_hangs(
    monkeypatch, caplog, held, idle_unload, owner, name, fault
):
    engine = Engine(partial(model.load, TINY), max_batch=2, idle_unload=idle_unload)
    engine.wait()
    prompt, _ = single("tiny-su.text_short")
    generations = [engine.submit([prompt]) for _ in range(9)]  # two that run, and seven that wait
    monkeypatch.setattr(owner, name, fault)
    if name == "_retry":
        monkeypatch.setattr(Engine, "_launch", lose_the_gpu)
    held.set()
    for generation in generations:
        with pytest.raises(RuntimeError, match="generation failed"):
            list(generation)
    assert engine.status == "failed" and "the engine has failed" in caplog.text
    with pytest.raises(Unavailable, match="the model is failed; try again"):
        engine.submit([prompt])
    with pytest.raises((RuntimeError, SystemExit)):
        engine.wait()
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0
    engine.close()
    assert not engine._thread.is_alive() and engine._model is None


def test_an_engine_that_dies_while_it_is_idle_says_so_to_the_next(monkeypatch, caplog):
    engine = Engine(partial(model.load, TINY), idle_unload=0.01)
    clears = [lose_the_gpu, Engine._clear]
    monkeypatch.setattr(Engine, "_clear", lambda self: clears.pop(0)(self))  # the first is when it frees the model
    engine._thread.join()
    assert engine.status == "failed"
    with pytest.raises(Unavailable, match="the model is failed"):
        engine.submit([single("tiny-su.text_short")[0]])
    engine.close()


def test_closing_ends_what_runs_and_refuses_what_comes():
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    prompt, _ = single("tiny-su.text_short")
    running = engine.submit([Prompt(prompt.ids, [], 1500)])
    engine.close()
    with pytest.raises(Unavailable, match="shutting down"):
        list(running)
    assert engine.status == "draining"
    with pytest.raises(Unavailable, match="the model is closed"):
        engine.submit([prompt])


def test_a_model_that_cannot_be_loaded_is_told_by_wait(tmp_path):
    gate = threading.Event()

    def load():
        gate.wait()
        return model.load(tmp_path)

    engine = Engine(load)
    assert engine.status == "loading"
    with pytest.raises(Unavailable, match="the model is loading"):
        engine.submit([Prompt([1], [], 1)])
    gate.set()
    with pytest.raises(SetupError, match="no checkpoint folder"):
        engine.wait()
    assert engine.status == "failed"
    engine.close()
