"""Records in, text out: the HTML report, the markdown for an issue, and the lines of a terminal. Never any torch."""

from __future__ import annotations

from samegrad.report.bars import Bar, bars_svg
from samegrad.report.curves import Series, curve_svg
from samegrad.report.markdown import render_markdown
from samegrad.report.page import render_report
from samegrad.report.story import Picture, Story
from samegrad.report.timeline import timeline_svg

__all__ = [
    "Bar",
    "Picture",
    "Series",
    "Story",
    "bars_svg",
    "curve_svg",
    "render_markdown",
    "render_report",
    "timeline_svg",
]
