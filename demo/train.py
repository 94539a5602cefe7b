"""Train the embedded model on drawings made meanwhile: python train.py --minutes 21 --out OUT.

Every minute OUT has the weights of now (last.pt; --resume goes on from there, in the schedule too) and a checkpoint
folder of their moving average, which is good at any time and is the result in the end.

Processes draw batches into shared memory; the GPU takes the new ones, or older ones again while none is ready. Of each
picture several conversations are asked at once: they share its tokens, and do not see each other. Beside the answers
the tower learns what each of 24 × 48 points shows; that head is dropped at the end. Needs torch, and a GPU to be quick.
"""

import argparse
import collections
import copy
import json
import mmap
import multiprocessing
import queue
import random
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from export import save, tokenizer
from torch import nn

TOWER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
WIDTH, LAYERS, INNER, HEADS, VOCABULARY = 256, 4, 768, 8, 1024
PICTURES = 252  # of a batch: 1, 2 and 3 divide it
SLOTS, PATCHES = 313, 577  # of a picture: tokens in the language model, positions in the tower
# Layouts of a batch: pictures of a row, tokens of its shared beginning and of its conversations, weight. "any" has one
# conversation to a row: a system message, or the question before the picture.
LAYOUTS = {"text": (0, 0, 256, 9), "one": (1, 318, 178, 74), "two": (2, 634, 142, 9), "three": (3, 950, 146, 4)}
LAYOUTS |= {"any": (1, 0, 432, 6)}
SYSTEM = ["You are a helpful assistant.", "You are a helpful AI assistant.", "Answer briefly.", "You are phi3v."]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS, POINTS = PICTURES * 336 * 336 * 3, PICTURES * 24 * 48


class Writer:
    """Conversations → ids, exactly as phi3v and the chat template make them."""

    def __init__(self, tok):
        self.tok = tok
        self.bos, self.user, self.end, self.assistant, self.system = (
            tok.token_to_id(t) for t in ("<s>", "<|user|>", "<|end|>", "<|assistant|>", "<|system|>")
        )
        self.newline = self.encode("\n")

    @cache  # noqa: B019 - it lives as long as its process
    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False).ids

    def opening(self, pictures: int) -> list[int]:
        """<|user|>, then the pictures; what follows begins with the line break after the last."""
        ids = [self.bos, self.user]
        for _ in range(pictures):
            ids += [*self.newline, *[-1] * SLOTS, self.bos]
        return ids

    def talk(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """The conversation after its opening: ids, and what each is to be followed by (−100: does not matter)."""
        ids, targets = [], []
        for k, (asked, answer) in enumerate(turns):
            prompt = [*self.encode("\n" + asked), self.end, *self.newline, self.assistant]
            prompt = [*self.newline, self.user, *prompt] if k else prompt
            said = [*self.encode(answer), self.end]
            ids += prompt + said
            targets += [-100] * (len(prompt) - 1) + said + [-100]
        return ids, targets


def rows_of(writer: Writer, rng, layout: str, easy: float, pixels, points):
    """A batch: `begin` (tokens shared by all rows), ids, targets, parts and positions, (rows, tokens) each."""
    n, begin, room, _ = LAYOUTS[layout]
    rows = PICTURES // max(n, 1)
    ids, targets, parts, places = (np.zeros((rows, room), np.int16) for _ in range(4))
    targets[:] = -100
    for row in range(rows):
        if n < 2:
            drawings = [scenes.one(rng, easy)] if n else []
            talk = drawings[0].talk if n else lambda: scenes.plain(rng)
        else:
            drawings, talk = scenes.several(rng, n, easy)
        for k, drawing in enumerate(drawings):
            pixels[row * n + k], points[row * n + k] = scenes.model_view(drawing)
        used, asked = 0, set()
        for part in range(1, 2 if layout == "any" else 12):
            turns = talk()[1]
            if str(turns) in asked:
                continue
            asked.add(str(turns))
            opening = writer.opening(0) if layout == "text" else []
            mine, follow = writer.talk(turns)
            if layout == "any":
                mine, follow = any_order(writer, rng, turns)
            opening, length = len(opening), len(opening) + len(mine)
            if used + length > room:
                continue
            own = slice(used, used + length)
            ids[row, own], targets[row, own] = (writer.opening(0) if opening else []) + mine, [-100] * opening + follow
            parts[row, own], places[row, own] = part, begin + np.arange(length)
            used += length
    return ids, targets, parts, places


def any_order(writer: Writer, rng, turns) -> tuple[list[int], list[int]]:
    """One conversation with a system message, or with the first question before its picture, or both."""
    mine, follow = writer.talk(turns)
    system, before = rng.choice([(True, False), (False, True), (False, True), (True, True)])
    head = [writer.bos]
    if system:
        head += [writer.system, *writer.encode("\n" + rng.choice(SYSTEM)), writer.end, *writer.newline]
    head.append(writer.user)
    if before:
        asked = writer.encode("\n" + turns[0][0])
        head += [*asked, *[-1] * SLOTS, writer.bos]
        mine, follow = mine[len(asked) :], follow[len(asked) :]
    else:
        head += [*writer.newline, *[-1] * SLOTS, writer.bos]
    return head + mine, [-100] * len(head) + follow


def draw_batches(seed: int, tok_file: str, memory: list, free, ready, progress) -> None:
    """A process: fills free slots of the shared memory for ever."""
    from tokenizers import Tokenizer

    rng, writer = random.Random(seed), Writer(Tokenizer.from_file(tok_file))
    names = list(LAYOUTS)
    while (slot := free.get()) is not None:
        pixels, points = views(memory[slot])
        layout = rng.choices(names, [LAYOUTS[name][3] for name in names])[0]
        easy = max(0.0, 1 - progress.value / 0.12)
        ready.put((slot, layout, rows_of(writer, rng, layout, easy, pixels, points)))


def views(memory) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.frombuffer(memory, np.uint8, PIXELS).reshape(PICTURES, 336, 336, 3)
    return pixels, np.frombuffer(memory, np.uint8, POINTS, PIXELS).reshape(PICTURES, 24, 48)


class Feed:
    """Batches on the GPU: each new one once as soon as it is there, and while there is none, one of the last again."""

    def __init__(self, seed: int, tok_file: str, workers: int, device: str, keep: int):
        context = multiprocessing.get_context("fork")
        self.memory = [mmap.mmap(-1, PIXELS + POINTS) for _ in range(2 * workers + 4)]
        self.free, self.ready, self.progress = context.Queue(), context.Queue(), context.Value("d", 0.0)
        for slot in range(len(self.memory)):
            self.free.put(slot)
        args = (tok_file, self.memory, self.free, self.ready, self.progress)
        self.workers = [context.Process(target=draw_batches, args=(seed + k, *args)) for k in range(workers)]
        for worker in self.workers:
            worker.daemon = True
            worker.start()
        self.device, self.fresh, self.old, self.drawn = device, queue.Queue(8), collections.deque(maxlen=keep), 0
        threading.Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        while True:
            slot, layout, arrays = self.ready.get()
            with torch.cuda.stream(stream):
                seen = [torch.from_numpy(view).to(self.device, copy=True) for view in views(self.memory[slot])]
                arrays = [torch.from_numpy(array).to(self.device) for array in arrays]
                if stream:
                    stream.synchronize()
            self.free.put(slot)
            self.fresh.put((layout, *(seen if LAYOUTS[layout][0] else (None, None)), *arrays))
            self.drawn += 1

    def next(self):
        try:
            batch = self.fresh.get(block=len(self.old) < 40)
        except queue.Empty:
            return random.choice(self.old)
        self.old.append(batch)
        return batch


def linear(inputs: int, outputs: int, bias: bool, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5 * 0.6)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Tower(nn.Module):
    def __init__(self, size: int, inner: int, layers: int, heads: int):
        super().__init__()
        self.heads = heads
        self.patch = linear(3 * 14 * 14, size, False)
        self.first, self.places = (nn.Parameter(torch.randn(n, size) * 0.02) for n in (1, PATCHES))
        self.norm = nn.LayerNorm(size)
        parts = [
            {"norm1": nn.LayerNorm(size), "qkv": linear(size, 3 * size, True), "out": linear(size, size, True, 0.3),
             "norm2": nn.LayerNorm(size), "up": linear(size, inner, True), "down": linear(inner, size, True, 0.3)}
            for _ in range(layers)
        ]  # fmt: skip
        self.layers = nn.ModuleList(nn.ModuleDict(part) for part in parts)

    def forward(self, pixels):
        """(n, 336, 336, 3) uint8 → (n, 576, size)."""
        n = len(pixels)
        mean, std = (torch.tensor(v, device=pixels.device) for v in (MEAN, STD))
        x = ((pixels.float() / 255 - mean) / std).view(n, 24, 14, 24, 14, 3).permute(0, 1, 3, 5, 2, 4)
        x = torch.cat([self.first.expand(n, 1, -1), self.patch(x.reshape(n, 576, 588))], 1)
        x = self.norm(x + self.places).to(x.dtype)
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).view(n, PATCHES, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, PATCHES, -1))
            h = layer["up"](layer["norm2"](x))
            x = x + layer["down"](h * torch.sigmoid(1.702 * h))
        return x[:, 1:]


class Phi(nn.Module):
    def __init__(self):
        super().__init__()
        size = TOWER["hidden_size"]
        self.tower = Tower(size, *(TOWER[k] for k in ("intermediate_size", "num_hidden_layers", "num_attention_heads")))
        self.sub, self.glb = (nn.Parameter(torch.randn(4 * size) * 0.02) for _ in range(2))
        self.project = nn.ModuleList([linear(4 * size, WIDTH, True), linear(WIDTH, WIDTH, True)])
        self.points = linear(size, 2 * 256, True)  # of training only
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), linear(WIDTH, VOCABULARY, False)
        nn.init.normal_(self.embed.weight, std=0.5)
        parts = [
            {"norm1": nn.RMSNorm(WIDTH, 1e-5), "qkv": linear(WIDTH, 3 * WIDTH, False),
             "out": linear(WIDTH, WIDTH, False, 0.3), "norm2": nn.RMSNorm(WIDTH, 1e-5),
             "up": linear(WIDTH, 2 * INNER, False), "down": linear(INNER, WIDTH, False, 0.3)}
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.layers, self.norm = nn.ModuleList(nn.ModuleDict(part) for part in parts), nn.RMSNorm(WIDTH, 1e-5)

    def look(self, pixels):
        """(n, 336, 336, 3) → (n, 313, WIDTH) as phi3v computes them for one crop, and logits of the points."""
        x = self.tower(pixels)
        n, size = len(x), x.shape[-1]
        y = x.view(n, 12, 2, 12, 2, size).permute(0, 1, 3, 2, 4, 5).reshape(n, 12, 12, 4 * size)
        y = torch.cat([y, self.sub.to(y.dtype).expand(n, 12, 1, -1)], 2).view(n, 156, 4 * size)
        y = F.gelu(self.project[0](torch.cat([y, self.glb.to(y.dtype).expand(n, 1, -1)], 1)))
        y = self.project[1](y)
        return torch.cat([y, y[:, :156]], 1), self.points(x)

    def forward(self, begin, ids, parts, places, features):
        """Logits of the conversations, (rows, tokens, VOCABULARY); `begin` and `ids` are −1 where features go."""
        n, head, length = len(ids), begin.shape[1], ids.shape[1]
        shared, x = self.embed(begin.clamp(min=0)), self.embed(ids.clamp(min=0))
        if features is not None:
            shared, x = shared.to(features.dtype), x.to(features.dtype)
        if head:
            features, at, pieces = features.view(n, -1, SLOTS, WIDTH), 4, [shared[:, :4]]
            for k in range(features.shape[1]):
                pieces += [features[:, k], shared[:, at + SLOTS : at + SLOTS + 3]]
                at += SLOTS + 3
            shared = torch.cat(pieces, 1)
        elif features is not None:
            slots = ((ids < 0).cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, WIDTH)
            x = torch.where((ids < 0)[..., None], features.view(n, -1, WIDTH).gather(1, slots), x)
        rotate = rotation(torch.cat([torch.arange(head, device=ids.device).expand(n, head), places], 1))
        order = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = F.pad((parts[:, :, None] == parts[:, None, :]) & order, (head, 0), value=True)[:, None]
        for i, layer in enumerate(self.layers):
            both = layer["qkv"](layer["norm1"](torch.cat([shared, x], 1)))
            q, k, v = both.view(n, head + length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
            own = F.scaled_dot_product_attention(q[:, :, head:], k, v, attn_mask=mask)
            x = x + layer["out"](own.transpose(1, 2).reshape(n, length, WIDTH))
            x = x + mlp(layer, x)
            if head and i < LAYERS - 1:  # of the last layer only the conversations go on
                q, k, v = (t[:, :, :head] for t in (q, k, v))
                seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                shared = shared + layer["out"](seen.transpose(1, 2).reshape(n, head, WIDTH))
                shared = shared + mlp(layer, shared)
        return self.head(self.norm(x))


def mlp(layer, x):
    gate, up = layer["up"](layer["norm2"](x)).chunk(2, -1)
    return layer["down"](F.silu(gate) * up)


def rotation(places):
    dim = WIDTH // HEADS
    angles = places[..., None] * 1e4 ** (-torch.arange(0, dim, 2, device=places.device).float() / dim)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    return lambda t: t * cos + torch.cat([-t[..., dim // 2 :], t[..., : dim // 2]], -1) * sin


class Muon:
    """Momentum whose steps are made orthogonal (Newton–Schulz), all matrices of one shape at once."""

    def __init__(self, weights: list[nn.Parameter], decay: float):
        self.groups, self.decay = collections.defaultdict(list), decay
        for w in weights:  # queries, keys and values, gate and up are matrices of their own
            parts = {3 * w.shape[1]: 3, 2 * INNER: 2}.get(w.shape[0], 1)
            rows = w.shape[0] // parts
            flip = rows > w.shape[1]
            shape = (w.shape[1], rows) if flip else (rows, w.shape[1])
            self.groups[shape] += [(w, slice(k * rows, (k + 1) * rows), flip) for k in range(parts)]
        self.momenta = {shape: None for shape in self.groups}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, parts in self.groups.items():
            grads = torch.stack([w.grad[own].mT if flip else w.grad[own] for w, own, flip in parts])
            momentum = self.momenta[shape]
            momentum = self.momenta[shape] = grads if momentum is None else momentum.lerp_(grads, 0.05)
            x = grads.lerp(momentum, 0.95).bfloat16()
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            steps = list(x.float() * 0.2 * max(shape) ** 0.5)
            weights = [w.data[own] for w, own, _ in parts]
            torch._foreach_mul_(weights, 1 - rate * self.decay)
            steps = [s.mT if flip else s for s, (_, _, flip) in zip(steps, parts, strict=True)]
            torch._foreach_add_(weights, steps, alpha=-rate)


def rate_at(progress: float) -> float:
    """Of the highest learning rate: up within 1 %, level, then down to nothing."""
    return min(1, progress / 0.01, (1 - progress) / 0.65 + 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=21)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--resume", type=Path, help="weights to start from")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--keep", type=int, default=400, help="batches kept on the GPU to be used again")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok_file = args.out / "tokenizer.json"
    if args.resume:  # with the words it was begun with
        tok_file.write_bytes((args.resume.parent / "tokenizer.json").read_bytes())
    else:
        tokenizer(VOCABULARY).save(str(tok_file), pretty=False)
    feed = Feed(args.seed * 1000, str(tok_file), args.workers, device, args.keep)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    net = Phi().to(device)
    done = 0.0
    if args.resume:
        state = torch.load(args.resume, map_location=device)
        net.load_state_dict(state["net"])
        done = state["progress"]
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.3f} M parameters", flush=True)
    train(net, feed, args, device, done)


def train(net: Phi, feed: Feed, args, device: str, done: float) -> None:
    from tokenizers import Tokenizer

    writer = Writer(Tokenizer.from_file(str(args.out / "tokenizer.json")))
    begins = {name: torch.tensor(writer.opening(n), device=device) for name, (n, begin, *_) in LAYOUTS.items() if begin}
    inner = [p for n, p in net.named_parameters() if p.ndim == 2 and ("layers." in n or n.startswith("project"))]
    others = [p for p in net.parameters() if all(p is not q for q in inner)]
    muon = Muon(inner, decay=0.05)
    adam = torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0, fused=device == "cuda")
    look, speak = net.look, net.forward
    if device == "cuda":
        look, speak = torch.compile(net.look, dynamic=False), torch.compile(net.forward, dynamic=False)

    def backward(batch, points_weight: float):
        layout, pixels, points, ids, targets, parts, places = batch
        begin = begins[layout].expand(len(ids), -1) if layout in begins else ids[:, :0].long()
        with torch.autocast(device, torch.bfloat16):
            features, seen = look(pixels) if pixels is not None else (None, None)
            logits = speak(begin, ids.long(), parts, places, features)
        targets = targets.long()
        loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1), ignore_index=-100)
        extra = points_loss(seen, points) if seen is not None else loss.detach() * 0
        (loss + points_weight * extra).backward()
        return layout, loss.detach(), extra.detach(), logits.detach(), targets

    known = set()
    while device == "cuda" and len(known) < len(LAYOUTS):  # compile before the clock runs
        if (batch := feed.next())[0] not in known:
            known.add(batch[0])
            backward(batch, 0.5)
            net.zero_grad()
    mean = copy.deepcopy(net)
    step, sums, log = 0, collections.defaultdict(list), open(args.out / "log.jsonl", "a")
    began = saved = time.time()
    while (progress := done + (time.time() - began) / 60 / args.minutes) < 1:
        feed.progress.value = progress
        rate = args.rate * rate_at(progress) * min(1, (step + 1) / 100)  # the momenta of a resumed run are new, too
        adam.param_groups[0]["lr"] = rate * 0.7
        layout, loss, extra, logits, targets = backward(feed.next(), 0.5 if progress < 0.5 else 0.2)
        if layout != "text" or step < 1:  # text alone has nothing for the tower: it joins the step of the next batch
            for p in net.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            nn.utils.clip_grad_norm_(others, 1.0)
            muon.step(rate)
            adam.step()
            net.zero_grad()
            step += 1
            if step % 10 == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), max(0.01, 10 / (step + 10)))
        if random.random() < 0.06:
            wrong = ((logits.argmax(-1) != targets) & (targets != -100)).sum() / (targets != -100).sum()
            sums[layout].append((loss.item(), extra.item(), wrong.item()))
        if step % 200 == 0 and layout != "text":
            told = {name: [round(float(v), 4) for v in np.mean(values, 0)] for name, values in sorted(sums.items())}
            seconds = round(60 * args.minutes * progress)  # of the whole training, if it is a resumed one
            line = json.dumps({"s": seconds, "step": step, "drawn": feed.drawn, "rate": rate} | told)
            print(line, file=log, flush=True)
            print(line, flush=True)
            sums.clear()
        if time.time() > saved + 60:
            saved = time.time()
            keep(net, mean, progress, args.out)
    keep(net, mean, progress, args.out)


def keep(net: Phi, mean: Phi, progress: float, out: Path) -> None:
    torch.save({"net": net.state_dict(), "progress": progress}, out / "new.pt")
    (out / "new.pt").rename(out / "last.pt")
    save(mean, out)


def points_loss(seen, points):
    """The background, most of each picture, counts little."""
    target = points.long().view(-1, 24, 24, 2).reshape(-1)
    each = F.cross_entropy(seen.float().view(-1, 256), target, reduction="none")
    weight = torch.where(target == 0, 0.05, 1.0)
    return (each * weight).sum() / weight.sum()


if __name__ == "__main__":
    main()
