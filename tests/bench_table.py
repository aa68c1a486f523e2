"""The table of a measurement, as text and as a picture."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

from bench_side import Generate


class Row(NamedTuple):
    """A figure's key, what it is, its unit, and whether more is better. Where there is no other
    server it is compared with `reference`, another figure of the same side, called `label`."""

    key: str
    title: str
    unit: str
    more: bool
    reference: str = ""
    label: str = ""


ROWS = [
    Row("cold", "first token, cold", "s", False),
    Row("warm", "first token, next turn", "s", False, "cold", "cold"),
    Row("reread", "prefilled per new token", "tokens", False),
    Row("prefill", "prefill", "tokens/s", True, label=Generate.name),
    Row("decode", "decode", "tokens/s", True, label=Generate.name),
    Row("story", "decode, drafts allowed", "tokens/s", True, "story_plain", "no drafts"),
    Row("two", "2 streams, drafts allowed", "tokens/s", True, "two_plain", "no drafts"),
    Row("concurrent", "8 streams together", "tokens/s", True, "one", "one stream"),
    Row("contended", "first token behind a long prompt", "s", False, "chunk", "512 tokens of it"),
    Row("memory", "peak memory", "GB", False),
]
LEGEND = (
    "↑ more is better, ↓ less. Medians. Memory is what a server says it holds. "
    "≤ it does not tell: by the time it took."
)


@dataclass
class Table:
    """Figures of two sides. `names` are theirs; the second is empty where the first is compared
    with itself and mlx-lm. `told`: whether the second tells what of a prompt it had read before.
    `short`: only rows that have a figure are printed."""

    head: list[str]
    names: tuple[str, str]
    ours: dict[str, float]
    theirs: dict[str, float]
    told: bool = True
    short: bool = False

    def __str__(self) -> str:
        rows = [line for row in ROWS if (line := self._line(row))]
        name = self.names[1] or "compared with"
        titles = f"  {'':41} {self.names[0]:>12} {name:>26} {'ratio':>8}"
        return "\n".join([*self.head, "", titles, *rows, "", LEGEND])

    def _line(self, row: Row) -> str:
        one, two = self.ours.get(row.key), self.theirs.get(row.key)
        if self.short and one is None and two is None:
            return ""
        compared = number(two)
        if two and not self.names[1]:
            compared = f"{row.label} {compared}"
        elif two and row.key == "reread" and not self.told:
            compared = f"≤ {compared}"
        arrow = "↑" if row.more else "↓"
        title = f"{row.title} ({row.unit})"
        ratio = number(one / two) if one and two else "–"
        return f"{arrow} {title:41} {number(one):>12} {compared:>26} {ratio:>8}"

    def draw(self, path: str) -> None:
        """A panel for each row, as PNG."""
        from matplotlib.figure import Figure

        sheet = Figure(figsize=(17, 7), layout="constrained")
        sheet.suptitle("\n".join(self.head), fontsize=8)
        sheet.get_layout_engine().set(h_pad=0.2, w_pad=0.2)
        for row, panel in zip(ROWS, sheet.subplots(2, 5).flat, strict=True):
            one, two = self.ours.get(row.key), self.theirs.get(row.key)
            bars = panel.bar([0, 1], [one or 0, two or 0], 0.6, color=["#2a6f97", "#b8bcc2"])
            panel.bar_label(bars, [number(one), number(two)], padding=2)
            panel.set_xticks([0, 1], [self.names[0], self.names[1] or row.label])
            better = "more" if row.more else "less"
            panel.set_title(f"{row.title}\n{row.unit}, {better} is better", fontsize=10)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.set(yticks=[], xlim=(-0.6, 1.6))
            panel.margins(y=0.15)
        sheet.savefig(path, format="png", dpi=120)


def number(value: float | None) -> str:
    return f"{value:,.0f}" if value and value >= 100 else f"{value:.3g}" if value else "–"


def machine() -> str:
    """When and on what this was measured."""
    import mlx.core as mx

    from _mlx_server import __version__

    device = mx.device_info()
    memory = device.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = device.get("device_name", platform.machine())
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {memory / 2**30:.0f} GB, "
        f"{platform.platform(terse=True)}; mlx-server {__version__}, mlx {version('mlx')}, "
        f"mlx-lm {version('mlx-lm')}, Python {platform.python_version()}"
    )
