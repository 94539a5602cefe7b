"""A: how the certificate is made, what scanners find, and its change while requests run."""

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import program
from report import NotRun, at_most, is_true, none_of
from service import PYTHON, Service, healthy, wait_until

MAKE = """
import time
from phi3v import tls
begun = time.perf_counter()
tls.ensure_certificate("server.crt", "server.key")
print(time.perf_counter() - begun)
"""
# What scanners say of every certificate that no public authority has signed.
TESTSSL_EXPECTED = {
    "cert_chain_of_trust": "self-signed",
    "cert_revocation": "self-signed: there is no list to be revoked in",
    "DNS_CAArecord": "localhost has no DNS records",
    "HSTS": "only for a real host name",
    "engine_problem": "of the scanner's own openssl",
    "sessionresumption_ticket": "the scanner's s_client often hangs up before its TLS 1.3 ticket has come",
}
SSLYZE_EXPECTED = {
    "certificate_path_validation": "self-signed",
    "maximum_certificate_lifespan": "825 days, the most for a private issuer",
    "tls_curves": "X448 and P-521, stronger than that list's; Python cannot leave them out",
}
REFUSAL = r" (WARNING|ERROR) .*(certificate|key|\.crt)"
CLOSED = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1")
WEAK = {
    "heartbleed": ("is_vulnerable_to_heartbleed", False),
    "openssl_ccs_injection": ("is_vulnerable_to_ccs_injection", False),
    "session_renegotiation": ("is_vulnerable_to_client_renegotiation_dos", False),
    "tls_compression": ("supports_compression", False),
    "tls_fallback_scsv": ("supports_fallback_scsv", True),
    "tls_extended_master_secret": ("supports_ems_extension", True),
    "robot": ("robot_result", "NOT_VULNERABLE_RSA_NOT_SUPPORTED"),
}


def made():
    seconds = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(float(subprocess.check_output([PYTHON, "-c", MAKE], cwd=folder)))
    yield at_most("A1", "key and certificate made", max(seconds), 2, "s", "slowest of 5")


def scanned_by_testssl():
    testssl = program("testssl")
    with Service() as server:
        found = server.folder / "testssl.json"
        command = [testssl, "--quiet", "--color", "0", "--warnings", "off", "--openssl-timeout", "5"]
        command += ["--jsonfile", str(found), f"localhost:{server.port}"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=170)
        findings = {f["id"]: f for f in json.loads(found.read_text())}
    assert {"TLS1_2", "TLS1_3", "BREACH", "cert_chain_of_trust"} <= set(findings), "the scan did not come to its end"
    bad = {name: f["severity"] for name, f in findings.items() if f["severity"] not in ("OK", "INFO", "DEBUG")}
    expected = "; ".join(f"{name} {bad[name]}: {why}" for name, why in TESTSSL_EXPECTED.items() if name in bad)
    others = [f"{name} {bad[name]}: {findings[name]['finding']}" for name in bad if name not in TESTSSL_EXPECTED]
    yield none_of("A4", "findings of testssl.sh but those of being self-signed", others, f"expected: {expected}")


def scanned_by_sslyze():
    sslyze = Path(sys.executable).with_name("sslyze")
    if not sslyze.exists():
        raise NotRun("needs sslyze")
    with Service() as server:
        found = server.folder / "sslyze.json"
        command = [sslyze, f"--json_out={found}", f"localhost:{server.port}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
        scans = json.loads(found.read_text())["server_scan_results"][0]["scan_result"]
    assert "SCANS COMPLETED" in said and "COMPLIANCE" in said
    bad = [name for name in CLOSED if scans[f"{name}_cipher_suites"]["result"]["accepted_cipher_suites"]]
    bad += [name for name, (field, good) in WEAK.items() if scans[name]["result"][field] != good]
    complaints = re.findall(r"^ +\* (\w+): ", said.partition("COMPLIANCE")[2], re.M)
    bad += [name for name in complaints if name not in SSLYZE_EXPECTED]
    expected = "; ".join(f"{name}: {why}" for name, why in SSLYZE_EXPECTED.items() if name in complaints)
    yield none_of("A4", "findings of sslyze, Mozilla's intermediate list among them", bad, f"expected: {expected}")


def changed():
    """A new pair, then one whose halves do not belong together, while `ab` makes new connections all the time."""
    ab = program("ab")
    with Service() as server, tempfile.TemporaryDirectory() as other:
        command = [ab, "-q", "-t", "6", "-n", "1000000", "-c", "8", f"{server.url}/health"]
        load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        kept, first = server.kept(), shown(server.port)
        time.sleep(1)
        subprocess.run([PYTHON, "-c", MAKE], cwd=other, check=True, capture_output=True)
        for name in ("server.key", "server.crt"):
            os.replace(Path(other, name), server.folder / name)
        server.process.send_signal(signal.SIGHUP)
        seconds = wait_until(lambda: shown(server.port) not in (first, None), 4)
        second, before = shown(server.port), len(server.log())
        subprocess.run([PYTHON, "-c", MAKE], cwd=other, check=True, capture_output=True)
        os.replace(Path(other, "server.key"), server.folder / "server.key")
        server.process.send_signal(signal.SIGHUP)
        logged = wait_until(lambda: re.search(REFUSAL, server.log()[before:]), 2) < 2
        refused = logged and second is not None and shown(server.port) == second
        said, stays = load.communicate(timeout=30)[0], healthy(kept)
        kept.close()
    done, failed = (
        int((re.search(rf"{what} requests: +(\d+)", said) or [0, -1])[1]) for what in ("Complete", "Failed")
    )
    lost = f"{failed} of {done:,} failed" if done > 0 else "ab gave up"
    yield at_most("A3", "new connections see a new certificate", seconds, 2, "s", "after SIGHUP")
    yield is_true("A3", "no request is lost meanwhile", done > 0 and failed == 0 and stays, lost)
    yield is_true("A3", "a pair that does not belong together is refused and logged", refused)


def shown(port: int) -> str | None:
    """The certificate that a new connection gets."""
    with contextlib.suppress(OSError):
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=3)
    return None
