"""What is kept of prompts and pictures: by owner, content and regime, and within its bytes."""

import mlx.core as mx
import numpy as np
import pytest

from phi3v.language import KVCache
from phi3v.sequences import MIN_PREFIX, Cache, shared_length

BYTES = 2 * 2 * 4  # of a token in the caches made here: two layers' keys and values of one float32


def read(length: int) -> KVCache:
    """What a prompt of so many tokens leaves behind: its columns hold their numbers."""
    made = KVCache(2)
    made.lengths, made.capacity = [length], length
    made.keys = [mx.arange(length, dtype=mx.float32).reshape(1, 1, length, 1) for _ in range(2)]
    made.values = [-keys for keys in made.keys]
    return made


def ids(*ranges: range) -> np.ndarray:
    return np.concatenate([np.array(r) for r in ranges])


def test_the_longest_beginning_in_common_is_found_and_copied():
    cache = Cache(10**6)
    cache.add_prefix("a", False, ids(range(100)), read(100))
    cache.add_prefix("a", False, ids(range(70), range(500, 600)), read(170))
    found, length = cache.prefix("a", False, ids(range(90), range(7)), 1)
    assert length == 90 and found.lengths == [90] and found.capacity == 97
    assert found.keys[1][0, 0, :90, 0].tolist() == list(range(90))
    assert found.values[0][0, 0, 89, 0].item() == -89
    assert cache.hits == 90


@pytest.mark.parametrize("owner, long, content", [
    ("b", False, ids(range(100))),
    ("a", True, ids(range(100))),
    ("a", False, ids(range(MIN_PREFIX - 1), range(900, 950))),
    ("a", False, ids(range(1, 100))),
    ("a", False, ids(range(5))),
])  # fmt: skip
def test_another_owner_regime_or_beginning_finds_nothing(owner, long, content):
    cache = Cache(10**6)
    cache.add_prefix("a", False, ids(range(100)), read(100))
    assert cache.prefix(owner, long, content, 1) is None


def test_the_last_token_is_always_left_to_be_read():
    cache = Cache(10**6)
    cache.add_prefix("a", False, ids(range(128)), read(128))
    assert cache.prefix("a", False, ids(range(128)), 1)[1] == 127
    assert cache.prefix("a", False, ids(range(128)), 64)[1] == 64
    assert cache.prefix("a", False, ids(range(64)), 64) is None


def test_bytes_are_counted_and_the_least_recently_used_goes_first():
    cache = Cache(250 * BYTES)
    for start in (1000, 2000):
        cache.add_prefix("a", False, ids(range(start, start + 100)), read(100))
    assert cache.bytes == 200 * BYTES
    assert cache.prefix("a", False, ids(range(1000, 1100)), 1)
    cache.add_prefix("a", False, ids(range(3000, 3100)), read(100))
    assert cache.bytes == 200 * BYTES
    assert cache.prefix("a", False, ids(range(2000, 2100)), 1) is None
    assert cache.prefix("a", False, ids(range(1000, 1100)), 1)
    cache.clear()
    assert cache.bytes == 0 and cache.prefix("a", False, ids(range(1000, 1100)), 1) is None


def test_a_prefix_takes_the_place_of_those_it_contains_and_what_is_too_large_is_not_kept():
    cache = Cache(200 * BYTES)
    cache.add_prefix("a", False, ids(range(100)), read(100))
    cache.add_prefix("a", False, ids(range(150)), read(150))
    assert cache.bytes == 150 * BYTES
    cache.add_prefix("a", False, ids(range(700)), read(700))
    cache.add_prefix("a", False, ids(range(MIN_PREFIX - 1)), read(MIN_PREFIX - 1))
    assert cache.bytes == 150 * BYTES and cache.prefix("a", False, ids(range(150)), 1)[1] == 149


def test_features_of_a_picture_belong_to_an_owner():
    cache = Cache(1000)
    features = mx.zeros((10, 4))
    cache.add_features("a", -5, features)
    assert cache.features("a", -5) is features and cache.bytes == features.nbytes
    assert cache.features("b", -5) is None and cache.features("a", -6) is None
    cache.add_features("a", -5, features)
    assert cache.bytes == features.nbytes


def test_shared_lengths():
    assert shared_length(ids(range(5)), ids(range(9))) == 5
    assert shared_length(ids(range(5)), ids(range(3), range(9))) == 3
    assert shared_length(ids(range(1, 5)), ids(range(5))) == 0
