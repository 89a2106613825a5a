"""Text of one row as its tokens come: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from lm.data.tokenizers import Tokenizer


class RowText:
    """Turns the tokens that follow a prompt into text that may be shown at once.

    Text that may be the beginning of a stop string is held back until that is decided. The stop string that
    is complete first ends the text; of several that end with the same character, the longest.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._stop = stop
        self._tokens: list[int] = []
        self._held = ""
        self.stopped = False
        # The stream takes one token for each text it gives, and ends when it finds none.
        tokens = iter(lambda: self._tokens.pop() if self._tokens else None, None)
        self._decoded = tokenizer.decode_stream(tokens)
        for token in prompt:
            self._decode(token)

    def push(self, token: int) -> str:
        """The text that is certain with this token, possibly ""; check `stopped` after."""
        return self._release(self._decode(token))

    def finish(self) -> str:
        """What was held back and is not to be followed by more tokens."""
        text = self._release("".join(self._decoded))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, token: int) -> str:
        self._tokens.append(token)
        return next(self._decoded)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
