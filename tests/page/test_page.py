"""The chat page, as a person uses it: in Chromium, which verifies the certificate, before real servers."""

import base64
import io
import json
import re
import ssl
import statistics
import urllib.request
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ALLOWED, FOREIGN, ROOT
from PIL import Image
from playwright.sync_api import Error, expect

from phi3v import tls
from phi3v.request import Delta

CIRCLE = ROOT / "phi3v" / "demo" / "red-circle.png"
QUESTION = "What is shown in this image?"
PHONE = {"viewport": {"width": 320, "height": 600}, "has_touch": True}
FACTS = re.compile(r"Copy\S+\s·\s\d+\stokens\s·\s[\d.]+\stokens/s\s·\sfirst\safter\s[\d.]+\ss")
FILE = """([name, type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))
  const file = new File([bytes], name, { type })"""
DROP = FILE + "; const transfer = new DataTransfer(); transfer.items.add(file); return transfer }"
COPY = FILE + "; return navigator.clipboard.write([new ClipboardItem({ [type]: file })]) }"
CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}
PAINT = """new Promise((done) => new PerformanceObserver((list) => done(list.getEntries()[0].startTime))
  .observe({ type: 'paint', buffered: true }))"""


def enter(page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("Your question").last).to_be_focused()


def ask(page, text: str):
    """Send a question; returns the locator of its answer."""
    before = page.get_by_label("Answer").count()
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    return page.get_by_label("Answer").nth(before)


def drop(page, file: Path, kind: str = "image/png") -> None:
    contents = base64.b64encode(file.read_bytes()).decode()
    transfer = page.evaluate_handle(DROP, [file.name, kind, contents])
    for event in ("dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def text_of(answer):
    return answer.locator(".text")


def bodies(page) -> list[dict]:
    return [json.loads(request.post_data) for request in page.sent if request.method == "POST"]


def running(server, pair) -> int:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"X-API-Key": server.key})
    with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=pair[0])) as reply:
        return int(float(re.search(r"^phi3v_running_sequences (\S+)", reply.read().decode(), re.M)[1]))


def test_a_person_enters_a_key_drops_a_picture_reads_the_answer_and_asks_on(demo, open_page):
    page = open_page(demo.url, **CLIPBOARD)
    enter(page, demo.key)
    drop(page, CIRCLE)
    expect(page.get_by_role("img", name="red-circle.png")).to_be_visible()
    answer = ask(page, QUESTION)
    expect(text_of(answer)).to_have_text("A red circle.")
    expect(answer.locator(".facts")).to_have_text(FACTS)
    assert "demo-" in answer.locator(".facts").inner_text()  # nobody takes it for the real model
    answer.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "A red circle."
    expect(text_of(ask(page, QUESTION))).to_have_text("A red circle.")  # which it sees in the turn before
    first, second = bodies(page)
    assert first["messages"] == second["messages"][:1]
    assert second["messages"][1] == {"role": "assistant", "content": "A red circle."}
    assert [len(message["content"]) for message in second["messages"]] == [2, 13, 1]
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    expect(text_of(ask(page, "What is 3 + 4?"))).to_have_text("3 + 4 = 7.")
    assert len(bodies(page)[2]["messages"]) == 1


def test_pictures_are_attached_by_button_and_by_paste_and_can_be_removed(demo, open_page, tmp_path):
    page = open_page(f"{demo.url}/#key={demo.key}", **CLIPBOARD)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add images").click()
    Image.new("RGB", (100, 100), "blue").save(tmp_path / "blue.png")
    chooser.value.set_files([tmp_path / "blue.png", CIRCLE])
    expect(page.locator("#attached img")).to_have_count(2)
    page.get_by_role("button", name="Remove blue.png").click()
    expect(page.locator("img")).to_have_count(1)
    page.keyboard.press("Enter")  # without a word: the placeholder's question is asked
    expect(text_of(page.get_by_label("Answer"))).to_have_text("A red circle.")
    expect(page.get_by_label("You", exact=True)).to_have_text(QUESTION)
    page.get_by_role("button", name="New chat").click()
    page.wait_for_load_state()
    page.evaluate(COPY, ["a.png", "image/png", base64.b64encode(CIRCLE.read_bytes()).decode()])
    page.keyboard.press("Control+v")
    expect(page.get_by_role("img", name="image.png")).to_be_visible()
    expect(text_of(ask(page, QUESTION))).to_have_text("A red circle.")
    (sent,) = (part["image_url"]["url"] for part in bodies(page)[-1]["messages"][0]["content"][:-1])
    picture = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
    assert picture.convert("RGB").tobytes() == Image.open(CIRCLE).convert("RGB").tobytes()  # a small PNG loses nothing


def test_what_is_no_picture_is_said_to_be_none(demo, open_page, tmp_path):
    page = open_page(f"{demo.url}/#key={demo.key}")
    (tmp_path / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    drop(page, tmp_path / "IMG_1.heic", "image/heic")
    words = "This browser cannot read IMG_1.heic as a picture: save it as JPEG or PNG."
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.locator("img")).to_have_count(0)
    drop(page, CIRCLE, "image/png")
    expect(page.locator("img")).to_have_count(1)
    expect(page.get_by_role("alert")).to_be_hidden()  # it was about the one before


def test_a_photograph_of_12_megapixels_is_turned_upright_made_smaller_and_answered(demo, open_page, tmp_path):
    photo = Image.effect_noise((4000, 3000), 40).convert("RGB")
    photo.paste(Image.open(CIRCLE).convert("RGB").resize((2600, 2600)), (700, 200))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "CANARY"  # turned by 90°; the camera's maker
    photo.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    assert (tmp_path / "photo.jpg").stat().st_size > 4_000_000
    page = open_page(f"{demo.url}/#key={demo.key}")
    drop(page, tmp_path / "photo.jpg", "image/jpeg")
    expect(page.get_by_role("img", name="photo.jpg")).to_be_visible(timeout=30_000)
    answer = ask(page, QUESTION)
    expect(answer.locator(".facts")).to_have_text(FACTS, timeout=30_000)
    assert len(page.sent[-1].post_data) < 1_500_000 and "CANARY" not in page.sent[-1].post_data
    url = bodies(page)[0]["messages"][0]["content"][0]["image_url"]["url"]
    raw = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    width, height = Image.open(io.BytesIO(raw)).size
    assert b"CANARY" not in raw and height / width == pytest.approx(4 / 3, 0.01)
    assert 0.99 < width * height / (16 * 336 * 336) < 1.01


def test_a_key_stays_over_a_reload_and_is_in_no_address_that_the_server_sees(demo, open_page):
    page = open_page(f"{demo.url}/#key={demo.key}")
    assert page.url == f"{demo.url}/"
    expect(text_of(ask(page, "Hello, world!"))).to_have_text(re.compile("Hello"))
    page.reload()
    expect(page.locator("#text")).to_be_focused()
    expect(text_of(ask(page, "Hello, world!"))).to_have_text(re.compile("Hello"))
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 1]
    secret = demo.key.removeprefix("phi3v_")
    sent = [request.url.partition("#")[0] + str(request.headers.get("referer")) for request in page.sent]
    assert {url for url in sent if secret in url} == set() and len(sent) == 4
    assert secret not in demo.log.read_text() and '"/"' in demo.log.read_text()
    page.get_by_role("button", name="Change key").click()
    page.reload()
    expect(page.get_by_label("API key")).to_be_focused()


def test_stop_ends_the_generation_on_the_server_and_keeps_what_was_said(endless, open_page, pair):
    page = open_page(f"{endless.url}/#key={endless.key}")
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        answer = ask(page, "Go on")
        expect(text_of(answer)).to_have_text(re.compile(".{1000}", re.S))
        assert running(endless, pair) == 1
        stop()
        expect(answer.locator(".facts")).to_contain_text("stopped")
        for _ in range(200):
            if not running(endless, pair):
                break
            page.wait_for_timeout(50)
        assert running(endless, pair) == 0
        expect(page.locator("#text")).to_be_focused()
    assert [turn["role"] for turn in bodies(page)[1]["messages"]] == ["user", "assistant", "user"]


def at(site) -> str:
    return f"https://localhost:{site.port}/#key={site.secret}"


def test_an_answer_is_shown_as_it_comes_and_read_out_once(site, open_page):
    def pieces(_):
        for i in range(200):
            yield Delta(0, f"word{i} ", None, 5, i + 1)
            if i == 99:
                site.llm.gate.wait(30)
        yield Delta(0, "", "length", 5, 200)

    site.llm._pieces = pieces
    site.llm.gate.clear()
    page = open_page(at(site))
    page.evaluate("""() => { window.said = []
      new MutationObserver(() => said.push(document.getElementById('status').textContent))
        .observe(document.getElementById('status'), { childList: true }) }""")
    answer = ask(page, "Tell me")
    expect(text_of(answer)).to_have_text(re.compile("word99 $"))
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    site.llm.gate.set()
    expect(answer.locator(".facts")).to_contain_text("200 tokens")
    expect(answer.locator(".facts")).to_contain_text("cut off at the limit")
    first, last = page.evaluate("said")
    assert first == "Asked" and last.split() == [f"word{i}" for i in range(200)]


def test_a_missing_and_an_unknown_key_are_refused_in_the_servers_words(site, open_page):
    page = open_page(f"https://localhost:{site.port}/")
    for secret, words in (("", "the API key is missing"), ("phi3v_no", "the API key is unknown, expired or deleted")):
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("alert")).to_contain_text(words)
        expect(page.locator("#text")).to_be_hidden()
    enter(page, site.secret)
    expect(text_of(ask(page, "abc"))).to_have_text("cba")
    site.keys.delete(site.key.id)
    drop(page, CIRCLE)
    expect(page.locator("img")).to_have_count(1)
    ask(page, "and this?")
    expect(page.get_by_role("alert")).to_contain_text("the API key is unknown")
    _, other = site.keys.create("other", 1000)
    enter(page, other)
    assert page.locator("#text").input_value() == "and this?"  # nothing is lost, the conversation neither
    expect(page.get_by_role("img", name="red-circle.png")).to_be_visible()
    expect(text_of(page.get_by_label("Answer"))).to_have_text("cba")


def test_what_is_too_large_is_said_in_the_servers_words_and_can_be_made_smaller(site, open_page):
    site.server.max_chat_content_length = 1000
    page = open_page(at(site))
    ask(page, "x" * 2000)
    expect(page.get_by_role("alert")).to_contain_text("at most 1,000 are allowed")
    expect(page.get_by_role("article")).to_have_count(0)
    assert page.locator("#text").input_value() == "x" * 2000
    expect(text_of(ask(page, "abc"))).to_have_text("cba")


def test_a_used_up_limit_is_counted_down_and_then_the_question_can_be_sent(site, open_page, clock):
    site.keys.update(site.key.id, rate_limit=1)
    page = open_page("about:blank")
    page.clock.install()
    page.goto(at(site))
    expect(text_of(ask(page, "abc"))).to_have_text("cba")
    ask(page, "def")
    expect(page.get_by_role("alert")).to_contain_text("this key's 1 requests per minute are used up")
    expect(page.get_by_text("You can send it again in 60 s.")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.clock.run_for(20_000)
    expect(page.locator("#wait")).to_have_text(re.compile("in (39|40) s"))
    page.keyboard.press("Enter")
    assert len(bodies(page)) == 2
    page.clock.run_for(41_000)
    clock.now += 60
    expect(page.locator("#wait")).to_be_empty()
    expect(page.locator("#problem")).to_be_empty()
    page.locator("#text").press("Enter")
    expect(text_of(page.get_by_label("Answer").nth(1))).to_have_text("fed")


def test_a_server_that_is_gone_is_said_to_be_gone(site, open_page):
    page = open_page(at(site))
    page.context.set_offline(True)
    ask(page, "abc")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer: is it running?")
    assert page.locator("#text").input_value() == "abc"


HOSTILE = [
    "<img src=x onerror=hacked=1>",
    "```\n<img src=x onerror=hacked=1><script>hacked=1</script>\n```",
    "- **<img src=x onerror=hacked=1>** `<svg onload=hacked=1>`",
    "<script>hacked=1</script><iframe src=/health></iframe><link rel=stylesheet href=/x><a href=/x ping=/x>a</a>",
    '"><style>@import "/x"</style><base href=/x/>![x](/x.png) [y](javascript:hacked=1)',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_an_answer_is_text_makes_no_request_and_runs_nothing(site, open_page, text):
    page = open_page(at(site))
    answer = ask(page, text[::-1])  # this model answers with the reverse
    expect(answer.locator(".facts")).to_be_visible()
    shown = text.replace("```\n", "").replace("\n```", "").replace("- **", "").replace("**", "").replace("`", "")
    expect(text_of(answer)).to_have_text(shown)
    tags = answer.locator(".text *").evaluate_all("(all) => all.map((one) => one.tagName)")
    assert set(tags) <= {"PRE", "DIV", "CODE", "STRONG"}
    assert answer.locator(".text [src], .text [href], .text [style]").count() == 0
    page.wait_for_timeout(100)
    assert [request.url.partition("/v1/")[2] for request in page.sent] == ["", "chat/completions"]
    assert page.evaluate("typeof hacked") == "undefined"


@pytest.mark.parametrize("piece", ["- ", "`a` ", "- `a`", "* ```"])
def test_no_answer_is_too_much_for_the_page(site, open_page, piece):
    said = piece * 50_000 + "end"
    site.llm._pieces = lambda _: iter([Delta(0, said, "stop", 5, 9)])
    page = open_page(at(site))
    answer = ask(page, "Go on")
    expect(answer.locator(".facts")).to_be_visible(timeout=60_000)
    expect(text_of(answer)).to_have_text(re.compile("end$"))


def test_a_link_with_another_key_does_not_take_the_place_of_a_persons_own_unasked(site, open_page):
    page, asked = open_page(at(site)), []
    _, other = site.keys.create("other", 1000)
    for accept, used in ((False, site.secret), (True, other)):
        answer = "accept" if accept else "dismiss"
        page.once("dialog", lambda dialog, answer=answer: asked.append(dialog.message) or getattr(dialog, answer)())
        page.goto("about:blank")
        page.goto(f"https://localhost:{site.port}/#key={other}")
        assert page.evaluate("[key, sessionStorage.getItem('key'), location.hash]") == [used, used, ""]
    assert asked == ["This link brings another API key. Use it instead of yours?"] * 2
    page.goto("about:blank")
    page.goto(f"https://localhost:{site.port}/#key={other}%0A%C3%A9")  # the same, and what no header takes
    assert len(asked) == 2
    expect(text_of(ask(page, "abc"))).to_have_text("cba")


def test_everything_can_be_done_with_the_keyboard_alone(demo, open_page):
    page = open_page(demo.url)
    page.keyboard.type(demo.key)
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("3 + 4?")
    assert page.locator("#text").input_value() == "What is\n3 + 4?"
    page.locator("#text").fill("What is 3 + 4?")
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.title || document.activeElement.textContent"))
        shown = "getComputedStyle(document.activeElement).outlineStyle"
        assert order[-1][:1] in ("", "\n") or page.evaluate(shown) == "solid", order[-1]
    assert order[0] == "Send (Enter)" and {"Change key", "Add images"} <= set(order)
    while page.evaluate("document.activeElement.id") != "text":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    answer = page.get_by_label("Answer")
    expect(text_of(answer)).to_have_text("3 + 4 = 7.")
    expect(answer.locator(".facts")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.title") == "Add images"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy"


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE, PHONE | {"color_scheme": "dark"}], ids=str)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_window(site, open_page, options):
    said = "- **a** `b`\n- " + "wide" * 50 + "\n\n```\nprint(1)\n```\nand then"
    site.llm._pieces = lambda _: iter([Delta(0, said, "stop", 5, 9)])
    site.keys.update(site.key.id, rate_limit=2)
    page = open_page(f"https://localhost:{site.port}/", **options)

    def look(state: str) -> None:
        found = Axe().run(page).response["violations"]
        worst = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]
        assert worst == [], state
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

    look("no key")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).not_to_be_empty()
    look("refused")
    enter(page, site.secret)
    look("empty")
    drop(page, CIRCLE)
    expect(page.locator("img")).to_have_count(1)
    look("a picture")
    answer = ask(page, "narrow")
    expect(answer.locator(".facts")).to_be_visible()
    look("an answer")
    expect(ask(page, "again").locator(".facts")).to_be_visible()
    ask(page, "too much")
    expect(page.locator("#wait")).not_to_be_empty()
    look("used up")


def test_the_page_is_one_small_request_and_is_painted_at_once(demo, open_page):
    paints = []
    while len(paints) < 7 or (min(paints) >= 200 and len(paints) < 40):  # other work on the machine can only add to it
        page = open_page(demo.url)
        paints.append(page.evaluate(PAINT))
        assert [request.url for request in page.sent] == [f"{demo.url}/"]
        assert page.sent[0].sizes()["responseBodySize"] <= 40_000
    print(f"first paint: {min(paints):.0f} ms, median {statistics.median(paints):.0f} ms of {len(paints)} new windows")
    assert min(paints) < 200


@pytest.mark.parametrize("name", [ALLOWED, tls.public_name("0.0.0.0"), "127.0.0.1"])
def test_the_page_works_under_another_name_whose_certificate_is_verified(demo, open_page, name):
    page = open_page(f"https://{name}:{demo.port}/#key={demo.key}")
    assert page.evaluate("[isSecureContext, location.hostname]") == [True, name]
    expect(text_of(ask(page, "What is 3 + 4?"))).to_have_text("3 + 4 = 7.")


def test_a_name_that_the_certificate_lacks_is_refused_by_the_browser(demo, open_page):
    with pytest.raises(Error, match="ERR_CERT_COMMON_NAME_INVALID"):
        open_page(f"https://{FOREIGN}:{demo.port}/")
