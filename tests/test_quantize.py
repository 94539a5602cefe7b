"""`quantize`: what it writes, what stays, what it costs, and everything that it refuses."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import test_parity as parity

from phi3v import __main__ as cli
from phi3v import model, quantize, vision
from phi3v.errors import SetupError

PARITY = Path(__file__).parent / "parity"
TOWER = "model.vision_embed_tokens"


def convert(source: Path, out: Path, bits: int = 4, group_size: int = 64, whole: bool = False) -> tuple[int, int]:
    return quantize.quantize(source, out, bits, group_size, whole)


def tensors(folder: Path) -> dict[str, mx.array]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    files = {file: mx.load(str(folder / file)) for file in set(weight_map.values())}
    assert sorted(weight_map) == sorted(name for file in files.values() for name in file)
    return {name: files[file][name] for name, file in weight_map.items()}


def logits(phi: model.Phi3V, ids=(1, 5, 9)) -> np.ndarray:
    return np.array(parity.logits_of(phi, list(ids), [], parity.cache_of(phi)))


@pytest.mark.parametrize(
    "bits, group_size, whole, like", [(4, 64, True, "tiny-gqa-q4"), (8, 64, False, "tiny-gqa-q8lm")]
)
def test_it_lays_a_checkpoint_out_as_mlx_conversions_do(tmp_path, bits, group_size, whole, like):
    """The two were quantised elsewhere from the same weights, in the two ways that mlx-vlm has had."""
    convert(PARITY / "tiny-gqa", tmp_path / "out", bits, group_size, whole)
    made, expected = tensors(tmp_path / "out"), mx.load(str(PARITY / like / "model.safetensors"))
    assert {n: x.shape for n, x in made.items()} == {n: x.shape for n, x in expected.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["quantization"] == {"group_size": group_size, "bits": bits, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]


@pytest.mark.parametrize("bits", [4, 6])
def test_what_it_wrote_has_the_logits_of_its_weights_dequantised(tmp_path, bits):
    convert(PARITY / "tiny-gqa", tmp_path / "out", bits, 32, True)
    made, plain = tensors(tmp_path / "out"), Path(shutil.copytree(PARITY / "tiny-gqa", tmp_path / "plain"))
    for name in [n.removesuffix("scales") for n in made if n.endswith(".scales")]:
        packed, *rest = (made.pop(name + part) for part in ("weight", "scales", "biases"))
        made[name + "weight"] = mx.dequantize(packed, *(x.astype(mx.float32) for x in rest), 32, bits)
    mx.save_safetensors(str(plain / "model.safetensors"), made)
    ours, theirs = model.load(tmp_path / "out"), model.load(plain)
    for ids in ([1, 5, 9], range(1, 200)):
        assert np.abs(logits(ours, ids) - logits(theirs, ids)).max() < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_all_bits_and_groups_are_read_as_they_were_written(tmp_path, bits, group_size):
    convert(PARITY / "tiny-gqa", tmp_path / "out", bits, group_size)
    layer = model.load(tmp_path / "out").model.layers[0].mlp.gate_up_proj
    assert (layer.bits, layer.group_size) == (bits, group_size)
    source = mx.load(str(PARITY / "tiny-gqa" / "model.safetensors"))["model.layers.0.mlp.gate_up_proj.weight"]
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size, bits)
    step = mx.abs(layer.scales).max().item()  # of what can be written; MLX makes one end exact, the other may be cut
    assert mx.abs(weight - source.astype(mx.float32)).max().item() < step * (1 + 2**bits / 256)  # bf16 scales


def test_what_has_no_width_of_whole_groups_stays_and_is_named(tmp_path):
    before, after = convert(PARITY / "tiny-su", tmp_path / "out", 4, 128, True)
    made, source = tensors(tmp_path / "out"), mx.load(str(PARITY / "tiny-su" / "model.safetensors"))
    stayed = {n.removesuffix(".weight") for n, x in source.items() if x.ndim == 2 and x.shape[-1] % 128}
    stayed = {n for n in stayed if f"{n}.weight" in source}
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert stayed and {n for n, value in config["quantization"].items() if value is False} == stayed
    assert not any(f"{n}.scales" in made for n in stayed) and any(n.endswith(".scales") for n in made)
    assert before == sum(x.nbytes for x in source.values()) and after == sum(x.nbytes for x in made.values())
    assert np.isfinite(logits(model.load(tmp_path / "out"))).all()


def test_it_writes_shards_with_an_index_and_takes_over_all_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SHARD", 200_000)
    source = Path(shutil.copytree(PARITY / "tiny-gqa", tmp_path / "source"))
    (source / "chat_template.jinja").write_text("…")
    (source / "pytorch_model.bin").write_text("…")
    convert(source, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    kept = {path.name for path in source.iterdir()} - {"model.safetensors", "pytorch_model.bin"}
    assert set(names) == kept | set(shards) | {"model.safetensors.index.json"}
    assert os.listdir(tmp_path) == [name for name in os.listdir(tmp_path) if name in ("source", "out")]
    assert np.isfinite(logits(model.load(tmp_path / "out"))).all()


def test_it_holds_a_shard_and_a_tensor_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SHARD", 4 << 20)
    source = Path(shutil.copytree(PARITY / "tiny-gqa", tmp_path / "source"))
    weights = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    for layer in range(4, 44):  # at the tower's top, where nothing is read
        weights[f"{TOWER}.img_processor.vision_model.encoder.layers.{layer}.weight"] = mx.zeros((1024, 512))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    del weights
    mx.clear_cache()
    at_first = mx.get_active_memory()
    mx.reset_peak_memory()
    before, after = convert(source, tmp_path / "out", whole=True)
    assert before > 80 << 20 and after < before / 3
    assert mx.get_peak_memory() - at_first < 12 << 20  # a shard, the next tensor in both forms and its parts
    assert mx.get_active_memory() - at_first < 1 << 20


def test_the_agreement_is_whole_with_itself_and_counted_at_the_answers(tmp_path, capsys):
    source = PARITY / "tiny-gqa"
    same, places = quantize.agreement(source, source)
    assert same == places > 100
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), "--bits", "8", "--group-size", "32"]) == 0
    shown = capsys.readouterr()
    assert "1.6 MB before, 1." in shown.out and f" of {places} places in built-in texts (" in shown.out
    assert shown.err == ""  # no progress where nobody looks
    assert shown.out.endswith(f"\nto serve it: phi3v serve --model {tmp_path / 'out'}\n")
    same = int(shown.out.split("same next token at ")[1].split()[0])
    assert 0.5 * places < same < places


@pytest.mark.parametrize("option, given, allowed", [("bits", 5, "2, 3, 4, 6, 8"), ("group-size", 48, "32, 64, 128")])
def test_bits_and_groups_that_mlx_does_not_have_are_told(tmp_path, capsys, option, given, allowed):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quantize", "demo", str(tmp_path / "out"), f"--{option}", str(given)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument --{option}: invalid choice: {given} (choose from {allowed})")
    assert not any(tmp_path.iterdir())


def refused(source: Path, out: Path) -> str:
    with pytest.raises(SetupError) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    convert(PARITY / "tiny-gqa", tmp_path / "out")  # empty, so it may be
    assert "is there already" in refused(PARITY / "tiny-gqa", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "is there already" in refused(PARITY / "tiny-gqa", tmp_path / "file")
    assert "cannot make" in refused(PARITY / "tiny-gqa", tmp_path / "nowhere" / "out")
    assert "is quantised already" in refused(PARITY / "tiny-gqa-q4", tmp_path / "new")
    assert "cannot read" in refused(tmp_path / "nothing", tmp_path / "new")
    cut = Path(shutil.copytree(PARITY / "tiny-gqa", tmp_path.parent / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    assert "is not a whole safetensors file" in refused(cut, tmp_path / "new")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(quantize.shutil, "disk_usage", lambda _: usage)
        assert "would have 0.8 MB, only 0.0 MB are free there" in refused(PARITY / "tiny-gqa", tmp_path / "new")
    with monkeypatch.context() as patch:  # the disk fills up while it is written
        save = partial(mx.save_safetensors, "/dev/full/x")
        patch.setattr(quantize.mx, "save_safetensors", lambda _, *rest, **named: save(*rest, **named))
        assert "Is the disk full?" in refused(PARITY / "tiny-gqa", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]
    (tmp_path / ".new.part").mkdir()
    assert "another run makes new, or one was cut off" in refused(PARITY / "tiny-gqa", tmp_path / "new")


def test_a_cpu_dequantises_for_many_rows_and_gives_the_same_logits(monkeypatch):
    phi = model.load(PARITY / "tiny-gqa-q4")
    linear = phi.model.layers[0].self_attn.qkv_proj
    assert type(linear) is model.CPUQuantizedLinear
    assert type(phi.model.vision_embed_tokens.img_projection[0]) is model.CPUQuantizedLinear  # with a bias
    crops, ids = parity.crops_of("tiny-gqa-q4.img_landscape"), list(range(1, 300))
    found = [logits(phi, ids), np.array(phi.image_features(crops)[0])]
    monkeypatch.setattr(model, "ROWS", 10**9)
    monkeypatch.setattr(model, "ROWS_SLOW", 10**9)
    expected = [logits(phi, ids), np.array(phi.image_features(crops)[0])]
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("blas, bits, rows", [(True, 4, 8), (True, 3, 24), (False, 8, 32), (False, 6, 96)])
def test_how_many_rows_are_many_depends_on_the_blas_and_the_bits(monkeypatch, blas, bits, rows):
    monkeypatch.setattr(model, "openblas", lambda: blas)
    layer = nn.QuantizedLinear(64, 32, bits=bits)
    layer.__class__ = model.CPUQuantizedLinear
    made = []
    monkeypatch.setattr(model.mx, "dequantize", lambda *a, real=mx.dequantize: made.append(1) or real(*a))
    for n in (1, rows - 1, rows):
        layer(mx.zeros((n, 64)))
    assert made == [1]


def test_a_gpu_keeps_the_type_of_the_file_and_mlx_products(monkeypatch):
    """bf16 stays bf16; only the device's name is changed here, the arrays are a CPU's."""
    monkeypatch.setattr(model.mx, "default_device", lambda: mx.Device(mx.gpu))
    assert model.load(PARITY / "tiny-gqa").model.norm.weight.dtype == mx.bfloat16
    phi = model.load(PARITY / "tiny-gqa-q4")
    assert not any(type(module) is model.CPUQuantizedLinear for module in phi.modules())
    assert phi.model.layers[0].self_attn.qkv_proj.scales.dtype != mx.float32


@pytest.mark.parametrize("names, found", [({}, False), ({"openblas_set_num_threads": len}, True)])
def test_without_openblas_the_library_is_not_found_and_with_it_it_is(monkeypatch, names, found):
    library = SimpleNamespace(**names)
    monkeypatch.setattr(vision.ctypes, "CDLL", lambda _: library)
    assert vision.openblas.__wrapped__() == (library if found else None)  # what it has found already stays


def test_nothing_is_copied_that_lies_outside_the_folder_or_is_hidden_in_it(tmp_path):
    source = Path(shutil.copytree(PARITY / "tiny-gqa", tmp_path / "source"))
    (tmp_path / "id_rsa").write_text("secret")
    (source / ".env").write_text("secret")
    (source / "NOTICE").symlink_to("../id_rsa")
    with pytest.raises(SetupError, match=r"NOTICE leads out of its folder, and would be copied: put the file itself"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["id_rsa", "source"]
    (source / "NOTICE").unlink()
    cached = tmp_path / "models--owner--phi" / "snapshots" / "0123"  # whose files are links, to those beside it
    shutil.copytree(source, tmp_path / "models--owner--phi" / "blobs")
    cached.mkdir(parents=True)
    for path in source.iterdir():
        (cached / path.name).symlink_to(f"../../blobs/{path.name}")
    for each, out in ((source, tmp_path / "a"), (cached, tmp_path / "b")):
        convert(each, out)
        names = {path.name for path in out.iterdir()}
        assert "tokenizer.json" in names and ".env" not in names


@pytest.mark.parametrize("blas, platform", [(True, "linux"), (False, "linux"), (False, "darwin")])
def test_only_the_blas_of_mlx_on_linux_has_the_weights_turned_round_for_many_rows(monkeypatch, blas, platform):
    monkeypatch.setattr(model, "openblas", lambda: blas)
    monkeypatch.setattr(model.sys, "platform", platform)
    layer = model.load(PARITY / "tiny-gqa").model.layers[0].mlp.down_proj
    turned = []
    monkeypatch.setattr(model.mx, "contiguous", lambda x, real=mx.contiguous: turned.append(x.shape) or real(x))
    for n in (1, model.ROWS_SLOW - 1, model.ROWS_SLOW):
        x = mx.random.normal((n, layer.weight.shape[1]))
        assert np.abs(np.array(layer(x)) - np.array(x) @ np.array(layer.weight).T).max() < 1e-5
    assert turned == ([layer.weight.shape[::-1]] if (blas, platform) == (False, "linux") else [])
