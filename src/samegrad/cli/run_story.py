"""The records of a run folder, read back as a Story: what ``report`` renders and ``doctor --run`` judges. No torch.

    config.json      the resolved options; can be fed back with --config
    summary.json     what the run is called, its command line, machine, metrics, notes and pictures
    plan.json        the Plan            footprint.json  the predicted Footprint, or the measured one alone
    measured.json    the measured Footprint, where the predicted one is kept as well
    verdict.json     the Verdict         metrics.jsonl   one object a line: steps, validations, memory lines
    status.json      running, done, stopped or failed, with the exit code
    report.html      rendered from all of the above
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from samegrad.cli.output_folder import write_output
from samegrad.errors import BadInput
from samegrad.json_record import Record
from samegrad.records import Footprint, Origin, Plan, StepResult, Verdict
from samegrad.report import Picture, Story
from samegrad.report.terminal import verdict_lines

AnyRecord = TypeVar("AnyRecord", bound=Record)
LARGEST_RECORD_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureFile(Record):
    file: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """What a report says besides the other records."""

    title: str
    command: str
    machine: dict[str, str]
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    explanation: str = ""
    troubleshooting: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[PictureFile, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricLines:
    """metrics.jsonl: the optimizer steps, the (step, loss) pairs of validations, and lines cut short."""

    results: tuple[StepResult, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    broken_lines: int = 0


def read_story(folder: Path) -> Story:
    """Everything ``folder`` holds. Raises BadInput when it is no run folder or a record in it is damaged."""
    summary = read_record(folder / "summary.json", Summary)
    footprint = read_record(folder / "footprint.json", Footprint)
    measured = read_record(folder / "measured.json", Footprint)
    if footprint is not None and footprint.origin is Origin.MEASURED and measured is None:
        footprint, measured = None, footprint
    if summary is None:
        raise BadInput(
            asked=f"read the run in {folder}",
            found="no summary.json in it" if folder.is_dir() else "no such folder",
            do="give the folder that `samegrad run` printed; it is under runs/ unless --output said otherwise",
            file=str(folder),
        )
    lines = read_metrics(folder / "metrics.jsonl")
    return Story(
        title=summary.title,
        command=summary.command,
        machine=summary.machine,
        plan=read_record(folder / "plan.json", Plan),
        predicted=footprint,
        measured=measured,
        results=lines.results,
        validation=lines.validation,
        metrics=summary.metrics,
        verdict=read_record(folder / "verdict.json", Verdict),
        pictures=tuple(_picture(folder, picture) for picture in summary.pictures),
        explanation=summary.explanation,
        troubleshooting=summary.troubleshooting,
        notes=summary.notes,
    )


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record in ``path``, or None when there is no such file. Raises BadInput."""
    if not file_stands(path):
        return None
    return kind.from_json(read_text(path), file=str(path))


def file_stands(path: Path) -> bool:
    """Whether there is a file ``path``; False where there is nothing. Raises BadInput for a folder, or what else is."""
    if path.is_file() or not path.exists():
        return path.is_file()
    inside = path / "plan.json"
    raise BadInput(
        asked=f"read {path}", found="a folder, where a file is needed",
        do=f"name the file in it: {inside}" if inside.is_file() else "move that folder away", file=str(path),
    )  # fmt: skip


def write_records(folder: Path | None, records: Mapping[str, Record]) -> None:
    """Each record under its name in ``folder``, made if need be; nothing without a folder."""
    if folder is None:
        return
    for name, record in records.items():
        write_output(folder, name, record.to_json())


def verdict_text(verdict: Verdict) -> str:
    """The verdict in lines as wide as the terminal."""
    from rich.text import Text

    # The lines come escaped for rich; a plain stream wants the names as they are.
    return Text.from_markup("\n".join(verdict_lines(verdict))).plain


def read_text(path: Path) -> str:
    """The text of ``path``. Raises BadInput for what is not a readable, reasonably small UTF-8 file."""
    try:
        if path.stat().st_size > LARGEST_RECORD_BYTES:
            found = f"{path.stat().st_size} bytes, far more than a record has"
        else:
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        found = "not UTF-8 text"
    except OSError as error:
        found = error.strerror or str(error)
    raise BadInput(asked=f"read {path}", found=found, do="give a file that samegrad wrote", file=str(path))


def read_metrics(path: Path) -> MetricLines:
    """The lines of a metrics.jsonl. A line that a crash cut short is counted and left out; order is by step."""
    results: dict[int, StepResult] = {}
    validation: dict[int, float] = {}
    broken = 0
    for text in read_text(path).splitlines() if file_stands(path) else ():
        try:
            line = json.loads(text)
            kind = line.pop("kind")
            if kind == "step":
                step = line.pop("step")
                results[step] = StepResult.from_dict(line, file=str(path))
            elif kind == "validation":
                validation[int(line["step"])] = float(line["loss"])
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
            broken += 1
    return MetricLines(
        results=tuple(results[step] for step in sorted(results)),
        validation=tuple(sorted(validation.items())),
        broken_lines=broken,
    )


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in ``path``; empty when there is no such file. Raises BadInput."""
    if not file_stands(path):
        return {}
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        document, reason = None, f"{path}:{error.lineno}: {error.msg}"
    else:
        reason = f"{path}: not a JSON object"
    if not isinstance(document, dict):
        raise BadInput(asked=f"read {path}", found=reason, do="give a file that samegrad wrote", file=str(path))
    return document


def _picture(folder: Path, picture: PictureFile) -> Picture:
    path = folder / picture.file
    # A summary that came from elsewhere may not reach outside its folder.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(
            asked=f"picture {picture.caption!r} of {folder}",
            found=f"{picture.file!r} leads outside the folder",
            do="name files inside the run folder in summary.json",
            file=str(folder / "summary.json"),
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(
            asked=f"picture {picture.caption!r} of {folder}",
            found=f"{path}: {error.strerror}",
            do="put the file back, or take it out of summary.json",
            file=str(path),
        ) from None
    return Picture(caption=picture.caption, image=data.decode("utf-8") if path.suffix == ".svg" else data)
