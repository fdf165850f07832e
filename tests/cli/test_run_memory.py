"""A run that meets a lack of memory: it goes on, says so once, and all its records tell."""

from __future__ import annotations

import json
from pathlib import Path

from samegrad.cli.run_health import Answer, examine_run
from samegrad.cli.run_memory import memory_notes, thrashing_line
from samegrad.records import Plan, Recovery, StepResult

from .conftest import Cli, metrics

FAILS_ONCE = '''
def short():
    """Runs out of memory in its third step, the first time."""
    class Fails(nn.Module):
        def forward(self, x):
            if armed.get("steps") == 2 and len(x) > armed["most_rows"]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    armed = {"most_rows": 40}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), Fails(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: armed.update(steps=armed.get("steps", 0) + 1))
    step = sg.Step(model, lambda out, b: nn.functional.cross_entropy(out, b[1]), budget="1MiB", optimizer=optimizer)
    return step, Batches(6)
'''


def test_a_run_goes_on_under_a_smaller_plan_and_every_record_tells(cli: Cli, folder: Path) -> None:
    with (folder / "steps.py").open("a") as file:
        file.write(FAILS_ONCE)
    ran = cli("run", "steps.py:short", "--output", "run")
    assert ran.code == 0, ran.err
    assert ran.err.count("the same batch runs again under split_rows") == 1
    assert ran.err.count("out of memory in forward of 1 (steps.py:") == 1
    run = folder / "run"
    steps = metrics(run)
    assert [len(line["recoveries"]) for line in steps] == [0, 0, 1, 0, 0, 0]
    recovery = Recovery.from_dict(steps[2]["recoveries"][0])
    assert recovery.left == {} and "split_rows" in recovery.taken
    # What a resumed run goes on with.
    assert Plan.from_json((run / "plan.json").read_text()).levers == recovery.taken
    notes = json.loads((run / "summary.json").read_text())["notes"]
    assert any(note.startswith("Step 2: out of memory in forward of 1") for note in notes)
    assert "out of memory in forward" in (run / "report.md").read_text()
    [found] = [finding for finding in examine_run(run) if finding.name == "no out-of-memory"]
    assert found.answer is Answer.FAILS and "1 attempts undone" in found.detail
    again = cli("run", "steps.py:short", "--output", "run", "--resume")
    assert again.code == 0, again.err


def test_a_resumed_run_goes_on_under_a_smaller_plan_as_well(cli: Cli, folder: Path) -> None:
    with (folder / "steps.py").open("a") as file:
        file.write(FAILS_ONCE)
    assert cli("run", "steps.py:short", "--output", "run", "--steps", "1").code == 0
    run = folder / "run"
    plain = Plan.from_json((run / "plan.json").read_text())
    assert plain.levers == {}
    # A process of its own, whose third step fails again.
    ran = cli("run", "steps.py:short", "--output", "run", "--resume", "--steps", "6")
    assert ran.code == 0, ran.err
    recovered = [line["recoveries"] for line in metrics(run)]
    assert [len(found) for found in recovered] == [0, 0, 0, 1, 0, 0]
    taken = Recovery.from_dict(recovered[3][0]).taken
    assert "split_rows" in taken
    # And that one is gone on with.
    now = Plan.from_json((run / "plan.json").read_text())
    assert now.levers == taken and now.budget == plain.budget and now.signature == plain.signature


def test_a_pin_is_not_left_by_a_resumed_run_either(cli: Cli, folder: Path) -> None:
    with (folder / "steps.py").open("a") as file:
        file.write(FAILS_ONCE.replace('budget="1MiB"', "rows=48"))
    assert cli("run", "steps.py:short", "--output", "run", "--steps", "1").code == 0
    ran = cli("run", "steps.py:short", "--output", "run", "--resume", "--steps", "6")
    assert ran.code == 5, ran.err
    assert "plan= is a pin" in ran.err
    assert len(metrics(folder / "run")) == 3


def result(index: int, retries: int = 0) -> StepResult:
    return StepResult(index=index, loss=1.0, seconds=1.0, batch_rows=8, allocator_retries=retries)


def test_thrash_is_a_warning_after_the_warm_up() -> None:
    assert thrashing_line([result(0, 5), result(1, 2), result(2)]) is None
    line = thrashing_line([result(2), result(3, 4)])
    assert line is not None and "in step 3" in line and "4 times" in line and "--budget" in line
    assert memory_notes([result(0, 5), result(1), result(2)]) == ()
    [note] = memory_notes([result(0, 5), result(1), result(2, 1), result(3, 1)])
    assert note.startswith("In 2 of 4 steps")
