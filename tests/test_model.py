"""Checkpoint folders that are whole, sharded, quantised, damaged, foreign or hostile."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import test_parity as parity

from phi3v import model
from phi3v.errors import SetupError

PARITY = Path(__file__).parent / "parity"


@pytest.fixture
def folder(tmp_path):
    """A copy of the smallest checkpoint that a test may spoil."""
    return Path(shutil.copytree(PARITY / "tiny-su", tmp_path / "tiny"))


def logits(phi: model.Phi3V) -> np.ndarray:
    return np.array(parity.prefill(phi, [1, 5, 9], [], parity.cache_of(phi)))


def rewrite(folder: Path, change) -> None:
    """Save the checkpoint again after `change` edited its tensors."""
    weights = mx.load(str(folder / "model.safetensors"))
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(folder: Path, **changes) -> None:
    """Let the safetensors header say something else of one tensor."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] |= changes
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def refusal(folder: Path) -> str:
    with pytest.raises(SetupError) as caught:
        model.load(folder)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def test_a_sharded_checkpoint_is_the_same_model(folder):
    expected = logits(model.load(folder))
    weights = mx.load(str(folder / "model.safetensors"))
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        mx.save_safetensors(str(folder / file), {key: weights[key] for key in keys})
    (folder / "model.safetensors").unlink()
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert np.array_equal(logits(model.load(folder)), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of 2 weight files, first model-00002-of-00002.safetensors: copy or download it again" in refusal(
        folder
    )


def test_numbered_files_without_an_index_are_as_many_as_their_names_say(folder):
    one, two = (folder / f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    expected = logits(model.load(folder))
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(two), {"lm_head.weight": weights.pop("lm_head.weight")})
    mx.save_safetensors(str(one), weights)
    (folder / "model.safetensors").unlink()
    assert np.array_equal(logits(model.load(folder)), expected)
    for lost in (two, one):
        kept = lost.rename(folder / "kept")
        assert f"lacks 1 of 2 weight files, first {lost.name}: copy or download it again" in refusal(folder)
        kept.rename(lost)


def test_an_index_cannot_name_files_elsewhere(folder):
    weight_map = {"lm_head.weight": "../../etc/passwd"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "not a file of its folder" in refusal(folder)


def test_mixed_quantisation_is_read_from_the_shapes(folder):
    """Two bits, group sizes in one file, and a config.json that does not speak of it."""

    def change(weights):
        for name, bits, group in (("model.layers.0.mlp.down_proj", 4, 64), ("model.layers.1.mlp.down_proj", 8, 32)):
            w, scales, biases = mx.quantize(weights[f"{name}.weight"], group_size=group, bits=bits)
            weights |= {f"{name}.weight": w, f"{name}.scales": scales, f"{name}.biases": biases}

    plain = model.load(folder)
    rewrite(folder, change)
    phi = model.load(folder)
    found = [(layer.mlp.down_proj.bits, layer.mlp.down_proj.group_size) for layer in phi.model.layers]
    assert found == [(4, 64), (8, 32)]
    assert 0 < np.abs(logits(phi) - logits(plain)).max() < 1


def test_what_nothing_reads_may_be_there_and_what_is_read_must(folder):
    tower = "model.vision_embed_tokens.img_processor.vision_model"
    rewrite(folder, lambda w: w.update({f"{tower}.embeddings.position_ids": mx.arange(577)}))
    model.load(folder)
    rewrite(folder, lambda w: w.update({"model.layers.0.extra.weight": mx.zeros(3)}))
    assert "1 tensors that Phi-3-vision has no place for, first model.layers.0.extra.weight" in refusal(folder)
    rewrite(folder, lambda w: (w.pop("model.layers.0.extra.weight"), w.pop("model.norm.weight")))
    assert "lacks 1 of" in refusal(folder) and "model.norm.weight" in refusal(folder)


def test_a_tensor_of_another_shape_is_told(folder):
    edit(folder / "config.json", vocab_size=1000)
    assert "has shape (512, 64), config.json asks for (1000, 64)" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_told_before_it_is_used(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("offsets", [[0, 10**12], [-4, 252], [8, 4], [0, 255], "x", None])
def test_a_header_that_points_elsewhere_is_refused(folder, offsets):
    edit_header(folder, data_offsets=offsets)
    assert "is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 8}}, "length of short_factor"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"img_processor": None}, "not a Phi-3-vision configuration"),
        ({"num_attention_heads": "four"}, "not a Phi-3-vision configuration"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many', not a number above 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, not a number above 0 and below 1000"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"img_processor": {"hidden_size": 32, "num_attention_heads": 7}}, "no multiple of num_attention_heads"),
    ],
)
def test_a_configuration_of_another_model_is_told(folder, changes, message):
    edit(folder / "config.json", **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"data_offsets": [0, 256]},
            "not a whole safetensors file: Error while deserializing header: invalid offset",
        ),  # a second tensor on another's bytes
        ({"dtype": "I32"}, "model.norm.weight holds mlx.core.int32"),
    ],
)
def test_tensors_may_neither_overlap_nor_have_another_kind_of_number(folder, change, message):
    edit_header(folder, **change)
    assert message in refusal(folder)


def test_numbers_that_mlx_does_not_read_are_told(folder):
    header = json.dumps({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "unsupported dtype F64; copy or download it again" in refusal(folder)


def test_eight_bit_floats_may_lie_in_a_file_that_is_whole(folder):
    """Only shapes and types are looked at before the names are: it is the tensor that is foreign, not the file."""
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (folder / "extra.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "1 tensors that Phi-3-vision has no place for, first a" in refusal(folder)


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path):
    assert "is no checkpoint folder" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)


DOWN = "model.layers.0.mlp.down_proj"  # (64, 128) in the smallest checkpoint


@pytest.mark.parametrize("bits", model.BITS)
def test_all_bits_that_mlx_quantises_to_are_read(folder, bits):
    def change(weights):
        parts = mx.quantize(weights[f"{DOWN}.weight"], group_size=64, bits=bits)
        weights |= dict(zip((f"{DOWN}.weight", f"{DOWN}.scales", f"{DOWN}.biases"), parts, strict=True))

    plain = model.load(folder).model.layers[0].mlp.down_proj.weight
    rewrite(folder, change)
    found = model.load(folder).model.layers[0].mlp.down_proj
    values = mx.dequantize(found.weight, found.scales, found.biases, 64, bits)
    assert found.bits == bits and mx.abs(values - plain).max() <= 2 * mx.abs(plain).max() / (2**bits - 1)


@pytest.mark.parametrize(
    "weight, scales, biases, message",
    [
        ((64, 28), (64, 2), True, "7 bits, groups of 64; phi3v reads 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128"),
        ((64, 16), (64, 8), True, "4 bits, groups of 16; phi3v reads"),
        ((64, 16), (64, 3), True, "4 bits, groups of 42.6667; phi3v reads"),
        ((64, 16), (64, 0), True, "scales has shape (64, 0), config.json asks for (64, 1)"),
        ((64, 16), (), True, "scales has shape (), config.json asks for (64, 1)"),
        ((16,), (64, 2), True, "0 bits, groups of 64"),
        ((64, 16), (64, 4), False, "4 bits, groups of 32, without biases; phi3v reads"),
    ],
)
def test_a_quantisation_that_mlx_has_not_is_told(folder, weight, scales, biases, message):
    def change(weights):
        weights |= {f"{DOWN}.weight": mx.zeros(weight, mx.uint32), f"{DOWN}.scales": mx.zeros(scales)}
        weights |= {f"{DOWN}.biases": mx.zeros(scales)} if biases else {}

    rewrite(folder, change)
    assert message in refusal(folder)


def index_of(folder: Path, **more: str) -> None:
    weight_map = dict.fromkeys(mx.load(str(folder / "model.safetensors")), "model.safetensors") | more
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def remove_a_norm(folder: Path) -> None:
    index_of(folder)
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))


def replace_by_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


SPOILT = {
    "only pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "is no checkpoint folder: it has no .safetensors file, and phi3v reads no other format",
    ),
    "an index that names a shard that is not there": (
        lambda folder: index_of(folder, other="model-2.safetensors"),
        "lacks 1 of 2 weight files, first model-2.safetensors: copy or download it again",
    ),
    "an index that names a tensor that is not there": (
        remove_a_norm,
        "lacks 1 of 58 tensors, first model.norm.weight: copy or download it again",
    ),
    "an index that is a list": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json is damaged: it has no weight_map",
    ),
    "a link to nothing": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "x") and (folder / "model.safetensors").symlink_to("y")
        ),
        "lacks 1 of 1 weight files, first model.safetensors: copy or download it again",
    ),
    "a folder for a file": (replace_by_a_folder, "model.safetensors: Is a directory; copy or download it again"),
    "whole numbers for floats": (
        lambda folder: rewrite(folder, lambda w: w.update({"model.norm.weight": mx.zeros(64, mx.uint8)})),
        "model.norm.weight holds mlx.core.uint8, which is no weight's type here",
    ),
    "another quantiser's tensors": (
        lambda folder: rewrite(folder, lambda w: w.update({f"{DOWN}.qweight": mx.zeros(9, mx.uint32)})),
        f"has 1 tensors that Phi-3-vision has no place for, first {DOWN}.qweight",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_folder_that_was_spoilt_is_told_in_one_line_that_says_what_to_do(folder, spoil, message):
    spoil(folder)
    assert message in refusal(folder)


def forbid(*_, **__) -> None:
    """As the system does it, but also when root runs the tests."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_file_that_may_not_be_read_is_told(folder, monkeypatch):
    weights, opened = model.weight_files(folder), Path.open
    monkeypatch.setattr(Path, "open", lambda path, *r, **k: (forbid if path in weights else opened)(path, *r, **k))
    with pytest.raises(SetupError, match="safetensors: Permission denied; let its owner and mode"):
        model.load(folder)


def test_what_is_converted_is_never_there_twice(folder):
    """The file of this is of shorter floats; all of them at once would be half as much again as what is kept."""
    rewrite(folder, lambda w: w.update({name: array.astype(mx.bfloat16) for name, array in w.items()}))
    model.load(folder)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, phi = mx.get_active_memory(), model.load(folder)
    kept = sum(array.nbytes for _, array in mlx.nn.utils.tree_flatten(phi.parameters()))
    largest = max(array.nbytes for _, array in mlx.nn.utils.tree_flatten(phi.parameters()))
    assert phi.model.norm.weight.dtype == mx.float32
    assert kept <= mx.get_peak_memory() - before < kept + 2 * largest


def test_a_cpu_computes_in_float32_and_other_types_are_kept_when_asked_for():
    phi = model.load(PARITY / "tiny-gqa")
    assert phi.model.norm.weight.dtype == mx.float32
    assert model.load(PARITY / "tiny-gqa", dtype=mx.bfloat16).model.norm.weight.dtype == mx.bfloat16


def test_rows_of_a_cache_that_join_and_leave_keep_their_own_logits():
    phi = model.load(PARITY / "tiny-gqa")
    prompts = [[1, 7, 9, 11], [1, 300, 5], list(range(1, 300)), [1], [9, 8, 7]]
    caches = [parity.cache_of(phi) for _ in prompts]
    for ids, cache in zip(prompts, caches, strict=True):
        parity.prefill(phi, ids, [], cache)
    together = caches[0]
    for other in caches[1:]:
        together.join(other, len(together.lengths))
    assert together.lengths == [4, 3, 299, 1, 3] and together.slots >= 5
    logits = np.array(parity.decode(phi, [42] * 5, together, False))
    assert np.abs(logits - alone(phi, [[*ids, 42] for ids in prompts])).max() < 1e-4
    assert together.keep([1, 3, 4]) == [4, 1, 3]  # only the last row moved, into the first gap
    assert together.lengths == [4, 4, 2]
    logits = np.array(parity.decode(phi, [6, 7, 8], together, False))
    expected = [[*prompts[4], 42, 6], [*prompts[1], 42, 7], [*prompts[3], 42, 8]]
    assert np.abs(logits - alone(phi, expected)).max() < 1e-4
    assert together.keep([2]) == [2] and together.slots == 1
    assert np.abs(np.array(parity.decode(phi, [5], together, False)) - alone(phi, [[*expected[2], 5]])).max() < 1e-4


def test_a_part_of_a_row_can_be_copied_and_read_on_and_leaves_the_row_as_it_was():
    phi, ids = model.load(PARITY / "tiny-gqa"), list(range(1, 80))
    cache = parity.cache_of(phi)
    parity.prefill(phi, ids, [], cache)
    for part in (cache.copy(0, 40), cache.head(40, 60)):
        assert np.abs(np.array(parity.decode(phi, [77], part, False)) - alone(phi, [[*ids[:40], 77]])).max() < 1e-4
    assert np.abs(np.array(parity.decode(phi, [77], cache, False)) - alone(phi, [[*ids, 77]])).max() < 1e-4


def alone(phi: model.Phi3V, prompts: list[list[int]]) -> np.ndarray:
    return np.array(mx.stack([parity.prefill(phi, ids, [], parity.cache_of(phi)) for ids in prompts]))


def test_pictures_looked_at_together_keep_no_memory_of_each_other():
    phi, pictures = model.load(PARITY / "tiny-gqa"), parity.crops_of("tiny-gqa.img_landscape") * 4
    mx.eval(phi.image_features(pictures))
    mx.clear_cache()
    before, made = mx.get_active_memory(), phi.image_features(pictures)
    mx.eval(made)
    kept = made.pop()
    made.clear()
    assert kept.nbytes <= mx.get_active_memory() - before < 1.5 * kept.nbytes


def test_the_real_configuration_has_the_tensors_of_the_real_checkpoint():
    """592 tensors of 4,146,621,440 numbers, less the tower's last layer and norm, which nothing reads."""
    factors = json.loads((PARITY / "rope_tables.json").read_text())["phi-3.5-vision-instruct"]
    dims = (32064, 3072, 8192, 32, 32, 32, 1e-5, 10000.0, 131072, 4096)
    config = model.Config(*dims, factors["short_factor"], factors["long_factor"], model.VisionConfig())
    tensors = dict(mlx.nn.utils.tree_flatten(model.Phi3V(config).parameters()))  # lazy: nothing is allocated
    last_layer = 4 * 1024 + 4 * (1024 * 1024 + 1024) + (4096 * 1024 + 4096) + (1024 * 4096 + 1024)
    assert sum(tensor.size for tensor in tensors.values()) == 4_146_621_440 - last_layer - 2 * 1024
    assert len(tensors) == 592 - 16 - 2
    assert tensors["model.vision_embed_tokens.img_projection.0.weight"].shape == (3072, 4096)
