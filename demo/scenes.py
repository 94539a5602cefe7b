"""Drawings, and conversations about them whose answers are known because code made the drawings.

A maker (`shapes`, `text`, …) returns a Drawing: a picture, a map of labels with one code for what each pixel shows, and
`talk`, which draws one more conversation about it: (task, [(question, answer), …]). `plain` needs no picture. All
randomness comes from the `random.Random` that is passed in. Knows nothing of the model or of the tokenizer.
"""

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from words import ABOUT, CAPITALS, CHAT, GOODS, HELLO, IMAGELESS, THANKS, THINGS, UNKNOWN, WORDS

SIDE = 336
FONT_FILES = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansCondensed DejaVuSansMono DejaVuSansMono-Bold
DejaVuSerif DejaVuSerif-Bold LiberationSans-Regular LiberationSans-Bold LiberationSans-Italic LiberationSerif-Regular
LiberationSerif-Bold LiberationSerif-Italic LiberationMono-Regular LiberationMono-Bold LiberationSansNarrow-Regular
Lato-Regular Lato-Bold Roboto-Regular Roboto-Bold RobotoCondensed-Regular ComicNeue-Regular ComicNeue-Bold""".split()
FONT_FOLDERS = [Path(__file__).parent / "fonts", Path("/usr/share/fonts")]
COLORS = {  # what people call by that name: CSS's, matplotlib's and softer ones
    "red": [(220, 30, 30), (255, 0, 0), (230, 60, 50)],
    "green": [(30, 160, 60), (0, 128, 0), (0, 200, 0), (44, 160, 44)],
    "blue": [(40, 80, 220), (0, 0, 255), (30, 60, 160), (31, 119, 180)],
    "yellow": [(245, 215, 40), (255, 255, 0)],
    "orange": [(245, 140, 30), (255, 165, 0), (255, 127, 14)],
    "purple": [(140, 50, 170), (128, 0, 128), (148, 103, 189)],
    "pink": [(245, 130, 180), (255, 105, 180), (255, 192, 203)],
    "black": [(20, 20, 20), (0, 0, 0)],
    "brown": [(130, 80, 40), (139, 69, 19), (165, 42, 42)],
    "gray": [(130, 130, 130), (128, 128, 128), (105, 105, 105), (160, 160, 160)],
    "white": [(255, 255, 255), (248, 248, 248)],
}
NAMES = list(COLORS)
KINDS = "circle square triangle star diamond hexagon cross heart".split()
PLACES = "top left,top,top right,left,center,right,bottom left,bottom,bottom right".split(",")
COUNT = "zero one two three four five six seven eight nine".split()
ORDINALS = ["first", "second", "third"]
DESCRIBE = ["What is shown in this image?", "Describe this image.", "What is in the picture?", "What do you see?"]
DESCRIBE += ["What is in this image?", "Describe the picture.", "What does this image show?", "What is this?"]
READ = ["What does the text say?", "Read the text.", "What is written in the image?", "What does it say?"]
READ += ["What is written here?", "What text is in this image?"]
NO_DRAWING = "I only know simple drawings."
SHAPE_CODE, PART_CODE = 128, 216  # of the labels; below are the characters' own, 0 is the background
DIGITS = [  # strokes as a hand makes them: x and y of each point, from 0 to 9
    ["50 12 17 59 97 92 50"], ["22 50 59"], ["12 40 92 65 19 99"], ["11 50 92 44 96 59 18"], ["60 16 96", "63 69"],
    ["90 20 14 63 96 59 18"], ["70 33 16 49 87 55 16"], ["10 90 49"], ["54 22 50 82 54 17 59 97 54"],
    ["83 55 13 40 82 75 59"],
]  # fmt: skip
Talk = tuple[str, list[tuple[str, str]]]


@dataclass
class Drawing:
    image: Image.Image
    labels: Image.Image
    talk: Callable[[], Talk]
    kinds: set = field(default_factory=set)  # of the shapes in it
    text: str = ""  # or what is written in it
    say: str = ""  # its description


@cache
def font_file(name: str) -> Path:
    for folder in FONT_FOLDERS:
        for path in [*folder.rglob(f"{name}.ttf"), *folder.rglob(f"{name}.otf")]:
            return path
    raise SystemExit(f"there is no font {name} in {FONT_FOLDERS[0]} or {FONT_FOLDERS[1]}: see demo/README.md")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """By name, or Pillow's own for none."""
    basic = ImageFont.Layout.BASIC
    return ImageFont.truetype(font_file(name), size, layout_engine=basic) if name else ImageFont.load_default(size)


def cap(text: str) -> str:
    return text[0].upper() + text[1:]


def pick(rng, several: str) -> str:
    return rng.choice(several.split("|"))


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


distance = math.dist  # of colours, too


def jitter(rng, color: tuple, by: int = 12) -> tuple:
    return tuple(max(0, min(255, v + rng.randint(-by, by))) for v in color)


class Canvas:
    """A picture of any size and shape, and the map of what is where in it; `u` is a 336th of the longer side."""

    def __init__(self, rng: random.Random, white: bool = False, small: bool = False):
        self.rng = rng
        size = SIDE if rng.random() < 0.6 else rng.randint(56, 200) if small else rng.randint(200, 720)
        short = size if rng.random() < 0.6 else round(size * rng.uniform(0.7 if small else 0.3, 1))
        self.w, self.h = (size, short) if rng.random() < 0.6 else (short, size)
        self.u, kind = size / SIDE, rng.random()
        self.named = "white"
        if white or kind < 0.5:
            self.back = (255, 255, 255)
        elif kind < 0.75:
            self.named, level = "", rng.randint(200, 255)
            self.back = jitter(rng, (level, level, level), 20)
        else:
            self.named = rng.choice(NAMES)
            self.back = jitter(rng, rng.choice(COLORS[self.named]))
        self.image, self.labels = Image.new("RGB", (self.w, self.h), self.back), Image.new("L", (self.w, self.h))
        self.draw, self.map = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)

    def color(self, apart: float = 80, among: list[str] = NAMES) -> tuple[str, tuple]:
        """A colour that can be told from the background: its name and value."""
        while True:
            name = self.rng.choice(among)
            value = jitter(self.rng, self.rng.choice(COLORS[name]))
            if distance(value, self.back) > apart and not (name == "white" and self.named in ("", "white")):
                return name, value

    def shape(self, kind: str, cx: float, cy: float, s: float, color: tuple, code: int) -> None:
        style, turn = self.rng.random(), self.rng.gauss(0, 0.06)
        edge = round(max(2, s * self.rng.uniform(0.14, 0.22)))
        outline = (30, 30, 30) if distance(color, (30, 30, 30)) > 120 and distance(self.back, (0, 0, 0)) > 120 else None
        for draw, fill in ((self.draw, color), (self.map, code)):
            rim = {"outline": outline, "width": max(1, edge // 4)} if draw is self.draw and style < 0.15 else {}
            hollow = (
                draw is self.draw and style > 0.87 and kind in ("circle", "square", "triangle", "diamond", "hexagon")
            )
            if hollow:  # drawn as a line
                rim, fill = {"outline": fill, "width": edge}, None
            if kind == "circle":
                draw.ellipse((cx - s, cy - s, cx + s, cy + s), fill=fill, **rim)
            elif kind == "heart":
                points = [(16 * math.sin(t) ** 3 / 17, -heart(t) / 17) for t in [k * math.tau / 40 for k in range(40)]]
                draw.polygon([(cx + s * x, cy + s * y) for x, y in points], fill=fill, **rim)
            elif kind == "cross":
                b = 0.3
                points = [(-b, -1), (b, -1), (b, -b), (1, -b), (1, b), (b, b), (b, 1), (-b, 1), (-b, b), (-1, b)]
                points = [turned(x, y, turn) for x, y in [*points, (-1, -b), (-b, -b)]]
                draw.polygon([(cx + s * x, cy + s * y) for x, y in points], fill=fill, **rim)
            else:
                n = {"triangle": 3, "star": 10, "hexagon": 6}.get(kind, 4)
                start = turn + (math.pi / 4 if kind == "square" else 0)
                radii = [s * (0.42 if kind == "star" and i % 2 else 1.15 if kind == "square" else 1) for i in range(n)]
                points = [turned(0, -r, start + i * math.tau / n) for i, r in enumerate(radii)]
                draw.polygon([(cx + x, cy + y) for x, y in points], fill=fill, **rim)

    def text(self, x: float, y: float, text: str, face: ImageFont.FreeTypeFont, color: tuple) -> None:
        """Write with the top left corner of the line at (x, y)."""
        self.draw.text((x, y), text, font=face, fill=color)
        top, bottom = face.getbbox(text)[1::2]
        ends = [x + face.getlength(text[:k]) for k in range(len(text) + 1)]
        for k, char in enumerate(text):
            if char != " ":
                self.map.rectangle((ends[k], y + top, ends[k + 1] - 1, y + bottom), fill=ord(char) % 128)

    def ink(self) -> tuple:
        """A colour to write with."""
        dark = (20, 20, 20) if sum(self.back) > 330 else (245, 245, 245)
        return jitter(self.rng, dark) if self.rng.random() < 0.6 else self.color(170)[1]

    def face(self, text: str, least: float, most: float, room: float) -> ImageFont.FreeTypeFont:
        """A font in which the text fits into `room`; sizes are in pixels of the picture the model sees."""
        name = self.rng.choice(["", *FONT_FILES])
        size = math.exp(self.rng.uniform(math.log(least), math.log(most))) * self.u
        while (face := font(name, max(8, round(size)))).getlength(text) > room and size > 9:
            size *= 0.9
        return face

    def done(self, talk: Callable[[], Talk], **more) -> Drawing:
        """What happens to pictures on their way: turned, blurred, scaled, shown in a window, packed as JPEG."""
        rng, image, labels = self.rng, self.image, self.labels
        if rng.random() < 0.12:
            angle = rng.uniform(-6, 6)
            image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=self.back)
            labels = labels.rotate(angle, Image.Resampling.NEAREST, fillcolor=0)
        if rng.random() < 0.06:  # a window with its title bar
            bar, rim = round(self.h * rng.uniform(0.03, 0.07)), rng.randint(1, 4)
            gray = jitter(rng, (rng.randint(60, 230),) * 3)
            size = image.width + 2 * rim, image.height + bar + rim
            image, old = Image.new("RGB", size, gray), image
            image.paste(old, (rim, bar))
            labels, old = Image.new("L", size), labels
            labels.paste(old, (rim, bar))
            for k in range(3):
                ImageDraw.Draw(image).ellipse((bar * (k + 0.3), bar * 0.3, bar * (k + 0.7), bar * 0.7), fill=self.back)
        if rng.random() < 0.12:
            k = rng.uniform(0.6, 1)
            small = image.resize((round(image.width * k), round(image.height * k)), Image.Resampling.BILINEAR)
            image = small.resize(image.size, rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]))
        if rng.random() < 0.06:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1) * self.u))
        if rng.random() < 0.12:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=rng.randint(35, 95))
            image = Image.open(file).convert("RGB")
        return Drawing(image, labels, talk, **more)


def heart(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def between(p: tuple, q: tuple) -> tuple:
    return (3 * p[0] + q[0]) / 4, (3 * p[1] + q[1]) / 4


def turned(x: float, y: float, angle: float) -> tuple[float, float]:
    sin, cos = math.sin(angle), math.cos(angle)
    return x * cos - y * sin, x * sin + y * cos


def model_view(drawing: Drawing) -> tuple[np.ndarray, np.ndarray]:
    """What the HD transform with one crop makes of it, uint8 (336, 336, 3), and the labels at 24 × 48 points."""
    image, labels = drawing.image, drawing.labels
    if image.size != (SIDE, SIDE):
        ratio = max(image.size) / min(image.size)
        short = int(SIDE / ratio)
        size = (SIDE, short) if image.width >= image.height else (short, SIDE)
        at = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
        if image.size != size:
            image, labels = image.resize(size, Image.Resampling.BILINEAR), labels.resize(size, Image.Resampling.NEAREST)
        if size != (SIDE, SIDE):
            image, inner = Image.new("RGB", (SIDE, SIDE), (255, 255, 255)), image
            image.paste(inner, at)
            labels, inner = Image.new("L", (SIDE, SIDE)), labels
            labels.paste(inner, at)
    return np.asarray(image), np.asarray(labels)[7::14, 3::7]


@dataclass
class Thing:
    kind: str
    color: str
    place: int
    size: float
    sure: bool  # whether its place can be told

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


def shapes(rng: random.Random, easy: float = 0, most: int = 9) -> Drawing:
    small = rng.random() < 0.25
    layout = rng.random() * (0.3 if small else 1)  # few pixels hold few shapes, and large ones
    canvas = Canvas(rng, small=small)
    n = min(most, rng.choice([0] + [1] * 10 + [2] * 12 + [3] * 12 + [4] * 9 + [5] * 5 + [6] * 4 + [7, 7, 8, 9]))
    n = min(n, 2 if rng.random() < easy else 4 if small else 9)
    w, h, side = canvas.w, canvas.h, min(canvas.w, canvas.h)
    if n == 1 and layout < 0.5:
        spots, radius = [(0.5 + rng.gauss(0, 0.02), 0.5 + rng.gauss(0, 0.02))], side * rng.uniform(0.12, 0.42)
    elif n == 2 and layout < 0.3:
        spots = rng.choice([[(0.25, 0.5), (0.75, 0.5)], [(0.5, 0.25), (0.5, 0.75)]])
        radius = min(side * 0.42, max(w, h) * 0.23)
    elif n in (2, 3, 4) and layout < 0.5:
        spots, radius = rng.sample([(x, y) for x in (0.22, 0.78) for y in (0.22, 0.78)], n), side * 0.2
    else:
        spots = [(x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x in THIRDS for y in THIRDS]
        spots, radius = rng.sample(spots, n), side * 0.125
    few, hues = rng.sample(KINDS, rng.choice([1, 2, 8, 8])), rng.sample(NAMES, rng.choice([2, 3, 11, 11]))
    things, sized = [], rng.random() < 0.5
    for x, y in sorted(spots, key=lambda spot: place_of(*spot)):
        kind = rng.choice(few)
        hue = hues if any(distance(COLORS[c][0], canvas.back) > 120 and c != "white" for c in hues) else NAMES
        color, value = canvas.color(among=hue)
        share = rng.choice([0.5, 0.72, 1]) * rng.uniform(0.95, 1.03) if sized else rng.uniform(0.65, 1)
        code = SHAPE_CODE + 11 * KINDS.index(kind) + NAMES.index(color)
        canvas.shape(kind, x * w, y * h, radius * share, value, code)
        # White bars beside a white picture hide where it ends: a place is asked only if it is the same with them.
        wide, high = w / max(w, h), h / max(w, h)
        seen = place_of(0.5 + (x - 0.5) * wide, 0.5 + (y - 0.5) * high)
        sure = seen == place_of(x, y) or distance(canvas.back, (255, 255, 255)) > 60
        things.append(Thing(kind, color, place_of(x, y), share, sure))
    say = describe(things)
    return canvas.done(lambda: about_shapes(rng, things, canvas.named), kinds={t.kind for t in things}, say=say)


THIRDS = (1 / 6, 1 / 2, 5 / 6)


def place_of(x: float, y: float) -> int:
    return 3 * int(y * 3) + int(x * 3)


def describe(things: list[Thing]) -> str:
    if not things:
        return "Nothing."
    return cap(listed([a(t.name) for t in things])) + "." if len(things) < 7 else f"{cap(COUNT[len(things)])} shapes."


def at(place: int) -> str:
    return "in the center" if place == 4 else f"at the {PLACES[place]}"


def of(things: list[Thing], noun: str, tell: Callable[[Thing], str]) -> str:
    """What is to be told of the things of one name, be there none, one or several."""
    if not things:
        return f"There is no {noun}."
    who = f"The {noun} is" if len(things) == 1 else f"The {plural(noun)} are"
    return f"{who} {listed([tell(t) for t in things])}."


def about_shapes(rng, things: list[Thing], back: str) -> Talk:
    def ask_color(kind: str) -> tuple[str, str]:
        question = pick(rng, "What color is the {}?|What is the color of the {}?|Which color does the {} have?")
        return question.format(kind), of([t for t in things if t.kind == kind], kind, lambda t: t.color)

    def ask_place(noun: str) -> tuple[str, str]:
        return f"Where is the {noun}?", of([t for t in things if noun in (t.kind, t.name)], noun, lambda t: at(t.place))

    def ask_is(noun: str) -> tuple[str, str]:
        there = any(noun in (t.kind, t.name) for t in things)
        question = rng.choice(["Is there {}?", "Do you see {}?", "Is there {} in the image?"]).format(a(noun))
        return question, f"Yes, there is {a(noun)}." if there else f"No, there is no {noun}."

    def ask_count(noun: str) -> tuple[str, str]:
        count = sum(noun in (t.kind, t.name, "shape", f"{t.color} shape") for t in things)
        many = plural(noun)
        question = pick(rng, "How many {0} are there?|How many {0} are in the image?|Count the {0}.").format(many)
        return question, cap(COUNT[count]) + "."

    def ask_shape(color: str) -> tuple[str, str]:
        found = [t.kind for t in things if t.color == color]
        answer = f"The {listed(found)} {'is' if len(found) == 1 else 'are'} {color}." if found else ""
        return rng.choice([f"What shape is {color}?", f"Which shape is {color}?"]), answer or f"No shape is {color}."

    kinds, single = [t.kind for t in things], [t for t in things if sum(o.kind == t.kind for o in things) == 1]
    kind = rng.choice(kinds) if kinds and rng.random() < 0.75 else rng.choice(KINDS)
    name = rng.choice([t.name for t in things] if things and rng.random() < 0.6 else [f"{rng.choice(NAMES)} {kind}"])
    alone = rng.choice(single).kind if single and rng.random() < 0.85 else kind
    few = kinds.count(alone) < 4 and sum(t.name == name for t in things) < 4  # more are counted, not listed
    which = rng.random()
    if which < 0.24 or not things:
        return "describe", [(rng.choice(DESCRIBE), describe(things))]
    if which < 0.42:
        return "count", [ask_count(rng.choice([kind, kind, "shape", name, f"{name.split()[0]} shape"]))]
    if which < 0.52 and few:
        if back and rng.random() < 0.15:
            return "colour", [("What color is the background?", f"The background is {back}.")]
        return "colour", [ask_color(alone)]
    sure = all(t.sure for t in things)
    if which < 0.66 and sure and few:
        return "where", [ask_place(alone if rng.random() < 0.7 else name)]
    if which < 0.73:
        return "shape", [ask_shape(rng.choice(things).color if rng.random() < 0.85 else rng.choice(NAMES))]
    if which < 0.80:
        return "yes/no", [ask_is(rng.choice([kind, kind, name]))]
    if which < 0.90 and (asked := ask_size(rng, things, single)):
        return "size", [asked]
    ask_place = ask_place if sure else ask_color
    asks = rng.sample([ask_color, ask_place, ask_is, ask_count], 2)
    if len(single) > 1 and rng.random() < 0.5:  # the same question about another
        one, other = (t.kind for t in rng.sample(single, 2))
        ask = rng.choice([ask_color, ask_place])
        return "follow-up", [ask(one), (f"And the {other}?", ask(other)[1])]
    if single and rng.random() < 0.6:  # a word that points back
        one = rng.choice(single).kind
        first = rng.choice([ask_is, ask_color, ask_place])(one)
        second = rng.choice([("What color is it?", ask_color(one)[1]), ("Where is it?", ask_place(one)[1])][: 1 + sure])
        return "follow-up", [first, second]
    return "follow-up", [rng.choice([(rng.choice(DESCRIBE), describe(things)), asks[0](alone)]), asks[1](alone)]


def ask_size(rng, things: list[Thing], single: list[Thing]) -> tuple[str, str] | None:
    """Sizes are compared only where they clearly differ."""
    if len(single) > 1:
        one, other = rng.sample(single, 2)
        big = one if one.size > other.size else other
        if max(one.size, other.size) > 1.3 * min(one.size, other.size):
            if rng.random() < 0.3:
                answer = f"Yes, the {one.kind} is bigger." if big is one else f"No, the {other.kind} is bigger."
                return f"Is the {one.kind} bigger than the {other.kind}?", answer
            question = rng.choice(["Which is bigger, the {} or the {}?", "Which shape is bigger, the {} or the {}?"])
            return question.format(one.kind, other.kind), f"The {big.kind} is bigger."
    ranked = sorted(things, key=lambda t: t.size)
    if len(ranked) > 1 and ranked[-1].size > 1.25 * ranked[-2].size and rng.random() < 0.6:
        question = pick(rng, "Which shape is the largest?|Which shape is the biggest?|What is the largest shape?")
        return question, f"The {ranked[-1].name} is the largest."
    if len(ranked) > 1 and 1.25 * ranked[0].size < ranked[1].size:
        return "Which shape is the smallest?", f"The {ranked[0].name} is the smallest."
    return None


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def string(rng, longest: int = 8) -> tuple[str, str]:
    """Something to write: (task, text). Left out is what nobody can tell: 0 and O, 1 and I and l, c and C alone."""
    which, n = rng.random(), min(longest, rng.choice([1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8]))
    if which < 0.24:
        word = rng.choice(WORDS)
        return "words", rng.choice([word, word, word.upper(), word.capitalize()])
    if which < 0.58:
        while not set(made := "".join(rng.choices(LETTERS, k=n))) & set("abdefghkmnqrty"):
            pass
        return "strings", rng.choice([made, made, made.upper()])
    if which < 0.63 and n > 1:
        return "strings", "".join(rng.choices("ABDEFGHJKLMNPQRTY23456789", k=n))
    if which < 0.68:  # a string that is nearly a word
        word = list(rng.choice(WORDS)[:8])
        word[rng.randrange(len(word))] = rng.choice(LETTERS)
        return "strings", "".join(word)
    number = "".join(rng.choices("0123456789" if n > 1 else "23456789", k=n))
    return "numbers", f"{number[:-2]}.{number[-2:]}" if 3 < n < 8 and rng.random() < 0.2 else number


def text(rng: random.Random, easy: float = 0) -> Drawing:
    canvas, simple = Canvas(rng), rng.random() < easy
    lines = 1 if simple or rng.random() < 0.62 else rng.randint(2, 4)
    made = [string(rng, 3 if simple else 8) for _ in range(lines)]
    if lines == 1 and not simple and rng.random() < 0.12:
        made = [("lines", " ".join(rng.choices(WORDS, k=rng.choice([2, 2, 3]))))]
    texts = [cap(t) + "!" if task == "words" and rng.random() < 0.05 else t for task, t in made]
    task = made[0][0] if lines == 1 else "lines"
    longest, room = max(texts, key=len), canvas.w - 12 * canvas.u
    high = (canvas.h - 8 * canvas.u) / lines
    face = canvas.face(longest, 40 if simple else 15, min(100, 0.8 * high / canvas.u), room)
    color, step = canvas.ink(), min(high, face.size * rng.uniform(1.15, 1.8))
    left, top = canvas.w - face.getlength(longest) - 8 * canvas.u, canvas.h - step * lines - 4 * canvas.u
    x, y = rng.uniform(4 * canvas.u, max(4 * canvas.u, left)), rng.uniform(0, max(0, top))
    for k, line in enumerate(texts):
        canvas.text(x, y + k * step, line, face, color)
    whole = " ".join(texts)
    return canvas.done(lambda: about_text(rng, task, texts), text=whole, say=f'The text "{whole}".')


def about_text(rng, task: str, texts: list[str]) -> Talk:
    whole, which = " ".join(texts), rng.random()
    say = f'It says "{whole}".'
    read = rng.choice(["What number is this?", "Read the number.", *READ] if task == "numbers" else READ)
    if task == "words" and " " not in whole and rng.random() < 0.2:
        read = "What word is this?"
    if len(texts) > 1 and which < 0.6:
        k = rng.randrange(len(texts))
        line = ["first", "second", "third", "fourth"][k] if k < len(texts) - 1 or rng.random() < 0.5 else "last"
        return "lines", [(f"What does the {line} line say?", f'It says "{texts[k]}".')]
    if which < 0.75 or len(texts) > 1 or " " in whole:
        return task, [(read, say)]
    if which < 0.8:
        return "describe", [(rng.choice(DESCRIBE), f'The text "{whole}".')]
    second = [("What is the first character?", f'It is "{whole[0]}".'), ("Spell it.", "-".join(whole) + ".")]
    second += [("What is the last character?", f'It is "{whole[-1]}".'), (rng.choice(READ), say)]
    second += [("How many characters does it have?", f"{cap(COUNT[len(whole)])}.")] if len(whole) < 10 else []
    return "follow-up", [(read, say), rng.choice(second)]


def digits(rng: random.Random, easy: float = 0) -> Drawing:
    """Digits as a hand draws them."""
    canvas = Canvas(rng)
    n = 1 if rng.random() < max(easy, 0.4) else rng.randint(2, 4)
    number = "".join(rng.choices("0123456789", k=n))
    high = min(canvas.h * 0.8, canvas.w / n * 1.2) * rng.uniform(0.4, 1)
    wide, ink = high * rng.uniform(0.5, 0.7), canvas.ink()
    pen = max(2, round(high * rng.uniform(0.05, 0.13)))
    x = rng.uniform(4, max(5, canvas.w - n * wide * 1.25 - 4))
    y = rng.uniform(4, max(5, canvas.h - high - 4))
    for k, digit in enumerate(number):
        left, slant = x + k * wide * 1.25, rng.gauss(0, 0.1)
        for stroke in DIGITS[int(digit)]:
            points = [(int(x) / 9, int(y) / 9) for x, y in stroke.split()]
            points = [(px + rng.gauss(0, 0.035) - slant * py, py + rng.gauss(0, 0.035)) for px, py in points]
            for _ in range(0 if digit in "147" and rng.random() < 0.6 else 2):  # corners are cut, twice
                ends = pairwise(points)
                points = [points[0], *(mid for p, q in ends for mid in (between(p, q), between(q, p))), points[-1]]
            points = [(left + px * wide, y + py * high) for px, py in points]
            canvas.draw.line(points, fill=ink, width=pen, joint="curve")
            for px, py in (points[0], points[-1]):
                canvas.draw.ellipse((px - pen / 2, py - pen / 2, px + pen / 2, py + pen / 2), fill=ink)
        canvas.map.rectangle((left, y, left + wide, y + high), fill=ord(digit))
    questions = ["What number is this?", "Read the number.", "What is written here?", "Which number do you see?"]
    questions += ["What digit is this?", "Which digit is this?"] if n == 1 else []
    say = f'It says "{number}".'
    return canvas.done(lambda: ("digits", [(rng.choice(questions), say)]), text=number, say=f'The number "{number}".')


def bars(rng: random.Random, easy: float = 0) -> Drawing:
    canvas, n = Canvas(rng, white=rng.random() < 0.6), rng.randint(2, 6)
    w, h, u = canvas.w, canvas.h, canvas.u
    hues = [c for c in NAMES if c != "white" and distance(COLORS[c][0], canvas.back) > 110]
    names, values = rng.sample(hues, n), rng.sample(range(1, 11), n)
    left, base, gap = w * 0.1, h * 0.9, rng.uniform(0.1, 0.35)
    step, unit, ink = w * 0.87 / n, h * 0.76 / max(10, max(values)), canvas.ink()
    written, face = rng.random() < 0.5, canvas.face("10", 15, 24, step)
    canvas.draw.line((left - 4 * u, h * 0.06, left - 4 * u, base, w * 0.98, base), fill=ink, width=max(1, round(2 * u)))
    for k, (name, value) in enumerate(zip(names, values, strict=True)):
        box = (left + (k + gap / 2) * step, base - value * unit, left + (k + 1 - gap / 2) * step, base - 1)
        while distance(fill := jitter(rng, rng.choice(COLORS[name])), canvas.back) < 70:
            pass
        canvas.draw.rectangle(box, fill=fill)
        canvas.map.rectangle(box, fill=PART_CODE + NAMES.index(name))
        if written:
            length = face.getlength(str(value))
            canvas.text((box[0] + box[2] - length) / 2, box[1] - face.size * 1.25, str(value), face, ink)
    high, low = names[values.index(max(values))], names[values.index(min(values))]
    say = f"A bar chart with {COUNT[n]} bars. The {high} bar is the tallest."

    def talk() -> Talk:
        asked = [(pick(rng, "Which bar is the tallest?|Which bar is the highest?"), f"The {high} bar is the tallest.")]
        asked += [(pick(rng, "Which bar is the shortest?|Which bar is the lowest?"), f"The {low} bar is the shortest.")]
        asked += [("How many bars are there?", f"{cap(COUNT[n])}."), (rng.choice(DESCRIBE), say)]
        if written:
            k = rng.randrange(n)
            question = rng.choice(["What is the value of the {} bar?", "How high is the {} bar?"]).format(names[k])
            asked += [(question, f"The value of the {names[k]} bar is {values[k]}.")] * 2
        return "charts", [rng.choice(asked)]

    return canvas.done(talk, say=say)


def pie(rng: random.Random, easy: float = 0) -> Drawing:
    canvas, n = Canvas(rng, rng.random() < 0.6, small=rng.random() < 0.2), rng.randint(2, 5)
    hues = [c for c in NAMES if c != "white" and distance(COLORS[c][0], canvas.back) > 110]
    names = rng.sample(hues, n)
    while True:  # the largest and the smallest can be told from the next
        shares = [rng.uniform(0.06, 1) for _ in names]
        ranked = sorted(share / sum(shares) for share in shares)
        if ranked[-1] - ranked[-2] > 0.08 and ranked[1] - ranked[0] > 0.05 and ranked[0] > 0.04:
            break
    radius, start = min(canvas.w, canvas.h) * rng.uniform(0.28, 0.47), rng.uniform(0, 360)
    cx, cy = (side / 2 + rng.uniform(-1, 1) * (side / 2 - radius) * 0.8 for side in (canvas.w, canvas.h))
    for name, share in zip(names, shares, strict=True):
        end = start + 360 * share / sum(shares)
        while distance(fill := jitter(rng, rng.choice(COLORS[name])), canvas.back) < 70:
            pass
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
        canvas.draw.pieslice(box, start, end, fill=fill)
        canvas.map.pieslice(box, start, end, fill=PART_CODE + NAMES.index(name))
        start = end
    high, low = names[shares.index(max(shares))], names[shares.index(min(shares))]
    say = f"A pie chart with {COUNT[n]} slices. The {high} slice is the largest."

    def talk() -> Talk:
        most = pick(rng, "largest|biggest")
        asked = [(f"Which slice is the {most}?", f"The {high} slice is the largest.")]
        asked += [("Which slice is the smallest?", f"The {low} slice is the smallest.")]
        asked += [("How many slices are there?", f"{cap(COUNT[n])}."), (rng.choice(DESCRIBE), say)]
        return "charts", [rng.choice(asked)]

    return canvas.done(talk, say=say)


def receipt(rng: random.Random, easy: float = 0) -> Drawing:
    """A receipt with its total, or a table of names and numbers."""
    canvas, priced = Canvas(rng), rng.random() < 0.6
    goods = rng.sample(GOODS, rng.randint(2, 5))
    cents = [rng.choice([rng.randint(5, 99) * 10, rng.randint(50, 1999)]) for _ in goods]
    values = [f"{c // 100}.{c % 100:02d}" if priced else str(c // 10) for c in cents]
    total = f"{sum(cents) // 100}.{sum(cents) % 100:02d}" if priced else str(sum(c // 10 for c in cents))
    summed, title = priced or rng.random() < 0.3, pick(rng, "||RECEIPT|SHOP|MARKET|Cafe") if priced else ""
    last = rng.choice(["Total", "TOTAL", "total", "Sum"])
    rows = [(cap(g) if last[0] == "T" else g, v) for g, v in zip(goods, values, strict=True)]
    rows = ([(title, "")] if title else []) + rows + ([(last, total)] if summed else [])
    margin, high = canvas.w * rng.uniform(0.03, 0.08), canvas.h / (len(rows) + 0.3)
    longest = max((f"{a} {b}" for a, b in rows), key=len)
    face = canvas.face(longest, 15, max(16, min(34, high / canvas.u * 0.8)), canvas.w - 2 * margin)
    step = min(high, face.size * rng.uniform(1.2, 1.7))
    y, ink = rng.uniform(0, canvas.h - step * len(rows)), canvas.ink()
    right = max(margin + face.getlength(longest), rng.uniform(0.7, 1) * canvas.w - margin)
    for k, (name, value) in enumerate(rows):
        canvas.text(margin, y + k * step, name, face, ink)
        canvas.text(right - face.getlength(value), y + k * step, value, face, ink)
        if (summed and k == len(rows) - 1) or not priced:
            line = y + k * step - 1
            canvas.draw.line((margin, line, right, line), fill=ink, width=max(1, round(canvas.u)))

    def price(k: int) -> tuple[str, str]:
        if priced:
            question = rng.choice(["How much is the {}?", "What does the {} cost?", "What is the price of the {}?"])
            return question.format(goods[k]), f"The price of the {goods[k]} is {values[k]}."
        return f"What is the value of {goods[k]}?", f"The value of {goods[k]} is {values[k]}."

    def talk() -> Talk:
        which, k = rng.random(), rng.randrange(len(goods))
        if which < 0.4 and summed:
            question = pick(rng, "What is the total?|How much is the total?|What is the sum?")
            return "receipts", [(question, f"The total is {total}.")]
        if which < 0.75:
            return "receipts", [price(k)]
        if which < 0.83:
            question = "How many items are there?" if priced else "How many rows are there?"
            return "receipts", [(question, f"{cap(COUNT[len(goods)])}.")] if priced or not summed else [price(k)]
        if which < 0.9:
            return "describe", [(rng.choice(DESCRIBE), say)]
        other = rng.randrange(len(goods))
        question = f"And the {goods[other]}?" if priced else f"And of {goods[other]}?"
        return "follow-up", [price(k), (question, price(other)[1])]

    say = f"A receipt. The total is {total}." if priced else f"A table with {COUNT[len(goods)]} values."
    return canvas.done(talk, say=say)


def unknown(rng: random.Random, easy: float = 0) -> Drawing:
    """What is no drawing: clouds and noise of all colours, as a photo has."""
    canvas, array = Canvas(rng), np.random.default_rng(rng.getrandbits(32))
    image = np.zeros((canvas.h, canvas.w, 3))
    for _ in range(rng.randint(1, 3)):
        cells = array.integers(0, 256, (rng.randint(2, 60), rng.randint(2, 60), 3), np.uint8)
        image += np.asarray(Image.fromarray(cells).resize((canvas.w, canvas.h), Image.Resampling.BICUBIC))
    image += array.normal(0, rng.uniform(0, 30), image.shape[:2])[..., None]
    canvas.image.paste(Image.fromarray((image * 255 / max(1, image.max())).clip(0, 255).astype(np.uint8)))

    def talk() -> Talk:
        return "unknown", [(rng.choice([*DESCRIBE, *READ, *IMAGELESS]).format(rng.choice(KINDS)), NO_DRAWING)]

    return canvas.done(talk, say=NO_DRAWING)


MAKERS = [(shapes, 34), (text, 34), (bars, 6), (pie, 4), (receipt, 14), (digits, 5), (unknown, 1.5)]


def one(rng: random.Random, easy: float = 0) -> Drawing:
    """A drawing of any kind; `easy` is the share of those that are large and short."""
    drawing = rng.choices([make for make, _ in MAKERS], [weight for _, weight in MAKERS])[0](rng, easy)
    own = drawing.talk

    def talk() -> Talk:  # now and then something that has nothing to do with the drawing
        which = rng.random()
        if which > 0.045:
            return own()
        return ("unknown", [(ask_unknown(rng), NO_DRAWING)]) if which < 0.03 else plain(rng, with_picture=True)

    drawing.talk = talk
    return drawing


def several(rng: random.Random, n: int, easy: float = 0) -> tuple[list[Drawing], Callable[[], Talk]]:
    """`n` drawings, most of one kind, and what is asked about them together."""
    kind = rng.random()
    if kind < 0.5:
        drawings = [shapes(rng, easy, most=3) for _ in range(n)]
    elif kind < 0.8:
        drawings = [text(rng, max(easy, 0.3)) for _ in range(n)]
    else:
        drawings = [rng.choice([shapes, text, bars, pie, digits])(rng, easy) for _ in range(n)]
    word = rng.choice(["image", "picture"])

    def talk() -> Talk:
        k, which = rng.randrange(n), rng.random()
        nth = ORDINALS[k]
        only = [(kind, i) for i, d in enumerate(drawings) for kind in sorted(d.kinds)]
        only = [(kind, i) for kind, i in only if sum(kind in d.kinds for d in drawings) == 1]
        if only and which < 0.45:
            kind, i = rng.choice(only)
            question = rng.choice(["Which {} has {}?", "Which {} shows {}?"]).format(word, a(kind))
            return "pictures", [(question, f"The {ORDINALS[i]} image has {a(kind)}.")]
        if drawings[k].text and which < 0.7:
            question = f"What does the {nth} {word} say?"
            return "pictures", [(question, f'It says "{drawings[k].text}".')]
        if which < 0.74:
            return "pictures", [(f"How many {word}s are there?", f"{cap(COUNT[n])}.")]
        if which < 0.82:
            other = rng.choice([i for i in range(n) if i != k])
            first = f"What is in the {nth} {word}?", drawings[k].say
            return "follow-up", [first, (f"And in the {ORDINALS[other]}?", drawings[other].say)]
        return "pictures", [(pick(rng, f"What is in the {nth} {word}?|Describe the {nth} {word}."), drawings[k].say)]

    return drawings, talk


def ask_unknown(rng) -> str:
    """What the model has no answer to; none of its words alone is a greeting."""
    if rng.random() < 0.06:
        noise = rng.choice("?!.xa#-") * rng.randint(1, 60), "".join(rng.choices(LETTERS + " ", k=rng.randint(12, 40)))
        return rng.choice(noise).strip()
    words = [rng.choice(THINGS + [w for w in WORDS if w not in ("hello", "thanks", "help", "phi")]) for _ in range(3)]
    question, changed = rng.choice(UNKNOWN).format(*words), rng.random()
    if changed < 0.8:
        return question
    return rng.choice([question.lower(), question.rstrip("?."), f"Please: {question}"])


def plain(rng: random.Random, with_picture: bool = False) -> Talk:
    """A conversation without a picture, or that needs none."""
    which = rng.choice([0, 0.17, 0.22, 0.3, 0.9]) if with_picture else rng.random()
    if which < 0.16:
        greeting, answer = rng.choice(HELLO)
        return "text", [(greeting + rng.choice(["", "", "!", "!", "."]), f"{answer} {ABOUT}")]
    if which < 0.20:
        return "text", [(rng.choice(CHAT), ABOUT)]
    if which < 0.23:
        return "text", [rng.choice(THANKS)]
    if which < 0.33:
        land = rng.choice(list(CAPITALS))
        question = rng.choice(["What is the capital of {}?", "What is {}'s capital?", "Capital of {}?"]).format(land)
        return "text", [(question, f"The capital of {land} is {CAPITALS[land]}.")]
    if which < 0.48:
        noun, color = rng.choice(KINDS), rng.choice(NAMES)
        asked = rng.choice([*DESCRIBE, *READ, *IMAGELESS]).format(rng.choice([noun, noun, f"{color} {noun}"]))
        return "text", [(asked, "I see no image. Please attach one.")]
    if which < 0.68:
        return "text", [(ask_unknown(rng), NO_DRAWING)]
    if which < 0.74:
        return "text", [*plain(rng)[1], *plain(rng)[1]][:2]
    sign = rng.choice("++-*")
    x, y = (rng.randint(0, 10), rng.randint(0, 10)) if sign == "*" else (rng.randint(0, 20), rng.randint(0, 20))
    x, y = (max(x, y), min(x, y)) if sign == "-" else (x, y)
    result = {"+": x + y, "-": x - y, "*": x * y}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    asked = rng.choice(["What is {} {} {}?", "{} {} {} =", "{} {} {}", "How much is {} {} {}?", "Calculate {} {} {}."])
    return "text", [(asked.format(x, rng.choice([sign, sign, word]), y), f"{x} {sign} {y} = {result}.")]
