"""The engines that bench/compare.py compares, each behind the same call: requests in, the moments of their tokens out.

All run on the same tensors, made once. Apart from its pictures' crops, phi3v is used here and nowhere else in bench/.
mlx-vlm imports little for what is used here: installed without its dependencies, as on a machine without network, it
needs those of mlx-lm only.
"""

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm.models.phi3_v as vlm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator as TextBatch
from mlx_lm.generate import generate_step as text_step
from mlx_lm.models import phi3
from mlx_lm.models.cache import make_prompt_cache
from mlx_vlm.generate.ar import BatchGenerator as PictureBatch
from mlx_vlm.generate.ar import generate_step as picture_step
from mlx_vlm.models.phi3_v.vision import VisionModel
from mlx_vlm.utils import StoppingCriteria

from phi3v.engine import Engine, Prompt
from phi3v.images import SIDE, Crops
from phi3v.llm import DEMO, LLM
from phi3v.model import Config, Phi3V

DEFAULT_BUFFERS = mx.set_cache_limit(0)  # bytes of freed memory that MLX holds on to unless told otherwise
mx.set_cache_limit(DEFAULT_BUFFERS)


@dataclass
class Request:
    """`ids` with −1 in the slots of the picture, if there is one; exactly `new` tokens are to be made."""

    ids: list[int]
    new: int
    crops: Crops | None = None


class Run:
    """Who made which token when: `times[i]` and `tokens[i]` of request i, in seconds since the requests were given."""

    def __init__(self, requests: list[Request]):
        self.start = time.perf_counter()
        self.times: list[list[float]] = [[] for _ in requests]
        self.tokens: list[list[int]] = [[] for _ in requests]

    def add(self, index: int, token: int) -> None:
        self.times[index].append(time.perf_counter() - self.start)
        self.tokens[index].append(token)

    def metrics(self) -> dict[str, float]:
        """First token: the median request's. Decode: from when all have one; full batch: while none has ended, too."""
        firsts, lasts = [t[0] for t in self.times], [t[-1] for t in self.times]
        found = {"first token, s": float(np.median(firsts)), "total, s": max(lasts)}
        for name, end in {"decode, tok/s": max(lasts), "full batch, tok/s": len(lasts) > 1 and min(lasts)}.items():
            if end > max(firsts):
                made = sum(max(firsts) < moment <= end for times in self.times for moment in times)
                found[name] = made / (end - max(firsts))
        return found


def make_weights(config: Config | None, dtype: mx.Dtype) -> tuple[Config, dict[str, mx.array]]:
    """Random tensors for a configuration, norms 1 and the rest small; for None, the model in phi3v's package."""
    tensors = {} if config else mx.load(str(DEMO / "model.safetensors"))
    config, weights = config or Config.read(DEMO), {}
    for name, like in tree_flatten(Phi3V(config).parameters()):
        if name in tensors:
            array = tensors[name]
            weights[name] = (array if array.shape == like.shape else array.moveaxis(1, -1)).astype(dtype)
        elif name.endswith("weight") and "norm" in name.split(".")[-2]:
            weights[name] = mx.ones(like.shape, dtype)
        else:
            weights[name] = mx.random.normal(like.shape, dtype, scale=0.02)
        mx.eval(weights[name])
    return config, weights


def write_folder(config: Config, weights: dict[str, mx.array], folder: Path) -> None:
    """A checkpoint folder with the embedded model's tokenizer, which knows fewer ids than the weights."""
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    raw = _arguments(config, "phi3_v") | {"img_processor": asdict(config.vision), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())


def with_weights(model, weights: dict[str, mx.array], strict: bool = True):
    model.load_weights(list(weights.items()), strict)
    for module in model.modules():
        if isinstance(model, Phi3V) and hasattr(module, "fuse"):  # as phi3v's own loading ends
            module.fuse()
    model.eval()
    mx.eval(model.parameters())
    return model


class Ours:
    """phi3v's engine, which makes its model on its own thread; MLX's buffer cache is as it sets it in its runs only."""

    def __init__(self, config: Config, weights: dict[str, mx.array], **limits):
        known = inspect.signature(Engine).parameters
        limits = {name: value for name, value in limits.items() if name in known}
        self.engine = Engine(lambda: with_weights(Phi3V(config), weights), **limits)
        self.engine.wait()
        self._buffers = mx.set_cache_limit(DEFAULT_BUFFERS)

    def __call__(self, requests: list[Request]) -> Run:
        mx.set_cache_limit(self._buffers)
        run = Run(requests)
        prompts = [Prompt(r.ids, [r.crops] if r.crops else [], r.new) for r in requests]
        for index, token, _ in self.engine.submit(prompts):
            run.add(index, token)
        mx.set_cache_limit(DEFAULT_BUFFERS)
        return run


@contextmanager
def language_models() -> Iterator[tuple[LLM, LLM]]:
    """phi3v's module with the demo, its caches on, and another with none."""
    off = {"cache_bytes": 0} if "limits" in inspect.signature(LLM).parameters else {}
    with LLM("demo") as llm, LLM("demo", **off) as plain:
        llm.wait()
        plain.wait()
        yield llm, plain


class MlxLm:
    """mlx-lm's phi3 and its generators, for text."""

    def __init__(self, config: Config, weights: dict[str, mx.array]):
        text = {name: array for name, array in weights.items() if "vision_embed_tokens" not in name}
        self.model = with_weights(phi3.Model(phi3.ModelArgs.from_dict(_arguments(config, "phi3"))), text)

    def one(self, requests: list[Request]) -> Run:
        """generate_step, one request after another."""
        run = Run(requests)
        for i, r in enumerate(requests):
            for token, _ in text_step(mx.array(r.ids), self.model, max_tokens=r.new):
                run.add(i, token)
        return run

    def batch(self, requests: list[Request]) -> Run:
        """BatchGenerator with room for all, its other settings as they come."""
        run = Run(requests)
        generator = TextBatch(self.model, completion_batch_size=len(requests))
        uids = generator.insert([r.ids for r in requests], [r.new for r in requests])
        return _collect(run, uids, generator)

    def plain(self, requests: list[Request]) -> Run:
        """The least that a batch can cost: equal lengths, no mask, greedy, all ends known, one step launched ahead."""
        run, cache = Run(requests), make_prompt_cache(self.model)

        def step(ids: mx.array) -> mx.array:
            tokens = mx.argmax(self.model.lm_head(self.model.model(ids, cache)[:, -1]), -1)
            mx.async_eval(tokens)
            return tokens

        tokens = step(mx.array([r.ids for r in requests]))
        for left in range(requests[0].new, 0, -1):
            following = step(tokens[:, None]) if left > 1 else None
            for i, token in enumerate(tokens.tolist()):
                run.add(i, token)
            tokens = following
        return run


class MlxVlm:
    """mlx-vlm's phi3_v and its generators, for pictures. They get the very crops that phi3v gets.

    Its tower has CLIP ViT-L's sizes built in: others are set from outside. The layers at its top that phi3v does not
    have, because nothing reads them, get copies of the last one; MLX, being lazy, computes them on neither side.
    """

    def __init__(self, config: Config, weights: dict[str, mx.array]):
        vision = config.vision
        VisionModel.CLIP_VIT_LARGE_PATCH14_336_CONFIG = SimpleNamespace(model_type="phi3_v", **asdict(vision))
        model = vlm.Model(vlm.ModelConfig.from_dict(_arguments(config, "phi3_v")))
        model.model.vision_embed_tokens.image_dim_out = vision.hidden_size
        last, tensors = f".encoder.layers.{vision.layers_used - 1}.", dict(weights)
        for n in range(vision.layers_used, vision.num_hidden_layers):
            tensors |= {k.replace(last, f".encoder.layers.{n}."): v for k, v in weights.items() if last in k}
        tensors = model.model.vision_embed_tokens.sanitize(tensors)
        if any(name.endswith(".scales") for name in tensors):
            nn.quantize(model, 64, 4, class_predicate=lambda path, _: f"{path}.scales" in tensors)
        self.model = with_weights(model, tensors, strict=False)

    def one(self, requests: list[Request]) -> Run:
        """generate_step, one request after another."""
        run = Run(requests)
        for i, r in enumerate(requests):
            ids, pixels, sizes = _picture_inputs(r)
            for token, _ in picture_step(ids, self.model, pixels, None, max_tokens=r.new, temperature=0, **sizes):
                run.add(i, int(token))
        return run

    def batch(self, requests: list[Request]) -> Run:
        """What its server does, without HTTP and text: embed each request, queue it, step its BatchGenerator."""
        run, uids = Run(requests), []
        processor = SimpleNamespace(stopping_criteria=StoppingCriteria([]))
        generator = PictureBatch(self.model, processor, compute_logprobs=False, greedy_sampling=True)
        with mx.stream(generator.stream):
            for r in requests:
                ids, pixels, sizes = _picture_inputs(r)
                embeddings = self.model.get_input_embeddings(ids, pixels, **sizes).inputs_embeds
                uids += generator.insert([r.ids], r.new, prompt_kwargs=[{"inputs_embeds": embeddings}])
        return _collect(run, uids, generator)


def towers(config: Config, weights: dict[str, mx.array], peer: MlxVlm) -> dict:
    """phi3v's and mlx-vlm's vision tower: (crops, 3, side, side) pixels → an array to be evaluated."""
    ours = with_weights(Phi3V(config), weights).model.vision_embed_tokens._look
    theirs = peer.model.model.vision_embed_tokens.img_processor.vision_model
    return {"phi3v": ours, "mlx-vlm": lambda pixels: theirs(pixels.transpose(0, 2, 3, 1), True)[-1][-2][:, 1:]}


def _arguments(config: Config, model_type: str) -> dict:
    scaling = {"type": "su", "short_factor": config.short_factor, "long_factor": config.long_factor}
    return {**asdict(config), "rope_scaling": scaling, "model_type": model_type}


def _picture_inputs(request: Request) -> tuple[mx.array, mx.array | None, dict]:
    if not request.crops:
        return mx.array([request.ids]), None, {}
    sizes = {"image_sizes": mx.array([request.crops.grid]) * SIDE}
    return mx.array([request.ids]), mx.array(request.crops.pixels)[None], sizes


def _collect(run: Run, uids: list[int], generator) -> Run:
    """Step a peer's batch generator until every request has ended."""
    index, left = {uid: i for i, uid in enumerate(uids)}, len(uids)
    while left:
        for response in generator.next()[1]:
            run.add(index[response.uid], response.token)
            left -= response.finish_reason is not None
    generator.close()
    return run
