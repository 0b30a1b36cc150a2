"""From tokens to text, piece by piece, and stop texts across token borders."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes tokens as they come; holds a piece back while its last character is incomplete.

    Args:
        tokenizer: A transformers tokenizer.
        stop: Texts that end the stream; the text ends right behind the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens[context:read] are decoded again with the new ones, for their spacing

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain; sets `stopped` when a stop text is complete."""
        self._tokens.append(token)
        piece = self._pending()
        held = not piece or piece.endswith("\ufffd")  # a special token, or one that ends inside a character
        if held and self._stop_end(piece.rstrip("\ufffd")) is None:
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._emit(piece)

    def flush(self) -> str:
        """Return what was held back, as it is."""
        piece = self._pending()
        self._read = len(self._tokens)
        return self._emit(piece)

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _emit(self, piece: str) -> str:
        if self.stopped:
            return ""
        before, end = len(self.text), self._stop_end(piece)
        self.text, self.stopped = (self.text + piece)[:end], end is not None
        return self.text[before:]

    def _stop_end(self, piece: str) -> int | None:
        """Return where the text ends if `piece` comes next and completes a stop text, else None."""
        text, ends = self.text + piece, []
        for stop in self.stop:
            found = text.find(stop, max(0, len(self.text) - len(stop) + 1))
            if found >= 0:
                ends.append(found + len(stop))
        return min(ends, default=None)
