"""Sampling against its definition in numpy, written the slow way, and against the frequencies that it promises."""

import mlx.core as mx
import numpy as np
import pytest

from phi3v.request import SamplingParams
from phi3v.sampling import BITS, Sampler, logprobs, sample
from phi3v.sequences import Generation, Prompt, Sequence

VOCABULARY = 60
RNG = np.random.default_rng(4)
NO_PROMPT = np.zeros(0, int)


def sampler(prompt=NO_PROMPT, branch: int = 0, **params) -> Sampler:
    return Sampler(SamplingParams(**params), np.asarray(prompt), branch)


def allowed(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution that is drawn from, token by token down the ranking."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    ranking = sorted(range(len(p)), key=lambda i: -p[i])
    ranking = ranking[: top_k or None]
    kept, before, whole = [], 0.0, sum(p[i] for i in ranking)
    for i in ranking:
        if (not kept or before < top_p * whole) and p[i] >= min_p * p[ranking[0]]:
            kept.append(i)
        before += p[i]
    result = np.zeros(len(p))
    result[kept] = p[kept] / p[kept].sum()
    return result


RULES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 12},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.5, "top_p": 0.95, "top_k": 30, "min_p": 0.1},
    {"temperature": 1e-9},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(rules):
    logits = (RNG.normal(size=VOCABULARY) * 3).astype(np.float32)
    expected = allowed(logits, **rules | {"temperature": max(rules["temperature"], 1e-3)})
    each = sampler(seed=1, **rules)
    draws = 4000
    tokens = np.array(sample(mx.array(np.tile(logits, (draws, 1))), [each] * draws))
    seen = np.bincount(tokens, minlength=VOCABULARY)
    assert not seen[expected == 0].any()  # what is cut off never comes
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(seen - draws * expected) <= 5 * spread + 3).all()


def test_the_token_is_where_the_cumulated_probability_passes_the_random_number():
    logits = RNG.normal(size=(200, VOCABULARY)).astype(np.float32)
    ours, twin = sampler(seed=7, temperature=0.8, top_p=0.9), sampler(seed=7, temperature=0.8, top_p=0.9)
    tokens = np.array(sample(mx.array(logits), [ours] * 200))
    for row, token in zip(logits.astype(float), tokens, strict=True):
        total = np.cumsum(allowed(row, 0.8, top_p=0.9))
        assert token == np.searchsorted(total, twin.uniform() * total[-1], side="right")


def test_each_row_follows_its_own_rules_whoever_is_beside_it():
    logits = mx.array(RNG.normal(size=(1, VOCABULARY)).astype(np.float32) * 2)
    rules = [*RULES, {}, {"presence_penalty": 1.5}, {"repetition_penalty": 2.0, "temperature": 1.0}]
    alone = [[int(sample(logits, [s])[0]) for _ in range(8)] for s in (sampler(seed=3, **rule) for rule in rules)]
    together = [sampler(seed=3, **rule) for rule in rules]
    rows = mx.tile(logits, (len(rules) + 1, 1))
    batches = [np.array(sample(rows, [*together, None]))[:-1].tolist() for _ in range(8)]
    assert [list(tokens) for tokens in zip(*batches, strict=True)] == alone


def test_penalties_are_those_of_their_definitions():
    logits, prompt = RNG.normal(size=VOCABULARY).astype(np.float32) * 4, [3, 3, 8, -1]
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
    ours, made = sampler(prompt, **params), []
    for _ in range(20):
        expected = logits.copy()
        for token in {3, 8, *made}:  # what the prompt says counts for the first of them only
            expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        for token in set(made):
            expected[token] -= 0.7 + 0.4 * made.count(token)
        made.append(int(sample(mx.array(logits[None]), [ours])[0]))
        assert made[-1] == expected.argmax()
    assert len(set(made)) > 5


def test_a_penalty_leaves_the_logits_of_others_and_the_caller_alone():
    logits = mx.array(RNG.normal(size=(2, VOCABULARY)).astype(np.float32))
    before, best = np.array(logits), int(mx.argmax(logits[0]))
    tokens = sample(logits, [sampler([best], repetition_penalty=10.0), sampler()])
    assert (np.array(logits) == before).all()
    assert int(tokens[1]) == before[1].argmax()


def test_a_seed_gives_the_same_numbers_for_ever_and_branches_their_own():
    numbers = [sampler(seed=5).uniform() for _ in range(2)]
    assert numbers[0] == numbers[1] == 0.6389632225036621  # of every version and machine
    assert len({sampler(seed=5, branch=b).uniform() for b in range(8)}) == 8
    unseeded = [Sequence(Prompt([1], [], 1), 0, Generation(1)) for _ in range(8)]
    assert len({s.sampler.uniform() for s in unseeded}) == 8


@pytest.mark.parametrize("bits", [0, 2**BITS - 1], ids=["smallest", "largest"])
def test_the_extreme_random_numbers_choose_tokens_that_may_come(bits, monkeypatch):
    """The largest times the whole must stay below the whole in float32, or no token would be chosen."""
    each = sampler(temperature=1.0, top_k=7)
    monkeypatch.setattr(each._random, "getrandbits", lambda _: bits)
    logits = RNG.normal(size=(500, VOCABULARY)).astype(np.float32) * 3
    tokens = np.array(sample(mx.array(logits), [each] * 500))
    best = np.sort(np.argsort(-logits, -1)[:, :7], -1)
    assert (tokens == best[:, -1 if bits else 0]).mean() > 0.9  # of the seven the last id, or the first
    assert all(token in seven for token, seven in zip(tokens, best, strict=True))


def test_logprobs_are_those_before_temperature_and_penalties():
    logits = RNG.normal(size=(3, VOCABULARY)).astype(np.float32) * 5
    exact = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
    own, ids, values = (np.array(a) for a in logprobs(mx.array(logits), mx.array([4, 5, 6]), 7))
    assert np.allclose(own, exact[[0, 1, 2], [4, 5, 6]], atol=1e-5)
    for row in range(3):
        assert sorted(ids[row]) == sorted(np.argsort(-exact[row])[:7])
        assert np.allclose(values[row], exact[row][ids[row]], atol=1e-5)
