"""Adapters as mlx-lm's tuner makes them: the answers that its own code gives, and what fits no model."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import test_parity as parity
from mlx.utils import tree_flatten
from mlx_lm.models import phi3
from mlx_lm.tuner.utils import linear_to_lora_layers

import phi3v
from phi3v import __main__ as cli
from phi3v import model
from phi3v.errors import SetupError
from phi3v.quantize import quantize

PARITY = Path(__file__).parent / "parity"
IDS = [1, 5, 9, 33, 200, 17, 80, 9, 5, 41]
NO_SCALES = float("nan"), float("inf"), -float("inf")  # as JSON has them: NaN, Infinity, 1e400
RANK = {"rank": 4, "scale": 10.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, plain and in 4 bits, whose rope mlx-lm computes as Microsoft does: short factors as the long."""
    folder = tmp_path_factory.mktemp("base")
    plain = Path(shutil.copytree(PARITY / "tiny-gqa", folder / "plain"))
    config = json.loads((plain / "config.json").read_bytes())
    config["rope_scaling"] |= {"short_factor": config["rope_scaling"]["long_factor"], "type": "su", "rope_type": "su"}
    (plain / "config.json").write_text(json.dumps(config))
    quantize(plain, folder / "q4", 4, 64, False)
    return {"plain": plain, "q4": folder / "q4"}


def text_model(folder: Path) -> phi3.Model:
    """mlx-lm's model with the language model of a folder, in float32."""
    made = phi3.Model(phi3.ModelArgs.from_dict(json.loads((folder / "config.json").read_bytes()) | {"type": "phi3"}))
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= mx.load(str(path))
    nn.quantize(made, 64, 4, class_predicate=lambda path, _: f"{path}.scales" in weights)
    text = {name: x for name, x in weights.items() if "vision" not in name}
    made.load_weights([(name, x if x.dtype == mx.uint32 else x.astype(mx.float32)) for name, x in text.items()])
    return made


def train(peer: phi3.Model, folder: Path, kind: str, num_layers: int, keys: list[str] | None) -> None:
    """Ten steps of mlx-lm's layers on one text, and the folder that its trainer leaves."""
    mx.random.seed(0)
    peer.freeze()
    parameters = RANK | ({"keys": keys} if keys else {})
    linear_to_lora_layers(peer, num_layers, parameters, use_dora=kind == "dora")
    inputs, targets = mx.array([IDS[:-1]]), mx.array([IDS[1:]])
    step = nn.value_and_grad(peer, lambda p: nn.losses.cross_entropy(p(inputs), targets).mean())
    optimizer = optim.Adam(learning_rate=1e-2)
    for _ in range(10):
        optimizer.update(peer, step(peer)[1])
        mx.eval(peer.parameters())
    peer.eval()
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(peer.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "model": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def logits(phi: model.Phi3V) -> np.ndarray:
    return np.array(parity.logits_of(phi, IDS, [], parity.cache_of(phi)))


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """An adapter for the plain checkpoint, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("trained") / "lora"
    train(text_model(folders["plain"]), folder, "lora", 2, ["self_attn.qkv_proj", "mlp.gate_up_proj"])
    return folder


@pytest.mark.parametrize("base", ["plain", "q4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_changes_the_answers_as_it_does_under_mlx_lm(folders, tmp_path, base, kind):
    peer = text_model(folders[base])
    before = np.array(peer(mx.array([IDS]))[0])
    assert np.abs(logits(model.load(folders[base])) - before).max() < 1e-4
    train(peer, tmp_path / "adapter", kind, 2, None)
    expected = np.array(peer(mx.array([IDS]))[0])
    found = logits(model.load(folders[base], adapter=tmp_path / "adapter"))
    assert np.abs(expected - before).max() > 1
    assert np.abs(found - expected).max() < 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).all() and (found.argmax(-1) != before.argmax(-1)).any()


def test_an_adapter_costs_plain_weights_nothing_and_stands_beside_quantised_ones(folders, trained):
    plain, quantised = (model.load(folders[base], adapter=trained) for base in ("plain", "q4"))
    assert isinstance(plain.model.layers[1].mlp.gate_up_proj, nn.Linear)
    assert isinstance(plain.model.layers[0].mlp.gate_up_proj, nn.Linear)
    adapted = [[type(layer.mlp[name]) is model.Adapted for name in layer.mlp] for layer in quantised.model.layers]
    assert adapted == [[False, False], [True, False], [True, False]]


def test_the_module_takes_an_adapter_and_says_so_in_its_name(trained):
    params = {"max_tokens": 8, "temperature": 0}
    with (
        phi3v.load(str(PARITY / "tiny-gqa"), adapter=str(trained)) as llm,
        phi3v.load(str(PARITY / "tiny-gqa")) as base,
    ):
        assert (llm.checkpoint, base.checkpoint) == ("tiny-gqa+lora", "tiny-gqa")
        assert llm.generate("Hello", **params) != base.generate("Hello", **params)


def test_the_command_line_takes_an_adapter_and_tells_in_one_line_what_is_none(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["generate", "Hello", "--max-tokens", "8", "--model", str(PARITY / "tiny-gqa")]
    answers = []
    for options in ([], ["--adapter", str(trained)]):
        assert cli.main([*tiny, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    told = "is no adapter folder: cannot read adapter_config.json: No such file or directory"
    for command in (tiny, ["serve", "--model", str(PARITY / "tiny-gqa")]):
        assert cli.main([*command, "--adapter", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"phi3v: {tmp_path} {told}\n"
    assert not list(tmp_path.iterdir())  # no certificate, no keys


def spoil(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is no adapter folder: cannot read adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is not what mlx-lm writes"),
        (lambda f: spoil(f, lora_parameters={"rank": 4}), "is not what mlx-lm writes: it has no lora_parameters"),
        (lambda f: spoil(f, fine_tune_type="full"), "has fine_tune_type 'full' and scale 10.0; phi3v adds 'lora' and"),
        (lambda f: spoil(f, lora_parameters={"scale": "x"}), "scale 'x'"),
        *((lambda f, x=x: spoil(f, lora_parameters={"scale": x}), f"scale {x!r}; phi3v adds") for x in NO_SCALES),
        (lambda f: spoil(f, lora_parameters={"scale": 10**400}), "0; phi3v adds 'lora' and 'dora' with a scale below"),
        (lambda f: spoil(f, fine_tune_type="dora"), "this model takes {'lora_a': (128, 4), 'lora_b': (4, "),
        (lambda f: (f / "adapters.safetensors").unlink(), "adapters.safetensors: No such file or directory; copy"),
        (lambda f: (f / "adapters.safetensors").write_bytes(b"\0" * 30), "is not a whole safetensors file"),
    ],
)
def test_what_is_no_adapter_is_told_in_one_line(trained, tmp_path, change, message):
    folder = Path(shutil.copytree(trained, tmp_path / "lora"))
    change(folder)
    with pytest.raises(SetupError) as caught:
        model.load(PARITY / "tiny-gqa", adapter=folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"model.layers.9.mlp.down_proj.lora_a": (256, 4)}, "adapts model.layers.9.mlp.down_proj, no linear layer of"),
        ({"model.embed_tokens.lora_a": (512, 4)}, "adapts model.embed_tokens, no linear layer"),
        ({"lora_a": (4,)}, "adapts , no linear layer"),
        ({"lm_head.lora_a": (4,), "lm_head.lora_b": (4, 512)}, "has {'lora_a': (4,)"),
        ({"lm_head.lora_a": (), "lm_head.lora_b": (4, 512)}, "has {'lora_a': ()"),
        ({"lm_head.lora_b": (4, 512)}, "this model takes"),
        ({"lm_head.lora_a": (128, 4), "lm_head.lora_b": (4, 513)}, "'lora_b': (4, 513)} for lm_head"),
    ],
)
def test_an_adapter_for_another_model_is_told_in_one_line(trained, tmp_path, tensors, message):
    folder = Path(shutil.copytree(trained, tmp_path / "lora"))
    arrays = {name: mx.zeros(shape) for name, shape in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    with pytest.raises(SetupError) as caught:
        model.load(PARITY / "tiny-gqa", adapter=folder)
    assert message in str(caught.value) and "it is for another" in str(caught.value)
