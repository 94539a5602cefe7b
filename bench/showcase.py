"""Makes README's picture of the chat page, docs/page.png, from the running product: `make screenshots`.

Knows nothing of the page's insides but what a person sees: labels, and an answer that has ended.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parent.parent
SERVER_PYTHON = sys.prefix.removesuffix("-page") + "/bin/python"
QUESTIONS = "What is in this image?", "Where is the star?"
SIZE = {"width": 1000, "height": 740}
MOST = 150_000  # bytes of README's picture
# A headless machine has one plain font; Inter looks like what people have.
ALIAS = '<alias binding="strong"><family>{}</family><prefer><family>Inter</family></prefer></alias>'
FONTS = f"<fontconfig>{''.join(map(ALIAS.format, ('system-ui', 'sans', 'sans-serif')))}</fontconfig>"


def draw(file: Path) -> None:
    """Four shapes, with smooth edges."""
    image = Image.new("RGB", (1600, 1200), "white")
    draw = ImageDraw.Draw(image)
    draw.circle((400, 330), 210, (220, 30, 30))
    draw.rectangle((1000, 130, 1390, 520), (40, 80, 220))
    draw.regular_polygon((400, 890, 240), 3, fill=(30, 160, 60))
    corners = [(k * math.pi / 5, 105 if k % 2 else 250) for k in range(10)]
    draw.polygon([(1200 + r * math.sin(a), 880 - r * math.cos(a)) for a, r in corners], (245, 140, 30))
    image.resize((480, 360), Image.Resampling.LANCZOS).save(file)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store = home / ".pki" / "nssdb"
        store.mkdir(parents=True)
        (home / "fontconfig").mkdir()
        (home / "fontconfig" / "fonts.conf").write_text(FONTS)
        draw(home / "shapes.png")
        command = [SERVER_PYTHON, "-u", "-m", "phi3v", "serve", "--model", "demo", "--first-key", "--port", "0"]
        server = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True)
        printed = ""
        while not (key := re.search(r"^phi3v_\w{36}$", printed, re.M)):
            printed += server.stdout.readline() or sys.exit("the server has ended")
        url = re.search(r"https://localhost:\d+", printed)[0]
        subprocess.run(["certutil", "-d", f"sql:{store}", "-N", "--empty-password"], check=True)
        trust = ["-A", "-t", "P,,", "-n", "phi3v", "-i", str(home / "server.crt")]
        subprocess.run(["certutil", "-d", f"sql:{store}", *trust], check=True)
        environment = os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), env=environment)
            page = browser.new_page(viewport=SIZE)
            page.goto(f"{url}/#key={key[0]}")
            page.locator("input[type=file]").set_input_files(home / "shapes.png")
            for number, question in enumerate(QUESTIONS):
                page.locator("textarea").fill(question)
                expect(page.get_by_role("button", name="Send")).to_be_enabled()
                page.keyboard.press("Enter")
                answer = page.get_by_label("Answer").nth(number)
                expect(answer.get_by_role("button", name="Copy")).to_be_visible(timeout=60_000)
                print(f"{question} {answer.inner_text()!r}")
            page.screenshot(path=ROOT / "docs" / "page.png")
            browser.close()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    size = (ROOT / "docs" / "page.png").stat().st_size
    print(f"docs/page.png has {size:,} bytes")
    assert size <= MOST


if __name__ == "__main__":
    main()
