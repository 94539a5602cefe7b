"""A recording of the terminal from the running product: into docs/terminal.txt, and its beginning into README.

    python bench/recording.py

The commands run for real, in an empty folder. What differs from machine to machine is written as one of everybody's:
the folder and the machine's name; keys are cut off.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
README, WHOLE = ROOT / "README.md", ROOT / "docs" / "terminal.txt"
WIDTH = 150  # characters of a line; the curl line that `serve` prints holds a picture
SHORT = [
    "export PHI3V_MODEL=demo",
    'phi3v generate "What is shown in this image?" --image red-circle.png',
    'phi3v generate "What is shown in this image?" --each photos/*.png --out captions.jsonl; head -n 1 captions.jsonl',
]
MORE = [
    "echo 'What is 3 + 4?' | phi3v generate - --json",
    'phi3v generate "What is shown in this image?" --image no.png',
    'phi3v create --name "MyApp" --rate-limit 100',
    "phi3v list",
    "phi3v chat --no-browser",
    "phi3v serve --host 0.0.0.0",
]
LAST = {"phi3v chat": "end with Ctrl-C", "phi3v serve": "curl"}  # what a command that stays says when it is ready


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copy(ROOT / "phi3v" / "demo" / "red-circle.png", folder)
        (folder / "photos").mkdir()
        for i, colour in enumerate(("green", "blue", "red")):
            image = Image.new("RGB", (336, 336), "white")
            ImageDraw.Draw(image).rectangle((80, 80, 256, 256), fill=colour)
            image.save(folder / "photos" / f"{i + 1}.png")
        short, more = (["".join(record(command, folder) for command in part)] for part in (SHORT, MORE))
    WHOLE.write_text(short[0] + more[0])
    pattern = r"(?<=<!-- python bench/recording.py -->\n```console\n).*?(?=```)"
    text, count = re.subn(pattern, lambda _: short[0], README.read_text(), count=1, flags=re.DOTALL)
    assert count == 1, "README has lost its marker"
    README.write_text(text)


def record(command: str, folder: Path) -> str:
    """The command behind a $, and what it shows, as far as it is the same everywhere."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PHI3V_MODEL": "demo"}
    script = f'phi3v() {{ "{sys.executable}" -m phi3v "$@"; }}; {command}'
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    shown, last = "", next((word for start, word in LAST.items() if command.startswith(start)), None)
    with subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment, **options) as process:
        for line in process.stdout:
            shown += line
            if last and last in line:
                shown += "^C\n"
                os.killpg(process.pid, signal.SIGINT)
                last = None
    machine = re.escape(socket.gethostname().split(".")[0].lower())
    named = {re.escape(str(folder)): "/home/me/phi3v", rf"\b{machine}\b": "my-machine", r"(phi3v_\w{4})\w{32}": r"\1…"}
    for pattern, word in named.items():
        shown = re.sub(pattern, word, shown)
    lines = [line if len(line) <= WIDTH else line[:WIDTH] + " …" for line in shown.splitlines()]
    return "\n".join([f"$ {command}", *lines, ""])


if __name__ == "__main__":
    main()
