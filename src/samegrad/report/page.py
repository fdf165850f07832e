"""A story as one HTML file: inline style and pictures, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence

from samegrad.records import Budget, Check, Counting, Origin
from samegrad.report.at_peak import peak_rows, peak_sentence
from samegrad.report.bars import Bar, bars_svg
from samegrad.report.curves import Series, curve_svg, suits_log_scale
from samegrad.report.facts import (
    LeverUse,
    Peak,
    comparable_budget,
    describe_budget,
    describe_plan,
    describe_training,
    examined,
    find_peaks,
    judge_fit,
    judge_prediction,
    key_figures,
    levers_left_out,
    levers_used,
)
from samegrad.report.palette import BLUE, GREY, OVER_BUDGET, SKY
from samegrad.report.shapes import NARROW_PX, WIDE_PX
from samegrad.report.statement import Statement
from samegrad.report.story import Picture, Story
from samegrad.report.style import STYLE_SHEET
from samegrad.report.timeline import timeline_svg
from samegrad.report.verdicts import check_title, describe_exactness, judge, share_of_allowed
from samegrad.report.words import (
    capitalised,
    escape_block,
    escape_line,
    format_metric,
    format_number,
)
from samegrad.units import format_bytes

# A number and its unit, or a number with an exponent: a line must not end within.
_UNBROKEN = re.compile(r"\d[\d.]*(?:e[-+]\d+| (?:[KMGT]iB|B|%|µs|ms|s|min|h)(?!\w))")

# Nothing in the file needs a script or the network; a browser is told to refuse both, whatever a name contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_report(story: Story) -> str:
    """The report of ``story`` as the text of one HTML file (write it as UTF-8).

    The verdict is the headline; below it stand memory, loss, plan, checks, metrics, pictures and the machine. Every
    string is escaped, control bytes are removed, PNG pictures are embedded; what the story lacks is left out.
    """
    parts = (
        _memory_section(story),
        _timeline_section(story),
        _peak_section(story),
        _loss_section(story),
        _plan_section(story),
        _checks_section(story),
        _section("Metrics", _pairs({name: format_metric(name, value) for name, value in story.metrics.items()})),
        _section("Pictures", "".join(_picture(picture) for picture in story.pictures)),
        _section("How the step is run", _pairs(examined(story)) + _preformatted(story.explanation)),
        _section("If something goes wrong", _list(story.troubleshooting, tag="ol")),
        _section("Notes", _list(story.notes, tag="ul")),
        _section("Command and machine", _preformatted(story.command) + _pairs(story.machine)),
    )
    title = escape_line(story.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">samegrad report</p>\n<h1>{title}</h1>\n{_headline(story)}</header>\n'
        f"{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _section(name: str, body: str) -> str:
    return f"<section>\n<h2>{name}</h2>\n{body}</section>\n" if body else ""


def _headline(story: Story) -> str:
    # A step that was only measured or planned is asked whether it fits, not whether its gradients are the same.
    statement = (judge_fit(story) if _only_measured(story) else None) or judge(story.verdict)
    sentence = f"<p>{_sentence(capitalised(statement.sentence))}.</p>"
    headline = f'<div class="verdict {statement.tone.value}">\n<h2>{statement.answer}</h2>\n{sentence}\n</div>\n'
    figures = "".join(
        f"<div><dt>{escape_line(name)}</dt><dd>{escape_line(value)}</dd><dd>{escape_line(note)}</dd></div>\n"
        for name, value, note in key_figures(story)
    )
    return headline + (f'<dl class="figures">\n{figures}</dl>\n' if figures else "")


def _only_measured(story: Story) -> bool:
    return story.verdict is None and not story.results


def _sentence(text: str) -> str:
    """One line of ``text`` for a paragraph, whose numbers stay in one piece."""
    return _UNBROKEN.sub(r'<span class="whole">\g<0></span>', escape_line(text))


def _figure(draw: Callable[[int], str], *, caption: str) -> str:
    """A picture drawn twice, for wide and for narrow pages, so that its text keeps its size; empty if it is empty."""
    wide = draw(WIDE_PX)
    if not wide:
        return ""
    both = f'<div class="wide">{wide}</div>\n<div class="narrow">{draw(NARROW_PX)}</div>\n'
    return f"<figure>\n{both}<figcaption>{escape_line(caption)}</figcaption>\n</figure>\n"


def _memory_section(story: Story) -> str:
    peaks = find_peaks(story)
    fit = judge_fit(story)
    budget = story.limit
    # Where that is the headline it need not be said again.
    body = _statement(fit) if fit is not None and not _only_measured(story) else ""
    if judge_prediction(story):
        body += f"<p>{_sentence(judge_prediction(story))}</p>\n"
    if budget is not None:
        body += f'<p class="soft">Budget: {_sentence(describe_budget(budget))}.</p>\n'
    bars = [_bar(peak, peaks=peaks, budget=budget) for peak in peaks if peak.judged or not peak.planned]
    caption = "Peaks of one step on one scale; under each name, what its bytes count."
    return _section("Memory", body + _figure(lambda px: bars_svg(bars, title="Peaks", width_px=px), caption=caption))


def _statement(statement: Statement) -> str:
    answer = f'<span class="{statement.tone.value}-text">{statement.answer}</span>'
    return f"<p>{answer}: {_sentence(statement.sentence)}.</p>\n"


def _bar(peak: Peak, *, peaks: Sequence[Peak], budget: Budget | None) -> Bar:
    """The bar of ``peak``; what else is known of the same step stands below its name."""
    same_step = [other for other in peaks if (other.name, other.origin) == (peak.name, peak.origin)]
    beside = [f"{other.what} {format_bytes(other.amount_bytes)}" for other in same_step if other is not peak]
    colour = (BLUE if peak.origin is Origin.MEASURED else SKY) if peak.planned else GREY
    comparable = budget is not None and budget.counting is peak.counting
    return Bar(
        name=f"{peak.name}, {peak.origin.value}",
        amount_bytes=peak.amount_bytes,
        detail=" · ".join(filter(None, [peak.counted, *beside, peak.basis])),
        colour=colour,
        # That the plain step does not fit is why there is a plan; only a planned step over the budget is alarming.
        over_colour=OVER_BUDGET if peak.planned else colour,
        limit_bytes=budget.total_bytes if budget is not None and comparable else None,
    )


def _timeline_section(story: Story) -> str:
    footprint = next((f for f in (story.measured, story.predicted) if f is not None and f.timeline), None)
    if footprint is None:
        return ""
    predicted = story.predicted if story.predicted is not footprint else None
    budget = story.limit
    budget_bytes = comparable_budget(budget, footprint)
    caption = f"{capitalised(footprint.origin.value)} on {footprint.device}: {_live(footprint.counting)}, by purpose."
    if budget_bytes is not None and footprint.counting is Counting.CUDA_ALLOCATOR:
        caption += " The budget bounds what the allocator reserves, which is never less than what is live."
    return _section(
        "Memory over one step",
        _figure(lambda px: timeline_svg(footprint, budget_bytes, predicted, width_px=px), caption=caption),
    )


def _live(counting: Counting) -> str:
    if counting is Counting.CUDA_ALLOCATOR:
        return "bytes allocated in the CUDA allocator"
    return Counting.TENSOR_BYTES.value


def _peak_section(story: Story) -> str:
    footprint = next((f for f in (story.predicted, story.measured) if f is not None and f.at_peak), None)
    if footprint is None:
        return ""
    names = '<th scope="col">What</th><th scope="col">Made by</th><th scope="col" class="number">Bytes</th>'
    names += '<th scope="col" class="number">Share</th>'
    rows = "".join(
        f'<tr><th scope="row">{escape_line(row.what)}</th><td>{escape_line(row.made_by)}</td>'
        f'<td class="number">{row.amount}</td><td class="number">{row.share}</td></tr>\n'
        for row in peak_rows(footprint)
    )
    caption = f'<p class="soft">{_sentence(peak_sentence(footprint))}</p>\n'
    table = f"<table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"
    return _section("What is live at the peak", f'{caption}<div class="scroll">{table}</div>\n')


def _loss_section(story: Story) -> str:
    series = []
    if story.results:
        series.append(Series(name="train", points=tuple((float(r.index), r.loss) for r in story.results)))
    if story.validation:
        series.append(Series(name="validation", points=tuple((float(x), y) for x, y in story.validation)))
    if not series:
        return ""
    log_y = suits_log_scale(series)
    scale = "Logarithmic scale." if log_y else "Linear scale; it need not start at zero."
    figure = _figure(lambda px: curve_svg(series, log_y=log_y, title="Loss over steps", width_px=px), caption=scale)
    nothing = '<p class="bad-text">No loss was finite, so there is no curve.</p>\n'
    facts = describe_training(story)
    return _section("Loss", (f"<p>{_sentence(facts)}</p>\n" if facts else "") + (figure or nothing))


def _plan_section(story: Story) -> str:
    plan = story.plan
    if plan is None:
        return ""
    levers = "".join(_lever(lever) for lever in levers_used(plan))
    body = f"<p>{_sentence(describe_plan(plan))}</p>\n"
    body += levers or "<p>No lever: the plain step.</p>\n"
    left_out = levers_left_out(plan, story.predicted, story.measured)
    if left_out:
        body += f"<h3>Not used</h3>\n{_pairs(left_out)}"
    return _section("Plan", body)


def _lever(lever: LeverUse) -> str:
    knobs = "".join(
        f"<li><code>{escape_line(knob.name)} = {escape_line(knob.value)}</code>"
        f' <span class="soft">{escape_line(knob.origin)}</span></li>'
        for knob in lever.knobs
    )
    listed = f'<ul class="knobs">{knobs}</ul>\n' if knobs else ""
    reason = f"<p>{_sentence(lever.reason)}</p>\n" if lever.reason else ""
    return f'<div class="lever">\n<h3>{escape_line(lever.name)}</h3>\n{listed}{reason}</div>\n'


def _checks_section(story: Story) -> str:
    if story.verdict is None or not story.verdict.checks:
        return ""
    names = "".join(f'<th scope="col">{name}</th>' for name in ("Check", "Result"))
    names += "".join(f'<th scope="col" class="number">{n}</th>' for n in ("Error", "Allowed", "Share"))
    names += '<th scope="col">Largest at</th>'
    rows = "".join(_check_row(check) for check in story.verdict.checks)
    table = f'<table class="checks">\n<thead><tr>{names}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n'
    exactness = "; ".join(f"{name}: {words}" for name, words in describe_exactness(story.verdict))
    said = f'<p class="soft">{_sentence(capitalised(exactness))}.</p>\n' if exactness else ""
    return _section("Checks", f'{said}<div class="scroll">{table}</div>\n')


def _check_row(check: Check) -> str:
    tone, result = ("good", "✓ passed") if check.passed else ("bad", "✗ failed")
    detail = f'<br><span class="soft">{escape_line(check.detail)}</span>' if check.detail else ""
    numbers = (
        ("error", format_number(check.error)),
        ("allowed", format_number(check.allowed)),
        ("share", share_of_allowed(check)),
    )
    cells = "".join(f'<td class="number" data-name="{name}">{value}</td>' for name, value in numbers)
    return (
        f'<tr><th scope="row">{escape_line(check_title(check))}{detail}</th>'
        f'<td><span class="{tone}-text">{result}</span></td>{cells}'
        f'<td data-name="largest at">{escape_line(check.worst)}</td></tr>\n'
    )


def _pairs(values: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape_line(name)}</th><td>{escape_line(value)}</td></tr>\n'
        for name, value in values.items()
    )
    return f'<table class="pairs">\n<tbody>\n{rows}</tbody>\n</table>\n' if rows else ""


def _preformatted(text: str) -> str:
    return f"<pre>{escape_block(text)}</pre>\n" if text.strip() else ""


def _list(items: Sequence[str], *, tag: str) -> str:
    rows = "".join(f"<li>{escape_line(item)}</li>\n" for item in items)
    return f"<{tag}>\n{rows}</{tag}>\n" if rows else ""


def _picture(picture: Picture) -> str:
    # As an image even an SVG can neither run a script nor fetch anything, whoever wrote it.
    svg = isinstance(picture.image, str)
    data = picture.image.encode(errors="replace") if isinstance(picture.image, str) else picture.image
    kind = "svg+xml" if svg else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    caption = escape_line(picture.caption)
    image = f'<img src="{source}" alt="{caption}">'
    return f'<figure class="picture">\n{image}\n<figcaption>{caption}</figcaption>\n</figure>\n'
