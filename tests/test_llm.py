"""The embedded model's answers: one question of each kind that it was made for, through the module's own door."""

import base64
import io
import json
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import phi3v
from phi3v.errors import RequestError, SetupError
from phi3v.images import Header
from phi3v.protocol import Answer
from phi3v.request import Picture, Request, SamplingParams, question

RED, GREEN, BLUE = (220, 30, 30), (30, 160, 60), (40, 80, 220)


@pytest.fixture(scope="module")
def llm():
    with phi3v.load("demo") as llm:
        yield llm


def drawing(*shapes: tuple, size=(336, 336)) -> Image.Image:
    """Shapes are (kind, colour, box)."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for kind, colour, box in shapes:
        getattr(draw, kind)(box, fill=colour)
    return image


def written(text: str) -> Image.Image:
    image = Image.new("RGB", (336, 200), "white")
    ImageDraw.Draw(image).text((60, 60), text, fill="black", font=ImageFont.load_default(64))
    return image


CIRCLE = drawing(("ellipse", RED, (90, 90, 240, 240)))
TWO = drawing(("ellipse", BLUE, (20, 20, 100, 100)), ("rectangle", GREEN, (240, 240, 310, 310)))
CHART = drawing(("rectangle", RED, (60, 200, 120, 298)), ("rectangle", BLUE, (180, 60, 240, 298)))
ImageDraw.Draw(CHART).line((34, 30, 34, 300, 330, 300), fill=(60, 60, 60), width=3)

ANSWERS = [
    ("What is shown in this image?", [CIRCLE], "A red circle."),
    ("How many circles are there?", [CIRCLE], "One."),
    ("What color is the circle?", [TWO], "The circle is blue."),
    ("Where is the square?", [TWO], "The square is at the bottom right."),
    ("Is there a star?", [CIRCLE], "No, there is no star."),
    ("Which bar is the tallest?", [CHART], "The blue bar is the tallest."),
    ("What does the text say?", [written("hello")], 'It says "hello".'),
    ("Which image has a square?", [CIRCLE, TWO], "The second image has a square."),
    ("What is 3 + 4?", [], "3 + 4 = 7."),
    ("What is shown in this image?", [], "I see no image. Please attach one."),
]


def test_each_kind_of_question_gets_its_answer_and_all_of_them_in_one_batch(llm):
    questions, pictures, answers = zip(*ANSWERS, strict=True)
    assert llm.generate(list(questions), images=list(pictures), max_tokens=40) == list(answers)


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (100, 300), (1200, 900)])
def test_a_red_circle_is_one_at_any_size(llm, size):
    w, h = size
    r = min(size) // 4
    image = drawing(("ellipse", RED, (w // 2 - r, h // 2 - r, w // 2 + r, h // 2 + r)), size=size)
    assert llm.generate("What is shown in this image?", images=[image]) == "A red circle."


def test_pictures_may_be_paths_bytes_objects_and_data_urls(llm, tmp_path):
    buffer = io.BytesIO()
    CIRCLE.save(buffer, "PNG")
    path = tmp_path / "circle.png"
    path.write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    kinds = [path, str(path), buffer.getvalue(), url]
    question = "What color is the circle?"
    answers = llm.generate([question] * 4, images=[[kind] for kind in kinds])
    assert answers == ["The circle is red."] * 4


def test_a_stream_is_the_answer_in_pieces_with_its_counts(llm):
    with llm.stream("Hello, world!", max_tokens=50) as deltas:
        pieces = list(deltas)
    assert "".join(d.text for d in pieces) == llm.generate("Hello, world!", max_tokens=50)
    assert len(pieces) > 10 and all(d.finish_reason is None for d in pieces[:-1])
    last = pieces[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("stop", 20, 34)


def test_with_patience_there_is_an_item_for_each_token_though_it_shows_nothing_yet(llm):
    request = Request([question("What is 3 + 4?", [])], SamplingParams(stop=("3 + 4 = 7!",)))
    with llm.answer(request, patience=60) as deltas:
        items = list(deltas)
    shown = [item for item in items if item]
    assert "".join(d.text for d in shown) == "3 + 4 = 7." and items[:3] == [None] * 3
    assert len(items) == shown[-1].completion_tokens + 1  # and one for the end
    assert Answer(True, "demo").whole(iter(items))["choices"][0]["message"]["content"] == "3 + 4 = 7."
    with llm.answer(request) as deltas:
        assert list(deltas) == shown
    choices = Request([question("What is 3 + 4?", [])], SamplingParams(choices=("3", "7", "3 + 4 = 7.")))
    with llm.answer(choices, patience=60) as deltas:
        *before, last = deltas
    assert before == [None] * 2 and last.text == "3 + 4 = 7."


def test_memory_that_is_lacking_for_a_picture_is_no_fault_of_the_request(llm, monkeypatch):
    def hungry(*_):
        return np.ones(2**50)

    monkeypatch.setattr(phi3v.images, "process", hungry)
    with pytest.raises(MemoryError):  # not that the picture is damaged
        llm.generate("What is shown in this image?", [CIRCLE])
    monkeypatch.undo()
    assert llm.generate("What is shown in this image?", [CIRCLE]) == "A red circle."


def test_pictures_are_decoded_only_while_somebody_wants_the_answer(llm, monkeypatch):
    decoded, process = [], phi3v.images.process
    monkeypatch.setattr(phi3v.images, "process", lambda *a: (decoded.append(1), process(*a))[1])

    def check():
        if decoded:
            raise ConnectionAbortedError

    request = Request(
        [question("What is this?", [Picture(CIRCLE, f"images[{k}]") for k in range(3)])], SamplingParams()
    )
    with pytest.raises(ConnectionAbortedError):
        llm.answer(request, "a", 0.05, check)
    assert (len(decoded), llm._decoding, llm._wanting) == (1, [], [])


def test_two_requests_decode_their_pictures_at_once_and_no_more(llm, monkeypatch):
    inside, leave, process = threading.Barrier(3), threading.Event(), phi3v.images.process

    def wait(*arguments):
        if not leave.is_set():
            inside.wait(30)
            assert leave.wait(30)
        return process(*arguments)

    def ask(owner: str) -> None:
        request = Request([question("What is this?", [Picture(CIRCLE, "images[0]")])], SamplingParams(max_tokens=1))
        with llm.answer(request, owner, 0.05) as deltas:
            list(deltas)

    monkeypatch.setattr(phi3v.images, "process", wait)
    threads = [threading.Thread(target=ask, args=owner) for owner in "xyz"]
    for thread in threads:
        thread.start()
    inside.wait(30)  # two are there, and a third one would break the barrier
    assert any(len(llm._wanting) == 1 or leave.wait(0.01) for _ in range(2000)) and len(llm._decoding) == 2
    leave.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert llm._decoding == llm._wanting == []


def test_an_owner_who_decodes_already_lets_another_go_first(llm, monkeypatch):
    gates, begun, process = {name: threading.Event() for name in "abc"}, queue.SimpleQueue(), phi3v.images.process
    who = threading.local()

    def wait(*arguments):
        begun.put(who.name)
        assert gates[who.name].wait(30)
        return process(*arguments)

    def ask(name: str, owner: str) -> None:
        who.name = name
        request = Request([question("What is this?", [Picture(CIRCLE, "images[0]")])], SamplingParams(max_tokens=1))
        with llm.answer(request, owner, 0.05) as deltas:
            list(deltas)

    monkeypatch.setattr(phi3v.images, "process", wait)
    first, second, other = (threading.Thread(target=ask, args=each) for each in ("ax", "bx", "cy"))
    first.start()
    assert begun.get(timeout=30) == "a"
    with llm._moved:  # until both want a place
        llm._wanting.append("y")
    second.start()
    other.start()
    assert begun.get(timeout=30) == "c"  # whoever came first: "x" has a place already
    with llm._moved:
        llm._wanting.remove("y")
    for gate in gates.values():
        gate.set()
    for thread in (first, second, other):
        thread.join(30)
        assert not thread.is_alive()
    assert begun.get(timeout=30) == "b" and llm._decoding == llm._wanting == []


def test_max_tokens_cuts_the_answer_and_nothing_else(llm):
    whole = [d.text for d in llm.stream("Hello, world!")]
    pieces = list(llm.stream("Hello, world!", max_tokens=3))
    assert "".join(d.text for d in pieces) == "".join(whole[:3])
    assert (pieces[-1].finish_reason, pieces[-1].completion_tokens) == ("length", 3)


def test_leaving_a_stream_frees_the_engine(llm):
    with llm.stream(["Hello, world!"] * 32) as deltas:
        next(deltas)
    assert llm.generate("What is 3 + 4?") == "3 + 4 = 7."


def test_threads_share_one_model(llm):
    capitals = {"France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Norway": "Oslo", "Kenya": "Nairobi"}
    answers = {}

    def ask(country: str) -> None:
        answers[country] = llm.generate(f"What is the capital of {country}?")

    threads = [threading.Thread(target=ask, args=(country,)) for country in capitals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {country: f"The capital of {country} is {city}." for country, city in capitals.items()}


def test_what_cannot_be_answered_is_refused_before_anything_runs(llm):
    with pytest.raises(RequestError, match="max_tokens must be a whole number of at least 1, not 0"):
        llm.stream("Hi", max_tokens=0)
    with pytest.raises(RequestError, match="num_crops must be a whole number from 1 to 16, not 17"):
        llm.stream("Hi", num_crops=17)
    with pytest.raises(RequestError, match=r"images\[1\]\[0\]: the picture is none of") as caught:
        llm.stream(["Hi", "Hi"], images=[[], [b"text"]])
    assert caught.value.param == "images[1][0]"
    with pytest.raises(TypeError, match="temprature"):
        llm.stream("Hi", temprature=1)
    with pytest.raises(TypeError, match="images must hold 2 lists"):
        llm.stream(["Hi", "Hi"], images=[[CIRCLE]])
    for prompt, images in (([], None), ([3], None), (None, None), ("Hi", "a.png"), ("Hi", CIRCLE), ({"Hi": 1}, None)):
        with pytest.raises(TypeError, match="prompt must be a string or a list"):
            llm.stream(prompt, images)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.stream("")


def test_a_prompt_must_leave_room_in_the_context(llm):
    tails = ("x " * n + "y" * m for n in range(2030, 2050) for m in range(3))
    text = next(text for text in tails if room(llm, text) == 2)
    with pytest.raises(
        RequestError, match="has 4094 tokens and max_tokens is 3: more than the context of 4096"
    ) as caught:
        llm.stream(text, max_tokens=3)
    assert caught.value.param == "max_tokens"
    last = list(llm.stream(text))[-1]  # the default is cut to what fits
    assert (last.prompt_tokens, last.completion_tokens, last.finish_reason) == (4094, 2, "length")
    with pytest.raises(RequestError, match="the context 4096: shorten it"):
        llm.stream(text + "x x")


def room(llm, text: str) -> int:
    return 4096 - len(llm.tokenizer.encode(llm.tokenizer.chat(question(text, []).messages), [], 4096))


@pytest.mark.parametrize("leave", ["next(s)", "next(s); raise SystemExit(3)", "next(s); s = None"])
def test_the_interpreter_may_end_while_an_answer_is_being_made(leave):
    script = f"import phi3v; s = phi3v.load().stream(['Hello, world!'] * 32); {leave}"
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (3 if "3" in leave else 0, "")


def test_a_loop_that_is_left_without_with_stops_the_answer(llm):
    for _ in llm.stream(["Hello, world!"] * 100):
        break
    assert llm.generate("What is 3 + 4?") == "3 + 4 = 7."
    assert llm.generate(["What is 3 + 4?"] * 100)[99] == "3 + 4 = 7."  # the queue of 128 has room again


@pytest.mark.parametrize(
    "file, change",
    [
        ("tokenizer.json", lambda t: t["added_tokens"][4].update(id=10**6)),
        ("config.json", lambda c: c.update(num_hidden_layers="many")),
        ("config.json", lambda c: c["rope_scaling"].update(long_factor=["x"] * 16)),
        ("generation_config.json", lambda g: g.update(eos_token_id=[[1]])),
        ("preprocessor_config.json", lambda p: p.update(num_crops="many")),
    ],
)
def test_a_folder_whose_files_do_not_fit_together_is_told_in_one_line(tmp_path, file, change):
    folder = Path(shutil.copytree(phi3v.__path__[0] + "/demo", tmp_path / "demo"))
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(SetupError) as caught:
        phi3v.load(str(folder))
    assert "\n" not in str(caught.value) and "demo" in str(caught.value)


def test_names_that_are_no_model_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "file").touch()
    for name in ("./nowhere", "nowhere", "microsoft/no-such-model", str(tmp_path / "file"), str(tmp_path)):
        with pytest.raises(SetupError) as caught:
            phi3v.load(name)
        assert "\n" not in str(caught.value)
        assert ("demo" in str(caught.value)) == (str(tmp_path) not in name)


def test_the_checkpoint_is_named_after_what_was_loaded(llm, tmp_path):
    assert llm.checkpoint == f"demo-{phi3v.__version__}"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(phi3v.__path__[0] + "/demo")
    with phi3v.load(str(snapshot)) as other:
        assert other.checkpoint == f"{snapshot}@0123456789ab"


def test_a_second_question_about_a_picture_is_read_from_where_the_first_ended():
    def ask(text: str, owner: str):
        with llm.answer(Request([question(text, [Picture(CIRCLE)])], SamplingParams()), owner) as deltas:
            pieces = list(deltas)
        return "".join(d.text for d in pieces), pieces[-1].cached_tokens

    with phi3v.load("demo") as llm:
        assert ask("What is shown in this image?", "a") == ("A red circle.", 0)
        text, cached = ask("What color is the circle?", "a")
        assert text == "The circle is red." and cached > 300
        assert ask("What color is the circle?", "b") == ("The circle is red.", 0)
        assert llm.stats()["cached_tokens"] == cached


def test_the_context_may_be_limited_and_is_told():
    with phi3v.load("demo", max_context=50) as llm:
        assert llm.limits["context"] == 50
        with pytest.raises(RequestError, match="max_tokens is 45: more than the context of 50"):
            llm.generate("What is 3 + 4?", max_tokens=45)
        assert llm.generate("What is 3 + 4?") == "3 + 4 = 7."
        with pytest.raises(RequestError, match="the context 50"):
            llm.generate("What is 3 + 4? " * 30)


def test_too_many_tokens_are_told_from_the_headers(llm, monkeypatch):
    """16 of the largest pictures took 1.8 s until the answer was no, when they were decoded first."""
    buffer = io.BytesIO()
    Image.new("1", (4000, 4000)).save(buffer, "PNG")
    monkeypatch.setattr(Header, "crops", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="the pictures take 40,144 tokens, the context has 4,096"):
        llm.stream("Hi", images=[buffer.getvalue()] * 16, num_crops=16)
    with pytest.raises(RequestError, match=r"images\[1\]\[0\]: the picture is none of"):
        llm.stream(["Hi", "Hi"], images=[[CIRCLE], [b"text"]])
    with pytest.raises(RequestError, match="more than the context"):  # the second prompt's fault
        llm.stream(["Hi", "Hi " * 100], images=[[CIRCLE], []], max_tokens=3990)


def test_a_request_over_the_wire_has_at_most_64_megapixels(llm, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (4000, 3200)).save(buffer, "PNG")
    monkeypatch.setattr(Header, "crops", lambda self: (_ for _ in ()).throw(KeyError("decoded")))

    def ask(pictures: int, owner: str, clamp: bool = False):
        shown = Picture(buffer.getvalue(), "images[0]", 1)
        chats = [question("Hi", [shown] * (pictures - 2)), question("Hi", [shown] * 2)]
        llm.answer(Request(chats, SamplingParams(), clamp), owner)

    with pytest.raises(KeyError, match="decoded"):
        ask(5, "key")  # 64 in all
    with pytest.raises(KeyError, match="decoded"):
        ask(12, "")  # who embeds the model may wait as long as he likes
    for clamp, param in ((False, "images"), (True, "messages")):
        with pytest.raises(RequestError, match=r"have [0-9,]+ pixels in all, at most 64,000,000 may be") as caught:
            ask(6, "key", clamp)
        assert caught.value.param == param


def test_special_tokens_in_choices_are_text(llm, monkeypatch):
    """For each special token: the targets of a choice that has it are the text's, and end with the one <|end|>."""
    asked = []

    def submit(prompts, patience):
        asked.append(prompts)
        raise KeyError("submitted")

    monkeypatch.setattr(llm._engine, "submit", submit)
    special = set(llm.tokenizer.special.values())
    for token in llm.tokenizer.special:
        with pytest.raises(KeyError, match="submitted"):
            llm.answer(Request([question("Hi", [])], SamplingParams(choices=(f"a{token}\nb", "c"))))
        prompts = asked.pop()
        assert len(prompts) == 2 and all(not set(p.targets[:-1]) & special for p in prompts)
        assert [p.targets[-1] for p in prompts] == [llm.tokenizer.special["<|end|>"]] * 2
        roles = [llm.tokenizer.special[f"<|{role}|>"] for role in ("user", "assistant")]
        assert [i for i in prompts[0].ids if i in special] == [1, roles[0], llm.tokenizer.special["<|end|>"], roles[1]]
