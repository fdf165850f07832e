"""``samegrad demo``: the whole promise in half a minute, on any machine, on real pictures.

The autoencoder recipe at a small size, under a budget well below what the plain step needs: planned, verified,
trained, compared with the best linear model, reported in one HTML file.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from samegrad.cli.console import Console
from samegrad.cli.options import parse_line
from samegrad.cli.output_folder import check_output
from samegrad.cli.stopping import Stopped

# Small enough for two cores and half a minute, large enough that the plain step needs several times the budget.
DEMO_FLAGS = (
    *("--patch_rows", "6000", "--num_epochs", "50", "--budget", "24MiB", "--latent_dim", "4", "--hidden", "128"),
    *("--save_every", "1000", "--log_every", "10", "--device", "cpu"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """No GPU, network or data needed."""

    output: Path = Path()
    """Folder for report.html; default: here."""


def main(argv: Sequence[str], console: Console) -> int:
    options = parse_line("samegrad demo", DemoOptions, argv)
    check_output(options.output, files=("report.html",))
    from samegrad.cli.run import parse_run
    from samegrad.cli.run_session import run_session, tell
    from samegrad.store import RunFolder

    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "report.html"
    with tempfile.TemporaryDirectory(prefix="samegrad-demo-") as scratch:
        target, call = parse_run(["autoencoder", *DEMO_FLAGS])
        with RunFolder.create(Path(scratch) / "run") as folder:
            try:
                finished = run_session(target, call, folder, console)
            except Stopped as stopped:
                # What it saved goes with the folder it lies in.
                raise Stopped(stopped.number, saved=None) from None
            shutil.copyfile(folder.path / "report.html", report)
    tell(dataclasses.replace(finished, folder=options.output), report, console)
    return finished.exit_code
