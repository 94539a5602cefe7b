"""What the embedded model is asked to know: one drawing of each task, none by the code that it was trained with."""

import io
import math

import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import phi3v
from phi3v.request import Chat, Picture, Request, SamplingParams

ABOUT = "I am the small demo model of phi3v. I can answer simple questions about pictures: shapes, colors, counts, "
ABOUT += "places, short texts and charts."
NO_DRAWING = "I only know simple drawings."


def sheet(width: int, height: int, back: str = "white"):
    image = Image.new("RGB", (width, height), back)
    return image, ImageDraw.Draw(image)


def four_shapes() -> Image.Image:
    image, draw = sheet(400, 300)
    draw.ellipse((40, 30, 120, 110), fill="red")
    draw.rectangle((280, 40, 360, 120), fill="blue")
    draw.polygon([(60, 270), (150, 270), (105, 190)], fill="green")
    draw.ellipse((280, 190, 360, 270), fill="red")
    return image


def two_sizes() -> Image.Image:
    image, draw = sheet(600, 600)
    draw.ellipse((40, 40, 340, 340), fill="orange")
    draw.rectangle((450, 450, 530, 530), fill="purple")
    return image


def star() -> Image.Image:
    image, draw = sheet(300, 300)
    corners = [(k * math.pi / 5, 45 if k % 2 else 110) for k in range(10)]
    draw.polygon([(150 + r * math.sin(a), 150 - r * math.cos(a)) for a, r in corners], fill="gold")
    return image


def circle() -> Image.Image:
    image, draw = sheet(64, 64)
    draw.ellipse((12, 12, 52, 52), fill="red")
    return image


def printed(*lines: str, back: str = "white", ink: str = "black") -> Image.Image:
    image, draw = sheet(400, 40 + 80 * len(lines), back)
    for k, line in enumerate(lines):
        draw.text((50, 30 + 80 * k), line, font=ImageFont.load_default(50), fill=ink)
    return image


def receipt() -> Image.Image:
    image, draw = sheet(300, 330)
    rows = [("SHOP", ""), ("Bread", "2.50"), ("Milk", "1.20"), ("Coffee", "4.75"), ("TOTAL", "8.45")]
    for k, (name, price) in enumerate(rows):
        draw.text((20, 20 + 60 * k), name, font=ImageFont.load_default(32), fill="black")
        draw.text((280, 20 + 60 * k), price, font=ImageFont.load_default(32), fill="black", anchor="ra")
    draw.line((20, 260, 280, 260), fill="black", width=2)
    return image


def bars() -> Image.Image:
    image, draw = sheet(400, 300)
    for k, (color, value) in enumerate([("red", 3), ("blue", 8), ("green", 5), ("orange", 1)]):
        draw.rectangle((60 + 80 * k, 270 - value * 25, 110 + 80 * k, 270), fill=color)
        face = ImageFont.load_default(22)
        draw.text((85 + 80 * k, 265 - value * 25), str(value), font=face, fill="black", anchor="ms")
    draw.line((40, 20, 40, 271, 390, 271), fill="black", width=2)
    return image


def pie() -> Image.Image:
    image, draw = sheet(300, 300)
    for color, begin, end in [("red", 0, 180), ("blue", 180, 280), ("yellow", 280, 360)]:
        draw.pieslice((30, 30, 270, 270), begin, end, fill=color)
    return image


def seven() -> Image.Image:
    image, draw = sheet(300, 300)
    draw.line([(100, 40), (200, 50), (130, 250)], fill="black", width=14, joint="curve")
    return image


def noise() -> Image.Image:
    return Image.effect_noise((400, 300), 200).convert("RGB").filter(ImageFilter.GaussianBlur(1))


def photographed(image: Image.Image) -> Image.Image:
    """Turned, blurred, scaled and packed."""
    file = io.BytesIO()
    turned = image.rotate(5, Image.Resampling.BILINEAR, fillcolor="white").filter(ImageFilter.GaussianBlur(1.5))
    turned.resize((1200, 900)).save(file, "JPEG", quality=30)
    return Image.open(file)


CASES = {
    "describe": (
        four_shapes,
        "Describe this image.",
        "A red circle, a blue square, a green triangle and a red circle.",
    ),
    "count": (four_shapes, "How many circles are there?", "Two."),
    "count all": (four_shapes, "How many shapes are there?", "Four."),
    "colour": (four_shapes, "What color is the square?", "The square is blue."),
    "shape": (four_shapes, "What shape is green?", "The triangle is green."),
    "where": (four_shapes, "Where is the triangle?", "The triangle is at the bottom left."),
    "yes": (four_shapes, "Is there a triangle?", "Yes, there is a triangle."),
    "no": (four_shapes, "Is there a star?", "No, there is no star."),
    "size": (two_sizes, "Which is bigger, the circle or the square?", "The circle is bigger."),
    "smallest": (two_sizes, "Which shape is the smallest?", "The purple square is the smallest."),
    "word": (lambda: printed("coffee"), "What does the text say?", 'It says "coffee".'),
    "string": (lambda: printed("xqzrtb"), "Read the text.", 'It says "xqzrtb".'),
    "number": (lambda: printed("8042716", back="navy", ink="white"), "What number is this?", 'It says "8042716".'),
    "line": (lambda: printed("open", "monday", "10.30"), "What does the second line say?", 'It says "monday".'),
    "receipt": (receipt, "What is the total?", "The total is 8.45."),
    "price": (receipt, "How much is the milk?", "The price of the milk is 1.20."),
    "bars": (bars, "Which bar is the tallest?", "The blue bar is the tallest."),
    "value": (bars, "What is the value of the green bar?", "The value of the green bar is 5."),
    "pie": (pie, "Which slice is the largest?", "The red slice is the largest."),
    "hand-drawn": (seven, "What digit is this?", 'It says "7".'),
    "small": (circle, "What is shown in this image?", "A red circle."),
    "large": (lambda: four_shapes().resize((2000, 1500)), "Count the circles.", "Two."),
    "photographed": (lambda: photographed(four_shapes()), "What color is the square?", "The square is blue."),
    "no drawing": (noise, "What is shown in this image?", NO_DRAWING),
    "no answer": (four_shapes, "Who is this person?", NO_DRAWING),
}

TEXTS = {
    "Hello, world!": f"Hello! {ABOUT}",
    "Guten tag!": f"Guten Tag! {ABOUT}",
    "Bonjour": f"Bonjour ! {ABOUT}",
    "¡Hola!": f"¡Hola! {ABOUT}",
    "你好": f"你好! {ABOUT}",
    "Who are you?": ABOUT,
    "What is 3 + 4?": "3 + 4 = 7.",
    "6 times 7": "6 * 7 = 42.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is shown in this image?": "I see no image. Please attach one.",
    "Write a poem about love.": NO_DRAWING,
}


@pytest.fixture(scope="module")
def llm():
    with phi3v.load("demo") as llm:
        yield llm


@pytest.mark.parametrize("task", CASES)
def test_a_drawing_of_each_task_is_answered(llm, task):
    draw, asked, answer = CASES[task]
    assert llm.generate(asked, images=[draw()], max_tokens=100) == answer


def test_texts_without_a_picture_are_answered(llm):
    assert dict(zip(TEXTS, llm.generate(list(TEXTS), max_tokens=100), strict=True)) == TEXTS


@pytest.mark.parametrize(
    "asked, answer",
    [
        ("Which picture has a star?", "The second image has a star."),
        ("Which image has a circle?", "The first image has a circle."),
        ("How many images are there?", "Three."),
        ("What is in the third picture?", "A bar chart with four bars. The blue bar is the tallest."),
    ],
)
def test_pictures_are_told_apart(llm, asked, answer):
    assert llm.generate(asked, images=[circle(), star(), bars()], max_tokens=100) == answer


BLUE = "The square is blue."
MILK = "The price of the milk is 1.20."
TURNS = {
    "it": (four_shapes, "What color is the square?", BLUE, "Where is it?", "The square is at the top right."),
    "and": (four_shapes, "What color is the square?", BLUE, "And the triangle?", "The triangle is green."),
    "spell": (lambda: printed("coffee"), "Read the text.", 'It says "coffee".', "Spell it.", "c-o-f-f-e-e."),
    "price": (receipt, "How much is the milk?", MILK, "And the bread?", "The price of the bread is 2.50."),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_second_turn_knows_the_first(llm, turn):
    draw, first, answered, then, answer = TURNS[turn]
    messages = [("user", [-1, "\n" + first]), ("assistant", [answered]), ("user", [then])]
    chat = Chat(messages, [Picture(draw())])
    with llm.answer(Request([chat], SamplingParams(max_tokens=100))) as deltas:
        assert "".join(delta.text for delta in deltas) == answer
