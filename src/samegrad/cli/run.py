"""``samegrad run TARGET``: plan, verify, train, save, stop, resume and report, inside a budget.

1. The folder is held, and its status.json true, from before anything is loaded until the end, whatever the end is.
2. A resumed run continues with the options, the plan and the bits of the run it continues. Another budget or device
   makes another plan, with the same gradient; whatever would make another training of it is refused.
3. A signal stops the loop between two ticks; what has been done is saved first.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samegrad import __version__
from samegrad.cli.config import values_of
from samegrad.cli.console import Console
from samegrad.cli.devices import refuse_card
from samegrad.cli.options import Call, Switch
from samegrad.cli.output_folder import check_output
from samegrad.cli.ranks import own_folder, own_rank
from samegrad.cli.run_story import file_stands
from samegrad.cli.target import Target, asked_device, target_call
from samegrad.errors import BadInput, UsageError
from samegrad.recipes import OutOfRange

if TYPE_CHECKING:
    from samegrad.store import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes, and how it is saved."""

    output: Path | None = None
    """Run folder; default: runs/<name>-<date>-<time>."""
    resume: Switch = False
    """Continue the run in --output where its newest checkpoint left off, bit for bit."""
    resume_from: int | None = None
    """With --resume: the checkpoint of this step instead of the newest; later ones are set aside by the next save."""
    strict_resume: Switch = False
    """With --resume: an error, instead of a warning, where the newest checkpoint cannot be used."""
    plan: Path | None = None
    """A plan.json to run, instead of making a plan."""
    steps: int | None = None
    """Stop after so many epochs or iterations (whichever a recipe counts), or steps (of file.py:function), in all.
    Rounded up to where a recipe can stop: score_kernel after every fifty iterations."""
    save_every: int = 10
    """Save a checkpoint every so many epochs, iterations or steps; one is saved at the end and on a stop as well."""
    log_every: int = 10
    """Log loss and memory every so many epochs, iterations or steps; rounded up as --steps is."""
    verify_rows: int | None = None
    """Rows on which the gradients are verified before training; default: as many as fit."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every", "verify_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OutOfRange(
                    asked=f"--{name} {value}", found="it must be at least 1", do="give 1 or more", option=name
                )
        if self.resume and self.output is None:
            raise UsageError(
                asked="--resume",
                found="no folder to resume",
                do="name the run's folder with --output DIR",
                option="resume",
            )


# Options of one invocation that a config file, fed back, must not carry on to another.
_NOT_IN_CONFIG = ("output", "resume", "resume_from", "strict_resume", "plan")
CONFIG = "config.json"
# What a run writes into its folder, looked for before a resumed one begins.
_FILES = (
    CONFIG, "run.lock", "status.json", "plan.json", "footprint.json", "summary.json", "verdict.json", "metrics.jsonl",
    "measured.json", "report.html", "report.md",
)  # fmt: skip
# Where runs go that name no folder.
_RUNS = Path("runs")


def main(argv: Sequence[str], console: Console) -> int:
    target, call = parse_run(argv)
    refuse_card("run", asked_device(target, call))
    from samegrad.cli.run_session import run_session, tell

    first = own_rank() == 0
    # Under torchrun the first rank speaks for all of them; errors are told by each.
    heard = console if first else Console(quiet=True)
    with open_folder(target, call.part(RunOptions)) as folder:
        finished = run_session(target, call, folder, heard)
    if first:
        tell(finished, finished.folder / "report.html", console)
    return finished.exit_code


def parse_run(argv: Sequence[str]) -> tuple[Target, Call]:
    """The target and options of a run; those of the run being resumed lie under all others (rule 2)."""
    target, call = target_call("run", (RunOptions,), argv)
    options = call.part(RunOptions)
    for name in ("resume_from", "strict_resume"):
        if getattr(options, name) not in (None, False) and not options.resume:
            raise UsageError(
                asked=f"--{name}", found="the run is not resumed", do="give --resume as well", option=name
            )
    config = options.output / CONFIG if options.resume and options.output is not None else None
    if config is None or not file_stands(config):
        if config is not None and (config.parent / "checkpoints").is_dir():
            raise BadInput(
                asked=f"resume the run in {config.parent}",
                found=f"{config}: no such file, so nothing says what options the run began with",
                do="put it back; samegrad run writes it before anything else", file=str(config), option="resume",
            )  # fmt: skip
        return target, call
    target, call = target_call("run", (RunOptions,), argv, below=(config,))
    _refuse_another_training(target, call, config)
    return target, call


def changed_options(target: Target, call: Call, config: Path) -> dict[str, tuple[Any, Any]]:
    """The options of ``target`` that are others in ``call`` than in the ``config`` of a run: as they were, as they are.

    Empty where there is no such file. An option that a config of an earlier version does not name is as it was.
    """
    if not config.is_file():
        return {}
    before, now = (json.loads(text) for text in (config.read_text(), config_text(target, call)))
    names = values_of(call.part(target.options_class))
    return {name: (before[name], now[name]) for name in names if name in before and before[name] != now[name]}


def _refuse_another_training(target: Target, call: Call, config: Path) -> None:
    allowed: Any = target.options_class
    for name, (before, now) in changed_options(target, call, config).items():
        if name not in allowed.changes_on_resume:
            raise UsageError(
                asked=f"--{name} {now} ({call.origins[name]}) in a run that is resumed",
                found=f"it began with {before} ({config}), and would be another training with {now}",
                do=f"leave {name} out, or start a new run in another folder",
                option=name,
            )


def open_folder(target: Target, options: RunOptions) -> RunFolder:
    """The run's folder, held: the one asked for, or a new one that no other process got."""
    from samegrad.store import RunFolder

    check_output(options.output or _RUNS)
    if options.output is not None:
        own = own_folder(options.output)
        if options.resume:
            check_output(own, option=None, files=_FILES)
        return RunFolder.resume(own) if options.resume else RunFolder.create(own)
    return RunFolder.create(_new_folder(_RUNS, target.name))


def _new_folder(parent: Path, name: str) -> Path:
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).name.replace(".py:", "-"))
    started = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent.mkdir(parents=True, exist_ok=True)
    # Two runs may start in the same second: mkdir tells who came first.
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (parent / (started + suffix)).mkdir()
        except FileExistsError:
            continue
        return parent / (started + suffix)
    raise FileExistsError(f"{parent / started}-2 to -99")


def config_text(target: Target, call: Call) -> str:
    """config.json: every resolved option, to be fed back with ``--config``."""
    values: dict[str, Any] = {}
    for kind in (target.options_class, RunOptions):
        values |= values_of(call.part(kind))
    kept = {name: value for name, value in values.items() if name not in _NOT_IN_CONFIG}
    notes: Mapping[str, Any] = {"schema_version": 1, "samegrad_version": __version__, "target": target.name}
    return json.dumps({**notes, **kept}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
