"""How a family of models writes one tool call: to read calls, and to write them on demand.

A call stands between the call tags of an `OutputFormat`. It has four parts:

    <tool_call>  {"name": "Bash", "arguments":   {"command": "ls"}   }        </tool_call>
    call tag     head                            arguments           tail     end tag

There are two kinds of arguments. In an `ObjectSyntax` they are a JSON object or much like one, in a
`TagSyntax` each value stands between tags of its own. Patterns read with some forgiveness; a
`CallTemplate` holds the exact text to write.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass


def pattern(*pieces: str) -> re.Pattern[str]:
    """The regular expression that the pieces make together; a dot matches newlines, too."""
    return re.compile("".join(pieces), re.DOTALL)


MAX_HEAD = 1000  # characters within which a call's head, or an argument's, is complete
# No name holds a "<", so that none reaches over an end tag.
_JSON_KEY = r'"((?:[^"\\<]|\\.){0,200}+)"\s*+:\s*+'
JSON_ARGUMENT = pattern(_JSON_KEY, r"(?=\S)")
# The bracket that opens a JSON object, once its first key or its end has come.
JSON_START = rf"\{{(?=\s*+(?:\}}|{_JSON_KEY}))"
# What a value stands between that holds its own family's tags.
# https://www.w3.org/TR/xml/#sec-cdata-sect
CDATA = ("<![CDATA[", "]]>")
# A key without quotes.
BARE_KEY = r"([^\s{}\[\]:,<](?:[^{}\[\]:,<]*[^\s{}\[\]:,<])?)\s*+:"


@dataclass(frozen=True, kw_only=True)
class CallTemplate:
    """The texts around the arguments of a call that is demanded.

    NAME stands for the tool's name, KEY for an argument's, KIND for what `kind_of` makes of a
    value's JSON type. Without `before_value` the arguments are one JSON object.
    """

    head: str
    tail: str
    before_value: str = ""
    after_value: str = ""
    separator: str = ""  # between two arguments
    kind_of: Callable[[str], str] | None = None

    @property
    def is_json(self) -> bool:
        """Whether the arguments are one JSON object."""
        return not self.before_value


@dataclass(frozen=True, kw_only=True)
class ValueSyntax:
    """How one value that is text ends: at one of `ends`, if one of `next_argument` or
    `arguments_end` follows, blanks aside.

    `opener` begins a value and `closer` ends it. If both are the same quote, there is no `opener`,
    and `before_string` is a pattern of what stands before a quote that begins a string. With
    `escapes` the value is a string of JSON, inside which no quote stands as it is.
    """

    ends: tuple[str, ...]
    next_argument: tuple[str, ...]
    arguments_end: tuple[str, ...]
    closer: str
    opener: str = ""
    before_string: str = ""
    escapes: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseSyntax:
    """What both kinds of syntax have.

    `head` matches from the call tag to the arguments; its group is the tool's name. A call counts
    from there on, so the pattern looks ahead until the first argument or the arguments' end has
    begun: a name alone may be prose. It sees at most MAX_HEAD characters, and must be linear in
    them: a repetition is possessive where what follows it could match the same. `argument` matches
    what precedes an argument's value; its first group is the argument's name. `next_argument` and
    `arguments_end` are the texts that may follow a value, blanks aside. `tail` matches what is
    skipped behind the arguments.
    """

    head: re.Pattern[str]
    argument: re.Pattern[str]
    next_argument: tuple[str, ...]
    arguments_end: tuple[str, ...]
    tail: re.Pattern[str]
    # How another call begins behind the tail, for families without an end tag. NAME is a tool's.
    next_call: tuple[str, ...] = ()
    # How an answer begins that is a call without a call tag: lower case, without blanks.
    bare_heads: tuple[str, ...] = ()
    # How to write a call; None if it is only read.
    template: CallTemplate | None = None

    @property
    def markup(self) -> tuple[str, ...]:
        """The texts that may hold control tokens."""
        template = self.template
        written = (template.head, template.before_value, template.tail) if template else ()
        return (*self.next_argument, *self.arguments_end, *written)

    def head_for(self, name: str) -> str:
        """The text between the call tag and the arguments in a call of the tool `name`."""
        return self.template.head.replace("NAME", name) if self.template else ""


@dataclass(frozen=True, kw_only=True)
class ObjectSyntax(BaseSyntax):
    """The arguments are a JSON object or much like one: `{k:<|"|>v<|"|>}`, `(k='v')`.

    `head` ends inside it, behind its opening bracket; its closing one is `arguments_end[0]`.
    """

    argument: re.Pattern[str] = JSON_ARGUMENT
    next_argument: tuple[str, ...] = (',"', ",}")
    arguments_end: tuple[str, ...] = ("}",)
    # What stands around strings, the usual one first. One character means JSON's escapes inside.
    quotes: tuple[str, ...] = ('"',)
    # Whether the arguments are a member of a JSON object, which ends behind them.
    enclosed: bool = False

    @property
    def markup(self) -> tuple[str, ...]:
        return (*super().markup, *self.quotes)

    def head_for(self, name: str) -> str:
        if self.enclosed:
            name = json.dumps(name, ensure_ascii=False)[1:-1]
        return super().head_for(name)

    @property
    def own_quotes(self) -> bool:
        """Whether the quotes are tags, not JSON's."""
        return len(self.quotes[0]) > 1

    def element(self, quote: str) -> ValueSyntax:
        """How a string within `quote` ends that stands in an array or an object."""
        return dataclasses.replace(self.value(quote), arguments_end=("]", "}"))

    def value(self, quote: str) -> ValueSyntax:
        """How a string within `quote` ends."""
        escapes = len(quote) == 1
        return ValueSyntax(
            ends=(quote,),
            next_argument=self.next_argument,
            arguments_end=self.arguments_end,
            closer=quote,
            before_string=r"[:=\[({,]" if escapes else rf"[{{,]\s*+{BARE_KEY}|\[|,",
            escapes=escapes,
        )


@dataclass(frozen=True, kw_only=True)
class TagSyntax(BaseSyntax):
    """Each value is plain text up to `value_end`. `value_start` is the text that it begins with, as
    far as it is always the same. In both KEY stands for the argument's name.

    The second group of `argument`, if it has one, tells the value's type: anything but "string" or
    "true" (it is a string) means JSON. With `cdata` a value may be a CDATA section, whose start
    then belongs to `argument`.
    """

    value_start: str
    value_end: str
    # Whether the newline behind `argument` and the one before `value_end` are no part of the value.
    own_lines: bool = False
    cdata: bool = False

    @property
    def markup(self) -> tuple[str, ...]:
        return (*super().markup, self.value_end, *(CDATA if self.cdata else ()))

    def value(self, key: str, before: str) -> ValueSyntax:
        """How the value of the argument `key` ends, whose `argument` matched the text `before`."""
        start, end = (text.replace("KEY", key) for text in (self.value_start, self.value_end))
        ends: tuple[str, ...] = (f"\n{end}", end) if self.own_lines else (end,)
        if self.cdata and before.endswith(CDATA[0]):
            start = CDATA[0]
            ends = tuple(f"{CDATA[1]}{blank}{end}" for blank in ("", "\n"))
            end = CDATA[1]
        return ValueSyntax(
            ends=ends,
            next_argument=self.next_argument,
            arguments_end=self.arguments_end,
            closer=end,
            opener=start,
        )


CallSyntax = ObjectSyntax | TagSyntax
