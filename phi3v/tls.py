"""The certificate on disk and the server's TLS context.

Uses the `openssl` program for what Python's ssl cannot do: make keys and certificates and read their dates. Each is
moved into place whole, the key first, and a key without certificate gets one: a kill leaves nothing to repair by hand.
"""

import ipaddress
import re
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .errors import SetupError

DAYS = 825  # the most that Apple's systems accept from a private issuer
WARN_SECONDS = 30 * 86400
OURS = "CN=localhost,O=phi3v"  # subject and issuer of a certificate of ours: only such a one is ever replaced
OPENSSL_TIMEOUT = 30  # seconds; a P-256 key takes milliseconds

# What makes a certificate of ours trusted where it is no authority's: Chromium takes it as a peer only, Firefox as an
# authority only. Both keep what they trust in an old place if it is there, and otherwise in a new one. The first two
# lines are what other makers of such certificates type, and were not tried.
TRUST = {
    "macOS": "security add-trusted-cert -p ssl -k ~/Library/Keychains/login.keychain-db {}",
    "Windows": "certutil -addstore -user Root {}",
    "Linux, Chromium and Chrome": "p=~/.pki/nssdb; if [ ! -d $p ]; then p=~/.local/share/pki/nssdb; fi; mkdir -p $p; "
    "certutil -d sql:$p -A -t P,, -n phi3v -i {}",
    "Linux, Firefox": "for p in $(find ~/.mozilla ~/.config/mozilla ~/snap/firefox -name cert9.db -printf '%h\\n' "
    "2>/dev/null); do certutil -d sql:$p -A -t C,, -n phi3v -i {}; done",
}

CONFIG = """
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
O = phi3v
CN = localhost
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = {names}
"""


def host_names(*hosts: str) -> list[str]:
    """The names this machine is reached by: localhost, its addresses, its own name, its .local name, `hosts`."""
    local = public_name("0.0.0.0")
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname().lower(), local.removesuffix(".local"), local]
    names += [host.lower().partition("%")[0] for host in hosts]  # an IPv6 zone is no part of a certificate's name
    return [n for n in dict.fromkeys(names) if n and n not in ("0.0.0.0", "::", ".local")]


def public_name(host: str) -> str:
    """The name by which clients reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname().split(".")[0].lower() + ".local"
    return "localhost" if host in ("127.0.0.1", "::1") else host.lower()


def ensure_certificate(certfile: str | Path, keyfile: str | Path, *hosts: str) -> list[str]:
    """Make the pair if there is none, renew our own expired one, leave any other alone.

    Returns what a person should know, one line each. Raises SetupError when there is no usable pair.
    """
    cert, key = Path(certfile).absolute(), Path(keyfile).absolute()
    if cert.exists() and not key.exists():
        raise SetupError(f"{cert} has no key beside it: put its key at {key}, or move the certificate away")
    if not key.exists():
        _write(key, 0o600, ["ecparam", "-name", "prime256v1", "-genkey", "-noout"])
    notice = f"made the certificate {cert}, valid for {DAYS} days and {', '.join(host_names(*hosts))}"
    if cert.exists():
        ours, left, names = _inspect(cert)
        lacks = [n for n in map(public_name, hosts) if not {n, "*." + n.partition(".")[2]} & names]
        if left > WARN_SECONDS:
            if not lacks:
                return []
            advice = f"rm {cert.name} {key.name}, and start again" if ours else "have one made for it"
            return [f"the certificate {cert} is not valid for {', '.join(lacks)}, clients will refuse it: {advice}"]
        if not ours or left > 0:
            state = f"ends in {left / 86400:.0f} days" if left > 0 else "has expired"
            advice = f"rm {cert.name}, and start again" if ours else "put a new one in its place"
            return [f"the certificate {cert} {state}: {advice}"]
        notice = f"the certificate {cert} had expired and was made anew: clients have to trust it again"
    _make_certificate(cert, key, host_names(*hosts))
    return [notice]


def server_context(certfile: str | Path, keyfile: str | Path) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, forward-secret AEAD suites only, HTTP/1.1."""
    # Not create_default_context: that one honours SSLKEYLOGFILE, which writes the session keys to a file.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it costs us more than the client who asks for it
    # A client's end without close_notify, and ours that hang_up makes it look like, is answered in order: without it
    # OpenSSL 3 answers with the alert decode_error. A body that was cut has less than its length.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    try:
        # The empty password turns OpenSSL's prompt on the terminal into an error.
        context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        advice = "both must be PEM, without a password, and belong together"
        raise SetupError(f"cannot use {certfile} with {keyfile}: {reason}; {advice}") from None
    return context


def fingerprint(certfile: str | Path) -> str:
    """SHA-256 of the certificate, to compare by eye: AB:CD:…"""
    return _openssl(["x509", "-in", str(certfile), "-noout", "-fingerprint", "-sha256"]).strip().split("=", 1)[1]


def trust_lines(certfile: Path, everyone: bool = False) -> list[str]:
    """What to type so that browsers trust a certificate of ours, here or on each system; [] for any other's."""
    if not _inspect(certfile)[0]:
        return []
    here = "" if everyone else "macOS" if sys.platform == "darwin" else "Linux"
    shown = certfile.name if everyone else shlex.quote(str(certfile))
    title = f"so that browsers trust the certificate {'with that copy' if everyone else 'here'}, once:"
    return [title, *(f"  {where}: {line.format(shown)}" for where, line in TRUST.items() if where.startswith(here))]


def _make_certificate(cert: Path, key: Path, names: list[str]) -> None:
    names = [("IP:" if re.fullmatch(r"([0-9]+\.){3}[0-9]+|.*:.*", name) else "DNS:") + name for name in names]
    with tempfile.NamedTemporaryFile("w", suffix=".cnf") as config:
        # Our own -config: the system's may be missing or add extensions of its own.
        config.write(CONFIG.format(names=", ".join(names)))
        config.flush()
        request = ["req", "-key", str(key), "-new", "-x509", "-sha256", "-days", str(DAYS), "-config", config.name]
        _write(cert, 0o644, [*request, "-passin", "pass:"])  # or openssl would ask for an encrypted key's password


def _inspect(cert: Path) -> tuple[bool, float, set[str]]:
    """Whether we made this certificate, the seconds until it ends, and the names it is valid for."""
    facts = ["-subject", "-issuer", "-enddate", "-nameopt", "RFC2253", "-text"]
    text = _openssl(["x509", "-in", str(cert), "-noout", *facts])
    found = {field: value.strip() for field, _, value in (line.partition("=") for line in text.splitlines())}
    names = set(re.findall(r"DNS:([^\s,]+)", text))
    names |= {str(ipaddress.ip_address(address)) for address in re.findall(r"IP Address:([^\s,]+)", text)}
    names = names or set(re.findall(r"CN=([^,]+)", found["subject"]))  # curl still takes such a one
    left = ssl.cert_time_to_seconds(found["notAfter"]) - time.time()
    return found["subject"] == found["issuer"] == OURS, left, names


def _write(path: Path, mode: int, command: list[str]) -> None:
    """Run openssl with its output in a folder of mode 0700, then move that to `path`."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            made = Path(folder, "made")
            _openssl([*command, "-out", str(made)])
            made.chmod(mode)
            made.replace(path)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from None


def _openssl(arguments: list[str]) -> str:
    try:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=OPENSSL_TIMEOUT)
    except FileNotFoundError:
        lacking = "the program `openssl`, which makes the TLS certificate, is not installed"
        advice = "`apt install openssl`, `dnf install openssl` or `brew install openssl` does that"
        raise SetupError(f"{lacking}; {advice}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"the program `openssl` does not run: {error}") from None
    if done.returncode:
        detail = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise SetupError(f"openssl {' '.join(arguments[:3])} failed: {detail}")
    return done.stdout
