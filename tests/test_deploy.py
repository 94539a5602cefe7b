"""The files in deploy/: units and property lists that are well formed, sealed off, and right about phi3v."""

import os
import plistlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from phi3v import __main__ as cli
from phi3v import connection, server

DEPLOY = Path(__file__).parent.parent / "deploy"
# Tenths of 10, so 21 with systemd 252; newer ones look at more. What is left is the network, the home, a GPU's device.
EXPOSURE = 30
NGINX = (DEPLOY / "nginx.conf").read_text()


@pytest.fixture
def systemd_analyze(tmp_path):
    """A function that runs it for the units, with a home that has phi3v in it."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / ".local" / "bin" / "phi3v"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def systemd_analyze(*arguments: str) -> str:
        environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
        command = ["systemd-analyze", "--user", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return systemd_analyze


def test_the_units_are_what_systemd_understands(systemd_analyze):
    units = [str(path) for path in sorted(DEPLOY.glob("*@.*"))]
    assert len(units) == 3
    assert systemd_analyze("verify", *units) == ""  # it only warns of a key that it does not know


def test_the_service_is_sealed_off(systemd_analyze):
    threshold = ["--offline=true", f"--threshold={EXPOSURE}"]
    assert "Overall exposure level" in systemd_analyze("security", *threshold, str(DEPLOY / "phi3v@.service"))


def test_the_property_lists_are_valid_and_start_again_what_did_not_end_well():
    agent, health = (plistlib.loads((DEPLOY / f"{name}.plist").read_bytes()) for name in ("phi3v", "phi3v-health"))
    assert (agent["Label"], agent["KeepAlive"], agent["Umask"]) == ("phi3v", {"SuccessfulExit": False}, 0o077)
    assert (health["Label"], health["StartInterval"]) == ("phi3v-health", 60)
    for each in (agent, health):
        assert subprocess.run(["sh", "-n", "-c", each["ProgramArguments"][2]]).returncode == 0
    assert health["ProgramArguments"][2].endswith(f'"gui/$(id -u)/{agent["Label"]}"')


@pytest.mark.parametrize("answer, killed", [(0, False), (7, False), (28, True), (77, False)])
def test_health_checks_kill_who_does_not_answer_in_time_and_nobody_else(tmp_path, answer, killed):
    """With stand-ins for curl, which ends with that status, and for what kills."""
    for name, script in {"curl": f"exit {answer}", "systemctl": 'echo "$@"', "launchctl": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    home = tmp_path / "Library" / "Application Support" / "phi3v"
    home.mkdir(parents=True)
    unit = (DEPLOY / "phi3v-health@.service").read_text().replace("\\\n", " ").replace("%i", "8000").replace("$$", "$")
    unit = shlex.split(re.search("^ExecStart=(.*)$", unit, re.M)[1])
    agent = plistlib.loads((DEPLOY / "phi3v-health.plist").read_bytes())["ProgramArguments"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    said = [subprocess.run(each, env=environment, capture_output=True, text=True, timeout=60) for each in (unit, agent)]
    assert [each.returncode for each in said] == [0, 0]
    kills = ["--user kill --signal=KILL phi3v@8000.service\n", f"kill KILL gui/{os.getuid()}/phi3v\n"]
    assert [each.stdout for each in said] == (kills if killed else ["", ""])


def test_both_start_phi3v_with_options_that_it_has_and_wait_until_it_has_stopped():
    unit = (DEPLOY / "phi3v@.service").read_text()
    agent = plistlib.loads((DEPLOY / "phi3v.plist").read_bytes())
    for line in (unit.replace("%i", "8000"), agent["ProgramArguments"][2]):
        options = re.search(r'\.local/bin/phi3v"? (serve .*?)(?: >.*)?$', line, re.M)[1]
        assert cli._parser().parse_args(shlex.split(options)).port == 8000
    stop = 2 * server.STOP_SECONDS + 1
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M)[1]) > stop < agent["ExitTimeOut"]


def test_the_limits_of_nginx_are_above_those_of_phi3v():
    def seconds(name: str) -> int:
        return int(re.search(rf"^    {name} (\d+)s;", NGINX, re.M)[1])

    assert "client_max_body_size 32m;" in NGINX and connection.MAX_LINGER == 32 << 20
    assert server.Server.max_chat_content_length < connection.MAX_LINGER
    assert seconds("client_header_timeout") > connection.HEAD and seconds("client_body_timeout") > connection.BODY
    assert seconds("send_timeout") > connection.WRITE
    assert seconds("proxy_read_timeout") > max(server.KEEP_ALIVE, seconds("proxy_next_upstream_timeout"))
