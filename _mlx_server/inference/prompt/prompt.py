"""A rendered request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _mlx_server.inference.images.pictures import Picture


class ImageRun(NamedTuple):
    """Tokens `start` to `end` of a prompt, which stand for parts of an image, one a token, from the
    part `first` on."""

    start: int
    end: int
    picture: Picture
    first: int


@dataclass
class Prompt:
    """A rendered request. `tokens` are what the model reads; those of an image are its `token`, a
    negative number, and `images` are where these stand.

    `root`, `turn` and `body` are token counts that later prompts are likely to share: the end of
    the system message and the tools, the beginning of the user's last message, and the end before
    the generation prompt. They are 0 where there is none. `opening` is text of the answer that the
    prompt already ends with (the opening tag of a forced tool call). `in_thinking` says that the
    prompt ends inside thinking.

    `key` names the conversation for `ConversationMemory`; it is "" for other prompts. Its first
    `known` tokens are those of the answer that is remembered as `answer`, if there is one."""

    tokens: list[int]
    root: int = 0
    turn: int = 0
    body: int = 0
    opening: str = ""
    in_thinking: bool = False
    key: str = ""
    answer: str = ""
    known: int = 0
    images: list[ImageRun] = field(default_factory=list)

    def find_images(self, pictures: dict[int, Picture]) -> None:
        """Sets `images`; `pictures` are those of the request, by their tokens."""
        runs: list[ImageRun] = []
        tokens, at = self.tokens, 0
        while pictures and at < len(tokens):
            token, start = tokens[at], at
            at += 1
            if token >= 0:
                continue
            while at < len(tokens) and tokens[at] == token:
                at += 1
            picture, first = pictures[token], 0
            if runs and runs[-1].picture is picture:
                first = (runs[-1].first + runs[-1].end - runs[-1].start) % picture.count
            runs.append(ImageRun(start, at, picture, first))
        self.images = runs

    def load_images(self, start: int) -> None:
        """Reads the pixels of the images that stand behind token `start`, so that the MLX thread
        need not do it."""
        room = MAX_LOADED
        for run in self.images:
            if run.end > start and room > 0:
                room -= run.picture.load().nbytes


MAX_LOADED = 64 * 2**20  # bytes of pixels of a request that waits
