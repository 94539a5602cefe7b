"""The engine on the reference's cases: batches, both rope regimes, cancellation, failure, shutdown."""

import threading
from functools import partial

import numpy as np
import pytest
import test_parity as parity

from phi3v import model
from phi3v.engine import Engine, Prompt
from phi3v.errors import RequestError, SetupError, Unavailable

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
    engine = Engine(partial(model.load, TINY), max_queue=4)
    engine.wait()
    yield engine
    engine.close()
    assert engine._count == 0  # every sequence was counted off, once


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
def test_all_cases_of_a_checkpoint_in_one_batch_make_the_tokens_they_make_alone(engines, checkpoint):
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
    ids = [tokenizer.encode(parity.parts(tokenizer, text), [], 0) for text in case["batch"]]
    assert ids == [expected[f"row{k}_input_ids"].tolist() for k in rows]
    greedy = [expected[f"row{k}_greedy"].tolist() for k in rows]
    prompts = [Prompt(ids[k], [], len(greedy[k])) for k in rows]
    assert run(engines[case["checkpoint"]], *prompts) == greedy
    phi, _ = parity.checkpoint(case["checkpoint"])
    for k in rows:
        logits = phi.prefill(phi.embed(ids[k], []), parity.KVCache(phi.config.num_hidden_layers))
        assert parity.off(np.array(logits[0]), expected[f"row{k}_logits_last"]) <= parity.LOGITS


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
    assert run(engine, prompt, prompt, prompt, prompt) == [greedy] * 4  # the whole queue of 4 is free again


def test_a_full_queue_refuses_and_takes_again(engine):
    prompt, greedy = single("tiny-su.text_short")
    held = engine.submit([Prompt(prompt.ids, [], 1500)] * 3)
    with pytest.raises(Unavailable, match="3 sequences wait or run, at most 4") as caught:
        engine.submit([prompt, prompt])
    assert caught.value.headers == {"Retry-After": "5"}
    assert run(engine, prompt) == [greedy]
    held.cancel()
    list(held)
    assert run(engine, prompt) == [greedy]


def test_a_batch_never_holds_more_than_it_may_and_all_get_their_answers(monkeypatch):
    rows = []
    decode = model.Phi3V.decode
    monkeypatch.setattr(
        model.Phi3V, "decode", lambda self, tokens, *rest: (rows.append(len(tokens)), decode(self, tokens, *rest))[1]
    )
    engine = Engine(partial(model.load, TINY), max_batch=3)
    engine.wait()
    prompt, greedy = single("tiny-su.text_short")
    assert run(engine, *[prompt] * 8) == [greedy] * 8
    assert max(rows) == 3
    engine.close()


def test_the_first_prompt_of_a_request_does_not_wait_for_all_prompts_of_another(monkeypatch):
    order, gate = [], threading.Event()
    prefill = model.Phi3V.prefill

    def watched(self, embeddings, cache):
        gate.wait()
        order.append(embeddings.shape[1])
        return prefill(self, embeddings, cache)

    monkeypatch.setattr(model.Phi3V, "prefill", watched)
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    many = engine.submit([Prompt([1] * 5, [], 1)] * 6)
    one = engine.submit([Prompt([1] * 9, [], 1)])
    gate.set()
    assert len(list(one)) == 1 and len(list(many)) == 6
    assert order.index(9) <= 1  # the many's first may have begun
    engine.close()


def test_more_prompts_than_the_queue_ever_takes_are_refused_for_good(engine):
    with pytest.raises(RequestError, match="5 prompts at once, at most 4"):
        engine.submit([Prompt([1], [], 1)] * 5)


def test_a_prompt_that_fails_ends_alone(engine):
    prompt, greedy = single("tiny-su.text_short")
    generation = engine.submit([Prompt(prompt.ids, ["no crops"], 5)])
    with pytest.raises(RuntimeError, match="generation failed") as caught:
        list(generation)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert run(engine, prompt) == [greedy]


def test_a_step_that_fails_ends_its_sequences_and_the_next_request_works(monkeypatch, caplog):
    def broken(self, tokens, cache, long):
        monkeypatch.undo()
        raise MemoryError("no room")

    engine = Engine(partial(model.load, TINY))
    engine.wait()
    monkeypatch.setattr(model.Phi3V, "decode", broken)
    prompt, greedy = single("tiny-su.text_short")
    with pytest.raises(RuntimeError, match="generation failed"):
        run(engine, prompt, prompt)
    assert "a step failed" in caplog.text
    assert run(engine, prompt) == [greedy]
    engine.close()


def die(*_):
    raise SystemExit


def test_an_engine_that_dies_says_so_to_all(monkeypatch, caplog):
    engine = Engine(partial(model.load, TINY))
    engine.wait()
    monkeypatch.setattr(model.Phi3V, "decode", die)
    prompt, _ = single("tiny-su.text_short")
    with pytest.raises(RuntimeError, match="generation failed"):
        run(engine, prompt, prompt)
    assert engine.status == "failed" and "the engine has failed" in caplog.text
    with pytest.raises(Unavailable, match="the model is failed"):
        engine.submit([prompt])
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
    with pytest.raises(Unavailable):
        engine.submit([prompt])


def test_a_model_that_cannot_be_loaded_is_told_by_wait(tmp_path):
    gate = threading.Event()

    def load():
        gate.wait()
        return model.load(tmp_path)

    engine = Engine(load)
    assert engine.status == "loading"
    with pytest.raises(Unavailable, match="the model is loading"):
        engine.submit([])
    gate.set()
    with pytest.raises(SetupError, match="no checkpoint folder"):
        engine.wait()
    assert engine.status == "failed"
    engine.close()
