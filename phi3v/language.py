"""Phi-3's decoder with both LongRoPE regimes, and the key/value cache of a batch.

Embeddings in, hidden states out; knows nothing of pictures, of tokens or of who asked. Attribute names are
the checkpoint's, so that its tensors load by name.
"""

import math

import mlx.core as mx
import mlx.nn as nn

GROW = 256  # columns by which a cache grows: fewer copies than column by column, little waste


class KVCache:
    """Keys and values of every layer for rows that end together.

    Arrays are (rows, kv_heads, capacity, head_dim). Row r occupies the columns padding[r] … length−1: shorter
    rows start later, so that a step writes one column for all of them.
    """

    def __init__(self, layers: int):
        self.keys: list[mx.array | None] = [None] * layers
        self.values: list[mx.array | None] = [None] * layers
        self.length = 0
        self.padding = [0]

    def append(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write (rows, kv_heads, n, head_dim) behind column `length`; returns all so far. `advance` ends the step."""
        end = self.length + keys.shape[2]
        for store, new in ((self.keys, keys), (self.values, values)):
            old = store[layer]
            if old is None or end > old.shape[2]:
                rows, heads, _, dim = new.shape
                room = mx.zeros((rows, heads, -(-end // GROW) * GROW - self.length, dim), new.dtype)
                store[layer] = room if old is None else mx.concatenate([old[:, :, : self.length], room], 2)
            store[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, columns: int) -> None:
        self.length += columns

    def positions(self) -> mx.array | int:
        """The position of the next token of each row, as rope takes it."""
        return self.length - mx.array(self.padding) if any(self.padding) else self.length

    def mask(self, columns: int) -> mx.array | str | None:
        """What each of the next `columns` columns may look at; None and "causal" keep the fused kernels."""
        if not any(self.padding):
            return "causal" if columns > 1 else None
        key = mx.arange(self.length + columns)
        causal = key <= mx.arange(self.length, self.length + columns)[:, None]
        return causal & (key >= mx.array(self.padding)[:, None, None, None])

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns that only they had."""
        spare = min(self.padding[r] for r in rows)
        index = mx.array(rows)
        for store in (self.keys, self.values):
            store[:] = [old[index, :, spare : self.length] for old in store]
        self.padding = [self.padding[r] - spare for r in rows]
        self.length -= spare

    def join(self, other: "KVCache") -> None:
        """Add the rows of `other`, aligned at their ends."""
        length = max(self.length, other.length)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer in range(len(mine)):
                rows = mine[layer][:, :, : self.length], theirs[layer][:, :, : other.length]
                mine[layer] = mx.concatenate([_pad_left(r, length) for r in rows])
        self.padding = [p + length - self.length for p in self.padding]
        self.padding += [p + length - other.length for p in other.padding]
        self.length = length

    def arrays(self) -> list[mx.array]:
        return self.keys + self.values


def _pad_left(x: mx.array, length: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (length - x.shape[2], 0), (0, 0)])


class Rope:
    """Rotary frequencies under the short and the long factors, and LongRoPE's attention factor.

    Source: Phi3LongRoPEScaledRotaryEmbedding of Phi-3.5-vision's code: inverse frequency 1 / (factor · θ^(2i/d)),
    cos and sin times sqrt(1 + ln(max/original) / ln(original)) in both regimes.
    """

    def __init__(self, config):
        powers = config.rope_theta ** (mx.arange(0, config.head_dim, 2, dtype=mx.float32) / config.head_dim)
        self.frequencies = [mx.array(f, mx.float32) * powers for f in (config.short_factor, config.long_factor)]
        stretch = config.max_position_embeddings / config.original_max_position_embeddings
        log_original = math.log(config.original_max_position_embeddings)
        self.attention_factor = math.sqrt(1 + math.log(stretch) / log_original) if stretch > 1 else 1.0
        # Queries and keys both carry the attention factor, so it may stand squared in the softmax scale instead.
        self.scale = self.attention_factor**2 / math.sqrt(config.head_dim)

    def __call__(self, x: mx.array, positions: mx.array | int, long: bool) -> mx.array:
        """Rotate (rows, heads, n, head_dim), halves paired, the first column of each row at its position."""
        frequencies = self.frequencies[long]
        return mx.fast.rope(
            x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=positions, freqs=frequencies
        )


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self._heads, self._kv_heads, self._dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = (self._heads + 2 * self._kv_heads) * self._dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self._heads * self._dim, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, layer: int, step: "Step") -> mx.array:
        batch, n, _ = x.shape
        heads = self.qkv_proj(x).reshape(batch, n, -1, self._dim).swapaxes(1, 2)
        queries, keys, values = mx.split(heads, [self._heads, self._heads + self._kv_heads], axis=1)
        queries, keys = step.rotate(queries), step.rotate(keys)
        keys, values = step.cache.append(layer, keys, values)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=step.scale, mask=step.mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, n, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, layer: int, step: "Step") -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), layer, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Step:
    """What all layers of one forward pass share: made once, read by each."""

    def __init__(self, rope: Rope, cache: KVCache, columns: int, long: bool):
        self.cache, self.scale = cache, rope.scale
        self.mask, self._positions = cache.mask(columns), cache.positions()
        self._rope, self._long = rope, long

    def rotate(self, x: mx.array) -> mx.array:
        return self._rope(x, self._positions, self._long)


class LanguageModel(nn.Module):
    """`long` picks the LongRoPE factors for all positions of the pass; the caller sees to it that a cache has one."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope = Rope(config)

    def __call__(self, x: mx.array, cache: KVCache, long: bool) -> mx.array:
        """(rows, n, hidden) embeddings of the next n columns → hidden states of the same shape."""
        step = Step(self._rope, cache, x.shape[1], long)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, step)
        cache.advance(x.shape[1])
        return self.norm(x)
