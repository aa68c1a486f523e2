"""Rules of flags for the requests to some models, or in some dialects."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TypeVar

from _mlx_server.front.options import ThinkingDefault
from _mlx_server.inference.protocol import EFFORT_BUDGETS, Priority, Request
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.reply import Reply

Value = TypeVar("Value")


def first_match(rules: Sequence[tuple[str, Value]], reply: Reply, model: str) -> Value | None:
    """The value of the first rule whose glob matches the name that the client has asked for, that
    of the model, or the dialect."""
    names = [reply.request.model.lower(), model.lower(), reply.dialect]
    for pattern, value in rules:
        if any(fnmatch.fnmatchcase(name, pattern.lower()) for name in names):
            return value
    return None


def chosen_priority(asked: str, ruled: Priority, highest: Priority) -> Priority:
    """What a client asks for in the header `x-priority`, else `ruled`; never more than `highest`,
    which its key allows. Raises WireError."""
    asked = asked.strip().upper()
    if asked and asked not in Priority.__members__:
        raise WireError(400, "x-priority: Input should be 'high', 'normal' or 'low'")
    return max(highest, Priority[asked] if asked else ruled)


def apply_thinking(request: Request, default: ThinkingDefault) -> None:
    """Fills in what a request leaves open of its thinking. A budget that it names itself stays; an
    effort may only make the default's smaller."""
    if request.thinking is None or request.adaptive:
        request.thinking = default.on
    if request.thinking and request.thinking_budget is None and default.budget is not None:
        most = EFFORT_BUDGETS.get(request.effort or "", default.budget)
        request.thinking_budget = min(default.budget, most)
