"""Text from token ids as they come: never half a character, and never a part of a stop string."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# A window of this many tokens without a whole character holds bytes that will never become one.
_LONGEST_WAIT = 12
_PROMPT_TAIL = 6
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes one sequence.

    Tokens are decoded together with some that precede them, since many tokenizers write a word's space only inside a
    text. The prompt's last tokens precede the first.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: list[int], *, skip_special_tokens: bool = True) -> None:
        self._decode: Callable[..., str] = tokenizer.backend_tokenizer.decode
        self._skip = skip_special_tokens
        # The window: tokens whose text is out, then those whose text is not.
        self._ids = self._tail(prompt_token_ids)
        self._num_read = len(self._ids)
        self._read_text = self._text(self._ids)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, often the token's own, sometimes none."""
        self._ids.append(token_id)
        text = self._text(self._ids)
        if text == self._read_text and self._is_skipped(token_id):
            self._ids.pop()  # however many come, the window keeps the text before them
            return ""
        waiting = len(self._ids) - self._num_read
        if waiting <= _LONGEST_WAIT and (len(text) <= len(self._read_text) or text.endswith(_REPLACEMENT)):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The text of tokens that still wait for the rest of their character."""
        return self._advance(self._text(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._read_text) :]
        self._ids = self._ids[self._num_read :]
        self._num_read = len(self._ids)
        self._read_text = self._text(self._ids)
        return new

    def _tail(self, prompt_token_ids: list[int]) -> list[int]:
        """The prompt's last tokens, from where a character begins: half a character would spoil all bytes behind it."""
        ids = prompt_token_ids[-_PROMPT_TAIL:]
        for first in range(min(4, len(ids))):
            if not self._text(ids[first:]).startswith(_REPLACEMENT):
                return ids[first:]
        return ids

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip and not self._text([token_id]) and bool(self._decode([token_id], skip_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=self._skip)


class StopMatcher:
    """Finds the first stop string in a text that grows, and what of its end may be the beginning of one (Knuth, Morris
    and Pratt, 1977: constant work a character and stop string, however long they are).
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._failures = [_failure_table(stop) for stop in stops]
        self._matched = [0] * len(stops)

    @property
    def held_back(self) -> int:
        """Characters at the text's end that may yet turn out to belong to a stop string."""
        return max(self._matched, default=0)

    def push(self, text: str) -> tuple[str, int] | None:
        """Add text.

        Returns:
            The stop string that ended first and the number of characters of `text` up to its end; None if none did.
        """
        for position, character in enumerate(text):
            ended = [i for i in range(len(self._stops)) if self._step(i, character)]
            if ended:
                return max((self._stops[i] for i in ended), key=len), position + 1
        return None

    def _step(self, index: int, character: str) -> bool:
        stop, failure, matched = self._stops[index], self._failures[index], self._matched[index]
        while matched and (matched == len(stop) or stop[matched] != character):
            matched = failure[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched == len(stop)


class TokenBytes:
    """The bytes that a token stands for, for tokenizers whose tokens may be parts of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._token: Callable[[int], str | None] = tokenizer.backend_tokenizer.id_to_token
        kinds = str(tokenizer.backend_tokenizer.decoder)
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None

    def of(self, token_id: int, text: str) -> bytes:
        """Bytes of a token that added `text` to the output."""
        token = self._token(token_id) or ""
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if self._alphabet is not None and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        return text.encode("utf-8", "replace")


@lru_cache(maxsize=256)
def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its end. Remembered, not to be changed: all
    answers to a request have the same stop strings.
    """
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        length += pattern[i] == pattern[length]
        table[i] = length
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
