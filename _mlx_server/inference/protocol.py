"""What goes into the engine, what comes out of it and what can go wrong: requests, events and
errors, in no vendor's words."""

from __future__ import annotations

import collections
import dataclasses
import enum
import re
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One message of the canonical conversation: `{"role", "content": str, ...}`.

`system` only first; `user` and `assistant` alternate apart from runs of `tool` after an assistant's
calls. An assistant may carry `reasoning_content: str` and `tool_calls: [{"id", "type": "function",
"function": {"name", "arguments": dict}}]`; a tool result carries `tool_call_id` and `name`. """


@dataclass
class Sampling:
    """How to pick tokens. None leaves the choice to the model's generation_config.json; temperature
    0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_context: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None  # what is added to the logits of tokens


# Tokens of thinking by a request's effort, for templates that know no efforts; "max" has no bound
EFFORT_BUDGETS = {"minimal": 512, "low": 1024, "medium": 4096, "high": 8192, "xhigh": 16384}


class Priority(enum.IntEnum):
    """Who goes first where requests have to wait for each other."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True)
class Scan:
    """A PDF without text, and the note that stands for it where its pages are not shown."""

    content: bytes
    note: str


@dataclass
class Request:
    """One generation, in no vendor's words. With neither `messages` nor `prompt` it only loads the
    model.

    `prompt` (raw text or token ids: no chat template, no markup in the answer) replaces `messages`
    when given. `tools` are in OpenAI form and are rendered; `deferred_tools` are not rendered but
    may be called. `tool_choice` is "auto", "none", "any" or a tool's name. `max_tokens` None means
    up to the context's end; 0 only fills the prompt cache. `logprobs` asks for the visible answer's
    tokens with their probabilities, and for so many of the likeliest ones beside each. `keep_alive`
    is in seconds (negative: for ever, 0: unload afterwards, None: the model's current setting).
    `context` are tokens that the model reads before all that, an earlier answer's `Done.tokens`.
    `suffix` is raw text that the answer leads from `prompt` to, for models whose capabilities have
    "insert". `embed` asks for the prompt's `Embedding` instead of an answer, `truncate` for that of
    its beginning where it is too long. Without `speculate` the answer, which is the same, comes a
    token a pass.

    `thinking_budget` is how many tokens the model may think for; then its thinking is ended for it.
    None leaves it the time, or as much as its `effort` is worth where the template knows no
    efforts. `adaptive` says that the client leaves it to this side whether and for how long the
    model thinks, though it can show it.

    `images` are files of images, and scans, by the marks that stand for them in `messages`: see
    images.py.

    A conversation that only grew keeps the model's old thinking. `keep_thinking` True asks
    templates to show it also where the conversation is read for the first time, False wants it
    dropped.

    `owner` says whose request it is: what was read and generated for one owner is never reused for
    another one. `client` says who shares places with others where many requests wait.

    `format` is what the visible answer must be: "json" (any JSON object) or a JSON schema, here the
    schema's dict; with `tools` the model may call one instead. Thinking stays free. A forced call
    (`tool_choice` "any" or a name) is held to the tools' names and, as far as the model's call
    syntax allows, their schemas; so is, with `strict`, every call the model makes. All this needs
    the package llguidance: without it a `format` is refused and a forced call only begun."""

    model: str
    messages: list[Message] = field(default_factory=list)
    prompt: str | list[int] | None = None
    context: list[int] = field(default_factory=list)
    suffix: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    deferred_tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    strict: bool = False
    parallel_tool_calls: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    adaptive: bool = False
    keep_thinking: bool | None = None
    effort: str | None = None
    format: dict[str, Any] | str | None = None
    logprobs: int | None = None
    keep_alive: float | None = None
    priority: Priority = Priority.NORMAL
    owner: str = ""
    client: str = ""
    embed: bool = False
    truncate: bool = False
    speculate: bool = True
    images: dict[str, bytes | Scan] = field(default_factory=dict)


@dataclass
class Thinking:
    """A piece of the model's reasoning."""

    text: str


@dataclass
class Token:
    """A token that was generated, or could have been: its bytes, which need not be whole
    characters, the text they make by themselves, and the natural logarithm of its probability
    before temperature and the like. `top` are the likeliest."""

    text: str
    bytes: bytes
    logprob: float
    top: list[Token] = field(default_factory=list)


@dataclass
class Text:
    """A piece of the visible answer. Never holds part of a stop string or half a character.
    `tokens` are those that begin in it, if the request wants `logprobs`."""

    text: str
    tokens: list[Token] = field(default_factory=list)


@dataclass
class ToolStart:
    """A tool call begins: its unique `id` ("toolu_" and 24 characters) and the declared tool's
    name."""

    id: str
    name: str


@dataclass
class ToolInput:
    """A piece of the open call's arguments as JSON text; all pieces together are exactly one JSON
    object, or its beginning."""

    json: str


@dataclass
class ToolEnd:
    """The open call is over; `arguments` is the object its pieces spell. With `cut` the answer's
    end came before the call's: the pieces are no whole object, `arguments` is empty, and the call
    must not be made."""

    arguments: dict[str, Any]
    cut: bool = False


@dataclass
class Embedding:
    """What a text means to the model, as a vector of any length."""

    vector: list[float]


@dataclass
class Tick:
    """Nothing new for `Generation.TICK` seconds: the time to look whether the caller's client still
    listens."""


@dataclass
class Usage:
    """Token counts and seconds. `prompt_tokens` is the whole prompt, `cached_tokens` the part that
    was not prefilled again, `prefilled_tokens` what was read, also again after a pause,
    `completion_tokens` everything generated, thinking included, `decode_passes` how often the model
    ran for it, `images_read` how many images the tower has read. `draft_tokens` counts by drafter
    what was drafted of the answer, `accepted_tokens` what of that was right."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    decode_passes: int = 0
    images_read: int = 0
    draft_tokens: collections.Counter[str] = field(default_factory=collections.Counter)
    accepted_tokens: collections.Counter[str] = field(default_factory=collections.Counter)
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass
class Done:
    """The last event. `reason` is "stop" (end of turn), "stop_sequence" (then `stop_sequence` names
    it), "length" (`max_tokens` reached), "context" (context window full), "tool_calls" (the turn
    ended and holds a call) or "load" (the request had nothing to generate from: the model was
    loaded, that is all). `tokens` are the prompt's and the answer's."""

    reason: str
    usage: Usage
    stop_sequence: str | None = None
    tokens: list[int] = field(default_factory=list)


Event = Thinking | Text | ToolStart | ToolInput | ToolEnd | Embedding | Tick | Done


class EngineError(Exception):
    """Something failed in the engine; `str(error)` is one sentence a user can act on, free of
    internals."""


class InvalidRequest(EngineError):
    """The request can never succeed as it is."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the context window. `tokens` and `maximum` are token counts."""

    def __init__(self, tokens: int, maximum: int):
        super().__init__(f"prompt is too long: {tokens} tokens > {maximum} maximum")
        self.tokens, self.maximum = tokens, maximum


class ModelNotFound(EngineError):
    """No local model answers to `model`; the message names what is installed."""

    def __init__(self, model: str, installed: list[str]):
        super().__init__(f"model '{model}' not found; installed: {', '.join(installed) or 'none'}")
        self.model, self.installed = model, installed


class ModelLoadError(EngineError):
    """The model's files cannot be loaded; trying again may help once they are repaired."""


class EngineBusy(EngineError):
    """As many requests as may wait do wait already; later there will be room."""

    retry_after = 1  # seconds after which it makes sense to try again


class LoadPutOff(EngineBusy):
    """The model of a less important request was not loaded, since others were in work too long."""

    retry_after = 30


class EngineClosed(EngineError):
    """The engine is shutting down."""


def first_line(error: BaseException, known: str = "/…") -> str:
    """An exception's first line without the machine's paths, one of which is known, fit for a
    client."""
    line = (str(error).splitlines() or [type(error).__name__])[0].replace(known, "…")
    return without_paths(line)[:200]


def without_paths(text: str) -> str:
    """A text without the machine's paths; routes of the APIs stay."""
    return re.sub(r"(?:/(?!v1/|api/)[\w.+@-]+){2,}/?", "…", text)


@dataclass
class Miss:
    """Where a prompt and the cached one that is most like it part: at which token, in which message
    of the canonical conversation, and the first words there, as cached and now."""

    at: int
    message: int | None
    role: str
    was: str
    now: str


@dataclass
class Totals:
    """What the engine has done since its start: requests by how they ended, tokens of the prompts
    of those, the tokens of `Usage`, counted as they come, and passes that have read prompts, each
    of them some of the tokens of one or more."""

    endings: collections.Counter[str] = field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    prefill_passes: int = 0
    decode_passes: int = 0  # of each request
    images_read: int = 0
    draft_tokens: collections.Counter[str] = field(default_factory=collections.Counter)
    accepted_tokens: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass
class Stats:
    """The engine at this moment. `memory` is what MLX holds, `memory_limit` what it may, `weights`
    and `states` (of running requests) what is known of the former, all in bytes. `max_waiting` is
    how many requests of normal priority may wait, `unmeasured` how many of the loaded models decode
    without drafts until their passes have been measured."""

    waiting: int
    max_waiting: int
    running: int
    loaded: int
    unmeasured: int
    weights: int
    states: int
    prefix_cache_bytes: int
    prefix_cache_limit: int
    memory: int
    memory_limit: int
    totals: Totals


def fill_sampling(sampling: Sampling, defaults: Sampling) -> Sampling:
    """What the client left open is taken from the model's defaults."""
    return Sampling(
        **{
            f.name: getattr(defaults, f.name)
            if getattr(sampling, f.name) is None
            else getattr(sampling, f.name)
            for f in dataclasses.fields(Sampling)
        }
    )
