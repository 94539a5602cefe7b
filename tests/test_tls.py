"""The certificate on disk and the TLS context, with the real openssl program and real handshakes on loopback."""

import calendar
import hashlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from phi3v import tls
from phi3v.errors import SetupError

MACHINE = socket.gethostname().split(".")[0].lower()
NAMES = list(dict.fromkeys(["localhost", socket.gethostname().lower(), MACHINE, f"{MACHINE}.local"]))
DAY = 86400


def openssl(*arguments, cwd=None) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def files(tmp_path):
    return tmp_path / "server.crt", tmp_path / "server.key"


@pytest.fixture
def own(files, pair):
    """A fresh copy of a pair that phi3v made."""
    for copy, source in zip(files, pair, strict=True):
        shutil.copy(source, copy)
    return files


def contents(files) -> list[bytes]:
    return [file.read_bytes() for file in files]


def reissue(files, days: float, subject: str = "/O=phi3v/CN=localhost", issuer: str | None = None) -> None:
    """Put a certificate for the key in its place that ends in so many days, signed by itself or by `issuer`."""
    certfile, keyfile = files
    folder = certfile.parent / "ca"
    folder.mkdir(exist_ok=True)
    for name, text in {"index": "", "index.attr": "unique_subject = no", "serial": "01", "crl": ""}.items():
        (folder / name).write_text(text)
    (folder / "conf").write_text(
        "[ca]\ndefault_ca=own\n[own]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=any\n"
        "[any]\norganizationName=optional\ncommonName=supplied\n[req]\ndistinguished_name=dn\n[dn]\n"
    )
    start, end = (time.strftime("%y%m%d%H%M%SZ", time.gmtime(time.time() + d * DAY)) for d in (days - 825, days))
    openssl("req", "-new", "-config", "conf", "-key", keyfile, "-subj", subject, "-out", "csr", cwd=folder)
    sign = ["-selfsign", "-keyfile", keyfile]
    if issuer:
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "ca.key", cwd=folder)
        root = ["-config", "conf", "-key", "ca.key", "-subj", issuer, "-out", "ca.crt"]
        openssl("req", "-new", "-x509", *root, cwd=folder)
        sign = ["-cert", "ca.crt", "-keyfile", "ca.key"]
    dates = ["-startdate", start, "-enddate", end]
    openssl("ca", "-batch", "-notext", "-config", "conf", *sign, *dates, "-in", "csr", "-out", certfile, cwd=folder)


def refused(message: str, action, *arguments) -> None:
    with pytest.raises(SetupError) as caught:
        action(*arguments)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)  # in one line: a dot is no line end


def handshake(files, client: ssl.SSLContext, name: str):
    """What a client on loopback sees: TLS version, cipher, ALPN and the names of the verified certificate."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer():
            with listener.accept()[0] as raw:
                raw.settimeout(10)
                with tls.server_context(*files).wrap_socket(raw, server_side=True) as server:
                    server.sendall(b"hello")

        served = pool.submit(answer)
        with socket.create_connection(listener.getsockname(), 10) as raw:
            with client.wrap_socket(raw, server_hostname=name) as connection:
                assert connection.recv(5) == b"hello"
                served.result()
                return connection.version(), connection.cipher()[0], connection.selected_alpn_protocol()


def test_the_first_run_makes_a_p256_certificate_for_825_days_and_all_names_of_the_machine(files):
    (notice,) = tls.ensure_certificate(*files, "Photos.Example")
    text = openssl("x509", "-in", files[0], "-noout", "-text")
    names = [*(f"DNS:{n}" for n in NAMES[:1]), "IP Address:127.0.0.1", "IP Address:0:0:0:0:0:0:0:1"]
    names += [f"DNS:{n}" for n in [*NAMES[1:], "photos.example"]]
    found = re.search(r"Subject Alternative Name: *\n *(.+)", text)[1]
    assert found.split(", ") == list(dict.fromkeys(names))
    for line in (
        r"Version: 3 \(0x2\)",
        r"Subject: O ?= ?phi3v, CN ?= ?localhost",
        r"Issuer: O ?= ?phi3v, CN ?= ?localhost",
        r"NIST CURVE: P-256",
        r"Signature Algorithm: ecdsa-with-SHA256",
        r"Basic Constraints: critical\n *CA:FALSE",
        r"Key Usage: critical\n *Digital Signature\n",
        r"Extended Key Usage: *\n *TLS Web Server Authentication\n",
    ):
        assert re.search(line, text), line
    start, end = (time.strptime(t, "%b %d %H:%M:%S %Y GMT") for t in re.findall(r"Not \w+ ?: (.+)", text))
    assert calendar.timegm(end) - calendar.timegm(start) == 825 * DAY
    assert notice.startswith(f"made the certificate {files[0]}, valid for 825 days and localhost, 127.0.0.1, ::1, ")
    assert notice.endswith(", photos.example")


def test_the_names_leave_out_wildcard_addresses_zones_and_repetitions():
    usual = [NAMES[0], "127.0.0.1", "::1", *NAMES[1:]]
    for host in ("0.0.0.0", "::", "127.0.0.1", "LOCALHOST", ""):
        assert tls.host_names(host) == usual
    assert tls.host_names("fe80::1%eth0") == [*usual, "fe80::1"]


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_key_is_0600_and_the_certificate_0644_under_any_umask_and_nothing_else_is_left(files, mask):
    before = os.umask(mask)
    try:
        tls.ensure_certificate(*files)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files[0].parent.iterdir()}
    assert modes == {"server.crt": "0o644", "server.key": "0o600"}


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", *NAMES])
def test_a_client_that_trusts_the_file_verifies_every_name_of_the_machine(pair, name):
    version, cipher, alpn = handshake(pair, ssl.create_default_context(cafile=pair[0]), name)
    assert version == "TLSv1.3" and cipher.startswith("TLS_") and alpn is None


def test_a_client_does_not_verify_another_name_or_without_the_file(pair):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(pair, ssl.create_default_context(cafile=pair[0]), "example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed certificate"):
        handshake(pair, ssl.create_default_context(), "localhost")


def test_the_pair_is_made_and_verifies_without_the_systems_openssl_configuration(files, monkeypatch):
    monkeypatch.setenv("OPENSSL_CONF", "/dev/null")
    tls.ensure_certificate(*files)
    assert handshake(files, ssl.create_default_context(cafile=files[0]), "localhost")[0] == "TLSv1.3"


def test_tls_1_2_gets_an_ecdhe_aead_cipher_and_http_1_1_and_an_older_client_nothing(pair, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/keys")
    assert tls.server_context(*pair).keylog_filename is None
    monkeypatch.delenv("SSLKEYLOGFILE")
    client = ssl.create_default_context(cafile=pair[0])
    client.set_alpn_protocols(["h2", "http/1.1"])
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    version, cipher, alpn = handshake(pair, client, "localhost")
    assert version == "TLSv1.2" and alpn == "http/1.1"
    assert re.fullmatch(r"ECDHE-ECDSA-(AES\d+-GCM-SHA\d+|CHACHA20-POLY1305)", cipher)
    client.set_ciphers("ECDHE+AES:!AESGCM:!AESCCM")  # CBC
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        handshake(pair, client, "localhost")
    client.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):  # an alert is what the server sent
        handshake(pair, client, "localhost")
    offered = tls.server_context(*pair).get_ciphers()
    assert [c["name"] for c in offered if not c["aead"] or not c["name"].startswith(("TLS_", "ECDHE-"))] == []


def test_a_pair_that_is_there_is_left_alone_also_the_documents_own(own, files):
    before = contents(own)
    assert tls.ensure_certificate(*own) == [] and contents(own) == before
    command = "req -x509 -newkey rsa:4096 -nodes -out server.crt -keyout server.key -days 365 -subj /CN=localhost"
    openssl(*command.split(), cwd=files[0].parent)
    documented = contents(files)
    assert documented != before and tls.ensure_certificate(*files) == [] and contents(files) == documented
    client = ssl.create_default_context(cafile=files[0])
    client.check_hostname = False  # it names no host but in its CN
    assert handshake(files, client, "localhost")[0] == "TLSv1.3"


def test_a_certificate_that_lacks_the_name_clients_use_is_told_and_left_alone(own, files, tmp_path):
    before = contents(own)
    again = f"rm {own[0].name} {own[1].name}, and start again"
    told = f"the certificate {own[0]} is not valid for 192.0.2.7, clients will refuse it: {again}"
    assert tls.ensure_certificate(*own, "192.0.2.7") == [told] and contents(own) == before
    assert tls.ensure_certificate(*own, "0.0.0.0") == []  # clients use the .local name, which it has
    fresh = tmp_path / "fresh.crt", tmp_path / "fresh.key"
    tls.ensure_certificate(*fresh, "192.0.2.7")
    assert tls.ensure_certificate(*fresh, "192.0.2.7") == []
    wild = "req -x509 -newkey rsa:2048 -nodes -out w.crt -keyout w.key -days 99 -subj /CN=a -addext"
    openssl(*wild.split(), "subjectAltName=DNS:*.example.org", cwd=tmp_path)
    assert tls.ensure_certificate(tmp_path / "w.crt", tmp_path / "w.key", "phi.example.org") == []
    (notice,) = tls.ensure_certificate(tmp_path / "w.crt", tmp_path / "w.key", "example.com")
    assert notice.endswith("is not valid for example.com, clients will refuse it: have one made for it")


def test_an_expired_certificate_of_our_own_is_made_anew_for_the_same_key_with_a_notice(own):
    reissue(own, days=-1)
    expired, key = contents(own)
    told = f"the certificate {own[0]} had expired and was made anew: clients have to trust it again"
    assert tls.ensure_certificate(*own) == [told]
    assert own[0].read_bytes() != expired and own[1].read_bytes() == key
    assert handshake(own, ssl.create_default_context(cafile=own[0]), "localhost")[0] == "TLSv1.3"
    assert tls.ensure_certificate(*own) == []


FOREIGN = [{"subject": "/O=phi3v-fans/CN=localhost"}, {"subject": "/CN=localhost"}, {"issuer": "/O=Company/CN=root"}]


@pytest.mark.parametrize("names", FOREIGN)
def test_a_foreign_expired_certificate_is_told_and_not_replaced(own, names):
    reissue(own, -1, **names)
    before = contents(own)
    told = f"the certificate {own[0]} has expired: put a new one in its place"
    assert tls.ensure_certificate(*own) == [told] and contents(own) == before


def test_a_certificate_that_ends_within_30_days_is_told_at_every_start_and_left_alone(own):
    reissue(own, 30.1)
    assert tls.ensure_certificate(*own) == []
    reissue(own, 29.1)
    before = contents(own)
    told = f"the certificate {own[0]} ends in 29 days: rm server.crt, and start again"
    assert tls.ensure_certificate(*own) == tls.ensure_certificate(*own) == [told] and contents(own) == before
    reissue(own, 7.1, "/CN=example.org")
    told = f"the certificate {own[0]} ends in 7 days: put a new one in its place"
    assert tls.ensure_certificate(*own) == [told]


def test_a_kill_at_any_moment_leaves_no_half_pair(files):
    code = "import sys; from phi3v import tls; tls.ensure_certificate(*sys.argv[1:])"
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    whole = time.monotonic() - begun
    for i in range(12):
        for file in files:
            file.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code, *files])
        time.sleep(whole * (0.5 + i / 20))
        process.kill()
        process.wait()
        assert [file.stat().st_mode & 0o777 for file in files[::-1] if file.exists()] in ([], [0o600], [0o600, 0o644])
        tls.ensure_certificate(*files)
        assert tls.server_context(*files)


def test_a_key_without_certificate_gets_one_and_a_certificate_without_key_is_refused(own):
    key = own[1].read_bytes()
    own[0].unlink()
    assert len(tls.ensure_certificate(*own)) == 1 and own[1].read_bytes() == key
    assert tls.server_context(*own)
    own[1].unlink()
    certificate = own[0].read_bytes()
    refused(rf"{own[0]} has no key beside it: put its key at {own[1]}, or .*", tls.ensure_certificate, *own)
    assert own[0].read_bytes() == certificate and not own[1].exists()


def test_a_pair_that_does_not_belong_together_or_is_damaged_is_refused_in_one_line(own, tmp_path):
    other = tmp_path / "other.crt", tmp_path / "other.key"
    tls.ensure_certificate(*other)
    advice = "both must be PEM, without a password, and belong together"
    mixed = own[0], other[1]
    assert tls.ensure_certificate(*mixed) == []
    refused(f"cannot use {own[0]} with {other[1]}: KEY_VALUES_MISMATCH; {advice}", tls.server_context, *mixed)
    before = contents(own)
    for data in (b"", b"garbage\n", before[0][: len(before[0]) // 2]):
        own[0].write_bytes(data)
        refused(rf"openssl x509 -in {own[0]} failed: .+", tls.ensure_certificate, *own)
        refused(rf"cannot use {own[0]} with {own[1]}: .+; {advice}", tls.server_context, *own)
        assert contents(own) == [data, before[1]]
    own[0].unlink()
    own[1].write_text("garbage")
    refused(rf"openssl req -key {own[1]} failed: .+", tls.ensure_certificate, *own)
    assert sorted(os.listdir(tmp_path)) == ["other.crt", "other.key", "server.key"]


TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal on which openssl would ask
from phi3v import errors, tls
for action in (tls.ensure_certificate, tls.server_context):
    try: action(*sys.argv[1:])
    except errors.SetupError as error: print(sys.argv[2] in str(error))
"""


@pytest.mark.parametrize("form", [["ec", "-aes256"], ["pkcs8", "-topk8"]])
def test_an_encrypted_key_is_refused_without_a_prompt_even_at_a_terminal(own, form):
    plain = own[1].with_name("plain")
    own[1].rename(plain)
    openssl(*form, "-in", plain, "-passout", "pass:secret", "-out", own[1])
    command = [sys.executable, "-c", TERMINAL, *own]
    ours, terminal = os.openpty()
    try:
        options = {"stdin": terminal, "capture_output": True, "text": True, "timeout": 20, "start_new_session": True}
        assert subprocess.run(command, **options).stdout == "True\n"  # the certificate is there
        own[0].unlink()
        assert subprocess.run(command, **options).stdout == "True\nTrue\n"
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            print(os.read(ours, 999))  # nothing was written to the terminal
    finally:
        os.close(ours)
        os.close(terminal)


def test_without_the_openssl_program_or_a_folder_there_is_one_line_and_no_pair(files, tmp_path, monkeypatch, own):
    refused(
        f"cannot write {tmp_path}/no/a.key: No such file or directory",
        tls.ensure_certificate,
        tmp_path / "no" / "a.crt",
        tmp_path / "no" / "a.key",
    )
    monkeypatch.setenv("PATH", "")
    message = "the program `openssl`, which makes the TLS certificate, is not installed; `apt install openssl`, .*"
    refused(message, tls.ensure_certificate, *own)
    own[0].unlink()
    refused(message, tls.ensure_certificate, *own)
    own[1].unlink()
    refused(message, tls.ensure_certificate, *files)
    assert os.listdir(tmp_path) == []


def test_the_fingerprint_is_the_sha256_of_the_certificate(pair):
    der = ssl.PEM_cert_to_DER_cert(pair[0].read_text())
    assert tls.fingerprint(pair[0]).replace(":", "").lower() == hashlib.sha256(der).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="the lines for Linux")
@pytest.mark.parametrize(
    "there, stores",
    [
        ((), [".local/share/pki/nssdb"]),  # a new account; Firefox has not run yet
        ((".pki/nssdb", ".mozilla/firefox/a.default"), [".pki/nssdb", ".mozilla/firefox/a.default"]),
        ((".config/mozilla/firefox/b.default",), [".local/share/pki/nssdb", ".config/mozilla/firefox/b.default"]),
    ],
)
def test_the_lines_for_linux_find_the_browsers_stores_in_their_old_and_their_new_places(tmp_path, there, stores):
    home, program = tmp_path / "home", tmp_path / "certutil"
    home.mkdir()
    for folder in there:
        (home / folder).mkdir(parents=True)
        (home / folder / "cert9.db").touch()
    program.write_text('#!/bin/sh\nfolder=${2#sql:}; [ -d "$folder" ] && echo "$folder" "$@"\n')
    program.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = [line.format("server.crt") for system, line in tls.TRUST.items() if system.startswith("Linux")]
    out = subprocess.check_output("\n".join(lines), shell=True, text=True, env=environment)
    flags = ["C,," if "mozilla" in store else "P,," for store in stores]
    assert out.splitlines() == [
        f"{home}/{s} -d sql:{home}/{s} -A -t {f} -n phi3v -i server.crt" for s, f in zip(stores, flags, strict=True)
    ]
