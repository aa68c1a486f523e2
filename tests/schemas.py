"""JSON schemas for the tests of constrained output, and tools that have them."""

from __future__ import annotations


def obj(required: list[str] | None = None, **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": list(properties) if required is None else required,
    }


def text(most: int, **more) -> dict:
    return {"type": "string", "maxLength": most, **more}


def rows(items: dict, most: int = 2, **more) -> dict:
    return {"type": "array", "items": items, "maxItems": most, **more}


def tool(name: str, schema: dict) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}


PARTS = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["boolean", "null"]},
    text(6),
    text(6, minLength=3),
    {"const": "fixed"},
    {"const": 17},
    {"const": {"a": [1, None]}},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, "two", None, 3.5, False]},
    {"enum": [f"a rather long value, number {n}" for n in range(300)]},
    {"enum": ["grün", "日本", '"quoted"', "a\\b", "\n"]},
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "integer", "minimum": -120, "maximum": 35},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 12},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 99},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "pattern": r"^\d{3}-[A-F]{2}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"anyOf": [{"type": "boolean"}, text(4)]},
    {"oneOf": [obj(kind={"const": "a"}), obj(kind={"const": "b"}, n={"type": "null"})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    obj(),
    obj(a=text(3), b={"type": "boolean"}),
    rows(text(3)),
    {"$ref": "#/$defs/part"},
]
WRAPS = [
    lambda part: part,
    lambda part: obj(value=part),
    lambda part: obj([], value=part, other=part),
    lambda part: obj(["größe"], **{"größe": part, "Ключ 键": {"type": "boolean"}}),
    lambda part: rows(part, 3, minItems=1),
    lambda part: obj(outer=obj(inner=rows(obj(["value"], value=part, note=text(4))))),
    lambda part: {"anyOf": [part, {"type": "null"}]},
    lambda part: {
        "type": "array",
        "prefixItems": [part, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
]
TITLE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **obj(title=text(20, description="3 to 7 words")),
}
TASK = obj(
    content=text(8, minLength=1),
    status={"type": "string", "enum": ["pending", "in_progress", "completed"]},
    activeForm=text(8, minLength=1),
)
LIKE_CLAUDE_CODE = [
    TITLE,
    {**TITLE, **obj(isNewTopic={"type": "boolean"}, title={"anyOf": [text(20), {"type": "null"}]})},
    obj(todos=rows(TASK, 3)),
    obj(
        ["command"],
        command=text(12),
        timeout={"type": "number", "maximum": 600000, "minimum": 1000},
        run_in_background={"type": "boolean"},
        description=text(5),
    ),
    obj(
        ["file_path", "old_string"],
        file_path=text(9, pattern="^/[a-z/]{1,8}$"),
        old_string=text(9),
        replace_all={"default": False, "type": "boolean"},
    ),
    obj(
        questions=rows(
            obj(
                question=text(9),
                header=text(5),
                multiSelect={"type": "boolean"},
                options=rows(obj(label=text(4), description=text(4)), 3, minItems=2),
            ),
            2,
            minItems=1,
        )
    ),
    obj(ok={"type": "boolean"}, reason=text(10)),
    obj(url={"type": "string", "format": "ipv4"}, prompt=text(5)),
]
SCHEMAS = [
    {**wrap(part), **({"$defs": {"part": text(3)}} if "$ref" in part else {})}
    for part in PARTS
    for wrap in WRAPS
]
SCHEMAS += LIKE_CLAUDE_CODE
TOOLS = [
    tool("Todo_Write", obj(todos=rows(TASK, 1))),
    tool(
        "set",
        obj(["on"], on={"type": "boolean"}, level={"type": "integer", "minimum": 0, "maximum": 9}),
    ),
    tool("Farbe-ändern", obj(["c"], c={"enum": ["rot", "grün"]}, n={"type": "null"})),
    tool("nothing", obj()),
]
ARGUMENTS = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
LIST = {
    **obj(value={"type": "boolean"}, next={"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]})
}
REFERRED = [
    {"$ref": "#/$defs/list", "$defs": {"list": LIST}},
    {**obj(list={"$ref": "#/$defs/list"}), "$defs": {"list": LIST}},
    {"anyOf": [obj(a={"const": "x"}), obj(b={"enum": [1, 2]}, c={"const": None})]},
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a", "c"],
        "allOf": [
            {"properties": {"b": {"type": "null"}, "c": {"enum": [1, 2]}}, "required": ["b"]}
        ],
    },
    {
        "type": "object",
        "required": ["a"],
        "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 4},
    },
    obj([], a={"type": "boolean"}, b={"type": "null"}, c=text(3)),
    obj(n=rows({"type": "null"}, 1), m=rows(text(2), 4, minItems=3)),
]
