"""From a request to the tokens that the model reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from _mlx_server.inference.catalog.models import LocalModel, generation_defaults
from _mlx_server.inference.constrained.constraint import Constraint, ThinkingBudget
from _mlx_server.inference.constrained.output_rules import OutputRules
from _mlx_server.inference.images.image_layout import DEFAULT_TOKENS
from _mlx_server.inference.images.pictures import PictureFinder
from _mlx_server.inference.output.families import HERMES, detect_format
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.parser import OutputParser
from _mlx_server.inference.prompt.chat_renderer import ChatRenderer
from _mlx_server.inference.prompt.conversations import Call, ConversationMemory, Reading
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.prompt.template import Template, plain_text
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import InvalidRequest, Request
from _mlx_server.inference.speculation.prompt_lookup import PromptLookup
from _mlx_server.inference.speculation.quotable import Quotable
from _mlx_server.inference.speculation.speculation import Drafter

MAX_STOPS = 64  # of a request
MAX_STOP_LENGTH = 1000  # characters


class _Memory:
    """What is remembered of one owner's requests to a model. Owners share none of it, so that not
    even the time that a request takes tells of another's.

    `chat` renders conversations, and is None without a template."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template | None,
        format: OutputFormat,
        readings: Mapping[str, Reading],
    ):
        self.quotable = Quotable(tokenizer, format)
        self.readings = ConversationMemory()
        self.readings.learn(readings)
        self.chat: ChatRenderer | None = None
        if template is not None:
            self.chat = ChatRenderer(template, tokenizer, format, self.readings)


class PromptRenderer:
    """All that requests to a model need apart from its weights: tokenizer, chat template, output
    format, sampling defaults, and for each owner the memory of what was read and generated.

    `tokenizer` is mlx-lm's TokenizerWrapper; `template` is None for models that have none,
    `image_layout` for those that do not see.

    Building one reads files but no weights and touches no MLX array, so it happens on the caller's
    thread, and whatever is wrong with a request is known before any work is queued. Safe to use
    from any thread."""

    def __init__(
        self,
        local: LocalModel,
        image_tokens: int = DEFAULT_TOKENS,
        readings: Callable[[str], Mapping[str, Reading]] = lambda owner: {},
    ):
        """`image_tokens` is the most that an image may have, `readings` gives what was read and
        generated for an owner in earlier processes, by keys. Raises ModelLoadError."""
        self._tokenizer = TextTokenizer.load(local)
        names = {name: token for token, name in self._tokenizer.special_token_names().items()}
        self._pictures = PictureFinder(local, names, image_tokens)
        self._tokenizer.layout = self.image_layout = self._pictures.layout
        self.tokenizer = self._tokenizer.wrapped
        self.template = Template(self.tokenizer) if self.tokenizer.has_chat_template else None
        self.format = detect_format(self.tokenizer)
        if self.template and not self.template.traits.has_tools:
            self.format = dataclasses.replace(
                HERMES,
                thinking=self.format.thinking,
                structural_markers=self.format.structural_markers,
            )
        self.defaults = generation_defaults(local.path)
        efforts = self.template is not None and self.template.mentions("reasoning_effort")
        self._rules = OutputRules(self._tokenizer, self.format, efforts)
        self._readings = readings
        self._memories: dict[str, _Memory] = {}  # by owner

    def prompt(self, request: Request, window: int | None = None, most: float = math.inf) -> Prompt:
        """Renders and tokenises a request. `window` is how many tokens prompt and answer may have.
        Raises InvalidRequest when the template refuses it, or an image is none; of more than `most`
        tokens some may be missing, or PromptTooLong is raised."""
        request, pictures = self._pictures.find(request)
        prompt = self._prompt(request, window, most)
        prompt.find_images(pictures)
        return prompt

    def _prompt(self, request: Request, window: int | None, most: float) -> Prompt:
        if request.prompt is None and (chat := self._memory(request.owner).chat) is not None:
            try:
                return chat.prompt(request, window, most)
            except RecursionError:
                message = "the messages or the tools are nested too deeply"
                raise InvalidRequest(message) from None
        raw = plain_text(request.messages) if request.prompt is None else request.prompt
        if not isinstance(raw, str):
            return Prompt(request.context + raw)
        if request.suffix:
            before, behind, end = self.gap_tokens()
            raw = f"{before}{raw}{behind}{request.suffix}{end}"
        return Prompt(request.context + self._tokenizer.encode_raw(raw, most))

    def truncated(self, prompt: Prompt, most: int) -> Prompt:
        """The first tokens of a text to embed, with its end token if the tokenizer gives it one."""
        if len(prompt.tokens) <= most:
            return prompt
        end = [token for token in prompt.tokens[-1:] if token in self.tokenizer.all_special_ids]
        return Prompt(prompt.tokens[: most - len(end)] + end)

    def locate(self, request: Request, before: str) -> tuple[int, str] | None:
        """The index and the role of the message in which the prompt's text goes beyond `before`;
        None where the template does not tell."""
        chat = self._memory(request.owner).chat
        request, _ = self._pictures.find(request)
        return chat.locate(request, before) if chat is not None else None

    # What was read and generated

    def remember(
        self,
        request: Request,
        prompt: Prompt,
        tokens: list[int],
        visible: str,
        thinking: str,
        calls: list[Call],
    ) -> str:
        """Keeps what was read and generated for a request: see ChatRenderer.remember."""
        chat = self._memory(request.owner).chat
        return chat.remember(request, prompt, tokens, visible, thinking, calls) if chat else ""

    def reading(self, owner: str, key: str) -> Reading | None:
        """What was read and generated for an owner up to the end of an answer, by the key that
        `remember` has returned; None if it is not kept any more."""
        return self._memory(owner).readings.get(key)

    def _memory(self, owner: str) -> _Memory:
        if owner not in self._memories:
            own = TextTokenizer(self.tokenizer, self.image_layout) if owner else self._tokenizer
            memory = _Memory(own, self.template, self.format, self._readings(owner))
            self._memories.setdefault(owner, memory)
        return self._memories[owner]

    # What an answer goes through

    def constraint(self, request: Request, prompt: Prompt) -> Constraint | None:
        """What holds the answer to a format or to the tools' schemas: see OutputRules."""
        return self._rules.constraint(request, prompt)

    def budget(self, request: Request, prompt: Prompt, begins: int) -> ThinkingBudget | None:
        """What ends the thinking of an answer behind `begins` tokens: see OutputRules."""
        return self._rules.budget(request, prompt, begins)

    def drafters(self, request: Request, prompt: Prompt) -> list[Drafter]:
        """What guesses the answer's next tokens, the best first."""
        if not request.speculate or request.embed or not prompt.tokens or prompt.images:
            return []
        quotable = self._memory(request.owner).quotable
        return [PromptLookup(prompt.tokens, quotable.tokens(request.messages))]

    def parser(self, request: Request, prompt: Prompt) -> OutputParser:
        """What makes events of the answer's text. Raises InvalidRequest for too many stop strings,
        or too long ones."""
        stop = request.stop
        if len(stop) > MAX_STOPS or max(map(len, stop), default=0) > MAX_STOP_LENGTH:
            bounds = f"at most {MAX_STOPS} stop sequences of {MAX_STOP_LENGTH} characters"
            raise InvalidRequest(f"{bounds} are allowed")
        tools = [*request.tools, *request.deferred_tools] if request.tool_choice != "none" else []
        if request.suffix:
            stop = [*stop, *self.gap_tokens(), "<|endoftext|>"]
        return OutputParser(
            self.format if request.prompt is None else OutputFormat(),
            tools,
            stop,
            in_thinking=prompt.in_thinking,
            parallel=request.parallel_tool_calls,
            control_tokens=set(self.control_tokens.values()),
        )

    # Tokens

    def encode(self, text: str) -> list[int]:
        """The token ids of a text in which special tokens are recognised; none are added."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, images left out."""
        return self._tokenizer.decode(tokens)

    @property
    def control_tokens(self) -> dict[int, str]:
        """The texts of the control tokens by their ids."""
        return self._tokenizer.control_tokens.names

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole characters."""
        return self._tokenizer.token_bytes(token)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises InvalidRequest for ids that no token has."""
        self._tokenizer.check_tokens(tokens)

    def gap_tokens(self) -> tuple[str, ...]:
        """The special tokens of a text with a gap, as text: see TextTokenizer."""
        return self._tokenizer.gap_tokens()
