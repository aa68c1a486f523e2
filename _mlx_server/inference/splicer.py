"""Puts the tokens of remembered answers into rendered prompts."""

from __future__ import annotations

import re

from _mlx_server.inference.answers import PLACEHOLDER, Answer
from _mlx_server.inference.control_tokens import alternatives
from _mlx_server.inference.formats import OutputFormat
from _mlx_server.inference.prompt import Prompt
from _mlx_server.inference.tokenizer import TextTokenizer


class AnswerSplicer:
    """Makes answers of generated tokens, and tokenises prompts in which placeholders stand for such
    answers.

    The tokens of an answer replace all from its placeholder to the end of its turn, which includes
    the calls as the template writes them. They also replace its thinking before the placeholder,
    unless the template has dropped that."""

    def __init__(self, tokenizer: TextTokenizer, format: OutputFormat):
        self._tokenizer, self._markers = tokenizer, format.structural_markers
        # Without thinking, tags that no text has
        self._thinking_start, self._thinking_end = format.thinking or ("\0", "\0")
        markers = alternatives(self._markers)
        self._marker = re.compile(markers)
        ends = alternatives(filter(None, (tokenizer.decode([end]) for end in tokenizer.end_tokens)))
        if self._thinking_end in self._markers:  # it may end the turn, too
            ends += f"|{re.escape(self._thinking_end)}(?!{markers})"
        self._turn_end = re.compile(ends)

    def answer(self, prompt: Prompt, written: list[int], raw: str, thinking: str) -> Answer:
        """What the model wrote in answer to `prompt`: the tokens `written`, which are the text
        `raw`, of which `thinking` is thinking."""
        tokens = self._tokenizer.encode(prompt.opening) + written
        if tokens and tokens[-1] in self._tokenizer.end_tokens:
            tokens = tokens[:-1]
        text = raw.rpartition(self._thinking_end)[2] if thinking else prompt.opening + raw
        while marker := self._marker.match(text):
            text = text[marker.end() :]
        return Answer(tokens, text.lstrip("\n"), thinking)

    def replaceable(self, text: str) -> set[int]:
        """The indices of the answers whose placeholder and end of turn are in a text."""
        pieces = PLACEHOLDER.split(text)
        behind = zip(pieces[1::2], pieces[2::2], strict=True)
        return {int(index) for index, rest in behind if self._turn_end.search(rest)}

    def splice(self, text: str, answers: dict[int, Answer], opener: str) -> list[int]:
        """Tokenises a text with placeholders for `answers`. `opener` is what the template begins an
        assistant's turn with."""
        before, *pieces = PLACEHOLDER.split(text)
        tokens: list[int] = []
        for index, behind in zip(pieces[::2], pieces[1::2], strict=True):
            tokens += self._with_answer(before, answers[int(index)], opener)
            end = self._turn_end.search(behind)
            before = behind[end.start() :] if end else behind
        return tokens + self._tokenizer.encode(before)

    def _with_answer(self, before: str, answer: Answer, opener: str) -> list[int]:
        """Tokens of the text before a placeholder and of its answer."""
        header = opener.partition(self._thinking_start)[0]
        at = before.rfind(header) if header else -1
        if at >= 0:
            turn = at + len(header)
            shown = self._marker.sub("", before[turn:]).strip()
            # Generated tokens include the thinking and the markup around the text
            if shown if answer.thinking else self._markers:
                in_thinking = opener.rstrip().endswith(self._thinking_start)
                begun = opener if in_thinking else header
                return self._tokenizer.encode(before[:at] + begun) + answer.tokens
        if answer.thinking:  # which the template has dropped
            return self._tokenizer.encode(before + answer.visible)
        return self._tokenizer.encode(before) + answer.tokens
