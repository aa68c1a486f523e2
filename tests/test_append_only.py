"""What makes turns fast: the tokens of a request and of its answer begin the next request, whatever
the client sends back."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import anthropic
import pytest
from conftest import ROOT, Server
from habits import FAMILIES
from models import build_tokenizer
from recorded import (
    DEFERRED,
    RECORDED,
    TOOLS,
    assistant,
    body,
    record,
    results,
    use,
    user,
)

from _mlx_server.inference.cache.prefix_tree import common_prefix
from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.output.parser import OutputParser
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.wire.anthropic import AnthropicMessages
from engine import Done, Text, Thinking, ToolEnd, ToolStart, Usage

FAST = ("json", "stripped", "nine")


@pytest.fixture(
    params=[
        family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ]
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build_renderer(path: Path, template: str) -> PromptRenderer:
    """The real tokenizer, template and output format of a model; nothing here needs its weights."""
    build_tokenizer(path, template)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 2}))
    shutil.copy(ROOT / "tests/demo/model.safetensors", path)
    return PromptRenderer(describe("m", path))


@pytest.fixture
def renderer(family: str, tmp_path: Path) -> PromptRenderer:
    return build_renderer(tmp_path, FAMILIES[family])


def goes_on(before: Prompt, after: Prompt) -> bool:
    return after.tokens[: before.body] == before.tokens[: before.body] and before.body > 0


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_session_only_appends(renderer: PromptRenderer, name: str):
    prompts = [renderer.prompt(AnthropicMessages(b).request) for b in record(name)]
    for before, after in itertools.pairwise(prompts):
        assert goes_on(before, after), renderer.tokenizer.decode(
            after.tokens[common_prefix(before.tokens, after.tokens) :]
        )
    assert len({prompt.root for prompt in prompts}) == 1


def test_tools_that_appear_later_change_nothing_before(renderer: PromptRenderer):
    messages = [user("fetch it")]
    before = renderer.prompt(AnthropicMessages(body(messages)).request)
    found = [{"type": "tool_reference", "tool_name": "Fetch"}]
    messages += [assistant(use("a1", command="search")), results(("a1", found))]
    after = renderer.prompt(
        AnthropicMessages(body(messages, 1, [TOOLS[0], DEFERRED, TOOLS[1]])).request
    )
    assert goes_on(before, after)
    assert renderer.tokenizer.decode(after.tokens).count("Fetch it.") == 1
    messages += [assistant(use("a2", "Fetch", url="x")), results(("a2", "page"))]
    assert goes_on(
        after, renderer.prompt(AnthropicMessages(body(messages, 2, [DEFERRED, *TOOLS])).request)
    )


def test_compaction_reads_only_its_instruction(renderer: PromptRenderer):
    *_, last = record("tool rounds")
    before = renderer.prompt(AnthropicMessages(last).request)
    ending = last["messages"][-1]["content"]
    compact = {
        **last,
        "messages": [
            *last["messages"][:-1],
            {"role": "user", "content": [*ending, *user("", "Summarise.")["content"]]},
        ],
    }
    after = renderer.prompt(AnthropicMessages(compact).request)
    # The end of the turn and its newline
    assert common_prefix(before.tokens, after.tokens) >= before.body - 2
    fresh = renderer.prompt(
        AnthropicMessages(body([user("This session is continued: all is well.")], 9)).request
    )
    assert fresh.root == before.root and common_prefix(before.tokens, fresh.tokens) >= before.root


# What the model wrote, as the client sends it back


class Session:
    """A conversation in which the answers' text is given and everything else is real."""

    def __init__(self, renderer: PromptRenderer, family: str):
        self.renderer, self.xml = renderer, family == "xml"
        self.messages: list[dict] = []

    def ask(self, *added: dict) -> Prompt:
        self.messages += added
        self.reply = AnthropicMessages(body(self.messages, len(self.messages)))
        self.prompt = self.renderer.prompt(self.reply.request)
        return self.prompt

    def write(
        self, thinking: str = "", text: str = "", calls: tuple[tuple[str, dict], ...] = ()
    ) -> str:
        """An answer in the family's format but in nobody's usual spelling of it."""
        written = f"<think>\n{thinking}\n</think>\n\n" if thinking else ""
        written += text + ("\n" if text and calls else "")
        for name, arguments in calls:
            if self.xml:
                values = {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in arguments.items()
                }
                inside = "".join(
                    f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()
                )
                written += f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>\n"
            else:
                call = {"arguments": arguments, "name": name}
                spelled = json.dumps(call, separators=(" ,", ":"))
                written += f"<tool_call>\n{spelled}\n</tool_call>\n"
        return written.rstrip("\n") if calls else written

    def answer(self, written: str, end: str = "<|im_end|>") -> tuple[list[int], dict]:
        """All tokens up to the end of this answer, and the message that a client gets."""
        if "<" in written:
            tokens = self.renderer.encode(written)  # tags are single tokens
        else:  # in other tokens than any tokenizer would choose: models do that
            pieces = [written[at : at + 7] for at in range(0, len(written), 7)]
            tokens = [token for piece in pieces for token in self.renderer.encode(piece)]
        everything = [*self.prompt.tokens, *tokens, *self.renderer.encode(end)]
        request = self.reply.request
        parser = OutputParser(self.renderer.format, [*request.tools, *request.deferred_tools])
        events = [*parser.feed(written), *parser.finish()]
        ends = (event for event in events if isinstance(event, ToolEnd))
        starts = (event for event in events if isinstance(event, ToolStart))
        self.renderer.remember(
            request,
            self.prompt,
            everything,
            "".join(event.text for event in events if isinstance(event, Text)),
            "".join(event.text for event in events if isinstance(event, Thinking)),
            [(one.id, one.name, end.arguments) for one, end in zip(starts, ends, strict=True)],
        )
        reason = "tool_calls" if parser.called else "stop"
        self.reply.open(SimpleNamespace(id="1", prompt_tokens=0, cached_tokens=0))
        for event in [*events, Done(reason, Usage())]:
            self.reply.event(event)
        return everything, {"role": "assistant", "content": self.reply.whole()["content"]}


def rewritten(block: dict) -> dict:
    """A call's input as clients validate it: in the schema's order, with defaults, numbers for
    their words, no trailing blanks."""
    if block["type"] != "tool_use":
        return block
    values = {
        key: value.rstrip()
        if isinstance(value, str)
        else int(value)
        if isinstance(value, float)
        else value
        for key, value in reversed(block["input"].items())
    }
    return {**block, "input": {"replace_all": False, **values}}


REWRITES = {
    "nothing": lambda blocks: blocks,
    "inputs": lambda blocks: list(map(rewritten, blocks)),
    "text before calls": lambda blocks: sorted(
        blocks, key=lambda block: block["type"] == "tool_use"
    ),
    "thinking without signature": lambda blocks: [
        {k: v for k, v in block.items() if k != "signature"} for block in blocks
    ],
    "thinking omitted": lambda blocks: [
        {**b, "thinking": ""} if b["type"] == "thinking" else b for b in blocks
    ],
    "thinking dropped": lambda blocks: [b for b in blocks if b["type"] != "thinking"],
}
ANSWERS = {
    "text": {"text": "It is  there,\n\n- and here\n"},
    "call": {"calls": (("Bash", {"timeout": "5000", "command": "ls -l  "}),)},
    "numbers": {
        "text": "So:",
        "calls": (("Bash", {"timeout": 5000.0, "background": "false", "command": "sleep 1"}),),
    },
    "two calls": {
        "text": "Both.",
        "calls": (("Bash", {"command": "ls"}), ("Write", {"content": "a  \n b\t\n", "path": "x"})),
    },
    "thought": {"thinking": "What now?\nThis.", "text": "Now this."},
    "thought and call": {"thinking": "Look  first.", "calls": (("Bash", {"command": "ls"}),)},
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_begins_the_next_request(
    renderer: PromptRenderer, family: str, name: str, rewrite: str
):
    session = Session(renderer, family)
    session.ask(user("begin"))
    for _ in range(2):
        everything, message = session.answer(session.write(**ANSWERS[name]))
        calls = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        assert len(calls) == len(ANSWERS[name].get("calls", ()))
        message = {**message, "content": REWRITES[rewrite](message["content"])}
        before = session.prompt
        after = session.ask(
            message,
            results(*((call, f"result of {call}") for call in calls)) if calls else user("go on"),
        )
        shared = common_prefix(everything, after.tokens)
        if family == "one call" and len(calls) > 1:  # the template needs a result between the calls
            assert shared >= before.body
        else:
            assert shared == len(everything), (
                renderer.tokenizer.decode(everything[shared - 9 :]),
                renderer.tokenizer.decode(after.tokens[shared - 9 :]),
            )


def think_and_call(session: Session, number: int) -> dict:
    """One round of thinking and a call; returns what the client sends back for it."""
    _, message = session.answer(
        session.write(thinking=f"thought {number}", calls=(("Bash", {"command": "ls"}),))
    )
    return message


def test_thinking_that_was_read_stays_where_a_template_would_strip_it(tmp_path: Path):
    session = Session(build_renderer(tmp_path, FAMILIES["stripped"]), "stripped")
    session.ask(user("begin"))
    for number in range(3):
        message = think_and_call(session, number)
        session.ask(message, results((message["content"][-1]["id"], "seen")))
    everything, message = session.answer("Done.")
    after = session.ask(message, user("next"))
    assert after.tokens[: len(everything)] == everything
    text = session.renderer.tokenizer.decode(after.tokens)
    assert text.count("thought") == 3 and text.endswith("next<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("why", ["the window is nearly full", "the client wants it dropped"])
def test_old_thinking_goes_once_and_what_is_read_then_stays(tmp_path: Path, why: str):
    session = Session(build_renderer(tmp_path, FAMILIES["stripped"]), "stripped")
    session.ask(user("begin"))
    for number in range(3):
        message = think_and_call(session, number)
        session.ask(message, results((message["content"][-1]["id"], "seen")))
    _, message = session.answer("Done.")
    session.messages += [message, user("next")]
    request = AnthropicMessages(body(session.messages)).request
    window = 10_000
    if why == "the window is nearly full":
        window = len(session.renderer.prompt(request, window).tokens)
    else:
        request.keep_thinking = False
    short = session.renderer.prompt(request, window)
    assert "thought" not in session.renderer.tokenizer.decode(short.tokens)
    session.prompt, session.reply = short, AnthropicMessages(body(session.messages))
    everything, message = session.answer("And on.")
    session.messages += [message, user("more")]
    request = AnthropicMessages(body(session.messages)).request
    after = session.renderer.prompt(request, window)
    assert after.tokens[: len(everything)] == everything


def test_a_template_that_ends_no_turn_with_a_token_keeps_the_whole_conversation(tmp_path: Path):
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    opening = "{% if add_generation_prompt %}assistant:{% endif %}"
    session = Session(build_renderer(tmp_path, turns + opening), "endless")
    session.ask(user("begin"))
    for words in ("go on", "end"):
        _, message = session.answer(session.write(text="Yes, it is."))
        after = session.ask(message, user(words))
    assert session.renderer.tokenizer.decode(after.tokens).endswith(
        "user: begin\nassistant: Yes, it is.\nuser: go on\nassistant: Yes, it is.\n"
        "user: end\nassistant:"
    )


@pytest.mark.parametrize("rewrite", ["nothing", "thinking dropped"])
def test_calls_that_a_template_takes_one_by_one_are_written_once(tmp_path: Path, rewrite: str):
    session = Session(build_renderer(tmp_path, FAMILIES["one call"]), "one call")
    session.ask(user("begin"))
    _, message = session.answer(session.write(thinking="Look.", **ANSWERS["two calls"]))
    content = REWRITES[rewrite](message["content"])
    calls = [block["id"] for block in content if block["type"] == "tool_use"]
    seen = results(*((call, f"result of {call}") for call in calls))
    after = session.ask({**message, "content": content}, seen)
    text = session.renderer.tokenizer.decode(after.tokens).partition("begin<|im_end|>")[2]
    for part in ("<think>\nLook.\n</think>", "Both.", '"Bash"', '"Write"', *calls):
        assert text.count(part) == 1, (part, text)


def test_a_date_in_the_prompt_stays_that_of_the_conversation(tmp_path: Path):
    # Microseconds
    session = Session(
        build_renderer(tmp_path, FAMILIES["dated"].replace("%H:%M:%S", "%f")), "dated"
    )
    before = session.ask(user("begin"))
    assert goes_on(before, session.ask(assistant("yes"), user("go on")))
    other = Session(session.renderer, "dated").ask(user("another conversation"))
    assert common_prefix(other.tokens, before.tokens) < len(
        session.renderer.encode("<|im_start|>system\nToday is 01 January 2000, 123456")
    )


HARMONY_TOKENS = [
    "<|return|>",
    "<|call|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|constrain|>",
]
HARMONY = """<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>
{%- for m in messages %}
{%- if m.role == 'tool' %}<|start|>functions.tool to=assistant<|channel|>commentary<|message|>
{{- m.content | tojson }}<|end|>
{%- elif m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}
{%- if loop.first %}{{ tools | tojson }}{% endif %}<|end|>
{%- elif m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('one or the other') }}{% endif %}
{%- set later = messages[loop.index:] | selectattr('role', 'eq', 'assistant') %}
{%- set later = later | rejectattr('tool_calls', 'defined') | list %}
{%- if (m.content or m.thinking) and not later %}<|start|>assistant<|channel|>analysis<|message|>
{{- m.content or m.thinking }}<|end|>
{%- endif %}{% set call = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ call.name }}
{{- '' }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""


def build_harmony(path: Path) -> Session:
    from tokenizers import Tokenizer

    build_tokenizer(path, HARMONY)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(HARMONY_TOKENS)
    tokenizer.save(str(path / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in HARMONY_TOKENS[:2]]
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": ends}))
    shutil.copy(ROOT / "tests/demo/model.safetensors", path)
    return Session(PromptRenderer(describe("m", path)), "harmony")


@pytest.mark.parametrize("rewrite", ["nothing", "inputs", "thinking omitted"])
def test_channels_keep_their_tokens_while_the_template_shows_them(tmp_path: Path, rewrite: str):
    session = build_harmony(tmp_path)
    session.ask(user("begin"))
    for thought in ("<|channel|>analysis<|message|>Look  first.<|end|><|start|>assistant", ""):
        for spoken in ("", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"):
            everything, message = session.answer(
                thought
                + spoken
                + "<|channel|>commentary to=functions.Bash <|constrain|>json<|message|>"
                '{"timeout":5000.0 ,"command":"ls"}',
                "<|call|>",
            )
            call = message["content"][-1]
            message = {**message, "content": REWRITES[rewrite](message["content"])}
            after = session.ask(message, results((call["id"], "seen")))
            assert after.tokens[: len(everything)] == everything
    thought = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant"
    _, message = session.answer(thought + "<|channel|>final<|message|>It is done.", "<|return|>")
    assert message["content"][-1] == {"type": "text", "text": "It is done."}
    after = session.ask(message, user("next"))
    text = session.renderer.tokenizer.decode(after.tokens)
    assert text.count("analysis<|message|>Look  first.") == 2 and text.endswith(
        "<|start|>assistant<|channel|>final<|message|>It is done.<|end|>"
        "<|start|>user<|message|>next<|end|><|start|>assistant"
    )
    everything, message = session.answer("<|channel|>final<|message|>Yes.", "<|return|>")
    after = session.ask(message, user("more"))  # in which the answer ends with another tag
    assert common_prefix(everything, after.tokens) == len(everything) - 1


# Closed loops with the built-in model


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("families")
    for name, text in FAMILIES.items():
        path = shutil.copytree(ROOT / "tests/demo", folder / f"demo-{name.replace(' ', '-')}")
        (path / "chat_template.jinja").write_text(text)
    server = Server("--models-dir", str(folder))
    yield server
    assert server.stop() == 0


@pytest.mark.slow
def test_a_closed_loop_prefills_only_what_is_new(families: Server, family: str):
    client = anthropic.Anthropic(
        base_url=families.url, api_key="any", max_retries=0, _strict_response_validation=True
    )
    messages: list[dict] = []
    known = called = 0
    calls: list[dict] = []
    for words in (
        "run echo one",
        "say two",
        "think then say three",
        "run ls and run pwd",
        "say four",
    ):
        messages.append(user(words))
        while True:
            answer = client.messages.create(
                **{**body(messages, len(messages)), "model": f"demo-{family.replace(' ', '-')}"}
            )
            read = answer.usage.cache_read_input_tokens
            split = family == "one call" and len(calls) > 1
            assert read >= known - 1 or split, (words, known, read)
            known = answer.usage.input_tokens + read + answer.usage.output_tokens
            blocks = [block.to_dict() for block in answer.content]
            messages.append({"role": "assistant", "content": list(map(rewritten, blocks))})
            calls = [block for block in blocks if block["type"] == "tool_use"]
            called += len(calls)
            if not calls:
                break
            messages.append(results(*((call["id"], "seen") for call in reversed(calls))))
    assert called >= 3


@pytest.mark.parametrize("later", ["sent back", "dropped"])
@pytest.mark.parametrize("family", ["json", "stripped", "nine"])
def test_turns_that_were_only_read_stay_as_they_were_read(tmp_path: Path, family: str, later: str):
    """A session that comes from elsewhere goes on here."""
    elsewhere = Session(build_renderer(tmp_path / "elsewhere", FAMILIES[family]), family)
    elsewhere.ask(user("begin"))
    for number in range(2):
        message = think_and_call(elsewhere, number)
        elsewhere.ask(message, results((message["content"][-1]["id"], "seen")))
    here = Session(build_renderer(tmp_path / "here", FAMILIES[family]), family)
    resumed = here.ask(*elsewhere.messages)
    _, message = here.answer("Done.")
    kept = here.messages
    if later == "dropped":
        drop = REWRITES["thinking dropped"]
        kept = [
            {**one, "content": drop(one["content"])} if one["role"] == "assistant" else one
            for one in kept
        ]
    here.messages = kept
    after = here.ask(message, user("next"))
    assert after.tokens[: resumed.body] == resumed.tokens[: resumed.body]
    assert here.renderer.tokenizer.decode(after.tokens).count("thought") == 2


@pytest.mark.parametrize("family", ["json", "stripped", "nine"])
def test_answers_from_elsewhere_are_read_behind_what_was_read(tmp_path: Path, family: str):
    """Also where the template would now leave out thinking that has been read."""
    elsewhere = Session(build_renderer(tmp_path / "elsewhere", FAMILIES[family]), family)
    elsewhere.ask(user("begin"))
    here = Session(build_renderer(tmp_path / "here", FAMILIES[family]), family)
    read, decode = [here.ask(*elsewhere.messages)], here.renderer.tokenizer.decode
    for number in range(3):
        message = think_and_call(elsewhere, number)
        new = [message, results((message["content"][-1]["id"], f"seen {number}"))]
        elsewhere.ask(*new)
        read.append(here.ask(*new))
    new = [assistant("Done."), user("next \n")]
    read.append(here.ask(*new))
    assert here.ask().tokens == read[-1].tokens
    read.append(here.ask(assistant("And done."), user("more")))
    assert all(itertools.starmap(goes_on, itertools.pairwise(read)))
    text = decode(read[-1].tokens)
    assert text.count("thought") == 3
    turns = [("user", "next"), ("assistant", "And done."), ("user", "more")]
    end = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    assert text.endswith(f"Done.<|im_end|>\n{end}<|im_start|>assistant\n")


def test_two_clients_that_share_a_beginning_go_on_from_it(tmp_path: Path):
    session = recorded_loop(tmp_path, "stripped")
    shared = list(session.messages)
    read = session.prompt.tokens[: session.prompt.body]
    for words in ("left", "right"):
        fork = Session(session.renderer, "stripped")
        fork.ask(*shared)
        everything, message = fork.answer(f"To the {words}.")
        after = fork.ask(message, user(f"{words} it is"))
        assert everything[: len(read)] == read and after.tokens[: len(everything)] == everything


# What the client changes


def recorded_loop(path: Path, family: str) -> Session:
    """Three turns of thinking, calls and text, all of them answered by this renderer."""
    session = Session(build_renderer(path, FAMILIES[family]), family)
    session.ask(user("begin"))
    for turn in range(3):
        for number in range(2):
            message = think_and_call(session, 10 * turn + number)
            call = message["content"][-1]["id"]
            session.ask(message, results((call, f"seen {turn} {number}")))
        _, message = session.answer(session.write(text=f"Done with {turn}."))
        session.ask(message, user(f"go on {turn}"))
    return session


def edited(messages: list[dict], chance: random.Random) -> tuple[list[dict], str]:
    """A conversation with one message changed as no client does by itself, and the words that
    have come in."""
    messages = json.loads(json.dumps(messages))
    at = chance.randrange(len(messages))
    words = f"changed {chance.randrange(10**9)}"
    content = messages[at]["content"]
    if isinstance(content, str):
        messages[at]["content"] = words
    elif content[-1]["type"] == "tool_result":
        content[-1]["content"] = words
    elif content[-1]["type"] == "tool_use" and chance.random() < 0.5:
        content[-1]["id"] = messages[at + 1]["content"][0]["tool_use_id"] = f"other {words}"
        content[-1]["input"] = {"command": words}
    else:
        texts = [block for block in content if block["type"] == "text"]
        if texts:
            texts[0]["text"] = words
        else:
            content.insert(0, {"type": "text", "text": words})
    return messages, words


@pytest.mark.parametrize("edits", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["json", "stripped", "thoughtless"])
def test_what_a_client_changes_is_read_anew_from_there_on(tmp_path: Path, family: str, edits: int):
    session = recorded_loop(tmp_path / "warm", family)
    cold = build_renderer(tmp_path / "cold", FAMILIES[family])
    decode, chance = cold.tokenizer.decode, random.Random(7)
    for _ in range(edits):
        messages, words = edited(session.messages, chance)
        request = AnthropicMessages(body(messages)).request
        warm_tokens = session.renderer.prompt(request).tokens
        cold_tokens = cold.prompt(request).tokens
        warm, anew = decode(warm_tokens), decode(cold_tokens)
        assert warm.count(words) == anew.count(words) > 0
        # From the changed turn on both are the same, but for thinking that only the warm one knows.
        assert warm.rpartition(words)[2] == anew.rpartition(words)[2]
        shared = common_prefix(warm_tokens[::-1], cold_tokens[::-1])
        next_turns = anew.rpartition(words)[2].partition("<|im_start|>")[2]
        assert decode(cold_tokens[len(cold_tokens) - shared :]).endswith(next_turns)


def test_the_same_messages_after_other_tools_or_another_system_prompt_are_read_anew(
    tmp_path: Path,
):
    session = recorded_loop(tmp_path, "stripped")
    same = session.renderer.prompt(session.reply.request)
    other = body(session.messages)
    other["system"][-1]["text"] = "You are careless."
    fewer = body(session.messages, tools=TOOLS[:1])
    for changed in (other, fewer):
        prompt = session.renderer.prompt(AnthropicMessages(changed).request)
        text = session.renderer.tokenizer.decode(prompt.tokens)
        assert prompt.root != same.root or prompt.tokens[: prompt.root] != same.tokens[: same.root]
        assert "You are careful." not in text or changed is fewer
        assert "thought" not in text  # the template's own form: nobody has read this before
