"""The HTML report: one file, nothing active in it, every number from a record, nothing shown empty."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from samegrad.errors import BadInput
from samegrad.records import Check, Counting, Origin, Same
from samegrad.report import Picture, Story, render_report
from samegrad.units import format_bytes

VOID = {"meta", "img", "br"}
NAMESPACE = "http://www.w3.org/2000/svg"


class Page(HTMLParser):
    """The tags, attributes, text and headings of a page; ``faults`` lists tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.faults: list[str] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
            if self.open and self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def dangers(html: str) -> list[str]:
    """What in a page is active or fetches something."""
    page = Page(html)
    found = [f"<{tag}>" for tag in page.tags if tag in {"script", "iframe", "object", "embed", "link", "base", "form"}]
    for tag, name, value in page.attributes:
        if name.startswith("on") or value.strip().lower().startswith("javascript:"):
            found.append(f"{tag} {name}={value}")
        if re.search(r"https?:|//", value) and name != "content" and value != NAMESPACE and "base64," not in value:
            found.append(f"{tag} {name}={value}")
        if name in {"src", "href", "xlink:href"} and not value.startswith("data:image/"):
            found.append(f"{tag} {name}={value}")
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    return found + re.findall(r"url\(|@import", style)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></svg><script>alert(1)</script>",
    "' onmouseover='alert(1)",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m",
    "a\x00b\x08c\x7f \u202egnp.exe",
    "\ud800 lone surrogate",
    "[/red] {0} %s ${x} & &amp;",
    "word" * 200,
    "",
]


def hostile(story: Story, text: str) -> Story:
    """``story`` with ``text`` in every place that holds a string."""
    assert story.verdict and story.plan and story.budget and story.measured and story.predicted
    check = Check(name=text, passed=False, error=1.0, allowed=0.5, worst=text, detail=text)
    strange = {"device": text, "basis": text, "facts": {text: text}, "refusals": {text + "2": text}}
    return Story(
        title=text,
        command=text,
        machine={text: text},
        budget=dataclasses.replace(story.budget, device=text, source=text),
        plan=dataclasses.replace(story.plan, levers={text: {text: text}}, reasons={text: text, text + "3": text}),
        predicted=dataclasses.replace(story.predicted, **strange),
        measured=dataclasses.replace(story.measured, **strange),
        results=story.results,
        metrics={text: text, text + "4": math.nan},
        verdict=dataclasses.replace(
            story.verdict, reference=text, dtype=text, worst_parameter=text, checks=(check,), answer=Same.DIFFERS
        ),
        pictures=(Picture(caption=text, image=f'<svg xmlns="{NAMESPACE}"><title>{text}</title></svg>'),),
        explanation=text,
        troubleshooting=(text,),
        notes=(text,),
    )


def test_a_report_is_well_formed_and_reaches_for_nothing_outside(story: Story) -> None:
    html = render_report(story)
    assert Page(html).faults == []
    assert dangers(html) == []
    assert "<script" not in html


@pytest.mark.parametrize(
    "planted",
    [
        "<script>alert(1)</script>",
        '<img src="https://example.org/x.png">',
        '<p onclick="x()">p</p>',
        '<link rel="stylesheet" href="x.css">',
        '<a href="javascript:x()">a</a>',
        "<style>p { background: url(x.png) }</style>",
    ],
)
def test_the_check_for_outside_references_catches_a_planted_one(story: Story, planted: str) -> None:
    assert dangers(render_report(story).replace("</main>", planted + "</main>")) != []


def test_the_check_for_nesting_catches_a_tag_left_open(story: Story) -> None:
    assert Page(render_report(story).replace("</figure>", "", 1)).faults != []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(story: Story, text: str) -> None:
    html = render_report(hostile(story, text))
    assert Page(html).faults == []
    assert dangers(html) == []
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", html)
    html.encode()


def test_a_script_as_title_is_shown_as_it_was_written() -> None:
    page = Page(render_report(Story(title="<script>alert('x')</script>")))
    assert page.text.count("<script>alert('x')</script>") == 2  # the tab and the heading


def test_terminal_sequences_leave_nothing_behind() -> None:
    assert "ab end" in Page(render_report(Story(title="a\x1b[31mb\x1b[0m\x1b]0;t\x07 end"))).text


def test_the_verdict_stands_above_everything_else(story: Story) -> None:
    page = Page(render_report(story))
    assert page.headings[0] == "Same gradients"
    expected = (
        "Largest error 3.1e-16 of the allowed 6.2e-14, in encoder.0.weight, against the plain step on cpu,"
        " 512 of 4000 rows, in float64."
    )
    assert expected in page.text


def test_sections_with_nothing_to_show_are_left_out() -> None:
    page = Page(render_report(Story(title="only a title")))
    assert page.headings == ["Not verified"]
    assert "svg" not in page.tags and "table" not in page.tags


def test_a_full_story_has_every_section(story: Story) -> None:
    assert Page(render_report(story)).headings == [
        "Same gradients",
        "Memory",
        "Memory over one step",
        "Loss",
        "Plan",
        "Checks",
        "Metrics",
        "Pictures",
        "How the step is run",
        "If something goes wrong",
        "Notes",
        "Command and machine",
    ]


ABSENT = [
    ("machine", {}, None),
    ("command", "", None),
    ("budget", None, None),
    ("plan", None, "Plan"),
    ("predicted", None, None),
    ("measured", None, None),
    ("results", (), None),
    ("validation", (), None),
    ("metrics", {}, "Metrics"),
    ("verdict", None, "Checks"),
    ("pictures", (), "Pictures"),
    ("troubleshooting", (), "If something goes wrong"),
    ("notes", (), "Notes"),
]


@pytest.mark.parametrize(("field", "nothing", "heading"), ABSENT, ids=[field for field, _, _ in ABSENT])
def test_a_story_may_lack_any_part(story: Story, field: str, nothing: object, heading: str | None) -> None:
    page = Page(render_report(dataclasses.replace(story, **{field: nothing})))
    assert page.faults == []
    assert heading not in page.headings
    assert "None" not in page.text and "nan" not in page.text.split()


def replaced(part: str, **changes: object) -> Callable[[Story], Story]:
    """A change of fields of one record of a story; ``part`` "" is the story itself."""

    def change(story: Story) -> Story:
        if not part:
            return dataclasses.replace(story, **changes)
        return dataclasses.replace(story, **{part: dataclasses.replace(getattr(story, part), **changes)})

    return change


def first_check(**changes: object) -> Callable[[Story], Story]:
    def change(story: Story) -> Story:
        assert story.verdict
        first, *rest = story.verdict.checks
        return replaced("verdict", checks=(dataclasses.replace(first, **changes), *rest))(story)

    return change


def last_result(**changes: object) -> Callable[[Story], Story]:
    def change(story: Story) -> Story:
        *rest, last = story.results
        return dataclasses.replace(story, results=(*rest, dataclasses.replace(last, **changes)))

    return change


NUMBERS = [
    (replaced("budget", total_bytes=12345678), format_bytes(12345678)),
    (replaced("budget", host_bytes=23456789), format_bytes(23456789)),
    (replaced("measured", peak_allocated_bytes=5432109), format_bytes(5432109)),
    (replaced("predicted", peak_allocated_bytes=4321098), format_bytes(4321098)),
    (replaced("predicted", rows=123), "123 of 4000 rows"),
    (replaced("plan", predicted_peak_bytes=6543210), format_bytes(6543210)),
    (replaced("plan", predicted_seconds=0.789), "789 ms"),
    (replaced("plan", levers={"split_rows": {"rows": 77}}), "rows = 77"),
    (replaced("verdict", max_relative_error=7.7e-15), "7.7e-15"),
    (replaced("verdict", rows_checked=321), "321 of 4000 rows"),
    (replaced("verdict", batch_rows=4321), "512 of 4321 rows"),
    (first_check(error=5.5e-15), "5.5e-15"),
    (first_check(allowed=8.8e-13), "8.8e-13"),
    (last_result(loss=0.65432), "0.6543"),
    (last_result(index=999), "at step 999"),
    (last_result(peak_allocated_bytes=9876543), format_bytes(9876543)),
    (replaced("", metrics={"test_mse": 0.98765}), "0.98765"),
    (replaced("", metrics={"swap_bytes": 7654321}), format_bytes(7654321)),
    (replaced("", machine={"cpu": "17 cores"}), "17 cores"),
]


@pytest.mark.parametrize(("change", "shown"), NUMBERS, ids=[shown for _, shown in NUMBERS])
def test_every_number_comes_from_its_record(story: Story, change: Callable[[Story], Story], shown: str) -> None:
    before, after = Page(render_report(story)).text, Page(render_report(change(story))).text
    assert shown not in before
    assert shown in after


def test_the_plain_steps_peak_is_what_its_laws_predict(story: Story) -> None:
    assert story.predicted
    amount = format_bytes(story.predicted.predicted_peak_bytes(rows=4000))
    assert f"{amount}Plain step, all 4000 rows at once, predicted" in Page(render_report(story)).text
    without = dataclasses.replace(
        story,
        predicted=dataclasses.replace(story.predicted, plain_laws=()),
        measured=dataclasses.replace(story.measured, plain_laws=()),
    )
    assert "Plain step" not in Page(render_report(without)).text


def test_the_curve_moves_with_a_single_loss(story: Story) -> None:
    changed = list(story.results)
    changed[10] = dataclasses.replace(changed[10], loss=1.9)
    before, after = (
        re.findall(r'<path d="[^"]*"', render_report(s)) for s in (story, replaced("", results=tuple(changed))(story))
    )
    assert before != after


def test_counted_tensor_bytes_are_never_called_gpu_memory(story: Story) -> None:
    html = render_report(story)
    assert "counted tensor bytes" in html
    assert not re.search(r"gpu|cuda|reserved", html, re.IGNORECASE)


def test_cuda_bytes_are_called_by_what_the_allocator_does(story: Story) -> None:
    cuda = {"counting": Counting.CUDA_ALLOCATOR, "device": "cuda:0"}
    for part in ("budget", "predicted", "measured"):
        story = replaced(part, **cuda)(story)
    story = replaced("measured", peak_reserved_bytes=9 * 2**20, steady_cap_bytes=10 * 2**20)(story)
    text = Page(render_report(replaced("", results=())(story))).text
    assert "10.0 MiB of 16.0 MiB (62 %), cap for steady steps (CUDA allocator), measured" in text
    assert "allocated 7.00 MiB · reserved 9.00 MiB" in text
    assert "counted tensor bytes" not in text


def test_a_loss_that_was_never_finite_is_said_in_words(story: Story) -> None:
    results = tuple(dataclasses.replace(result, loss=math.nan) for result in story.results)
    text = Page(render_report(dataclasses.replace(story, results=results, validation=()))).text
    assert "No loss was finite" in text


def test_pictures_are_embedded_byte_for_byte(story: Story) -> None:
    sources = [value for tag, name, value in Page(render_report(story)).attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [story.pictures[0].image]


@pytest.mark.parametrize("image", [b"GIF89a", b"", "not a picture", "<svg></svg>"])
def test_a_picture_that_a_browser_would_not_draw_is_refused_by_its_caption(image: str | bytes) -> None:
    with pytest.raises(BadInput, match="error histogram"):
        Picture(caption="error histogram", image=image)


def test_the_same_story_gives_the_same_bytes(story: Story) -> None:
    assert render_report(story) == render_report(dataclasses.replace(story))


def test_a_prediction_alone_is_never_called_measured(story: Story) -> None:
    alone = dataclasses.replace(story, measured=None, results=())
    text = Page(render_report(alone)).text
    assert "Predicted to fit" in text
    assert re.findall(r"(?<!not )\bmeasured\b", text.replace("auc" + "not measured", "")) == []
    mislabelled = dataclasses.replace(alone, measured=dataclasses.replace(story.predicted, origin=Origin.PREDICTED))
    assert "Within the budget" not in Page(render_report(mislabelled)).text


def test_reporting_loads_neither_torch_nor_numpy_nor_rich() -> None:
    program = (
        "import sys; from samegrad import report; from samegrad.report import terminal;"
        "report.render_report(report.Story(title='t'));"
        "sys.exit(','.join({'torch', 'numpy', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
