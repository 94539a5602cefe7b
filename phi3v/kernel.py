"""Decode attention for rows of different lengths as one CUDA kernel: rope, cache write and attention together.

MLX's fused attention takes rows of one length only: any mask leaves it, at 1.5 to 2.5 times the cost. Metal's takes
masks, so there, and on a CPU, `language` keeps to MLX's own.
"""

from functools import cache
from pathlib import Path

import mlx.core as mx


@cache
def _kernel():
    source = Path(__file__).with_name("decode_attention.cu").read_text(encoding="utf-8")
    names = ["qkv", "keys", "values", "lengths", "freqs", "scale"]
    # Whatever its layout, the cache must come as it is: MLX would write the new column into a contiguous copy of it.
    return mx.fast.cuda_kernel("decode_attention", names, ["out"], source, ensure_row_contiguous=False)


@cache
def _scalar(value: float) -> mx.array:
    return mx.array([value], mx.float32)


def takes(keys: mx.array | None) -> bool:
    """Whether `decode_attention` can compute with this cache here: on CUDA, heads that four lanes share evenly."""
    on_cuda = mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)
    return on_cuda and keys is not None and keys.shape[-1] % (64 // keys.itemsize) == 0


def decode_attention(
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
