"""Chat templates with the habits of real families: what they show of a turn that has become
history, and what they refuse."""

from __future__ import annotations

JSON_CALL = """<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>"""
XML_CALL = """<tool_call>\n<function={{ tool_call.name }}>
{% for key, value in tool_call.arguments.items() %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>\n</tool_call>"""
KEPT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
LAST_WORDS = (
    "{% set ns = namespace(at=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.at = loop.index0 %}{% endif %}{% endfor %}"
)
STRIPPED = KEPT.replace("m.reasoning_content %}", "m.reasoning_content and loop.index0 > ns.at %}")


def refuse(condition: str) -> str:
    reason = "refused: " + condition.replace("'", "")
    return f"{{% if {condition} %}}{{{{ raise_exception('{reason}') }}}}{{% endif %}}"


def template(call: str = JSON_CALL, thinking: str = KEPT, check: str = "", top: str = "") -> str:
    return f"""{top}{{% if tools %}}<|im_start|>system
{{% if messages[0].role == 'system' %}}{{{{ messages[0].content }}}}

{{% endif %}}# Tools

You may call these functions:
<tools>
{{% for tool in tools %}}{{{{ tool | tojson }}}}
{{% endfor %}}</tools>

Write each call as JSON inside tags:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call><|im_end|>
{{% elif messages[0].role == 'system' %}}<|im_start|>system
{{{{ messages[0].content }}}}<|im_end|>
{{% endif %}}{{% for m in messages %}}{check}{{% if m.role == 'tool' %}}<|im_start|>user
<tool_response>
{{{{ m.content }}}}
</tool_response><|im_end|>
{{% elif m.role == 'assistant' %}}<|im_start|>assistant
{thinking}{{{{ m.content.strip() }}}}{{% for c in m.tool_calls or [] %}}
{{%- set tool_call = c.function %}}{{% if m.content or not loop.first %}}
{{% endif %}}{call}{{% endfor %}}<|im_end|>
{{% elif m.role == 'user' or not loop.first %}}<|im_start|>{{{{ m.role }}}}
{{{{ m.content.strip() }}}}<|im_end|>
{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant
{{% endif %}}"""


NO_MID_SYSTEM = refuse("m.role == 'system' and not loop.first")
NINE = refuse("m.role == 'tool' and m.tool_call_id | length != 9") + (
    "{% for c in m.tool_calls or [] %}" + refuse("c.id | length != 9") + "{% endfor %}"
)
ALTERNATES = refuse(
    "not loop.first and m.role == 'user' and loop.previtem.role in ('user', 'tool')"
)
FAMILIES = {
    "json": template(),
    "xml": template(call=XML_CALL),
    "stripped": template(thinking=STRIPPED, top=LAST_WORDS),
    "thoughtless": template(thinking=""),
    "strict": template(check=ALTERNATES + NO_MID_SYSTEM),
    "nine": template(check=NINE),
    "one call": template(check=refuse("(m.tool_calls or []) | length > 1")),
    "dated": template(
        top="<|im_start|>system\nToday is {{ strftime_now('%d %B %Y, %H:%M:%S') }}.<|im_end|>\n"
    ),
}
