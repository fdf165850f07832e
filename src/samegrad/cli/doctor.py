"""``samegrad doctor``: what this machine and installation offer and lack; with ``--run``, how a run went."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from samegrad import __version__
from samegrad.cli.console import Console
from samegrad.cli.devices import list_cards
from samegrad.cli.options import Switch, parse_line
from samegrad.cli.run_health import examine_run
from samegrad.recipes import Answer, Finding
from samegrad.units import format_bytes

# What each extra brings, as it is imported.
EXTRAS = {
    "recipes": ("sklearn", "skimage", "PIL", "soundfile", "matplotlib", "pyarrow"),
    "gpu": ("pynvml",),
    "tensorboard": ("tensorboard",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Paste the output of `samegrad doctor` into an issue."""

    run: Path | None = None
    """A run folder to judge instead: exit code 0 when every check passes, 1 when one fails or cannot be judged yet."""
    cards: Switch = False
    """List the cards that plan and measure can predict for (--device), instead."""


def main(argv: Sequence[str], console: Console) -> int:
    options = parse_line("samegrad doctor", DoctorOptions, argv)
    if options.cards:
        return _show_cards(console)
    findings = examine_run(options.run) if options.run is not None else examine_machine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        console.result(f"{finding.answer.value:<7}  {finding.name:<{width}}  {finding.detail}")
        if finding.do:
            console.result(f"{'':<7}  {'':<{width}}  do: {finding.do}")
    document = {"findings": [finding.to_dict() for finding in findings]}
    failed = sum(finding.answer is Answer.FAILS for finding in findings)
    if options.run is None:
        console.document(document)
        return 4 if failed else 0
    not_judged = sum(finding.answer is Answer.UNKNOWN for finding in findings)
    console.result(_tally(len(findings), failed, not_judged))
    # What could not be judged is no pass.
    passed = not failed and not not_judged
    console.document(document | {"passed": passed})
    return 0 if passed else 1


def _tally(checks: int, failed: int, not_judged: int) -> str:
    """All checks of a run in a line, and the exit code where that is not 0."""
    if not failed and not not_judged:
        return f"all {checks} checks passed"
    passed = checks - failed - not_judged
    return f"{passed} of {checks} checks passed, {failed} failed, {not_judged} could not be judged: exit code 1"


def _show_cards(console: Console) -> int:
    cards = list(list_cards())
    width = max(len(card["name"]) for card in cards)
    for card in cards:
        memory = f"{format_bytes(card['memory_bytes'])} {card['memory_basis']}"
        console.result(f"{card['name']:<{width}}  {memory}; {'calibrated' if card['calibrated'] else 'uncalibrated'}")
    console.document({"cards": cards})
    return 0


def examine_machine() -> tuple[Finding, ...]:
    return (
        Finding(
            name="versions",
            answer=Answer.OK,
            detail=f"samegrad {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}",
        ),
        *_torch(),
        _memory(),
        _disk(),
        *(_extra(name, modules) for name, modules in EXTRAS.items()),
    )


def _torch() -> tuple[Finding, ...]:
    try:
        import torch
    except (ImportError, OSError) as error:
        do = "install torch for this machine: https://pytorch.org/get-started/locally/"
        return (Finding(name="torch", answer=Answer.FAILS, detail=f"cannot be imported: {error}", do=do),)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        Finding(name="torch", answer=Answer.OK, detail=torch.__version__),
        Finding(name="cpu", answer=Answer.OK, detail=f"{cores} cores, torch uses {torch.get_num_threads()} threads"),
    ]
    if not torch.cuda.is_available():
        detail = "none: plans are made and run on the CPU, budgets count tensor bytes"
        return (*found, Finding(name="cuda", answer=Answer.OK, detail=detail))
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} free of {format_bytes(total)}"
        found.append(Finding(name=f"cuda:{index}", answer=Answer.OK, detail=detail))
    return tuple(found)


def _memory() -> Finding:
    import torch

    from samegrad.measure import counters

    host = torch.device("cpu")
    total, limit = counters.total_bytes(host)
    free, how = counters.free_now(host)
    detail = f"{format_bytes(free)} usable of {format_bytes(total)} ({limit}; {how})"
    return Finding(name="memory", answer=Answer.OK, detail=detail)


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    return Finding(
        name="disk", answer=Answer.OK, detail=f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} here"
    )


def _extra(name: str, modules: Sequence[str]) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return Finding(name=f"extra {name}", answer=Answer.OK, detail="installed")
    return Finding(
        name=f"extra {name}",
        answer=Answer.UNKNOWN,
        detail=f"not installed: {', '.join(missing)}",
        do=f"pip install 'samegrad[{name}]', if you want what it is for",
    )
