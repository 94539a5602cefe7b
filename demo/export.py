"""The tokenizer, and the files of a Phi-3-V checkpoint folder, from what train.py has learned."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import scenes

SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]  # the last ids, from 1000 on
FIRST_SPECIAL = 1000
VISION = "model.vision_embed_tokens."
TOWER = VISION + "img_processor.vision_model."


def tokenizer(vocabulary: int):
    """Phi-3's kind of tokenizer, whose words are merged from their space on: what stands in quotes stays characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    rng, counts = random.Random(0), Counter()
    for _ in range(6000):
        talk = scenes.plain(rng) if rng.random() < 0.15 else rng.choice(EXAMPLES)(rng).talk()
        for turn in talk[1]:
            for text, weight in zip(turn, (1, 2), strict=True):
                for word in re.findall(r" [A-Za-z]+", " " + re.sub(r'"[^"]*"', '"', text)):
                    counts["\u2581" + word[1:]] += weight
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [f"<0x{i:02X}>" for i in range(256)] + [chr(c) for c in range(33, 127)] + ["\u2581"]:
        vocab[token] = len(vocab)
    merges = []
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        new = [k for k in range(2, len(word) + 1) if word[:k] not in vocab]
        if len(vocab) + len(new) > FIRST_SPECIAL:
            continue
        for k in new:
            merges.append((word[: k - 1], word[k - 1]))
            vocab[word[:k]] = len(vocab)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(steps)
    fill = [AddedToken(f"<|placeholder{i}|>", normalized=False) for i in range(1, FIRST_SPECIAL - len(vocab) + 1)]
    t.add_tokens(fill)
    t.add_special_tokens([AddedToken(x, rstrip=x == "<|assistant|>", normalized=False, special=True) for x in SPECIAL])
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert t.token_to_id("<|user|>") == FIRST_SPECIAL + 4 < vocabulary
    return t


EXAMPLES = [scenes.shapes, scenes.shapes, scenes.text, scenes.bars, scenes.pie, scenes.receipt, scenes.unknown]
EXAMPLES += [lambda rng: scenes.Drawing(None, None, scenes.several(rng, rng.choice([2, 3]))[1])]


def tensors(net) -> dict:
    """The checkpoint's names → float tensors."""
    s, out = net.state_dict(), {}
    size = len(s["sub"]) // 4
    out[TOWER + "embeddings.class_embedding"] = s["tower.first"][0]
    out[TOWER + "embeddings.patch_embedding.weight"] = s["tower.patch.weight"].view(size, 3, 14, 14)
    out[TOWER + "embeddings.position_embedding.weight"] = s["tower.places"]
    out[VISION + "sub_GN"], out[VISION + "glb_GN"] = s["sub"].view(1, 1, 1, -1), s["glb"].view(1, 1, -1)
    out["model.embed_tokens.weight"], out["lm_head.weight"] = s["embed.weight"], s["head.weight"]
    out["model.norm.weight"] = s["norm.weight"]
    for kind in "weight", "bias":
        out[TOWER + f"pre_layrnorm.{kind}"] = s[f"tower.norm.{kind}"]
        out[TOWER + f"post_layernorm.{kind}"] = s[f"tower.norm.{kind}"] * 0 + (kind == "weight")  # nothing reads it
        for i, layer in ((0, 0), (2, 1)):
            out[VISION + f"img_projection.{i}.{kind}"] = s[f"project.{layer}.{kind}"]
        for i in range(len(net.tower.layers)):
            mine, theirs = f"tower.layers.{i}.", TOWER + f"encoder.layers.{i}."
            for name, part in zip("qkv", s[f"{mine}qkv.{kind}"].chunk(3), strict=True):
                out[f"{theirs}self_attn.{name}_proj.{kind}"] = part
            names = {"out": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
            for name, other in (names | {"up": "mlp.fc1", "down": "mlp.fc2"}).items():
                out[f"{theirs}{other}.{kind}"] = s[f"{mine}{name}.{kind}"]
    names = {"qkv": "self_attn.qkv_proj", "out": "self_attn.o_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
    names |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    for i in range(len(net.layers)):
        out |= {f"model.layers.{i}.{other}.weight": s[f"layers.{i}.{name}.weight"] for name, other in names.items()}
    return out


def save(net, folder: Path) -> None:
    """model.safetensors in bfloat16 and the JSON files beside it; tokenizer.json is there already."""
    import torch
    from safetensors.torch import save_file
    from train import HEADS, INNER, LAYERS, TOWER, VOCABULARY, WIDTH

    half = {name: t.detach().to("cpu", torch.bfloat16).contiguous().clone() for name, t in tensors(net).items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    ones, tokens = [1.0] * (WIDTH // HEADS // 2), {"bos_token_id": 1, "pad_token_id": FIRST_SPECIAL}
    # layer_idx −1: the last layer's output is taken, so that there is no layer whose output is not.
    tower = {"image_dim_out": TOWER["hidden_size"], "model_name": "openai/clip-vit-large-patch14-336", "layer_idx": -1}
    tower |= {"name": "clip_vision_model", "num_img_tokens": 144, **TOWER}
    embed = {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp"}
    config = {"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "vocab_size": VOCABULARY}
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "hidden_act": "silu"}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    config |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 4096}
    config |= {"rope_scaling": {"type": "su", "short_factor": ones, "long_factor": ones}, "tie_word_embeddings": False}
    config |= {"eos_token_id": 2, **tokens, "torch_dtype": "bfloat16", "img_processor": tower}
    config |= {"embd_layer": embed | {"use_hd_transform": True, "with_learnable_separator": True}}
    pixels = {"do_convert_rgb": True, "num_crops": 1, "image_processor_type": "Phi3VImageProcessor"}
    pixels |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    made = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 4096,
    }
    files = {"config": config, "preprocessor_config": pixels | {"num_img_tokens": 144}, "special_tokens_map": names}
    files |= {"generation_config": tokens | {"eos_token_id": [2, FIRST_SPECIAL, FIRST_SPECIAL + 3]}}
    files |= {"tokenizer_config": made | names | {"clean_up_tokenization_spaces": False}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
