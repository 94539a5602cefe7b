"""CLIP's tower, the HD merge of its crops, and the projection into the language model's space.

Pixels in, one row per image slot out; knows nothing of text. Attribute names are the checkpoint's.
"""

import mlx.core as mx
import mlx.nn as nn


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.class_embedding = mx.zeros(config.hidden_size)
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        pixels = pixels.astype(self.class_embedding.dtype).moveaxis(1, -1)
        patches = self.patch_embedding(pixels).flatten(1, 2)
        first = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        x = mx.concatenate([first, patches], 1)
        return x + self.position_embedding(mx.arange(x.shape[1]))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self._heads = config.num_attention_heads
        dim = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        batch, n, dim = x.shape
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (p.reshape(batch, n, self._heads, -1).swapaxes(1, 2) for p in projected)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=(dim // self._heads) ** -0.5)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, n, dim))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.fc1(x)
        return self.fc2(x * mx.sigmoid(1.702 * x))  # CLIP's quick_gelu


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


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.layers_used)]


class ClipTower(nn.Module):
    """Only the layers below the one whose output is taken exist here: the reference computes and drops the rest."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """(crops, channels, side, side) → (crops, patches, hidden); the class token is dropped."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class ImageProcessor(nn.Module):
    """Exists for the name it gives: img_processor.vision_model."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = ClipTower(config)


class VisionModel(nn.Module):
    """`config` is the tower's (VisionConfig), `hidden_size` the language model's width."""

    def __init__(self, config, hidden_size: int):
        super().__init__()
        width = 4 * config.hidden_size  # 2 × 2 patches make one token
        self.img_processor = ImageProcessor(config)
        self.glb_GN = mx.zeros((1, 1, width))
        self.sub_GN = mx.zeros((1, 1, 1, width))
        self.img_projection = [nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)]

    def __call__(self, pixels: mx.array, grid: tuple[int, int]) -> mx.array:
        """(1 + rows·columns, channels, side, side), the global view first → (image slots, hidden_size)."""
        rows, columns = grid
        if rows * columns == 1:  # the only crop and the global view are the same picture
            patches = self.img_processor.vision_model(pixels[:1])
            whole = crops = self._merge(patches, 1, 1)
        else:
            patches = self.img_processor.vision_model(pixels)
            whole, crops = self._merge(patches[:1], 1, 1), self._merge(patches[1:], rows, columns)
        x = mx.concatenate([crops, self.glb_GN[0], whole])
        for layer in self.img_projection:
            x = layer(x)
        return x

    def _merge(self, patches: mx.array, rows: int, columns: int) -> mx.array:
        """(rows·columns, n², hidden) → (slots, 4·hidden): one map in raster order, 2×2 merged, sub_GN ends each row."""
        dim = patches.shape[-1]
        n = round(patches.shape[1] ** 0.5)
        x = patches.reshape(rows, columns, n, n, dim).swapaxes(1, 2)
        x = x.reshape(rows * n // 2, 2, columns * n // 2, 2, dim).swapaxes(1, 2)
        x = x.reshape(rows * n // 2, columns * n // 2, 4 * dim)
        ends = mx.broadcast_to(self.sub_GN[0], (len(x), 1, 4 * dim))
        return mx.concatenate([x, ends], 1).reshape(-1, 4 * dim)
