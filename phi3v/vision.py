"""CLIP's tower, the HD merge of its crops, and the projection into the language model's space.

Pixels in, one row per image slot out; knows nothing of text. Attribute names are the checkpoint's.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import mlx.nn as nn

OWN = threading.local()  # streams belong to the thread that makes them, and are only freed with it


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.class_embedding = mx.zeros(config.hidden_size)
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """(crops, channels, side, side) → (crops, 1 + patches, hidden)."""
        crops, channels, side, _ = pixels.shape
        weight = self.patch_embedding.weight  # (hidden, patch, patch, channels)
        patch, n = weight.shape[1], side // weight.shape[1]
        # The windows of the convolution do not overlap: it is one matrix product.
        x = pixels.astype(weight.dtype).reshape(crops, channels, n, patch, n, patch).transpose(0, 2, 4, 3, 5, 1)
        x = x.reshape(crops, n * n, -1) @ weight.flatten(1).T
        first = mx.broadcast_to(self.class_embedding, (crops, 1, x.shape[-1]))
        return mx.concatenate([first, x], 1) + self.position_embedding(mx.arange(n * n + 1))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self._heads, dim = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def fuse(self) -> None:
        """Make one projection of the three, once they are loaded: a wider product is a faster one."""
        three = self.q_proj, self.k_proj, self.v_proj
        if all(type(p) is nn.Linear for p in three):
            self.qkv = nn.Linear(1, 1)
            self.qkv.weight, self.qkv.bias = (mx.concatenate([p[name] for p in three]) for name in ("weight", "bias"))
            for name in ("q_proj", "k_proj", "v_proj"):
                del self[name]

    def __call__(self, x: mx.array) -> mx.array:
        batch, n, dim = x.shape
        fused = "qkv" in self
        projected = mx.split(self.qkv(x), 3, -1) if fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (p.reshape(batch, n, self._heads, -1).swapaxes(1, 2) for p in projected)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=(dim // self._heads) ** -0.5)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, n, dim))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_fast_approx(self.fc1(x)))  # "quick_gelu": x · sigmoid(1.702 x)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipTower(nn.Module):
    """Only the layers below the one whose output is taken exist here: the reference computes and drops the rest."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = [EncoderLayer(config) for _ in range(config.layers_used)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """(crops, channels, side, side) → (crops, patches, hidden); the class token is dropped."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class VisionModel(nn.Module):
    """`config` is the tower's (VisionConfig), `hidden_size` the language model's width."""

    def __init__(self, config, hidden_size: int):
        super().__init__()
        width = 4 * config.hidden_size  # 2 × 2 patches make one token
        self.img_processor = nn.Module()
        self.img_processor.vision_model = ClipTower(config)
        self.glb_GN = mx.zeros((1, 1, width))
        self.sub_GN = mx.zeros((1, 1, 1, width))
        self.img_projection = [nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)]

    def __call__(self, pictures: list[tuple[mx.array, tuple[int, int]]]) -> list[mx.array]:
        """Pixels (1 + rows·columns, channels, side, side), the global view first, and grid (rows, columns) of each.

        Returns (image slots, hidden_size) for each; all crops go through the tower together.
        """
        # One crop is its own global view.
        crops = [pixels[:1] if grid == (1, 1) else pixels for pixels, grid in pictures]
        patches = self._look(mx.concatenate(crops))
        features = []
        for (_, grid), own in zip(pictures, crops, strict=True):
            mine, patches = patches[: len(own)], patches[len(own) :]
            whole = self._merge(mine[:1], 1, 1)
            x = mx.concatenate([self._merge(mine[1:], *grid) if len(own) > 1 else whole, self.glb_GN[0], whole])
            for layer in self.img_projection:  # each for itself: parts of one array would keep each other's memory
                x = layer(x)
            features.append(x)
        return features

    def _look(self, pixels: mx.array) -> mx.array:
        """The tower over all crops; on a CPU side by side, a core each: most of it is not matrix products there."""
        tower = self.img_processor.vision_model
        if mx.default_device() == mx.Device(mx.gpu) or len(pixels) == 1:
            return tower(pixels)
        if not hasattr(OWN, "streams"):
            OWN.streams = [mx.new_stream(mx.cpu) for _ in range(os.cpu_count() or 1)]
        mx.synchronize()  # what may be under way still has the BLAS's threads
        looked = []
        with _blas_of_one_thread():
            for i in range(len(pixels)):
                with mx.stream(OWN.streams[i % len(OWN.streams)]):
                    looked.append(tower(pixels[i : i + 1]))
            mx.eval(looked)
        return mx.concatenate(looked)

    def _merge(self, patches: mx.array, rows: int, columns: int) -> mx.array:
        """(rows·columns, n², hidden) → (slots, 4·hidden): one map in raster order, 2×2 merged, sub_GN ends each row."""
        dim, n = patches.shape[-1], round(patches.shape[1] ** 0.5)
        x = patches.reshape(rows, columns, n, n, dim).swapaxes(1, 2)
        x = x.reshape(rows * n // 2, 2, columns * n // 2, 2, dim).swapaxes(1, 2)
        x = x.reshape(rows * n // 2, columns * n // 2, 4 * dim)
        ends = mx.broadcast_to(self.sub_GN[0], (len(x), 1, 4 * dim))
        return mx.concatenate([x, ends], 1).reshape(-1, 4 * dim)


@cache
def openblas() -> ctypes.CDLL | None:
    """The library, if it computes our products: __init__ has made its names global."""
    blas = ctypes.CDLL(None)  # all that this process has opened
    return blas if hasattr(blas, "openblas_set_num_threads") else None


@contextmanager
def _blas_of_one_thread() -> Iterator[None]:
    """OpenBLAS, if it is there, computes in its callers' threads: it serializes those that want all of its own."""
    if not (blas := openblas()):
        yield
        return
    threads = blas.openblas_get_num_threads()
    blas.openblas_set_num_threads(1)
    try:
        yield
    finally:
        blas.openblas_set_num_threads(threads)
