"""Messages → token ids (image slots included), and ids → text as it comes.

Knows nothing of pixels or of the model. The special tokens of a prompt come from here alone: text that
a user wrote is encoded by a tokenizer that has none, so `<|end|>` in it is seven characters.
"""

import codecs
import json
import re
from pathlib import Path

from tokenizers import Tokenizer as Encoder

from .errors import RequestError, SetupError

IMAGE_TAG = re.compile(r"<\|image_([0-9]{1,9})\|>")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end|>")  # the model says <|end|>; the configs name only the other two
ROLES = ("system", "user", "assistant")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What "rstrip" swallows: Unicode's White_Space (str.strip() takes four control characters more).
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

# A prompt before encoding: text, or a number: the id of a special token, or −k for the slots of picture k.
Parts = list[str | int]


class Tokenizer:
    """The tokenizer.json of a checkpoint folder."""

    def __init__(self, folder: Path):
        path = Path(folder) / "tokenizer.json"
        try:
            spec = json.loads(path.read_bytes())
            vocabulary = dict(spec["model"]["vocab"])
            self.special = {t["content"]: t["id"] for t in spec["added_tokens"]}
            self._swallows = {t["id"] for t in spec["added_tokens"] if t["rstrip"]}
            # With encode_special_tokens alone "</s>" would still be one token: emptying the table is what helps.
            spec |= {"added_tokens": [], "post_processor": None}
            self._plain = Encoder.from_str(json.dumps(spec))
        except OSError as error:
            raise SetupError(f"cannot read {path}: {error.strerror}") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise SetupError(f"{path} is no tokenizer that can be used: {str(error)[:200]}") from None
        missing = [t for t in ("<s>", "<|end|>", *(f"<|{role}|>" for role in ROLES)) if t not in self.special]
        if missing:
            raise SetupError(f"{path} lacks {', '.join(missing)}: it is not a Phi-3 tokenizer")
        self.bos = self.special["<s>"]
        self.end_ids = frozenset(self.special[t] for t in END_TOKENS if t in self.special)
        self.largest_id = max(0, *vocabulary.values(), *self.special.values())
        self._bytes = {i: _token_bytes(token) for token, i in vocabulary.items()}
        self._bytes |= {i: b"" for i in self.special.values()}

    def prompt(self, text: str, images: int) -> Parts:
        """A single question in the chat template, with its `images` pictures where their tags stand or in front."""
        tags = {int(k) for k in IMAGE_TAG.findall(text)}
        if not tags:
            content: Parts = [part for k in range(1, images + 1) for part in (-k, "\n")] + [text]
        elif tags == set(range(1, images + 1)):
            pieces = IMAGE_TAG.split(text)  # text, number, text, number, …, text
            content = [-int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
        else:
            named = ", ".join(f"<|image_{k}|>" for k in sorted(tags)[:4])
            raise RequestError(f"the prompt names {named} but has {images} pictures; name each, or none", "images")
        return self.chat([("user", content)])

    def chat(self, messages: list[tuple[str, Parts]]) -> Parts:
        """The checkpoint's chat template: `<|role|>\\n` content `<|end|>\\n` for each, then the assistant's turn."""
        parts: Parts = []
        for role, content in messages:
            parts += [self.special[f"<|{role}|>"], "\n", *content, self.special["<|end|>"], "\n"]
        return [*parts, self.special["<|assistant|>"], "\n"]

    def encode(self, parts: Parts, slots: list[int], most: int) -> list[int]:
        """Token ids, with −k repeated `slots[k-1]` times for picture k; RequestError when pictures take over `most`.

        As the reference does it, the text before, between and after pictures is encoded piece by piece,
        each piece with a <s> of its own, and within a piece each run between two special tokens.
        """
        taken = sum(slots[-part - 1] for part in parts if not isinstance(part, str) and part < 0)
        if taken > most:  # told before the list is made, which a short prompt can make of any length
            raise RequestError(f"the pictures take {taken:,} tokens, the context has {most:,}", "images")
        ids, run = [self.bos], ""
        for part in [*parts, None]:  # None ends the last run
            if isinstance(part, str):
                run += part
                continue
            if ids[-1] in self._swallows:
                run = run.lstrip(WHITE_SPACE)
            # The batch call, because it lets other threads run: a megabyte takes a second.
            ids += self._plain.encode_batch_fast([run])[0].ids if run else []
            run = ""
            if part is not None:
                ids += [part] if part >= 0 else [part] * slots[-part - 1] + [self.bos]
        return ids

    def decoder(self) -> "Decoder":
        return Decoder(self._bytes)


class Decoder:
    """Token ids of one answer → text, piece by piece; an unfinished multi-byte character is held back."""

    def __init__(self, table: dict[int, bytes]):
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False

    def push(self, token: int) -> str:
        """What can be shown after `token`; special tokens and ids beyond the vocabulary are empty text."""
        data = self._table.get(token, b"")
        if data and not self._started:
            self._started = True
            data = data.removeprefix(b" ")  # the first word's own space
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left when the answer is over: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def _token_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
