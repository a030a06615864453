"""Questions put to a model, and when the answer to one ends, exactly as lm-eval's HFLM has it.

A request's answer ends at an end-of-text token, after `max_gen_toks` tokens, at a stop sequence, or, if
`answer_line`, where its first line with text on it ends. CoQA's metric reads no further than that line
(lm_eval/tasks/coqa/utils.py, `process_results`)."""

from dataclasses import dataclass, field

from lm_eval.models.utils import postprocess_generated_text


@dataclass
class Request:
    """One question: its place in lm-eval's list, its tokens, and when its answer ends."""

    index: int
    context: str
    kwargs: dict
    tokens: list[int]
    max_gen_toks: int
    until: list[str]
    answer_line: bool
    made: list[int] = field(default_factory=list)
    done: bool = False
    right: int = 0  # guesses that were right in the last step
    spelt: str = ""  # the tokens as `guess` searches them


def guess(request: Request, count: int, shortest: int = 2) -> list[int]:
    """Up to `count` tokens that may follow: what followed the answer's last three tokens (or fewer, down to
    `shortest`) where they stood before, in the answer or its context. An answer that goes round in circles, or
    quotes, is guessed right."""
    if count < 1:
        return []
    if not request.spelt:
        request.spelt = spell(request.tokens)
    text = request.spelt + spell(request.made)
    for size in range(3, shortest - 1, -1):
        at = text.rfind(text[-size:], 0, -1)
        if at >= 0:
            period = len(text) - at - size
            return [ord(text[at + size + n % period]) for n in range(count)]
    return []


def spell(tokens: list[int]) -> str:
    """Tokens as characters of a string, which Python searches faster than a list."""
    return "".join(map(chr, tokens))


class Endings:
    """Decides after every token, for one tokenizer. think_end_token: HFLM's (what precedes it is no part of the
    answer)."""

    def __init__(self, tokenizer, think_end_token: str | int | None = None):
        self.tokenizer, self.think_end_token = tokenizer, think_end_token
        self.pieces: dict[int, str] = {}
        self.windows: dict[str, int] = {}
        # Asked of the tokenizer itself, whose setting need not count: transformers passes it over for BPE.
        self.cleanup = not tokenizer.decode(tokenizer.encode("a .", add_special_tokens=False)).endswith(" .")

    def line_is_safe(self, until: list[str]) -> bool:
        """Whether stopping at the line's end can't change that line: a stop sequence that continues over it could
        still cut it."""
        return self.think_end_token is None and not any("\n" in stop.lstrip() for stop in until)

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]

    def _window(self, stop: str) -> int:
        """How many last tokens lm-eval searches for a stop sequence (lm_eval/models/utils_hf.py,
        MultiTokenEOSCriteria)."""
        if stop not in self.windows:
            self.windows[stop] = len(self.tokenizer.encode(stop, add_special_tokens=False)) + 2
        return self.windows[stop]

    def _moves(self, until: list[str]) -> bool:
        """Whether decoding may drop or move a character that a stop sequence ends with."""
        return self.cleanup or any(stop[-1].isspace() and stop[-1] != "\n" for stop in until if stop)

    def reached(self, request: Request, token: int, eos: set[int]) -> bool:
        """Add a token to a request's answer; whether it is the last."""
        request.made.append(token)
        if token in eos or len(request.made) >= request.max_gen_toks:
            return True
        # Text is decoded only when the newest token could have completed something: it holds a last character, or
        # part of one.
        piece = self._piece(token)
        loose = not piece or "\ufffd" in piece or self._moves(request.until)
        for stop in request.until:
            # An empty one is in any text.
            if not stop or (
                (loose or stop[-1] in piece) and stop in self.tokenizer.decode(request.made[-self._window(stop) :])
            ):
                return True
        return (
            request.answer_line
            and (loose or "\n" in piece)
            and "\n" in self.tokenizer.decode(request.made, skip_special_tokens=True).lstrip()
        )

    def text(self, request: Request) -> str:
        """The answer as HFLM gives it (lm_eval/models/huggingface.py, `generate_until`), cut after its line if
        `answer_line`."""
        tokens, think = request.made, self.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if isinstance(think, int):
            text = text.lstrip()
        think = think if isinstance(think, str) else None
        text = postprocess_generated_text(generation=text, stop=request.until, think_end_token=think)
        if request.answer_line:
            blank = len(text) - len(text.lstrip())
            text = text[:blank] + text[blank:].split("\n")[0]
        return text
