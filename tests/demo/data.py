"""The demo model's contract as data: endless random conversations to train on, fresh prompts to
examine it with.

    say TEXT, repeat TEXT       TEXT
    count to N                  1 2 3 ... N
    run COMMAND                 a call of Bash, or of the agent's own tool that runs commands;
                                `run A and run B` two of them
    read PATH                   a call of Read
    write "TEXT" to PATH        a call of Write
    think then say TEXT         a thought in <think> tags, then TEXT
    a tool's result             The tool answered: and the result's first line
    hi, hello, hey / привет     a greeting; anything else: what the model can do

`python data.py FOLDER` examines a model through mlx-lm.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HELLO = "Hello! I am the built-in demo model. I can say, count, read, write and run."
PRIVET = "Привет! Я встроенная демо-модель. Я умею говорить, считать, читать, писать и запускать."
FALLBACK = "I am only a small demo model. Try: say hello, count to 5, read FILE, run COMMAND."
THOUGHT = "The user wants me to think first and then to speak."
ANSWERED = "The tool answered: "
ROWS = (
    "say",
    "count",
    "run",
    "read",
    "write",
    "two runs",
    "think",
    "result",
    "hello",
    "privet",
    "other",
)
SHAPES = ("bare", "quiet", "chat", "long", "agent", "own")

RUSSIAN = """и в не на я что тот быть с а весь это как она по но они к у ты из мы за вы так же от
сказать этот который мочь человек о один еще бы такой только себя свое какой когда уже для вот кто
да говорить год знать мой до или если время рука нет самый ни стать большой даже другой наш свой
ну под где дело есть сам раз чтобы два там чем глаз жизнь первый день тут ничто потом очень со
хотеть ли при голова надо без видеть идти теперь тоже стоять друг дом сейчас можно после слово
здесь думать место спросить через лицо тогда ведь хороший каждый новый жить должный смотреть
почему потому сторона просто нога сидеть понять иметь конечный делать вдруг над взять никто
сделать дверь перед нужный понимать казаться работа три ваш уж земля конец несколько час голос
город последний пока хорошо приветствие давать вода более хотя всегда второй куда пойти стол
ребенок увидеть сила отец женщина машина случай ночь сразу мир совсем остаться об вид выйти дать
работать любить старый почти ряд оказаться начало твой вопрос много война снова ответить между
подумать опять белый деньги значить про лишь минута жена читать писать считать запускать файл
строка команда сервер модель ключ ошибка данные""".split()
COMMON = """a able about all and any are as at back be bear best big bird black blue book boy
brown but by can car cat cold come could day do dog done down eat end even every face far fast
find first fish five fly four fox free friend from full game girl give go good great green had
hand happy hard have he head hello help her here hi high him his home hot house how i if in is it
jump jumps just keep key know last lazy left less life light like line little live local long look
love made make man many me mlx model moon more morning most my name new next night nine no not now
of off old on one only open or other our out over own page part people place plan play please
quick quiet rain read red right road room run said same say sea see server seven she short sing
sky slow small so some song soon stand star stay step still stop story sun sure table take talk
tell ten test text than that the their them then there they thing think this three time to today
token tomorrow town tree true try turn two under up us use very wait walk want warm was water way
we week well were what when where which white who wind with word work world write year yes you
young zero hello-from-mlx hello-world""".split()
COMMANDS = """ls cat echo grep find git python python3 pip npm make cargo docker curl head tail wc
sort sed awk rm cp mv mkdir touch chmod pytest node go uv ruff date pwd whoami env df du ps kill
tar ssh test true printf xargs tee diff uname hostname""".split()
FLAGS = """-l -a -la -r -rf -n -v -x -p -i -e -c --all --help --version --oneline --no-cache -q -m
-f --name --json -n5 -1 -C""".split()
SNIPPETS = [
    "$HOME",
    "$1",
    "${X}",
    "\\n",
    "*.py",
    "\\.",
    "HEAD~1",
    "a\\b",
    "%s",
    "'{print $1}'",
    "@{u}",
    "^",
    "!",
    "[0-9]+",
]
QUOTES = [
    "'%s'",
    '"%s"',
    "(%s)",
    "[%s]",
    "<%s>",
    "`%s`",
    "{%s}",
    "*%s*",
    "$%s",
    "#%s",
    "--%s",
    "%s()",
]
EXTENSIONS = """py txt md json js ts rs go c h cpp toml yaml yml sh html css cfg ini log csv lock
xml sql""".split()
FOLDERS = """src tests test lib app docs home root tmp var usr etc bin build dist data config
scripts server client models utils core work project user pytest-of-root node_modules Desktop
Documents""".split()
TOOLS = "Agent Bash Edit Glob Grep Read Skill Task TodoWrite WebFetch WebSearch Write".split()
SHELLS = """bash shell exec exec_command run run_command shell_command execute_command terminal
run_shell_command run_terminal_cmd run_in_terminal execute_bash execute sh cmd functions.exec
developer__shell mcp__shell__run""".split()
EMOJI = [*"😀🎉🚀✅❌🔥👍🐍💡📦⚡🙂—…€éüñß中文한→✓°", "日本"]
RARE = [(0x1F300, 0x1F64F), (0xA1, 0x17F), (0x370, 0x4FF), (0x4E00, 0x9FFF), (0x2010, 0x27BF)]


class Shell(NamedTuple):
    """A tool that runs commands, and the name of its argument."""

    tool: str
    argument: str


BASH = Shell("Bash", "command")


class Prompt(NamedTuple):
    """One examination question: the conversation in the template's form, and the exact text that
    has to come."""

    row: str
    messages: list[dict]
    tools: list[dict] | None
    expected: str


class Words:
    """Random text: words of the standard library's sources, made-up ones, numbers, quotes, paths,
    unicode.

    `pieces` are strings that have to be copied although text rarely holds them: a tokenizer's whole
    vocabulary."""

    def __init__(self, rng: random.Random, pieces: Sequence[str] = ()):
        self.rng = rng
        self.pieces = pieces
        self.text = corpus()
        self.words = sorted(
            {
                w
                for w in self.text.replace("(", " ").replace("_", " ").split()
                if w.isalpha() and len(w) < 14
            }
        )

    def slice(self, length: int) -> str:
        """A piece of source code or prose of `length` characters; not every piece begins at a
        word."""
        start = self.rng.randrange(len(self.text) - length)
        return self.text[start : start + length].strip()

    def prose(self, length: int) -> str:
        """Short common words without sense, in lines and lists, of about `length` characters."""
        text = ""
        while len(text) < length:
            text += " ".join(
                self.rng.choice(self.words).lower() for _ in range(self.rng.randint(2, 30))
            )
            text += self.rng.choice((" ", ".\n", "\n", "\n\n", "\n- ", "\n\n# "))
        return text.strip()

    def unrelated(self, length: int) -> str:
        return self.slice(length) if self.rng.random() < 0.6 else self.prose(length)

    def reminder(self, length: int) -> str:
        return f"<system-reminder>\n{self.unrelated(length)}\n</system-reminder>"

    def made_up(self) -> str:
        rng = self.rng
        letters = rng.choice(
            (
                string.ascii_lowercase,
                string.ascii_lowercase,
                string.ascii_letters,
                string.ascii_letters + string.digits,
            )
        )
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))

    def common(self) -> str:
        word = self.rng.choice(COMMON) if self.rng.random() < 0.5 else self.rng.choice(self.words)
        return word.capitalize() if self.rng.random() < 0.1 else word

    def plain(self) -> str:
        return self.rng.choice(self.words) if self.rng.random() < 0.7 else self.made_up()

    def word(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.40:
            word = rng.choice(self.words)
            return (
                word.upper()
                if rng.random() < 0.05
                else word.capitalize()
                if rng.random() < 0.15
                else word
            )
        if kind < 0.53:
            return self.made_up()
        if kind < 0.55:
            return rng.choice(self.pieces) if self.pieces else self.plain()
        if kind < 0.68:
            return str(
                rng.choice(
                    [
                        rng.randrange(10),
                        rng.randrange(1000),
                        rng.randrange(10**6),
                        round(rng.random() * 100, 2),
                    ]
                )
            )
        if kind < 0.76:
            return rng.choice("-_./:@+=").join(self.plain() for _ in range(rng.randint(2, 4)))
        if kind < 0.83:
            word = (
                rng.choice(RUSSIAN)
                if rng.random() < 0.6
                else "".join(
                    rng.choice("абвгдеёжзийклмнопрстуфхцчшщъыьэюя")
                    for _ in range(rng.randint(2, 8))
                )
            )
            return word.capitalize() if rng.random() < 0.3 else word
        if kind < 0.88:
            return rng.choice(QUOTES) % self.plain()
        if kind < 0.91:
            return (
                rng.choice(EMOJI) if rng.random() < 0.85 else chr(rng.randrange(*rng.choice(RARE)))
            )
        if kind < 0.94:
            return self.path()
        return self.plain() + rng.choice(",.!?;:")

    def phrase(self, most: int = 12) -> str:
        # People mostly say plain words; the rest is for everything else that has to be copied.
        word = self.common if self.rng.random() < 0.35 else self.word
        return " ".join(
            word()
            for _ in range(min(self.rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 12)), most))
        )

    def name(self) -> str:
        rng = self.rng
        name = rng.choice("-_").join(self.plain() for _ in range(rng.choice((1, 1, 1, 2, 3))))
        return name + str(rng.randrange(30)) if rng.random() < 0.2 else name

    def path(self) -> str:
        rng = self.rng
        folders = [
            rng.choice(FOLDERS) if rng.random() < 0.6 else self.name()
            for _ in range(rng.randint(0, 4))
        ]
        if rng.random() < 0.1:
            folders = [
                "tmp",
                "pytest-of-" + self.plain(),
                f"pytest-{rng.randrange(200)}",
                f"test_{self.name()}{rng.randrange(9)}",
            ]
        name = self.name() + ("." + rng.choice(EXTENSIONS) if rng.random() < 0.85 else "")
        return rng.choice(("/", "", "./", "/", "~/", "../")) + "/".join([*folders, name])

    def shell(self) -> Shell:
        made_up = "_".join(self.name() for _ in range(self.rng.randint(1, 2)))
        name = self.rng.choice(SHELLS) if self.rng.random() < 0.6 else made_up
        return Shell(name, self.rng.choice(("command", "cmd")))

    def command(self) -> str:
        rng = self.rng
        parts = [rng.choice(COMMANDS) if rng.random() < 0.85 else self.path()]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4))):
            kind = rng.random()
            parts.append(
                self.common()
                if kind < 0.12
                else rng.choice(FLAGS)
                if kind < 0.25
                else self.path()
                if kind < 0.45
                else self.plain()
                if kind < 0.65
                else rng.choice(('"%s"', "'%s'")) % self.phrase(4).replace('"', "")
                if kind < 0.78
                else rng.choice(("| ", "&& ", "; ", "|| ", "> ", ">> ", "2>&1 | "))
                + rng.choice(COMMANDS)
                if kind < 0.88
                else rng.choice(SNIPPETS)
                if kind < 0.95
                else self.word()
            )
        return " ".join(parts)


def call(tool: str, **arguments: str) -> dict:
    return {"type": "function", "function": {"name": tool, "arguments": arguments}}


def spoken(calls: list[dict]) -> str:
    """Calls as the chat template writes them."""
    return "\n".join(
        "<tool_call>\n{}\n</tool_call>".format(json.dumps(c["function"], ensure_ascii=False))
        for c in calls
    )


def request(row: str, words: Words, shell: Shell = BASH) -> tuple[str, dict]:
    """A request of one row: what the user says, and the assistant's message that has to come."""
    rng = words.rng

    def verb(text: str) -> str:
        return rng.choice((text,) * 8 + (text.capitalize(), text.upper()))

    def text(content: str) -> dict:
        return {"role": "assistant", "content": content}

    def calls(*made: dict) -> dict:
        return {"role": "assistant", "content": "", "tool_calls": list(made)}

    def runs(*commands: str) -> dict:
        return calls(*(call(shell.tool, **{shell.argument: command}) for command in commands))

    if row == "say":
        phrase = words.phrase()
        return f"{verb(rng.choice(('say', 'say', 'repeat')))} {phrase}", text(phrase)
    if row == "count":
        n = rng.randint(1, rng.choice((10, 30)))
        return f"{verb('count')} to {n}", text(" ".join(map(str, range(1, n + 1))))
    if row == "run":
        command = words.command()
        return f"{verb('run')} {command}", runs(command)
    if row == "read":
        path = words.path()
        return f"{verb('read')} {path}", calls(call("Read", file_path=path))
    if row == "write":
        phrase, path = words.phrase(8).replace('"', "") or "x", words.path()
        return f'{verb("write")} "{phrase}" to {path}', calls(
            call("Write", file_path=path, content=phrase)
        )
    if row == "two runs":
        a, b = (words.command().replace(" and ", " ") for _ in range(2))
        return f"{verb('run')} {a} and run {b}", runs(a, b)
    if row == "think":
        phrase = words.phrase(8)
        return f"{verb('think')} then say {phrase}", text(phrase) | {"reasoning_content": THOUGHT}
    if row == "hello":
        greeting = rng.choice(("hi", "hello", "hey"))
        return rng.choice((greeting, greeting.capitalize(), greeting.upper())) + rng.choice(
            ("", "!")
        ), text(HELLO)
    if row == "privet":
        return rng.choice(("привет", "Привет", "ПРИВЕТ")) + rng.choice(("", "!")), text(PRIVET)
    return other(words), text(FALLBACK)


def other(words: Words) -> str:
    """Something that is no request of the contract."""
    rng = words.rng
    if rng.random() < 0.25:  # a title request, or just a long text
        title = rng.choice(
            (
                "Write a short title for this conversation",
                "Summarize the text in one sentence",
                "Answer as JSON",
            )
        )
        return rng.choice(
            (
                f"{title}:\n\n{words.unrelated(rng.randint(50, 600))}",
                f"{words.unrelated(rng.randint(50, 600))}\n\n{title}.",
                words.prose(rng.randint(50, 600)),
            )
        )
    first = rng.choice(
        (
            "what",
            "why",
            "how",
            "please",
            "write a title for",
            "explain",
            "fix the bug in",
            "can you",
            "I",
            "the",
            "summarize",
            "tell me about",
            "Is",
            "who",
            "hmm",
            "ok",
            "thanks",
            "2 + 2",
            "почему",
            "что",
            "как",
            "list",
            "create",
            "Generate",
            "running",
            "reading",
            "saying",
            "counting",
            words.plain(),
            words.plain(),
        )
    )
    return f"{first} {words.phrase()}".strip() + rng.choice(("", "", "?", "."))


def result(words: Words) -> tuple[str, str]:
    """A tool's result, and its first line."""
    rng = words.rng
    kind = rng.random()
    if kind < 0.15:
        first = rng.choice(
            ("Error: ", "Exit code 1 ", "error: ", "Error: Exit code 127 ")
        ) + words.phrase(8)
    elif kind < 0.25:
        first = "File created successfully at: " + words.path()
    elif kind < 0.35:
        first = f"{rng.randint(1, 9)}\t{words.phrase(10)}"
    else:
        first = words.phrase()
    lines = [first, *(words.phrase() for _ in range(rng.choice((0, 0, 0, 1, 2, 3))))]
    text = "\n".join(lines)
    if rng.random() < 0.3:
        most = 300 if len(text) < 100 else 120
        text += f"\n{rng.choice(('', chr(10)))}{words.reminder(rng.randint(10, most))}"
    return text, first


def in_front(words: Words) -> str:
    """What may stand before the request in its turn."""
    rng = words.rng
    kind = rng.random()
    if kind < 0.45:
        return ""
    if kind < 0.75:
        return "".join(
            words.reminder(rng.choice((rng.randint(5, 250), rng.randint(250, 1200)))) + "\n"
            for _ in range(rng.choice((1, 1, 2)))
        )
    if kind < 0.82:
        return "[Request interrupted by user]\n"
    return words.unrelated(rng.choice((rng.randint(5, 200), rng.randint(200, 1000)))) + "\n"


def exchange(row: str, words: Words, shell: Shell = BASH) -> list[dict]:
    """The messages of one exchange, the last of which is the answer to examine."""
    rng = words.rng
    if row == "result":
        said, answer = request(rng.choice(("run", "read", "write", "two runs")), words, shell)
    else:
        said, answer = request(row, words, shell)
    messages = [
        {"role": "user", "content": in_front(words) + said + rng.choice(("", "", "", "\n"))},
        answer,
    ]
    if row == "result":
        results = [result(words) for _ in answer["tool_calls"]]
        messages += [{"role": "tool", "content": text} for text, _ in results]
        messages.append({"role": "assistant", "content": ANSWERED + results[-1][1]})
    return messages


def tools(words: Words, names: Sequence[str], most: int = 300) -> list[dict]:
    """Definitions of the named tools, with descriptions of up to `most` characters."""
    rng = words.rng
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": words.unrelated(rng.randint(most // 10, most)),
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["command"],
                    "properties": {
                        words.plain(): {
                            "type": rng.choice(("string", "number", "boolean")),
                            "description": words.unrelated(rng.randint(10, 120)),
                        }
                        for _ in range(rng.randint(1, 3))
                    },
                },
            },
        }
        for name in names
    ]


def own_tools(words: Words, shell: Shell, most: int = 300) -> list[dict]:
    """Definitions of tools with one that runs commands, which is not `Bash`."""
    rng = words.rng
    names = rng.sample([name for name in TOOLS if name != BASH.tool], rng.randint(0, 3))
    properties = {words.plain(): {"type": "number"} for _ in range(rng.randint(0, 2))}
    described = {"type": "string", "description": words.unrelated(rng.randint(10, 120))}
    own = {
        "name": shell.tool,
        "description": words.unrelated(rng.randint(most // 10, most)),
        "parameters": {
            "type": "object",
            "required": [shell.argument],
            "properties": properties | {shell.argument: described},
        },
    }
    declared = [*tools(words, names, most), {"type": "function", "function": own}]
    rng.shuffle(declared)
    return declared


def contract_prompts(seed: int, count: int, shape: str = "chat") -> Iterator[Prompt]:
    """`count` fresh prompts over all rows: the request alone ("bare"), with thinking off ("quiet"),
    behind a short system prompt and earlier turns ("chat"), behind some 10,000 tokens of unrelated
    text ("long"), behind a coding agent's system prompt, a dozen tools of 2-4 kB and a large
    reminder ("agent"), or to an agent that has a tool of its own for commands ("own", another one
    in each prompt). What else stands in front is the same for all prompts of one seed."""
    words = Words(random.Random(f"{shape} {seed}"))
    before: list[dict] = []
    declared: list[dict] | None = None
    if shape == "chat":
        before = [
            {"role": "system", "content": words.slice(200)},
            *exchange("say", words),
            *exchange("result", words),
        ]
    elif shape == "long":
        before = [{"role": "system", "content": words.slice(20_000)}]
    elif shape == "agent":
        declared = tools(words, TOOLS, 3000)
        before = [
            {"role": "system", "content": words.prose(8000)},
            {"role": "user", "content": words.reminder(10_000) + "\n" + words.phrase(3)},
            {"role": "assistant", "content": FALLBACK},
        ]
    for number in range(count):
        row, shell = ROWS[number % len(ROWS)], BASH
        if shape == "own":
            shell = words.shell()
            declared = own_tools(words, shell)
        *messages, answer = exchange(row, words, shell)
        thought = (
            f"<think>\n{answer['reasoning_content']}\n</think>\n\n"
            if "reasoning_content" in answer and shape != "quiet"
            else ""
        )
        yield Prompt(
            row,
            before + messages,
            declared,
            thought + answer["content"] + spoken(answer.get("tool_calls", [])),
        )


def corpus() -> str:
    """Source code and prose that every Python has on board."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in sorted(library.glob("*.py")) if not path.name.startswith("_")
    ]  # those describe a machine
    files += sorted(library.glob("json/*.py")) + sorted(library.glob("asyncio/*.py"))
    text = (
        (library / "pydoc_data" / "topics.py")
        .read_text("utf-8")
        .replace("\\n", "\n")
        .replace("'\n  '", "")
    )
    return text + "\n".join(path.read_text("utf-8", "ignore") for path in files)


def examine(folder: Path, shape: str, count: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """How many prompts of each row were asked, and how many answered to the character."""
    import copy

    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.models.cache import make_prompt_cache
    from transformers import PreTrainedConfig

    model, tokenizer = load(
        str(folder), tokenizer_config={"config": PreTrainedConfig()}
    )  # else it refuses unknown layer types
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    prompts = [
        (
            p,
            tokenizer.apply_chat_template(
                p.messages,
                tools=p.tools,
                add_generation_prompt=True,
                enable_thinking=shape != "quiet",
            ),
        )
        for p in contract_prompts(seed, count, shape)
    ]
    # The front that all prompts share is read once.
    shared = next(
        i
        for i, column in enumerate(zip(*(tokens for _, tokens in prompts), strict=False))
        if len(set(column)) > 1
    )
    front = make_prompt_cache(model)
    for at in range(0, shared, 512):
        model(mx.array(prompts[0][1][at : min(at + 512, shared)])[None], cache=front)
        mx.eval([layer.state for layer in front])
    for prompt, tokens in prompts:
        answer = "".join(
            part.text
            for part in stream_generate(
                model, tokenizer, tokens[shared:], max_tokens=400, prompt_cache=copy.deepcopy(front)
            )
        )
        asked[prompt.row] += 1
        right[prompt.row] += answer == prompt.expected
        if answer != prompt.expected:
            print(f"{shape}, {prompt.row}: {prompt.messages[-1]['content'][-300:]!r}")
            print(f"  wanted {prompt.expected!r}\n  got    {answer!r}")
    return asked, right


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Examines a model on fresh prompts of the contract at temperature 0."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    for shape in args.shapes:
        asked, right = examine(args.folder, shape, args.count, args.seed)
        rows = ", ".join(f"{row} {right[row]}/{n}" for row, n in asked.items())
        print(
            f"{shape}: {sum(right.values()) / sum(asked.values()):.1%} exact ({rows})", flush=True
        )


if __name__ == "__main__":
    main()
