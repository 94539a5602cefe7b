"""Logits → tokens, each row of a batch by its own rules; log-probabilities for those who asked.

Knows nothing of text or of the engine. A row's token depends on its logits, its rules and its own random numbers, never
on the other rows: with a seed it is the same alone, in a batch and after a restart.
"""

import random

import mlx.core as mx
import numpy as np

from .request import SamplingParams

BITS = 23  # of a random number, so that u < 1 in float32 and u · total < total
COLDEST = 1e-3  # a lower temperature would overflow float32, and is greedy as it is


class Sampler:
    """How the tokens of one sequence are chosen, behind those it `made`; `branch` tells `n` answers to one apart.

    `number` stands for the seed where none was given.
    """

    def __init__(self, params: SamplingParams, prompt: np.ndarray, branch: int = 0, made: tuple = (), number: int = 0):
        self.params = params
        self.drawn = params.temperature > 0
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.penalized = penalties != (1, 0, 0)
        # Seeded by text, Python's generator promises the same numbers in every version.
        self._random = random.Random(f"{number if params.seed is None else params.seed}/{branch}")
        self._prompt, self._made, self._counts = prompt, np.array(made, int), None
        for _ in made if self.drawn else ():
            self.uniform()

    def uniform(self) -> float:
        """The next random number: a sequence takes one for each token, at the temperature 0 none."""
        return self._random.getrandbits(BITS) / 2**BITS

    def seen(self, vocabulary: int) -> tuple[mx.array, mx.array]:
        """(vocabulary,) how often each token was made, and whether it stands in the prompt."""
        if self._counts is None:
            here = np.zeros(vocabulary, bool)
            here[self._prompt[self._prompt >= 0]] = True
            made = np.bincount(self._made, minlength=vocabulary)
            self._prompt, self._counts = mx.array(here), mx.array(made, mx.float32)
        return self._counts, self._prompt

    def count(self, token: mx.array) -> None:
        self._counts = self._counts.at[token].add(1)


def sample(logits: mx.array, samplers: list[Sampler | None]) -> mx.array:
    """(rows, vocabulary) float32 → (rows,) tokens; nobody waits for the row of None."""
    penalized = [row for row, s in enumerate(samplers) if s and s.penalized]
    drawn = [row for row, s in enumerate(samplers) if s and s.drawn]
    if penalized:
        rows, logits = mx.array(penalized), logits[:]  # a new array: whoever shows log-probabilities has the old one
        logits[rows] = _penalize(logits[rows], [samplers[row] for row in penalized])
    tokens = mx.argmax(logits, -1)
    if drawn:
        rows = mx.array(drawn)
        tokens[rows] = _draw(logits[rows], [samplers[row] for row in drawn])
    for row in penalized:
        samplers[row].count(tokens[row])
    return tokens


def _column(samplers: list[Sampler], name: str) -> mx.array:
    return mx.array([[getattr(s.params, name)] for s in samplers], mx.float32)


def _penalize(logits: mx.array, samplers: list[Sampler]) -> mx.array:
    """Divide (or multiply, below 0) what was seen by `repetition_penalty`, then take off the other two.

    Sources: Keskar et al. 2019, section 4.1, as transformers has it; OpenAI's API reference.
    """
    counts, prompts = (mx.stack(arrays) for arrays in zip(*(s.seen(logits.shape[-1]) for s in samplers), strict=True))
    repetition = _column(samplers, "repetition_penalty")
    turned = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(prompts | (counts > 0), turned, logits)
    presence = _column(samplers, "presence_penalty") * (counts > 0)
    return logits - presence - _column(samplers, "frequency_penalty") * counts


def _draw(logits: mx.array, samplers: list[Sampler]) -> mx.array:
    """One token of each row: of the `top_k` most probable those that make up `top_p`, none below `min_p` of the first.

    The order of the three is transformers'; equals at a boundary stay together. The token is where the cumulated
    probability, in the order of ids, passes a random share of the whole: no reordering of near equals can change it.
    """
    p = mx.softmax(logits / mx.maximum(_column(samplers, "temperature"), COLDEST), -1)
    least = _column(samplers, "min_p") * p.max(-1, keepdims=True)
    if any(s.params.top_k or s.params.top_p < 1 for s in samplers):
        ranked, rank = mx.sort(p, -1)[:, ::-1], mx.arange(p.shape[-1])
        ranked = mx.where(rank < mx.array([[s.params.top_k or p.shape[-1]] for s in samplers]), ranked, 0)
        before = mx.cumsum(ranked, -1, inclusive=False)
        top_p = _column(samplers, "top_p")
        kept = (before < top_p * ranked.sum(-1, keepdims=True)) | (top_p == 1) | (rank == 0)
        least = mx.maximum(least, mx.where(kept & (ranked > 0), ranked, 2).min(-1, keepdims=True))
    p = mx.where(p >= least, p, 0)
    total = mx.where(p > 0, mx.cumsum(p, -1), 0)  # a parallel sum may waver where nothing is added
    share = mx.array([[s.uniform()] for s in samplers], mx.float32) * total.max(-1, keepdims=True)
    return mx.where(total > share, mx.arange(p.shape[-1]), p.shape[-1]).min(-1)


def logprobs(logits: mx.array, tokens: mx.array, top: int) -> list[mx.array]:
    """Log-probabilities, before penalties and temperature, of each row's token (rows,) and of its `top` best.

    Returns these and, in any order, (rows, top) ids and (rows, top) values.
    """
    logits = logits - mx.logsumexp(logits, -1, keepdims=True)
    own = mx.take_along_axis(logits, tokens[:, None].astype(mx.int32), -1)[:, 0]
    best = mx.argpartition(logits, -max(top, 1), -1)[:, -max(top, 1) :]
    return [own, best, mx.take_along_axis(logits, best, -1)]
