"""phi3v: Phi-3-Vision on MLX, as a secure server, a command line and a module."""

import ctypes
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .llm import LLM

__version__ = "0.1.0"


def load(model: str = "demo", *, adapter: str | None = None, **limits) -> "LLM":
    """A model ready to answer: "demo", a checkpoint folder, or a hub id, which is downloaded once.

    `adapter` is the folder of a LoRA or DoRA adapter that mlx-lm has made. `limits` are max_batch, max_queue,
    max_context (tokens), cache_bytes (0: nothing is kept) and idle_unload (seconds).
    Raises errors.SetupError with one line for a person when it cannot be loaded.
    """
    llm = open_llm(model, adapter=adapter, **limits)
    llm.wait()
    return llm


def open_llm(model: str = "demo", **options) -> "LLM":
    """Like `load`, but returns while the model is still being read: `llm.wait()` waits for it."""
    need_mlx()
    from .llm import LLM

    return LLM(model, **options)


def need_mlx() -> None:
    """Import MLX, the BLAS before it; SetupError if it is not there."""
    fast_blas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        from .errors import SetupError

        raise SetupError(
            "MLX has no backend here: install phi3v's extra cpu, cuda12 or cuda13, or what it stands for, as in"
            f" pip install 'mlx[cpu]' ({error})"
        ) from None


def fast_blas() -> str | None:
    """On Linux, put OpenBLAS before the slow BLAS of MLX's CPU wheel; its file's name if that was done.

    Symbols bind to what was opened first, so this must come before `import mlx.core`. PHI3V_BLAS=0 turns it off.
    README has the figures.
    """
    if sys.platform != "linux" or os.environ.get("PHI3V_BLAS") == "0":
        return None
    # Its threads would spin between two products and take the cores from everybody: a short answer in 20 ms, not 17.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    for name in ("libopenblas.so.0", "libopenblas.so"):
        with suppress(OSError):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return name
    return None
