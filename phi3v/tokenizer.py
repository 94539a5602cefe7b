"""Messages → token ids (image slots included), and ids → text as it comes.

Knows nothing of pixels or of the model. The special tokens of a prompt come from here alone: text that a user wrote
is encoded by a tokenizer that has none, so `<|end|>` in it is seven characters.
"""

import codecs
import json
import re
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer as Encoder

from .errors import RequestError, SetupError
from .request import TokenLogprob

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
        self._longest = max(map(len, vocabulary), default=0)
        self._bytes = {i: _token_bytes(token) for token, i in vocabulary.items()}
        self._bytes |= dict.fromkeys(self.special.values(), b"")
        self._names = {i: name.encode() for name, i in self.special.items()}

    def chat(self, messages: list[tuple[str, Parts]]) -> Parts:
        """The checkpoint's chat template: `<|role|>\\n` content `<|end|>\\n` for each, then the assistant's turn."""
        parts: Parts = []
        for role, content in messages:
            parts += [self.special[f"<|{role}|>"], "\n", *content, self.special["<|end|>"], "\n"]
        opened = messages[-1][0] == "assistant"  # it stays open
        return parts[:-2] if opened else [*parts, self.special["<|assistant|>"], "\n"]

    def encode(self, parts: Parts, slots: list[int], most: int) -> list[int]:
        """Token ids, with −k repeated `slots[k-1]` times for picture k; RequestError when they cannot fit in `most`.

        As in the reference, the text before, between and after pictures is encoded piece by piece, each with a <s> of
        its own, and within a piece each run between two special tokens.
        """
        taken = sum(slots[-part - 1] for part in parts if not isinstance(part, str) and part < 0)
        if taken > most:  # told before the list is made, which a short prompt can make of any length
            raise RequestError(f"the pictures take {taken:,} tokens, the context has {most:,}", "images")
        characters = sum(len(part) for part in parts if isinstance(part, str))
        if characters > most * self._longest:  # so much text would be encoded for minutes
            raise RequestError(f"the prompt has {characters:,} characters, too many for {most:,} tokens", "prompt")
        ids = [self.bos]
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                text = "".join(run).lstrip(WHITE_SPACE if ids[-1] in self._swallows else "")
                # The batch call, because it lets other threads run: a megabyte takes a second.
                ids += self._plain.encode_batch_fast([text])[0].ids if text else []
                continue
            for part in run:
                ids += [part] if part >= 0 else [part] * slots[-part - 1] + [self.bos]
        return ids

    def decoder(self, stop: tuple[str, ...] = (), goes_on: bool = False) -> "Decoder":
        """For one answer; `goes_on`: it continues a text, so that its first word keeps its space."""
        return Decoder(self._bytes, stop, goes_on, self._names)


class Decoder:
    """Token ids of one answer → text, piece by piece, and the log-probabilities that belong to it.

    Held back are an unfinished multi-byte character, and what one of the strings in `stop` may begin with. The first
    stop string to be complete ends the text before it, however the tokens cut it, and sets `stopped`.
    """

    def __init__(self, table: dict[int, bytes], stop: tuple[str, ...] = (), goes_on: bool = False, names=()):
        self._table, self._stop, self._started, self._names = table, stop, goes_on, dict(names)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._shown, self.stopped = "", 0, False  # text, and characters
        self._waiting: list[TokenLogprob] = []

    def push(self, token: int, logprobs: tuple[float, list[tuple[int, float]]] | None = None) -> str:
        """What can be shown after `token`, which may be nothing; `logprobs`: its own, (id, logprob) of alternatives."""
        data = self._data(token)
        if logprobs:
            top = [(self._names.get(other) or self._data(other), value) for other, value in logprobs[1]]
            self._waiting.append(TokenLogprob(data, logprobs[0], top, self._shown + len(self._held)))
        self._started |= bool(self._table.get(token))
        return self._show(self._utf8.decode(data))

    def finish(self) -> str:
        """What is left when the answer is over: U+FFFD for a character that never became whole."""
        return self._show(self._utf8.decode(b"", final=True), final=True)

    def logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens of which something was shown since the last call."""
        ready = [entry for entry in self._waiting if entry.start < self._shown]
        self._waiting = self._waiting[len(ready) :]
        return ready

    def _data(self, token: int) -> bytes:
        data = self._table.get(token, b"")  # special tokens and ids beyond the vocabulary are empty text
        return data if self._started else data.removeprefix(b" ")  # the first word's own space

    def _show(self, text: str, final: bool = False) -> str:
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        end, length = min(found, default=(0, 0))
        longest = ((stop, min(len(stop) - 1, len(self._held))) for stop in self._stop)
        begun = (k for stop, most in longest for k in range(most, 0, -1) if self._held.endswith(stop[:k]))
        cut = end + length if found else len(self._held) - (0 if final else max(begun, default=0))
        text, self._held = self._held[:cut], "" if found else self._held[cut:]
        self.stopped |= bool(found)
        self._shown += len(text)
        return text


def _token_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
