"""One model over several devices: who takes part, and what rank 0 tells the others so that all take the same steps.

Each rank has its share of every layer, and mx.distributed adds up what they make of it. Beside that there is a TCP
connection from each rank to rank 0: what arrives and what is cancelled goes over it as JSON, pictures behind it as they
are, and its end tells at once who is lost. Neither asks who speaks: both belong on a private network.
"""

import atexit
import faulthandler
import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import SetupError
from .images import SIDE, Crops
from .request import SamplingParams
from .sequences import Generation, Prompt, Sequence

POLL = 0.5  # seconds between two tries to meet
GREETING = 0.5  # seconds for a rank to say which it is
CONNECT = 30  # seconds for MLX to connect the ranks, once they have met
# A machine that vanishes says nothing. After a second of silence the system asks once, and waits another.
KEEP_ALIVE = {"SO_KEEPALIVE": 1, "TCP_NODELAY": 1, "TCP_KEEPIDLE": 1, "TCP_KEEPALIVE": 1}
KEEP_ALIVE |= {"TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 1, "TCP_USER_TIMEOUT": 1500}

CROP = 4 * 3 * SIDE**2  # bytes

log = logging.getLogger("phi3v")


class Group:
    """The ranks that run one model, as mlx.launch has started them: this process is `rank` of `size`.

    `meet`, `sum` and `least` belong to the thread that computes. `awaited` are the ranks that are not there yet, `lost`
    says who was there. They meet at `port` of rank 0's. Raises SetupError where no ranks were started.
    """

    def __init__(self, port: int):
        self.rank, self.size, host, self._backend = _launched()
        self.address = host, port
        self.awaited, self.lost = [0] if self.rank else list(range(1, self.size)), ""
        self.patient = True  # False ends the waiting for who has not come
        self.in_order = True  # whether the other ranks are to end with success
        self._missed = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._turns: queue.SimpleQueue = queue.SimpleQueue()  # of rank 0; None is the end
        self._ended = False

    def meet(self, lost: Callable[[], None]) -> None:
        """Return when all ranks are there; from then on `lost` is called, on another thread, when one no longer is."""
        log.warning("rank %d waits for %s at %s:%d", self.rank, _named(self.awaited), *self.address)
        try:
            self._connect() if self.rank else self._accept()
        except OSError as error:
            reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error
            raise SetupError(f"the ranks cannot meet at {self.address[0]}:{self.address[1]}: {reason}") from None
        if self.awaited:
            raise SetupError(f"{_named(self.awaited)} did not come")
        for rank, peer in self._peers.items():
            threading.Thread(target=self._listen, args=(rank, peer, lost), daemon=True).start()
        # Python stands still meanwhile: a rank whose ports nobody reaches would wait for ever, and silently.
        faulthandler.dump_traceback_later(CONNECT, exit=True)
        try:
            self._group = mx.distributed.init(strict=True, backend=self._backend)
        except RuntimeError as error:
            raise SetupError(f"MLX's backend {self._backend} cannot connect the ranks: {error}") from None
        finally:
            faulthandler.cancel_dump_traceback_later()

    def sum(self, x: mx.array) -> mx.array:
        """What all ranks have given, added up, and the same on each."""
        return mx.distributed.all_sum(x, group=self._group)

    def least(self, number: int) -> int:
        """The smallest of what the ranks have given, to float32's seven digits."""
        return int(mx.distributed.all_min(mx.array(number, mx.float32), group=self._group).item())

    def tell(self, arrived: list[Sequence], cancelled: list[Sequence], made: list[int]) -> None:
        """Have the other ranks take a turn with these sequences, and compare the tokens that the last one made."""
        pictures = {crops.digest: crops for s in arrived for crops in s.images}
        turn = {"made": made, "arrived": [_wire(s) for s in arrived], "cancelled": [s.number for s in cancelled]}
        turn["pictures"] = [[digest, crops.grid, len(crops.pixels)] for digest, crops in pictures.items()]
        self._send(json.dumps(turn).encode() + b"\n", *(crops.pixels.tobytes() for crops in pictures.values()))

    def hear(self) -> tuple[list[Sequence], set[int], list[int]] | None:
        """Wait for rank 0's next turn: who arrived, the numbers of who was cancelled, the tokens; None is the end."""
        turn = self._turns.get()
        return turn and ([_sequence(raw) for raw in turn["arrived"]], set(turn["cancelled"]), turn["made"])

    def end(self) -> None:
        """Have the other ranks end in order."""
        self._ended = self.in_order
        if self.in_order:
            self._send(b"null\n")

    def abandon(self) -> None:
        """After a failure MLX may wait for other ranks without end: the process must not wait for MLX at its own."""
        atexit.register(os._exit, 1)
        self._missed.wait(POLL)  # if a lost rank is the reason, it is to be named

    def _send(self, *data: bytes) -> None:
        for peer in self._peers.values() if self.rank == 0 else ():
            with suppress(OSError):  # whoever listens to it tells that it is lost
                for each in data:
                    peer.sendall(each)

    def _accept(self) -> None:
        with socket.create_server(self.address) as listener:
            listener.settimeout(POLL)
            while self.awaited and self.patient:
                with suppress(TimeoutError):
                    peer = _kept_alive(listener.accept()[0])
                    peer.settimeout(GREETING)
                    try:
                        self.awaited.remove(rank := int(peer.recv(16)))
                        self._peers[rank] = peer
                    except (OSError, ValueError):
                        peer.close()  # it is no rank that we wait for

    def _connect(self) -> None:
        while self.awaited and self.patient:
            try:
                peer = _kept_alive(socket.create_connection(self.address, timeout=CONNECT))
                peer.sendall(b"%d" % self.rank)
                self._peers[self.awaited.pop()] = peer
            except (ConnectionError, TimeoutError):
                time.sleep(POLL)  # rank 0 has not come yet

    def _listen(self, rank: int, peer: socket.socket, lost: Callable[[], None]) -> None:
        """Read what a rank says, which of all but rank 0 is nothing, until it ends."""
        peer.settimeout(None)
        with suppress(OSError, ValueError, TypeError, KeyError), peer.makefile("rb") as file:
            if self.rank == 0:
                file.read(1)
                raise ConnectionError  # nobody has anything to tell rank 0
            while turn := json.loads(file.readline()):
                pictures = {}
                for digest, grid, crops in turn["pictures"]:
                    pixels = np.frombuffer(file.read(crops * CROP), np.float32).reshape(crops, 3, SIDE, SIDE)
                    pictures[digest] = Crops(pixels, tuple(grid), digest)
                for raw in turn["arrived"]:
                    raw["images"] = [pictures[digest] for digest in raw["images"]]
                self._turns.put(turn)
            self._ended = True
            self._turns.put(None)
        if not self._ended:
            self.lost = f"{_named([rank])} is lost, and with it the model: start all ranks again"
            self._missed.set()
            lost()


def _launched() -> tuple[int, int, str, str]:
    """This process's rank, the number of ranks, rank 0's address and MLX's backend, as mlx.launch tells them."""
    told = os.environ
    try:
        rank = int(told["MLX_RANK"])
        if "MLX_HOSTFILE" in told:
            hosts = json.loads(Path(told["MLX_HOSTFILE"]).read_bytes())
            found = rank, len(hosts), hosts[0][0].rpartition(":")[0], "ring"
        elif "NCCL_HOST_IP" in told:
            found = rank, int(told["MLX_WORLD_SIZE"]), told["NCCL_HOST_IP"], "nccl"
        else:
            devices = json.loads(Path(told["MLX_IBV_DEVICES"]).read_bytes())
            found = rank, len(devices), told["MLX_JACCL_COORDINATOR"].rpartition(":")[0], "jaccl"
        if not 0 <= rank < found[1] > 1:
            raise ValueError(f"rank {rank} of {found[1]}")
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError):
        how = "mlx.launch -n 2 -- python -m phi3v serve --tensor-parallel"
        raise SetupError(f"--tensor-parallel needs two ranks or more, which mlx.launch starts: {how}") from None
    return found


def _kept_alive(peer: socket.socket) -> socket.socket:
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # each system has some
            peer.setsockopt(socket.SOL_SOCKET if name[:2] == "SO" else socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _wire(s: Sequence) -> dict:
    """A sequence as JSON; its pictures are digests."""
    params = {name: value for name, value in vars(s.prompt.params).items() if value != ()}
    prompt = vars(s.prompt) | {"params": params, "end_ids": list(s.prompt.end_ids)}
    return prompt | {"images": [crops.digest for crops in s.images], "number": s.number, "arrived": s.arrived + s.index}


def _sequence(raw: dict) -> Sequence:
    number, arrived = raw.pop("number"), raw.pop("arrived")
    params, sets = SamplingParams(**raw.pop("params")), frozenset(raw.pop("end_ids"))
    prompt = Prompt(params=params, end_ids=sets, targets=tuple(raw.pop("targets")), **raw)
    s = Sequence(prompt, 0, Generation(1), number)
    s.arrived = arrived  # by rank 0's clock, so that all agree who goes first
    return s
