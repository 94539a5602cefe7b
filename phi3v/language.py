"""Phi-3's decoder with both LongRoPE regimes, and the key/value cache of a batch.

Embeddings in, hidden states out; knows nothing of pictures, of tokens or of who asked. Attribute names are
the checkpoint's, so that its tensors load by name.
"""

import math
from copy import copy
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

GROW = 256  # columns by which a cache grows: fewer copies than column by column, little waste


class KVCache:
    """Keys and values of every layer for rows of different lengths: row r fills its first `lengths[r]` columns.

    Arrays are (slots, kv_heads, capacity, head_dim). The first slots are the rows; the others, and the columns behind
    a row's length, are room to grow and hold anything.
    """

    def __init__(self, layers: int):
        self.keys: list[mx.array | None] = [None] * layers
        self.values: list[mx.array | None] = [None] * layers
        self.lengths, self.slots, self.capacity = [0], 1, 0

    def reserve(self, columns: int, grow: int = 1) -> None:
        """Have room for so many columns in every row, and up to a multiple of `grow` where it is to be made."""
        if columns > self.capacity:
            self._resize(self.slots, -(-columns // grow) * grow)

    def append(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write (rows, kv_heads, n, head_dim) behind each row's length; returns the rows as far as any is filled.

        The lengths are the pass's to change, at its end. Rows of different lengths take one column at a time.
        """
        rows, n = keys.shape[0], keys.shape[2]
        end = max(self.lengths) + n
        for store, new in ((self.keys, keys), (self.values, values)):
            if store[layer] is None:
                store[layer] = _padded(new, self.slots, self.capacity)
            elif self.even:
                store[layer][:rows, :, end - n : end] = new
            else:
                store[layer][mx.arange(rows), :, mx.array(self.lengths)] = new[:, :, 0]
        return self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]

    @property
    def even(self) -> bool:
        """Whether all rows have one length."""
        return min(self.lengths) == max(self.lengths)

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all other rows; returns which old row each new one is. Only the rows that fill a gap are moved."""
        count = len(rows)
        moved = [r for r in rows if r >= count]
        order = [r if r in rows else moved.pop() for r in range(count)]
        gaps = [r for r in range(count) if order[r] != r]
        for store in (self.keys, self.values):
            for old in store if gaps else []:
                old[mx.array(gaps)] = old[mx.array([order[r] for r in gaps])]
        self.lengths = [self.lengths[r] for r in order]
        if 2 * count < self.slots:
            self._resize(count, self.capacity)
        return order

    def join(self, other: "KVCache", row: int) -> None:
        """Make the one row of `other` our row, in the place of one that is not used any more or behind all."""
        length = other.lengths[0]
        if row == self.slots or length > self.capacity:
            # A quarter more: joining one by one must not copy all rows each time.
            self._resize(max(self.slots, row + 1 + row // 4), max(self.capacity, length))
        self.lengths[row : row + 1] = [length]
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, new in enumerate(theirs):
                mine[layer][row : row + 1, :, :length] = new[:, :, :length]

    def copy(self, row: int, length: int) -> "KVCache":
        """The first `length` columns of a row as an evaluated cache of its own."""
        new = self.snapshot()
        new.lengths, new.slots, new.capacity = [length], 1, length
        # Added to, since a mere slice of whole columns is a view, and would hold the memory of all rows.
        new.keys, new.values = ([x[row : row + 1, :, :length] + 0 for x in store] for store in (new.keys, new.values))
        mx.async_eval(new.arrays())
        return new

    def head(self, length: int, capacity: int) -> "KVCache":
        """A cache of its own with the first `length` columns and room for more."""
        new = self.snapshot()
        new.lengths = [length]
        new._resize(1, capacity)
        return new

    def snapshot(self) -> "KVCache":
        """A cache of the same arrays: this one goes on behind what they hold, and growing or joining copies them."""
        new = copy(self)
        new.lengths, new.keys, new.values = self.lengths[:], self.keys[:], self.values[:]
        return new

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def _resize(self, slots: int, capacity: int) -> None:
        rows, longest = min(slots, len(self.lengths)), max(self.lengths)
        for store in (self.keys, self.values):
            store[:] = [old if old is None else _padded(old[:rows, :, :longest], slots, capacity) for old in store]
        self.slots, self.capacity = slots, capacity


def _padded(x: mx.array, slots: int, capacity: int) -> mx.array:
    room = slots - x.shape[0], capacity - x.shape[2]
    # What a projection gives is a view of queries, keys and values together, and would keep the memory of all three.
    return mx.pad(x, [(0, room[0]), (0, 0), (0, room[1]), (0, 0)]) if any(room) else mx.contiguous(x)


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
        options = {"traditional": False, "base": None, "scale": 1.0}
        return mx.fast.rope(x, x.shape[-1], offset=positions, freqs=self.frequencies[long], **options)


class Part:
    """One cache's share of a pass: each of its rows reads `columns` more tokens, under the long factors or the short.

    Of these the first `count` stay, the others only fill the shape. Holds what all layers need of it, made once. The
    caller sees to it that a cache has one regime.
    """

    def __init__(self, cache: KVCache, columns: int, long: bool, count: int | None = None):
        self.cache, self.columns, self.long, self.count = cache, columns, long, count or columns
        need = max(cache.lengths) + columns
        cache.reserve(need, GROW)
        self.tokens = len(cache.lengths) * columns
        self.fused = columns == 1 and _kernel_takes(cache.keys[0])
        if self.fused:
            self.lengths = mx.array(cache.lengths, mx.int32)
        elif cache.even:  # these keep MLX's fused kernels
            self.mask, self.positions = "causal" if columns > 1 else None, cache.lengths[0]
        else:
            self.positions = mx.array(cache.lengths)
            self.mask = mx.arange(need) <= self.positions[:, None, None, None]


@cache
def _kernel():
    """Rope, cache write and attention of rows of different lengths in one: decode_attention.cu.

    MLX's fused attention takes rows of one length only: any mask leaves it, at 1.5 to 2.5 times the cost. Metal's takes
    masks, so there, and on a CPU, MLX's own is used.
    """
    source = Path(__file__).with_name("decode_attention.cu").read_text(encoding="utf-8")
    names = ["qkv", "keys", "values", "lengths", "freqs", "scale"]
    # Whatever its layout, the cache must come as it is: MLX would write the new column into a contiguous copy of it.
    return mx.fast.cuda_kernel("decode_attention", names, ["out"], source, ensure_row_contiguous=False)


@cache
def _scalar(value: float) -> mx.array:
    return mx.array([value], mx.float32)


def _kernel_takes(keys: mx.array | None) -> bool:
    """Whether the kernel can compute with this cache here: on CUDA, heads that four lanes share evenly."""
    on_cuda = mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)
    return on_cuda and keys is not None and keys.shape[-1] % (64 // keys.itemsize) == 0


def _decode_attention(
    qkv: mx.array, keys: mx.array, values: mx.array, lengths: mx.array, frequencies: mx.array, scale: float
) -> mx.array:
    """One step of attention: qkv (rows, (heads + 2·kv_heads)·dim) → (rows, heads·dim).

    `keys` and `values` are (slots, kv_heads, capacity, dim), of which row r has `lengths[r]`; its new key, rotated, and
    value are written behind them, in place. MLX does not see that write. It needs not: whoever reads the cache next
    depends on this step's tokens, or is evaluated after them on the same stream.
    """
    rows, dim, kv_heads = len(qkv), keys.shape[-1], keys.shape[1]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    # Many small blocks where there are rows for them, else few that each have more loads under way: tried on an H200.
    threads, unroll = (64, 2) if rows * heads >= 2048 else (256, 4)
    template = {"T": qkv.dtype, "D": dim, "HEADS": heads, "KV_HEADS": kv_heads, "THREADS": threads, "UNROLL": unroll}
    return _kernel()(
        inputs=[qkv, keys, values, lengths, frequencies, _scalar(scale)],
        template=list(template.items()),
        grid=(threads, heads, rows),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, heads * dim)],
        output_dtypes=[qkv.dtype],
    )[0]


class Attention(nn.Module):
    def __init__(self, config, rope: Rope, ranks: int):
        super().__init__()
        heads = config.num_attention_heads, config.num_key_value_heads
        self._heads, self._kv_heads, self._dim = heads[0] // ranks, heads[1] // ranks, config.head_dim
        rows = (self._heads + 2 * self._kv_heads) * self._dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self._heads * self._dim, config.hidden_size, bias=False)
        self._rope = rope

    def __call__(self, x: mx.array, layer: int, parts: list[Part], rows: mx.array | None) -> mx.array:
        x = self.qkv_proj(x)
        shares = mx.split(x, list(accumulate(part.tokens for part in parts[:-1])))
        out = [self._attend(share, layer, part) for share, part in zip(shares, parts, strict=True)]
        x = mx.concatenate(out) if len(out) > 1 else out[0]
        return self.o_proj(x if rows is None else x[rows])

    def _attend(self, x: mx.array, layer: int, part: Part) -> mx.array:
        """(tokens, (heads + 2·kv_heads)·head_dim) of one part → (tokens, heads·head_dim)."""
        cache, rope = part.cache, self._rope
        if part.fused:
            keys, values = cache.keys[layer], cache.values[layer]
            return _decode_attention(x, keys, values, part.lengths, rope.frequencies[part.long], rope.scale)
        heads = x.reshape(len(cache.lengths), part.columns, -1, self._dim).swapaxes(1, 2)
        queries, keys, values = mx.split(heads, [self._heads, self._heads + self._kv_heads], axis=1)
        queries, keys = (rope(heads, part.positions, part.long) for heads in (queries, keys))
        keys, values = cache.append(layer, keys, values)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=rope.scale, mask=part.mask)
        return out.swapaxes(1, 2).reshape(part.tokens, -1)


class MLP(nn.Module):
    def __init__(self, config, ranks: int):
        super().__init__()
        width = config.intermediate_size // ranks
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(_swiglu(*mx.split(self.gate_up_proj(x), 2, axis=-1)))


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class DecoderLayer(nn.Module):
    """With a group each rank has its share of the heads and of the MLP, and `sum` adds up what they make."""

    def __init__(self, config, rope: Rope, group=None):
        super().__init__()
        ranks, self._sum = (group.size, group.sum) if group else (1, lambda x: x)
        self.self_attn = Attention(config, rope, ranks)
        self.mlp = MLP(config, ranks)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, layer: int, parts: list[Part], rows: mx.array | None) -> mx.array:
        attended = self._sum(self.self_attn(self.input_layernorm(x), layer, parts, rows))
        x = (x if rows is None else x[rows]) + attended
        return x + self._sum(self.mlp(self.post_attention_layernorm(x)))


class LanguageModel(nn.Module):
    """All parts of a pass share the matrix products; attention is each part's own, so that none is padded."""

    def __init__(self, config, group=None):
        super().__init__()
        rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, rope, group) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, parts: list[Part], rows: mx.array | None = None) -> mx.array:
        """(tokens, hidden) embeddings, part after part and in each row after row → hidden states of the same shape.

        With `rows` only of those tokens: the others are not taken further than the last layer's keys and values.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, i, parts, rows if layer is self.layers[-1] else None)
        for part in parts:
            part.cache.lengths = [length + part.count for length in part.cache.lengths]
        return self.norm(x)
