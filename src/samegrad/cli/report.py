"""``samegrad report RUN_DIR``: the report of a run, rebuilt from the JSON records in its folder. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from samegrad.cli.console import Console
from samegrad.cli.options import parse_line
from samegrad.cli.output_folder import check_output, write_output
from samegrad.cli.run_story import read_story
from samegrad.report import render_markdown, render_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which run, and where the report goes."""

    run_dir: tyro.conf.Positional[Path]
    """The folder that `samegrad run` wrote."""
    output: Path | None = None
    """Folder for report.html and report.md; default: the run folder itself."""


def main(argv: Sequence[str], console: Console) -> int:
    options = parse_line("samegrad report", ReportOptions, argv)
    story = read_story(options.run_dir)
    output = options.output or options.run_dir
    html, markdown = output / "report.html", output / "report.md"
    check_output(output, files=(html.name, markdown.name))
    write_output(output, html.name, render_report(story))
    write_output(output, markdown.name, render_markdown(story))
    console.result(f"{html}\n{markdown}")
    console.document({"report_html": str(html), "report_markdown": str(markdown)})
    return 0
