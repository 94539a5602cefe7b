"""A checkpoint folder → the model: configuration, weights, quantisation, text and picture embedding.

Reads JSON and safetensors only, never code from the folder; knows nothing of requests or of threads.
"""

import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import SetupError
from .images import Crops
from .language import LanguageModel, Part
from .vision import VisionModel, openblas

PATCH_WEIGHT = "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight"
# Tensors that checkpoints carry and nothing reads: buffers of old transformers, a fine-tuning's leftovers, and the top
# of CLIP's tower (the number is the layer's), whose output Phi-3-V does not take.
UNREAD = re.compile(r"position_ids$|\.wte\.|post_layernorm\.|vision_model\.encoder\.layers\.(\d+)\.|inv_freq$")
# Rows from which a CPU multiplies faster with dequantised weights: with OpenBLAS, and without (crossovers measured with
# Phi-3's and CLIP's widths: 3 to 6 rows and 8 to 32). Bits that do not divide 32 take three times as long to unpack.
ROWS, ROWS_SLOW, UNEVEN = 8, 32, 3
MAX_LAYERS = 1000  # each is made before a weight is read; Phi-3-vision has 32 and 24
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what MLX's affine quantisation has
MAX_SCALE = 1_000_000  # of an adapter: 10 or 20 are usual, and NaN is not below it
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class VisionConfig:
    """`img_processor`; what it leaves out is CLIP ViT-L/14-336, as Microsoft's code has it built in."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    layer_idx: int = -2  # of the hidden states, the embeddings being the first: −2 is the last layer's input

    @property
    def layers_used(self) -> int:
        return self.layer_idx % (self.num_hidden_layers + 1)


@dataclass(frozen=True)
class Config:
    """config.json, `model_type` phi3_v; the names are the file's, the factors those of `rope_scaling`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    original_max_position_embeddings: int
    short_factor: list[float]
    long_factor: list[float]
    vision: VisionConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_long(self, length: int) -> bool:
        """Whether a sequence of this total length takes the long factors (Phi-3.5's and transformers' rule)."""
        return length > self.original_max_position_embeddings

    @classmethod
    def read(cls, folder: Path) -> "Config":
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_bytes())
            if raw.get("model_type") != "phi3_v":
                raise SetupError(f"{path} says model_type {raw.get('model_type')!r}; phi3v runs 'phi3_v' only")
            scaling = raw.get("rope_scaling") or {}
            ones = [1.0] * (raw["hidden_size"] // raw["num_attention_heads"] // 2)
            given = {"num_key_value_heads": raw["num_attention_heads"], "short_factor": ones, "long_factor": ones}
            given |= {k: v for k, v in (scaling | raw).items() if k in cls.__dataclass_fields__}
            vision = {k: v for k, v in raw["img_processor"].items() if k in VisionConfig.__dataclass_fields__}
            config = cls(**given | {"vision": VisionConfig(**vision)})
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not JSON"
            raise SetupError(f"{folder} is no checkpoint folder: cannot read {path.name}: {reason}") from None
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise SetupError(f"{path} is not a Phi-3-vision configuration: {error}") from None
        config._check(path, scaling.get("type") or scaling.get("rope_type") or "none", raw)
        return config

    def _check(self, path: Path, rope_type: str, raw: dict) -> None:
        for part in (self, self.vision):
            for field in [f for f in fields(part) if f.type in (int, float) and f.name != "layer_idx"]:
                value, most = getattr(part, field.name), MAX_LAYERS if "layers" in field.name else math.inf
                if type(value) not in (int, field.type) or not 0 < value < most:
                    above = f" and below {most}" if most < math.inf else ""
                    raise SetupError(f"{path}: {field.name} is {value!r}, not a number above 0{above}")
            if part.hidden_size % part.num_attention_heads:
                raise SetupError(f"{path}: hidden_size {part.hidden_size} is no multiple of num_attention_heads")
        supported = {
            "rope_scaling type": (rope_type, ("su", "longrope", "none")),
            "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
            "tie_word_embeddings": (raw.get("tie_word_embeddings", False), (False,)),
            "img_processor type_feature": (raw["img_processor"].get("type_feature", "patch"), ("patch",)),
            "length of short_factor": (len(self.short_factor), (self.head_dim // 2,)),
            "length of long_factor": (len(self.long_factor), (self.head_dim // 2,)),
        }
        for name, (value, allowed) in supported.items():
            if value not in allowed:
                raise SetupError(f"{path}: {name} is {value!r}, phi3v knows {', '.join(map(repr, allowed))}")


class CPULinear(nn.Linear):
    """Turns the weights round for many rows: with the BLAS of MLX's wheel 7.7 GFLOP/s a core instead of 4.1."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size < ROWS_SLOW * x.shape[-1]:
            return super().__call__(x)
        x = x @ mx.contiguous(self.weight.T)
        return x + self.bias if "bias" in self else x


class CPUQuantizedLinear(nn.QuantizedLinear):
    """Makes the weights float again for many rows: MLX's quantised product runs at 2.7 GFLOP/s on a CPU's two cores."""

    def __call__(self, x: mx.array) -> mx.array:
        rows = (ROWS if openblas() else ROWS_SLOW) * (UNEVEN if 32 % self.bits else 1)
        if x.size < rows * x.shape[-1]:
            return super().__call__(x)
        weight = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
        x = x @ (weight.T if openblas() else mx.contiguous(weight.T))
        return x + self.bias if "bias" in self else x


class Adapted(nn.Module):
    """A quantised layer with an adapter beside it; `share` is DoRA's, by which each output is scaled."""

    def __init__(self, linear: nn.QuantizedLinear, lora_a: mx.array, lora_b: mx.array, share: mx.array | None):
        super().__init__()
        self.linear, self.lora_a, self.lora_b, self.share = linear, lora_a, lora_b, share

    def __call__(self, x: mx.array) -> mx.array:
        x = self.linear(x) + (x @ self.lora_a) @ self.lora_b
        return x if self.share is None else x * self.share


class Phi3V(nn.Module):
    """Phi-3-vision: `model` and `lm_head` are the checkpoint's names."""

    def __init__(self, config: Config, group=None):
        super().__init__()
        self.config = config
        self.model = LanguageModel(config, group)
        self.model.vision_embed_tokens = VisionModel(config.vision, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def image_features(self, pictures: list[Crops]) -> list[mx.array]:
        """Each picture's rows as they enter the language model: (crops.tokens, hidden_size)."""
        return self.model.vision_embed_tokens([(mx.array(crops.pixels), crops.grid) for crops in pictures])

    def embed(self, ids: np.ndarray, slots: np.ndarray, features: list[mx.array | None]) -> mx.array:
        """(n, hidden): the embedding of each id, and for −k row slots[i] of features[k−1]."""
        text = self.model.embed_tokens(mx.array(np.maximum(ids, 0)))
        pictures = np.unique(-ids[ids < 0])
        if not len(pictures):
            return text
        rows, start = np.arange(len(ids)), len(ids)
        for k in pictures:
            rows[ids == -k] = start + slots[ids == -k]
            start += len(features[k - 1])
        return mx.concatenate([text, *(features[k - 1] for k in pictures)])[mx.array(rows)]

    def __call__(self, embeddings: mx.array, parts: list[Part], rows: mx.array | None = None) -> mx.array:
        """(tokens, hidden) of all parts, one after another → float32 logits (tokens, vocab), or of some rows only."""
        return self.lm_head(self.model(embeddings, parts, rows)).astype(mx.float32)


def load(
    folder: Path, dtype: mx.Dtype | None = None, adapter: Path | None = None, lazy: bool = False, group=None
) -> Phi3V:
    """The model in a folder, evaluated (unless `lazy`) on the thread that is to run it.

    `dtype` None is the file's, or a CPU's best; `adapter` the folder of a LoRA or DoRA adapter. With a parallel.Group
    it is one rank's share. Raises SetupError.
    """
    config, tensors = Config.read(folder), {}
    model = Phi3V(config, group)
    cpu = mx.default_device() == mx.Device(mx.cpu)
    if dtype is None and cpu:
        dtype = mx.float32  # shorter floats are slow there
    for path in weight_files(Path(folder)):
        tensors |= read(path)
    if group:
        tensors = {name: _share(name, array, config, group.rank, group.size) for name, array in tensors.items()}
    _quantize(model, tensors, folder)
    wanted = dict(nn.utils.tree_flatten(model.parameters()))
    _check_names(wanted, tensors, config.vision.layers_used, folder)
    sizes = {name: tensors[name].nbytes for name in wanted}
    with progress("loading the model", sum(sizes.values())) as advance:
        for name, like in wanted.items():
            wanted[name] = _convert(name, tensors.pop(name), like, dtype, folder)
            if not lazy:  # one by one: all at once would be there as they are read and as they are converted
                mx.eval(wanted[name])
            advance(sizes[name])
    model.load_weights(list(wanted.items()))
    for layer in model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers:
        layer.self_attn.fuse()
    plain = nn.Linear if openblas() or sys.platform != "linux" else CPULinear
    on_cpu = {nn.Linear: plain, nn.QuantizedLinear: CPUQuantizedLinear}
    for module in model.modules() if cpu else ():
        module.__class__ = on_cpu.get(type(module), type(module))  # the same weights, another product
    if adapter:
        _adapt(model, adapter)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A line on a terminal, if standard error is one: how many of `total` bytes are done. Call it with those added."""
    start, began = done, time.monotonic()
    shown = began if sys.stderr and sys.stderr.isatty() else math.inf

    def advance(added: int) -> None:
        nonlocal done, shown
        done, now = done + added, time.monotonic()
        if now - shown > 0.2:
            shown, rate = now, max(1.0, (done - start) / (now - began))
            line = f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
            print(f"\r{line}, {max(0, total - done) / rate:.0f} s left\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if began < shown < math.inf:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name, none of them evaluated yet. Raises SetupError."""
    try:
        path.open("rb").close()  # safe_open says of each that it is not there
        with safe_open(path, "numpy"):  # checks what MLX does not: that offsets fit the file, shapes and each other
            return mx.load(str(path))
    except OSError as error:
        advice = "let its owner and mode allow it" if isinstance(error, PermissionError) else AGAIN
        raise SetupError(f"cannot read {path}: {error.strerror or error}; {advice}") from None
    except (SafetensorError, RuntimeError) as error:
        raise SetupError(f"{path} is not a whole safetensors file: {error}; {AGAIN}") from None


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that the index names, or whose numbers say how many there are; SetupError if any lacks."""
    index = folder / "model.safetensors.index.json"
    paths = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            paths = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise SetupError(f"{index} is damaged: it has no weight_map") from None
    elif paths and (shard := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", paths[-1].name)):
        paths = [folder / f"{shard[1]}{number:05}{shard[2]}" for number in range(1, int(shard[3]) + 1)]
    if outside := [str(path) for path in paths if path != folder / path.name]:
        raise SetupError(f"{index} names {outside[0]!r}, which is not a file of its folder")
    if missing := [path.name for path in paths if not path.exists()]:
        raise SetupError(f"{folder} lacks {len(missing)} of {len(paths)} weight files, first {missing[0]}: {AGAIN}")
    if not paths:
        lacking = "it has no .safetensors file, and phi3v reads no other format"
        raise SetupError(f"{folder} is no checkpoint folder: {lacking}")
    return paths


def _share(name: str, array: mx.array, config: Config, rank: int, ranks: int) -> mx.array:
    """What a rank has of a tensor: some heads, some units of the MLPs, and all of what is not one of those products."""
    *_, module, _ = f"..{name}".split(".")
    if not name.startswith("model.layers.") or not module.endswith("_proj"):
        return array
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    segments = {"qkv_proj": [queries, queries + keys], "gate_up_proj": 2}  # of the rows; of the others there is one
    axis = 0 if module in segments else -1
    try:
        if config.num_attention_heads % ranks or config.num_key_value_heads % ranks:
            raise ValueError
        parts = [mx.split(part, ranks, axis)[rank] for part in mx.split(array, segments.get(module, 1), axis)]
    except ValueError:
        heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} of them for keys"
        raise SetupError(f"{ranks} ranks cannot share {name} {array.shape} of {heads}: try 2") from None
    return mx.contiguous(mx.concatenate(parts, axis))


def _quantize(model: Phi3V, tensors: dict[str, mx.array], folder: Path) -> None:
    """Quantise exactly the modules that have scales, each with the bits and group size its shapes tell."""

    def parameters(path: str, module: nn.Module) -> dict | bool:
        scales = tensors.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized"):
            return False
        weight, width = tensors.get(f"{path}.weight", scales), module.weight.shape[-1]
        packed, groups = (array.shape[-1] if array.ndim == 2 else 0 for array in (weight, scales))
        bits, group = 32 * packed / width, width / max(1, groups)
        if bits not in BITS or group not in GROUPS or f"{path}.biases" not in tensors:
            given = f"{path} is quantised in {bits:g} bits, groups of {group:g}"
            given += "" if f"{path}.biases" in tensors else ", without biases"
            allowed = f"{', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUPS))}, mode affine"
            raise SetupError(f"{folder}: {given}; phi3v reads {allowed}: convert it anew")
        return {"bits": int(bits), "group_size": int(group)}

    if any(name.endswith(".scales") for name in tensors):
        nn.quantize(model, class_predicate=parameters)


def _check_names(wanted: dict[str, mx.array], tensors: dict[str, mx.array], layers_used: int, folder: Path) -> None:
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise SetupError(f"{folder} lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]}: {AGAIN}")
    unread = ((name, UNREAD.search(name)) for name in tensors.keys() - wanted.keys())
    if surplus := sorted(name for name, found in unread if not found or (found[1] and int(found[1]) < layers_used)):
        raise SetupError(f"{folder} has {len(surplus)} tensors that Phi-3-vision has no place for, first {surplus[0]}")


def _convert(name: str, array: mx.array, like: mx.array, dtype: mx.Dtype | None, folder: Path) -> mx.array:
    if name == PATCH_WEIGHT and array.ndim == 4 and array.shape[-1] != like.shape[-1]:
        array = array.moveaxis(1, -1)  # torch has the channels second, MLX last
    if array.shape != like.shape:
        raise SetupError(f"{folder}: {name} has shape {array.shape}, config.json asks for {like.shape}")
    floats = mx.issubdtype(array.dtype, mx.floating)
    if floats != mx.issubdtype(like.dtype, mx.floating) or (not floats and array.dtype != like.dtype):
        raise SetupError(f"{folder}: {name} holds {array.dtype}, which is no weight's type here")
    return array.astype(dtype) if dtype is not None and floats else array


def _adapt(model: Phi3V, folder: Path) -> None:
    """Add an adapter as mlx-lm writes them: into plain weights, where it costs nothing, beside quantised ones."""
    kind, scale = read_adapter_config(folder)
    parts: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for name, array in read(folder / "adapters.safetensors").items():
        parts[name.rpartition(".")[0]][name.rpartition(".")[2]] = array
    layers = {name: module for name, module in model.named_modules() if "vision" not in name}
    for name, given in parts.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear | nn.QuantizedLinear):
            raise SetupError(f"{folder} adapts {name}, no linear layer of this language model: it is for another")
        weight = layer.weight
        if quantized := isinstance(layer, nn.QuantizedLinear):
            weight = mx.dequantize(weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        found = {leaf: given[leaf].shape for leaf in sorted(given)}
        (rows, width), rank = weight.shape, (0, *found.get("lora_a", ()))[-1]
        wanted = {"lora_a": (width, rank), "lora_b": (rank, rows)} | ({"m": (rows,)} if kind == "dora" else {})
        if found != wanted:
            raise SetupError(
                f"{folder} has {found} for {name}, this model takes {wanted}: it is for another, or damaged"
            )
        lora_a, lora_b = given["lora_a"].astype(mx.float32), scale * given["lora_b"].astype(mx.float32)
        adapted = weight.astype(mx.float32) + (lora_a @ lora_b).T
        share = given["m"] / mx.linalg.norm(adapted, axis=1) if kind == "dora" else None
        if quantized:
            arrays = [x if x is None else x.astype(layer.scales.dtype) for x in (lora_a, lora_b, share)]
            model.update_modules(nn.utils.tree_unflatten([(name, Adapted(layer, *arrays))]))
        else:
            layer.weight = (adapted if share is None else adapted * share[:, None]).astype(weight.dtype)
            mx.eval(layer.weight)  # one after another: its parts are float32


def read_adapter_config(folder: Path) -> tuple[str, float]:
    """Which kind of adapter a folder has, "lora" or "dora", and its scale. Raises SetupError."""
    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_bytes())
        kind, scale = raw.get("fine_tune_type", "lora"), raw["lora_parameters"]["scale"]
    except OSError as error:
        raise SetupError(f"{folder} is no adapter folder: cannot read {path.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{path} is not what mlx-lm writes: it has no lora_parameters with a scale") from None
    if kind not in ("lora", "dora") or type(scale) not in (int, float) or not abs(scale) < MAX_SCALE:
        given = f"fine_tune_type {kind!r} and scale {scale!r:.40}"
        raise SetupError(f"{path} has {given}; phi3v adds 'lora' and 'dora' with a scale below {MAX_SCALE:,}")
    return kind, scale
