"""Fixtures that several files share; the BLAS is put in place before anything imports MLX."""

import logging
from contextlib import suppress

import phi3v

phi3v.fast_blas()

import pytest  # noqa: E402
from site_under_test import Site  # noqa: E402

from phi3v import tls  # noqa: E402
from phi3v.__main__ import main  # noqa: E402

# The reference's numbers are float32's, and a GPU computes in the file's type: here it is left to the servers that the
# end-to-end tests start.
with suppress(ModuleNotFoundError):  # the environments of clients and of the page have none
    import mlx.core as mx

    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A certificate and its key, made as the first run makes them."""
    folder = tmp_path_factory.mktemp("tls")
    certfile, keyfile = folder / "server.crt", folder / "server.key"
    tls.ensure_certificate(certfile, keyfile)
    return certfile, keyfile


@pytest.fixture
def run(capsys):
    """Run a command line; its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(list(arguments))
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, now: float = 1_700_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def site(pair, tmp_path, clock, caplog):
    caplog.set_level(logging.DEBUG, "phi3v")
    site = Site(pair, tmp_path, clock)
    logging.getLogger("phi3v").addHandler(site.log)
    yield site
    left = site.close()
    logging.getLogger("phi3v").removeHandler(site.log)
    assert [r.getMessage() for r in left if r.levelno > logging.INFO] == []  # nothing broke unseen
