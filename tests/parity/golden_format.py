"""Shared, numpy-only description of the golden files (no torch, no mlx).

A golden is one NPZ per case plus one JSON (`cases.json`) that says how to run it.
Reductions here are applied to full arrays, both when goldens are written and when
a system under test (SUT) hands in full arrays, so files stay small.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

PX_STRIDE = 24  # pixel sub-sampling: [:, :, 5::24, 7::24]
FEAT_STRIDE = 17  # projected image token rows kept in full
N_POS = 12  # prompt positions whose whole logit row is kept
TOPK = 8


def px_reduce(crops):
    """crops: (n, 3, 336, 336) real crops of ONE image, global view first."""
    c = np.asarray(crops, dtype=np.float32)
    return {
        "sub": c[:, :, 5::PX_STRIDE, 7::PX_STRIDE].copy(),
        "mean": c.astype(np.float64).mean(axis=(2, 3)).astype(np.float32),
        "std": c.astype(np.float64).std(axis=(2, 3)).astype(np.float32),
    }


def feat_reduce(f):
    """f: (tokens, hidden) projected features of ONE image, in prompt order."""
    f = np.asarray(f, dtype=np.float32)
    return {
        "rows": f[::FEAT_STRIDE].copy(),
        "last": f[-1].copy(),
        "norm": np.sqrt((f.astype(np.float64) ** 2).sum(-1)).astype(np.float32),
        "first4": f[:, :4].copy(),
    }


def pos_index(n):
    return np.unique(np.linspace(0, n - 1, min(n, N_POS)).astype(np.int64))


def logits_reduce(lg, keep_all=False):
    """lg: (positions, vocab) prompt logits of ONE sequence."""
    lg = np.asarray(lg, dtype=np.float32)
    idx = np.arange(len(lg)) if keep_all else pos_index(len(lg))
    m = lg.max(-1)
    lse = (m + np.log(np.exp(lg.astype(np.float64) - m[:, None]).sum(-1))).astype(np.float32)
    return {
        "pos": idx.astype(np.int32),
        "rows": lg[idx].copy(),
        "argmax": lg.argmax(-1).astype(np.int32),
        "lse": lse,
        "norm": np.sqrt((lg.astype(np.float64) ** 2).sum(-1)).astype(np.float32),
    }


def topk(row, k=TOPK):
    i = np.argsort(-row, kind="stable")[:k]
    return i.astype(np.int32), row[i].astype(np.float32)


def sha(a):
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()


def load_cases(gdir):
    with open(os.path.join(gdir, "cases.json")) as f:
        return json.load(f)


# ------------------------------------------------------------------ test images
def synth_image(seed, w, h):
    """Deterministic RGB test image (numpy only): gradient, shapes, stripes, noise.

    Integer arithmetic and one PCG64 stream: bit-identical on every platform.
    """
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    g = np.random.Generator(np.random.PCG64(seed))
    a = np.empty((h, w, 3), dtype=np.int64)
    a[..., 0] = x * 255 // max(w - 1, 1)
    a[..., 1] = y * 255 // max(h - 1, 1)
    a[..., 2] = (x * 3 + y * 5 + 17 * seed) % 256
    # disc
    cx, cy, r = w * 2 // 5, h * 3 // 7, max(min(w, h) // 4, 1)
    disc = (x - cx) ** 2 + (y - cy) ** 2 <= r * r
    a[disc] = [250, 40 + (seed * 31) % 180, 10]
    # box
    bx, by = w * 3 // 5, h // 8
    box = (x >= bx) & (x < bx + max(w // 5, 1)) & (y >= by) & (y < by + max(h // 3, 1))
    a[box] = [15, 15, 240 - (seed * 13) % 100]
    # fine stripes (aliasing test) in the lower right quarter
    st = (x > w * 7 // 10) & (y > h * 6 // 10) & (((x + 2 * y) // 2) % 2 == 0)
    a[st] = 255 - a[st]
    a += g.integers(-12, 13, size=a.shape)
    return np.clip(a, 0, 255).astype(np.uint8)
