"""One model on two ranks over loopback: the same tokens as on one, and a clear end for whoever loses the other."""

import base64
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

import phi3v
from phi3v import parallel
from phi3v.errors import SetupError
from phi3v.images import Crops
from phi3v.keys import KeyStore
from phi3v.llm import DEMO
from phi3v.model import Config, _share
from phi3v.quantize import quantize
from phi3v.request import SamplingParams
from phi3v.sequences import Generation, Prompt, Sequence

ONE_GPU = pytest.mark.skipif(mx.cuda.is_available(), reason="NCCL wants a GPU for each rank")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def drawing(seed: int, size: tuple[int, int] = (336, 336)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for colour in rng.permutation(["red", "green", "blue", "black"])[: rng.integers(1, 4)]:
        x, y, r = *rng.integers(40, min(size) - 90, 2), rng.integers(20, 50)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + 2 * r, y + 2 * r), str(colour))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


class Ranks:
    """Two processes that serve one model, as mlx.launch would start them or by it."""

    def __init__(self, folder: Path, pair: tuple, *models: str):
        self.folder, self.models = folder, models or ("demo", "demo")
        self.port, self.meeting, *ring = free_ports(4)
        (folder / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ring]))
        self.context = ssl.create_default_context(cafile=pair[0])
        self.options = ["--port", str(self.port), "--certfile", str(pair[0]), "--keyfile", str(pair[1])]
        keys = KeyStore(folder / "keys.db")
        self.key = keys.create("test", 10_000, None)[1]
        keys.close()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("PHI3V_", "MLX_"))}
        self.processes: list[subprocess.Popen] = []

    def command(self, rank: int) -> list[str]:
        parallel = ["--tensor-parallel", str(self.meeting), "--model", self.models[rank]]
        return [sys.executable, "-m", "phi3v", "serve", *parallel, *self.options]

    def start(self, rank: int) -> subprocess.Popen:
        told = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(self.folder / "hosts")}
        return self._run(self.command(rank), f"rank{rank}", self.environment | told)

    def launch(self, ring: int) -> subprocess.Popen:
        launcher = Path(sys.executable).with_name("mlx.launch")
        options = ["--backend", "ring", "-n", "2", "--starting-port", str(ring), "--"]
        return self._run([str(launcher), *options, *self.command(0)], "launch", self.environment)

    def _run(self, command: list[str], name: str, environment: dict) -> subprocess.Popen:
        with open(self.folder / name, "wb") as out:
            pipes = {"stdin": subprocess.PIPE, "stdout": out, "stderr": out}
            process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **pipes)
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        headers = {"X-API-Key": self.key, "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=60) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def until(self, status: str) -> dict:
        """Wait until /health says so."""
        for _ in range(1200):
            with suppress(urllib.error.URLError, ConnectionError):
                if (health := self.ask("/health")[1])["status"] == status:
                    return health
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.05)
        raise AssertionError(f"/health has not come to say {status}")

    def begin_streaming(self) -> ssl.SSLSocket:
        """Ask for a long answer and return once its first tokens are there."""
        body = {"prompt": "Say something", "stream": True, "max_tokens": 1000} | LONG
        body = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {self.key}\r\nContent-Length: {len(body)}"
        )
        client = self.context.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port)), server_hostname="localhost"
        )
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        seen = b""
        while seen.count(b"data: ") < 3:
            some = client.recv(4096)
            assert some, seen
            seen += some
        return client

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            process.stdin.close()


@pytest.fixture
def ranks(tmp_path, pair):
    started = []

    def make(*models: str) -> Ranks:
        started.append(Ranks(tmp_path, pair, *models))
        return started[-1]

    yield make
    for each in started:
        each.stop()


LONG = {"repetition_penalty": 10}  # the demo ends no sentence that it may not repeat
QUESTIONS = [
    {"prompt": "Hello, world!"},
    {"prompt": "What are you?"},
    {"prompt": "What is shown in this image?", "images": [1]},
    {"prompt": "How many shapes are there?", "images": [2]},
    {"prompt": "What is shown in this image?", "images": [(3, (900, 500))]},
    {"prompt": "What is different?", "images": [4, 5]},
    {"prompt": "What is shown in this image?", "images": [1], "max_tokens": 60} | LONG,
    {"prompt": "Tell me more", "max_tokens": 150} | LONG,
    {"prompt": "Tell me less", "temperature": 1, "top_p": 0.9, "seed": 9, "repetition_penalty": 1.2, "n": 3},
    {"prompt": "What colour is it?", "images": [6], "choices": ["Red", "Green", "Blue", "Black and white"]},
    *({"prompt": f"Count to {i}", "max_tokens": 20 + 20 * i} | LONG for i in range(4)),
]


@ONE_GPU
@pytest.mark.parametrize("weights", ["float32", "4 bits"])
def test_two_ranks_make_the_tokens_of_one_batched_and_with_cancels(ranks, weights, tmp_path):
    model = "demo"
    if weights == "4 bits":
        quantize(DEMO, tmp_path / "quantized", 4, 64, False)
        model = str(tmp_path / "quantized")
    two = ranks(model, model)
    ring = free_ports(1)[0]
    launcher = two.launch(ring)
    questions = []
    for question in QUESTIONS if model == "demo" else QUESTIONS[:7]:  # few rows of 4 bits are slow on a CPU
        pictures = [drawing(*seed) if isinstance(seed, tuple) else drawing(seed) for seed in question.get("images", [])]
        questions.append(question | {"images": pictures})
    with phi3v.load(model) as one:
        wanted = [one.generate(**question) for question in questions]
    two.until("ok")
    for count in (len(questions), 5):  # those of the second round find prompts and features in the caches
        with ThreadPoolExecutor(count + 4) as pool:
            abandoned = [pool.submit(lambda: two.begin_streaming().close()) for _ in range(4)]
            bodies = [
                q | {"images": [base64.b64encode(data).decode() for data in q["images"]]} for q in questions[:count]
            ]
            replies = list(pool.map(lambda body: two.ask("/v1/completions", body), bodies))
            assert [each.result() for each in abandoned] == [None] * 4
        answers = [reply.get("responses", reply) for _, reply in replies]
        assert answers == [each if isinstance(each, list) else [each] for each in wanted[:count]]
    status, free = two.ask("/v1/completions", {"prompt": "Anything", "max_tokens": 100} | LONG | {"temperature": 2})
    assert status == 200 and free["usage"]["completion_tokens"] > 20  # without a seed both ranks drew the same
    assert two.until("ok") == {"status": "ok"}
    os.killpg(launcher.pid, signal.SIGINT)  # Ctrl-C, which all processes of the terminal are sent
    launcher.wait(60)
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)  # nobody is left
    log = (two.folder / "server.log").read_text()
    assert "finishing the running requests" in log and "lost" not in log + two.said("launch")


@ONE_GPU
def test_a_lost_rank_is_told_to_the_running_requests_and_ends_rank_0_with_a_line(ranks):
    two = ranks()
    zero, one = two.start(0), two.start(1)
    two.until("ok")
    stream, refused = two.begin_streaming(), []
    body = {"prompt": "Say something", "n": 8, "max_tokens": 1000} | LONG
    waiting = threading.Thread(target=lambda: refused.append(two.ask("/v1/completions", body)))
    waiting.start()
    while running(two) < 2:
        time.sleep(0.01)
    one.kill()
    rest = b""
    with stream:
        while some := stream.recv(4096):
            rest += some
    waiting.join()
    message = "rank 1 is lost, and with it the model: start all ranks again"
    assert message in rest.decode() and rest.endswith(b"0\r\n\r\n")
    assert refused[0][0] == 503 and message in refused[0][1]["error"]["message"]
    assert zero.wait(30) == 1
    assert two.said("rank0").splitlines()[-1] == f"phi3v: {message}"


def running(two: Ranks) -> int:
    request = urllib.request.Request(f"https://localhost:{two.port}/metrics", headers={"X-API-Key": two.key})
    with urllib.request.urlopen(request, context=two.context) as reply:
        return int(re.search(r"^phi3v_running_sequences (\d+)", reply.read().decode(), re.M)[1])


@ONE_GPU
def test_the_other_ranks_end_when_rank_0_is_lost(ranks):
    two = ranks()
    zero, one = two.start(0), two.start(1)
    two.until("ok")
    assert f"phi3v: rank 1 waits for rank 0 at 127.0.0.1:{two.meeting}\n" in two.said("rank1")
    with two.begin_streaming():
        zero.kill()
        assert one.wait(30) == 1
    assert two.said("rank1").splitlines()[-1] == "phi3v: rank 0 is lost, and with it the model: start all ranks again"
    assert not (two.folder / "server.log").read_text().count("Traceback")


@ONE_GPU
def test_a_rank_with_another_model_ends_all_before_an_answer_goes_wrong(ranks, tmp_path):
    quantize(DEMO, tmp_path / "other", 2, 64, False)
    two = ranks("demo", str(tmp_path / "other"))
    zero, one = two.start(0), two.start(1)
    two.until("ok")
    status, reply = two.ask("/v1/completions", {"prompt": "Say something", "max_tokens": 1000} | LONG)
    assert status == 503 and "rank 1 is lost" in reply["error"]["message"]
    assert (zero.wait(30), one.wait(30)) == (1, 1)
    assert "phi3v: this rank makes other tokens than rank 0" in two.said("rank1")


@ONE_GPU
def test_health_names_the_ranks_that_are_awaited_and_strangers_are_none(ranks):
    two = ranks()
    zero = two.start(0)
    assert two.until("loading") == {"status": "loading", "ranks_awaited": [1]}
    status, reply = two.ask("/v1/completions", {"prompt": "Hello"})
    assert (status, reply["error"]["message"]) == (503, "the model is loading; try again in 5 s")
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"7", b"0", b"\xff\xfe", b""):
        with socket.create_connection(("127.0.0.1", two.meeting)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    two.start(1)
    assert two.until("ok") == {"status": "ok"}
    assert two.ask("/v1/completions", {"prompt": "Hello, world!"})[1]["responses"][0].startswith("Hello! I am")
    zero.terminate()
    assert [process.wait(30) for process in two.processes] == [0, 0]


def test_the_shares_of_a_layer_add_up_to_it_with_grouped_heads_too():
    config = Config(
        **{f.name: getattr(Config.read(DEMO), f.name) for f in Config.__dataclass_fields__.values()}
        | {"num_attention_heads": 8, "num_key_value_heads": 2}
    )
    dim, rng = config.head_dim, np.random.default_rng(1)
    rows, width = (8 + 2 * 2) * dim, config.hidden_size
    qkv = mx.array(rng.normal(size=(rows, width)))
    shares = [np.array(_share("model.layers.0.self_attn.qkv_proj.weight", qkv, config, r, 2)) for r in (0, 1)]
    queries, keys, values = np.split(np.array(qkv), [8 * dim, 10 * dim])
    for rank, share in enumerate(shares):
        mine = [x[rank * len(x) // 2 : (rank + 1) * len(x) // 2] for x in (queries, keys, values)]
        assert (share == np.concatenate(mine)).all()
    down = mx.array(rng.normal(size=(width, config.intermediate_size)).astype(np.float32))
    x = rng.normal(size=(3, config.intermediate_size)).astype(np.float32)
    parts = [np.array(_share("model.layers.3.mlp.down_proj.weight", down, config, r, 2)) for r in (0, 1)]
    summed = sum(half @ part.T for half, part in zip(np.split(x, 2, -1), parts, strict=True))
    assert abs(summed - x @ np.array(down).T).max() < 1e-4
    for name in ("lm_head.weight", "model.vision_embed_tokens.img_processor.vision_model.x.q_proj.weight"):
        assert _share(name, down, config, 1, 2) is down
    with pytest.raises(SetupError, match=r"4 ranks cannot share .*qkv_proj.weight .* of 8 heads, 2 of them for keys"):
        _share("model.layers.0.self_attn.qkv_proj.weight", qkv, config, 0, 4)


def test_a_sequence_reaches_the_other_ranks_as_it_is():
    crops = Crops(np.ones((2, 3, 336, 336), np.float32), (1, 1), -(2**62) - 1)
    params = SamplingParams(temperature=0.7, stop=["a", "b"], logprobs=3, top_p=0.0, seed=-5)
    prompt = Prompt([5, -1, -1, 7], [crops], 9, frozenset({1, 2}), "key", params, 2, (3, 4))
    s = Sequence(prompt, 4, Generation(5))
    raw = json.loads(json.dumps(parallel._wire(s)))
    assert raw["images"] == [crops.digest]
    told = parallel._sequence(raw | {"images": [crops]})
    assert told.prompt == s.prompt and told.images == s.images and (told.content == s.content).all()
    assert (told.number, told.arrived, told.index) == (s.number, s.arrived + 4, 0)
    assert told.sampler.uniform() == s.sampler.uniform()


@pytest.mark.parametrize(
    "told, found",
    [
        ({"MLX_HOSTFILE": '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]'}, (1, 2, "10.0.0.1", "ring")),
        ({"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_WORLD_SIZE": "4"}, (1, 4, "10.0.0.1", "nccl")),
        (
            {"MLX_IBV_DEVICES": '[[null, "rdma_en5"], ["rdma_en5", null]]', "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"},
            (1, 2, "10.0.0.1", "jaccl"),
        ),
        ({}, None),
        ({"MLX_HOSTFILE": ""}, None),
        ({"MLX_HOSTFILE": "[[]]"}, None),
        ({"MLX_HOSTFILE": '[["10.0.0.1:5000"]]'}, None),  # mlx.launch -n 1
        ({"NCCL_HOST_IP": "10.0.0.1"}, None),
        ({"NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "two"}, None),
    ],
)
def test_the_ranks_are_those_that_mlx_launch_tells(monkeypatch, tmp_path, run, told, found):
    for name in ("MLX_HOSTFILE", "NCCL_HOST_IP", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        if name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
            (tmp_path / name).write_text(value)
            value = str(tmp_path / name)
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLX_RANK", "1")
    if found:
        assert parallel._launched() == found
    else:
        monkeypatch.chdir(tmp_path)
        how = "mlx.launch -n 2 -- python -m phi3v serve --tensor-parallel"
        line = f"phi3v: --tensor-parallel needs two ranks or more, which mlx.launch starts: {how}\n"
        assert run("serve", "--model", "demo", "--tensor-parallel") == (1, "", line)


@pytest.mark.parametrize("option", [("--adapter", "folder"), ("--idle-unload", "10m")])
def test_what_does_not_go_with_ranks_is_told(run, option):
    line = f"phi3v: --tensor-parallel does not go with {option[0]}\n"
    assert run("serve", "--model", "demo", *option, "--tensor-parallel") == (1, "", line)


@ONE_GPU
def test_of_different_limits_the_least_is_every_rank_s(ranks):
    two = ranks()
    two.start(0)
    two.options += ["--max-batch", "1"]
    two.start(1)
    two.until("ok")
    assert two.ask("/v1/completions", {"prompt": "Hello, world!", "n": 3, "temperature": 1})[0] == 200


@ONE_GPU
def test_when_rank_0_cannot_start_the_others_fail_too(ranks):
    two = ranks()
    with socket.create_server(("127.0.0.1", two.port)):
        zero, one = two.start(0), two.start(1)
        assert (zero.wait(30), one.wait(30)) == (1, 1)
    assert "cannot listen on 127.0.0.1" in two.said("rank0")
