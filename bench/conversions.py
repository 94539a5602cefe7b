"""What mlx-vlm converts, read by phi3v, and what phi3v quantises, read by mlx-vlm: are the logits equal?

    python bench/conversions.py

A small Phi-3-V with random weights, whose tower is as wide as CLIP's since mlx-vlm has that built in, is converted by
mlx-vlm's own code to 4 bits, to 8 bits and, in shards, to bf16. Both sides compute in float32 with the weights of the
same files, mlx-vlm with each quantised layer dequantised by its own code. Its ids, pixels and rope are given so that
none of its known deviations counts: short factors equal to the long ones, one crop. Exits with 1 if a logit is off by
over TOLERANCE of the largest, which float32 allows for.
"""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import phi3v

phi3v.fast_blas()

import mlx.core as mx  # noqa: E402
import mlx_vlm.utils as vlm  # noqa: E402
import peers  # noqa: E402
from compare import TINY  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_vlm.convert import convert  # noqa: E402
from mlx_vlm.models.phi3_v.vision import VisionModel  # noqa: E402
from mlx_vlm.quant_utils import dequantize_model  # noqa: E402
from PIL import Image  # noqa: E402

from phi3v.images import SIDE, Crops, process  # noqa: E402
from phi3v.language import KVCache, Part  # noqa: E402
from phi3v.model import VisionConfig, load  # noqa: E402
from phi3v.quantize import quantize  # noqa: E402

TOLERANCE = 2e-5
# A width of 192 is no multiple of 128: there a group of 128 leaves some layers as they are.
SMALL = replace(TINY, vision=VisionConfig(num_hidden_layers=3), short_factor=[1.2] * 24, long_factor=[1.2] * 24)
CONVERSIONS = {
    "mlx-vlm, 4 bits": {"quantize": True, "q_bits": 4},
    "mlx-vlm, 8 bits, language model only": {"quantize": True, "q_bits": 8},
    "mlx-vlm, mixed 3 and 6 bits": {"quantize": True, "quant_predicate": "mixed_3_6"},
    "mlx-vlm, bf16 in shards": {},
}
OURS = {
    "phi3v, 4 bits": (4, 64, False),
    "phi3v, 8 bits, the tower too": (8, 64, True),
    "phi3v, 6 bits in groups of 128": (6, 128, True),
}


def make(folder: Path) -> None:
    """The source: bf16, in the layout of the hub."""
    config, weights = peers.make_weights(SMALL, mx.bfloat16)
    last, tower = ".encoder.layers.1.", "model.vision_embed_tokens.img_processor.vision_model."
    weights |= {name.replace(last, ".encoder.layers.2."): x for name, x in weights.items() if last in name}
    weights |= {f"{tower}post_layernorm.{part}": mx.ones(1024, mx.bfloat16) for part in ("weight", "bias")}
    embedding = f"{tower}embeddings.patch_embedding.weight"
    weights[embedding] = mx.contiguous(weights[embedding].moveaxis(-1, 1))
    peers.write_folder(config, weights, folder)


def convert_theirs(source: Path, out: Path, **options) -> None:
    """mlx-vlm's convert, less its processor, which wants tokenizer files that a test model does not have."""

    def fetched(path: Path, **_) -> tuple:
        return vlm.load_model(path, lazy=True), vlm.load_config(path), SimpleNamespace()

    sys.modules["mlx_vlm.convert"].fetch_from_hub = fetched
    convert(str(source), str(out), **options)


def in_shards(weights: dict) -> list[dict]:
    names = list(weights)
    return [{name: weights[name] for name in names[i::3]} for i in range(3)]


def theirs(folder: Path, ids: list[int], crops: Crops | None) -> np.ndarray:
    """(tokens, vocab) of mlx-vlm's model, dequantised by its own code, in float32."""
    model = vlm.load_model(folder, lazy=True)
    model.update(
        tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    )
    model = dequantize_model(model)
    pictures = {"image_sizes": mx.array([crops.grid]) * SIDE} if crops else {}
    pixels = mx.array(crops.pixels)[None] if crops else None
    return np.array(model(mx.array([ids]), pixel_values=pixels, **pictures).logits[0])


def ours(folder: Path, ids: list[int], crops: Crops | None) -> np.ndarray:
    """(tokens, vocab) of phi3v's."""
    phi, count = load(folder, dtype=mx.float32), np.array(ids)
    slots = np.arange(len(ids)) - (count < 0).argmax()
    embedded = phi.embed(count, slots, phi.image_features([crops]) if crops else [])
    return np.array(phi(embedded, [Part(KVCache(phi.config.num_hidden_layers), len(ids), False)]))


def main() -> int:
    rng, worst = np.random.default_rng(0), 0.0
    text = rng.integers(3, SMALL.vocab_size, 100).tolist()
    crops = process(Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)), 1)
    asked = {"text": (text, None), "picture": (text[:8] + [-1] * crops.tokens + text[8:], crops)}
    VisionModel.CLIP_VIT_LARGE_PATCH14_336_CONFIG = SimpleNamespace(model_type="phi3_v", **asdict(SMALL.vision))
    vlm.make_shards = in_shards
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "source"
        source.mkdir()
        make(source)
        for number, (name, options) in enumerate((CONVERSIONS | OURS).items()):
            out = Path(made) / str(number)
            if name in OURS:
                quantize(source, out, *options)
            else:
                convert_theirs(source, out, **options)
            size = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e6
            for kind, (ids, picture) in asked.items():
                expected, found = theirs(out, ids, picture), ours(out, ids, picture)
                off = float(np.abs(found - expected).max() / np.abs(expected).max())
                same = float((found.argmax(-1) == expected.argmax(-1)).mean())
                worst = max(worst, off)
                print(
                    f"{name}, {size:.1f} MB, {kind}: logits differ by {off:.1e} of the largest, greedy equal {same:.1%}"
                )
    return int(not worst < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
