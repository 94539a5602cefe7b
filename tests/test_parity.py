"""The reference's numbers: every case of tests/parity, made with torch and transformers in float32.

The language model alone is stepped here; test_engine runs the same cases through the engine.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from phi3v import images, model
from phi3v.language import KVCache, Part, Rope
from phi3v.request import IMAGE_TAG
from phi3v.tokenizer import Tokenizer

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))
import golden_format as golden  # noqa: E402

CASES = {case["case"]: case for case in golden.load_cases(PARITY)["cases"]}
SINGLE = [name for name, case in CASES.items() if "batch" not in case]
BATCHES = [name for name, case in CASES.items() if "batch" in case]
PIXELS, FEATURES, LOGITS = 2e-3, 2e-3, 1e-3  # tolerances, as stated with the numbers; we are at 5e-7, 2e-5, 5e-5


@cache
def checkpoint(name: str):
    return model.load(PARITY / name), Tokenizer(PARITY / name)


def parts(tokenizer: Tokenizer, text: str) -> list[str | int]:
    """A rendered template as our encoder takes it: special tokens and pictures as numbers."""
    found = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        tag = IMAGE_TAG.fullmatch(piece)
        found.append(-int(tag[1]) if tag else tokenizer.special.get(piece, piece))
    return found


@cache
def crops_of(name: str) -> list[images.Crops]:
    case = CASES[name]
    preprocessor = json.loads((PARITY / case["checkpoint"] / "preprocessor_config.json").read_text())
    num_crops = case["num_crops"] or preprocessor["num_crops"]
    drawn = [golden.synth_image(i["seed"], i["w"], i["h"]) for i in case["images"]]
    return [images.Header(Image.fromarray(d), num_crops).crops() for d in drawn]


@cache
def features_of(name: str) -> list[mx.array]:
    return checkpoint(CASES[name]["checkpoint"])[0].image_features(crops_of(name)) if CASES[name]["images"] else []


def logits_of(phi: model.Phi3V, ids: list[int], features: list[mx.array], cached: KVCache, chunk: int = 10**6):
    """The logits of a prompt read into `cached`, piece by piece: (tokens, vocab)."""
    ids = np.array(ids)
    slots = np.zeros(len(ids), int)
    for k, rows in enumerate(features, 1):
        slots[ids == -k] = np.arange((ids == -k).sum()) % len(rows)
    long, pieces = phi.config.is_long(len(ids)), range(0, len(ids), chunk)
    embedded = [phi.embed(ids[i : i + chunk], slots[i : i + chunk], features) for i in pieces]
    logits = []
    for piece in embedded:
        logits.append(phi(piece, [Part(cached, len(piece), long)]))
        mx.eval(logits[-1], cached.arrays())
    return mx.concatenate(logits)


def prefill(phi: model.Phi3V, ids: list[int], features: list[mx.array], cached: KVCache, chunk: int = 10**6):
    """The last token's logits (vocab,)."""
    return logits_of(phi, ids, features, cached, chunk)[-1]


def decode(phi: model.Phi3V, tokens: list[int], cached: KVCache, long: bool):
    """One more token for each row of a cache → logits (rows, vocab)."""
    return phi(phi.model.embed_tokens(mx.array(tokens)), [Part(cached, 1, long)])


def cache_of(phi: model.Phi3V) -> KVCache:
    return KVCache(phi.config.num_hidden_layers)


def numbers(case: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / f"{case}.npz") as file:
        return dict(file)


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max())


@pytest.mark.parametrize("name", SINGLE)
def test_ids_are_those_of_the_reference(name):
    case, tokenizer = CASES[name], checkpoint(CASES[name]["checkpoint"])[1]
    if case["text"] is None:  # too long for the file: the ids are all there is
        assert len(numbers(name)["input_ids"]) == case["prompt_len"]
        return
    ids = tokenizer.encode(parts(tokenizer, case["text"]), [crops.tokens for crops in crops_of(name)], 10**6)
    assert ids == numbers(name)["input_ids"].tolist()


@pytest.mark.parametrize("name", [name for name in SINGLE if CASES[name]["images"]])
def test_pixels_and_features_are_those_of_the_reference(name):
    case, expected = CASES[name], numbers(name)
    for k, (crops, features) in enumerate(zip(crops_of(name), features_of(name), strict=True)):
        assert list(crops.grid) == case["grid_hw"][k]
        assert crops.tokens == expected["num_img_tokens"][k]
        for key, value in golden.px_reduce(crops.pixels).items():
            assert off(value, expected[f"px{k}_{key}"]) <= PIXELS
        for key, value in golden.feat_reduce(np.array(features)).items():
            assert off(value, expected[f"feat{k}_{key}"]) <= FEATURES


@pytest.mark.parametrize("name", SINGLE)
def test_logits_of_every_prompt_position_are_those_of_the_reference(name):
    case, expected = CASES[name], numbers(name)
    phi, _ = checkpoint(case["checkpoint"])
    logits = np.array(logits_of(phi, expected["input_ids"].tolist(), features_of(name), cache_of(phi)))
    reduced = golden.logits_reduce(logits)
    assert off(logits[expected["logits_pos"]], expected["logits_rows"]) <= LOGITS
    assert off(logits[-1], expected["logits_last"]) <= LOGITS
    assert off(reduced["lse"], expected["logits_lse"]) <= LOGITS
    assert (reduced["argmax"] == expected["logits_argmax"]).all()


@pytest.mark.parametrize("name", SINGLE)
def test_greedy_tokens_are_those_of_the_reference_also_across_the_rope_switch(name):
    case, expected = CASES[name], numbers(name)
    phi, _ = checkpoint(case["checkpoint"])
    ids, start, long, cached = expected["input_ids"].tolist(), len(expected["input_ids"]), None, None
    for _ in expected["greedy"]:
        if long != phi.config.is_long(len(ids)):
            long, cached = phi.config.is_long(len(ids)), cache_of(phi)
            logits = prefill(phi, ids, features_of(name), cached)
        else:
            logits = decode(phi, ids[-1:], cached, long)[0]
        ids.append(int(mx.argmax(logits)))
    assert ids[start:] == expected["greedy"].tolist()


@pytest.mark.parametrize("chunk", [1, 63, 64, 700])
def test_a_prompt_read_in_chunks_gives_the_same_logits(chunk):
    expected = numbers("tiny-gqa.text_cross")
    phi, _ = checkpoint("tiny-gqa")
    ids = expected["input_ids"].tolist()[-70:] if chunk == 1 else expected["input_ids"].tolist()
    whole, pieces = (prefill(phi, ids, [], cache_of(phi), n) for n in (len(ids), chunk))
    assert off(np.array(pieces), np.array(whole)) <= 1e-4


@pytest.mark.parametrize("chunk", [40, 65])
def test_chunks_take_the_regime_of_the_whole_prompt(chunk):
    expected = numbers("tiny-su.text_65")  # one past the switch: its first chunk alone would be short
    phi, _ = checkpoint("tiny-su")
    logits = prefill(phi, expected["input_ids"].tolist(), [], cache_of(phi), chunk)
    assert off(np.array(logits), expected["logits_last"]) <= LOGITS


@pytest.mark.parametrize("name, theirs", [("phi-3-vision-128k-instruct", "phi3"), ("phi-3.5-vision-instruct", "phi35")])
def test_rope_tables_of_both_real_models_are_those_of_the_reference(name, theirs):
    tables = json.loads((PARITY / "rope_tables.json").read_text())
    table = next(t for key, t in tables.items() if key.lower() == name)
    with np.load(PARITY / "rope.npz") as file:
        expected = dict(file)
    rope = Rope(real_config(table["short_factor"], table["long_factor"]))
    assert rope.attention_factor == pytest.approx(float(expected[f"{theirs}_attention_factor"]), abs=1e-6)
    for long, regime in enumerate(("short", "long")):
        positions = expected["positions_long" if long else "positions"]
        # A one in the first half comes back as cos, and in the second half as sin, of its pair's angle.
        x = mx.concatenate([mx.ones((len(positions), 1, 1, 48)), mx.zeros((len(positions), 1, 1, 48))], -1)
        turned = np.array(rope(x, mx.array(positions), bool(long)))[:, 0, 0] * rope.attention_factor
        cos, sin = expected[f"{theirs}_{regime}_cos"][:, :48], expected[f"{theirs}_{regime}_sin"][:, :48]
        # The angle itself has a float32's precision: 131,071 radians are known to 0.008.
        tolerance = 1e-6 + 2e-7 * positions.max()
        assert off(turned, np.concatenate([cos, sin], 1)) <= tolerance


def real_config(short_factor: list[float], long_factor: list[float]) -> model.Config:
    """Phi-3-vision's dimensions."""
    return model.Config(
        32064, 3072, 8192, 32, 32, 32, 1e-5, 10000.0, 131072, 4096, short_factor, long_factor, model.VisionConfig()
    )
