"""``--device`` with a card's name: planned and measured there without it, every number predicted and said to be so."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from samegrad.levers import find_levers
from samegrad.measure.cards import CARDS
from samegrad.measure.target import Target
from samegrad.records import Footprint, Front, KnobOrigin, Plan
from samegrad.units import format_bytes, parse_bytes
from tests.cli.conftest import Cli

CARD = ("--device", "rtx 4070 laptop")
STEPS = '''
    import torch
    from torch import nn
    import samegrad as sg

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    def train(device="cpu", budget=None, classes=64):
        with torch.device(device):
            model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(128, classes))
            batch = torch.randn(4096, 128), torch.randint(0, classes, (4096,))
        optimizer = torch.optim.Adam(model.parameters())
        loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1])
        return sg.Step(model, loss, optimizer=optimizer, budget=budget), [batch]

    def nowhere(device="meta"):
        return train(device)

    def wider():
        return train(classes=65)

    def hosted():
        step, batches = train()
        declared = step.declared
        return sg.Step(declared.model, declared.loss_fn, optimizer=declared.optimizer, host_budget="10MiB"), batches

    def own_budget():
        return train(budget="90MiB")

    def normed():
        model = nn.Sequential(*(nn.Sequential(Block(), nn.BatchNorm1d(128)) for _ in range(4)), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters())
        loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1])
        return sg.Step(model, loss, optimizer=optimizer), [(torch.randn(4096, 128), torch.randint(0, 10, (4096,)))]

    def reads_values():
        step, batches = train()
        loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1]) * (2.0 if out.sum().item() > 0 else 1.0)
        return sg.Step(step.declared.model, loss, optimizer=step.declared.optimizer), batches
'''


@pytest.fixture(autouse=True)
def cards(folder: Path) -> None:
    (folder / "cards.py").write_text(textwrap.dedent(STEPS))


def planned(cli: Cli, *line: str) -> Any:
    ran = cli("plan", *line, "--json")
    assert ran.code == 0, ran.err
    return ran.document


def test_a_plan_for_a_card_names_it_and_predicts_everything(cli: Cli) -> None:
    document = planned(cli, "cards.py:train", *CARD, "--budget", "90MiB")
    assert (document["fits"], document["origin"]) == (True, "predicted")
    card = document["card"]
    assert (card["name"], card["calibrated"]) == ("RTX 4070 Laptop", False)
    assert card["context_bytes"] > 0
    footprint, plan = document["footprint"], document["plan"]
    assert plan["levers"] and plan["budget"]["device"] == footprint["device"] == "RTX 4070 Laptop"
    caps = [footprint[name] for name in ("peak_allocated_bytes", "smallest_cap_bytes", "steady_cap_bytes")]
    assert caps == sorted(caps) and caps[-1] <= 90 * 2**20 < document["plain_predicted_peak_bytes"]
    assert plan["predicted_peak_bytes"] == footprint["steady_cap_bytes"]
    assert footprint["seconds"] > 0


def test_a_person_reads_what_it_is_made_of(cli: Cli) -> None:
    told = " ".join(cli("plan", "cards.py:train", *CARD, "--budget", "90MiB").out.split())
    for part in (
        "Predicted for RTX 4070 Laptop, not measured", "peak reserved", "steady cap", "smallest cap", "time of a step",
        "in no budget", "uncalibrated", "8.00 GiB as on the box",
    ):  # fmt: skip
        assert part in told
    measured_card = " ".join(cli("plan", "cards.py:train", "--device", "H200").out.split())
    assert "; calibrated." in measured_card and "uncalibrated" not in measured_card


def test_the_model_is_made_here_or_nowhere(cli: Cli) -> None:
    line = (*CARD, "--budget", "90MiB")
    here, nowhere = planned(cli, "cards.py:train", *line), planned(cli, "cards.py:nowhere", *line)
    assert nowhere["plan"]["levers"].keys() - {"host_rows"} == here["plan"]["levers"].keys() - {"host_rows"}
    assert "not examined" in nowhere["footprint"]["facts"]


@pytest.mark.parametrize("command", ["plan", "measure", "run", "verify"])
def test_a_model_that_is_nowhere_needs_a_card(cli: Cli, command: str) -> None:
    ran = cli(command, "cards.py:nowhere", "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, "device")
    assert "for a card by name" in ran.document["error"]["hint"]


def test_without_a_budget_the_step_s_own_counts_and_else_an_empty_card(cli: Cli) -> None:
    assert planned(cli, "cards.py:own_budget", *CARD)["plan"]["budget"]["total_bytes"] == 90 * 2**20
    empty = planned(cli, "cards.py:train", *CARD)["plan"]["budget"]
    assert empty["total_bytes"] == Target.named("RTX 4070 Laptop").budget(None).total_bytes


def test_what_does_not_fit_is_a_no_with_the_floor(cli: Cli) -> None:
    ran = cli("plan", "cards.py:train", *CARD, "--budget", "2MiB", "--json")
    assert (ran.code, ran.document["error"]["code"]) == (1, "budget-too-small")
    assert "parameters" in ran.document["error"]["message"]
    way_down = re.search(r"raise the budget to ([\d.]+) (\w+)", ran.document["error"]["hint"])
    assert way_down is not None
    budget = "".join(way_down.groups())
    # The floor is that of the smallest plan, far below the plain step, and the way down leads there.
    bought = planned(cli, "cards.py:train", *CARD, "--budget", budget)
    assert bought["plan"]["levers"]
    assert parse_bytes(budget) < bought["plain_predicted_peak_bytes"]


# A twentieth is kept for what a trace cannot see.
@pytest.mark.parametrize("spare", [1.07, 0.97])
def test_a_card_s_budget_is_used_up_to_the_steady_cap(cli: Cli, spare: float) -> None:
    plain = planned(cli, "cards.py:train", *CARD)["footprint"]["steady_cap_bytes"]
    budget = f"{int(spare * plain)}B"
    assert bool(planned(cli, "cards.py:train", *CARD, "--budget", budget)["plan"]["levers"]) == (spare < 1)


@pytest.mark.parametrize("command", ["plan", "measure"])
@pytest.mark.parametrize(
    ("asked", "nearest"), [("RTX 4071", "RTX 4070"), ("tpu", "lists all"), ("3080", "RTX 3080 12GB")]
)
def test_an_unknown_card_is_a_mistake_with_the_nearest_names(cli: Cli, command: str, asked: str, nearest: str) -> None:
    ran = cli(command, "cards.py:train", "--device", asked, "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, "device")
    assert nearest in ran.document["error"]["message"] + ran.document["error"]["hint"]


@pytest.mark.parametrize(("asked", "meant"), [("cuad:0", "cuda:0"), ("CUDA:1", "cuda:1"), ("cup", "cpu")])
def test_a_slip_in_a_device_is_answered_with_the_device(cli: Cli, asked: str, meant: str) -> None:
    ran = cli("plan", "autoencoder", "--device", asked)
    assert ran.code == 2
    assert f"did you mean '{meant}'?" in ran.err


@pytest.mark.parametrize("device", ["vulkan", "hpu"])
def test_a_device_that_torch_cannot_use_here_is_a_matter_of_the_machine(cli: Cli, device: str) -> None:
    ran = cli("plan", "autoencoder", "--device", device, "--json")
    assert (ran.code, ran.document["error"]["option"]) == (4, "device")
    assert "cannot use it here" in ran.document["error"]["message"]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is there")
def test_mps_is_refused_where_there_is_none(cli: Cli) -> None:
    assert cli("run", "autoencoder", "--device", "mps").code == 4


@pytest.mark.parametrize("command", ["run", "verify"])
@pytest.mark.parametrize("target", ["cards.py:train", "autoencoder"])
def test_a_step_does_not_run_on_a_name(cli: Cli, folder: Path, command: str, target: str) -> None:
    ran = cli(command, target, *CARD)
    assert ran.code == 2
    assert "run on a device of torch's" in ran.err
    assert not (folder / "runs").exists()


def test_doctor_lists_every_card(cli: Cli) -> None:
    listed = cli("doctor", "--cards", "--json").document["cards"]
    assert [card["name"] for card in listed] == [card.name for card in CARDS]
    assert [card["name"] for card in listed if card["calibrated"]] == ["H200"]
    line = next(line for line in cli("doctor", "--cards").out.splitlines() if line.startswith("RTX 3090 "))
    assert format_bytes(listed[5]["memory_bytes"]) in line and "uncalibrated" in line


@pytest.mark.parametrize(
    ("target", "lever", "budget"), [("train", "split_rows", "90MiB"), ("normed", "recompute", "100MiB")]
)
def test_a_saved_plan_is_judged_again_and_runs_here(
    cli: Cli, folder: Path, target: str, lever: str, budget: str
) -> None:
    made = planned(cli, f"cards.py:{target}", *CARD, "--budget", budget, "--output", "out")
    assert lever in made["plan"]["levers"]
    again = planned(cli, f"cards.py:{target}", *CARD, "--plan", "out/plan.json")
    assert (again["fits"], again["footprint"]["steady_cap_bytes"]) == (True, made["footprint"]["steady_cap_bytes"])
    path = folder / "out" / "plan.json"
    tight = json.loads(path.read_text())
    tight["budget"]["total_bytes"] = made["footprint"]["steady_cap_bytes"] - 1
    path.write_text(json.dumps(tight))
    refused = cli("plan", f"cards.py:{target}", *CARD, "--plan", "out/plan.json")
    assert refused.code == 1 and "does not fit" in refused.out
    # Here its budget bounds nothing, which is said; the gradients are verified all the same.
    here = cli("plan", f"cards.py:{target}", "--plan", "out/plan.json")
    assert here.code == 0 and "its budget does not bound" in here.out
    assert cli("verify", f"cards.py:{target}", "--plan", "out/plan.json", "--rows", "64").code == 0


@pytest.mark.parametrize("lever", ["optimizer_state", "offload_saved"])
def test_a_saved_plan_with_a_lever_that_no_law_predicts_is_followed(cli: Cli, folder: Path, lever: str) -> None:
    plain = planned(cli, "cards.py:train", *CARD, "--output", "plain")
    document = json.loads((folder / "plain" / "plan.json").read_text())
    knobs = find_levers()[lever]().knobs()
    (folder / "by_hand.json").write_text(json.dumps(document | {"levers": {lever: knobs}}))
    again = planned(cli, "cards.py:train", *CARD, "--plan", "by_hand.json")
    assert again["plan"]["levers"] == {lever: knobs}
    assert again["footprint"]["peak_allocated_bytes"] < plain["footprint"]["peak_allocated_bytes"]


def test_what_may_be_pinned_on_the_host_is_the_declarations_on_a_card_too(cli: Cli) -> None:
    assert planned(cli, "cards.py:hosted", *CARD)["plan"]["budget"]["host_bytes"] == 10 * 2**20


@pytest.mark.parametrize("line", [("plan", *CARD), ("plan",), ("run", "--output", "run")])
def test_a_plan_for_another_model_is_refused_with_the_reason(cli: Cli, line: tuple[str, ...]) -> None:
    planned(cli, "cards.py:train", *CARD, "--budget", "90MiB", "--output", "out")
    refused = cli(line[0], "cards.py:wider", *line[1:], "--plan", "out/plan.json", "--json")
    error = refused.document["error"]
    assert (refused.code, error["code"], error["option"], error["file"]) == (3, "wrong-plan", "plan", "out/plan.json")
    assert error["message"].startswith("--plan out/plan.json: apply a plan made for another model")
    assert "weight was float32" in error["message"] and "samegrad plan cards.py:wider" in error["hint"]


def test_announced_steps_are_written_down_and_added_up(cli: Cli) -> None:
    document = planned(cli, "cards.py:train", *CARD, "--steps", "1000")
    assert document["expected_steps"] == 1000
    assert document["predicted_total_seconds"] == 1000 * document["plan"]["predicted_seconds"]
    assert "expected_steps" not in planned(cli, "cards.py:train", *CARD)
    assert cli("plan", "cards.py:train", "--steps", "0").code == 2


def test_a_step_that_cannot_be_followed_is_refused_by_place(cli: Cli) -> None:
    ran = cli("plan", "cards.py:reads_values", *CARD, "--json")
    assert (ran.code, ran.document["error"]["code"]) == (1, "cannot-trace")
    assert "cards.py:" in ran.document["error"]["message"]


def test_a_recipe_is_planned_for_a_card(cli: Cli) -> None:
    document = planned(cli, "autoencoder", "--patch_rows", "300", *CARD, "--dtype", "bfloat16")
    assert document["card"]["name"] == "RTX 4070 Laptop"


@pytest.mark.parametrize(
    "recipe", [("autoencoder", "--patch_rows", "300"), ("fewshot_cosine", "--dataset", "digits", "--n_way", "3")]
)
def test_a_recipes_budget_is_the_cards(recipe: tuple[str, ...], cli: Cli) -> None:
    document = planned(cli, *recipe, *CARD, "--budget", "250MiB")
    assert document["plan"]["budget"]["total_bytes"] == 250 * 2**20


def test_what_a_recipes_options_pin_is_pinned_on_the_card_too(cli: Cli) -> None:
    kernel = ("plan", "score_kernel", *CARD, "--data", "moons", "--strategy", "chunked", "--chunk_size", "10")
    plan = Plan.from_dict(cli(*kernel, "--budget", "4GiB", "--json").document["plan"])
    assert plan.levers["split_rows"]["rows"] == 10
    assert plan.knob_origins["split_rows.rows"] is KnobOrigin.PINNED


def test_measure_on_a_card_is_predicted_only(cli: Cli, folder: Path) -> None:
    ran = cli("measure", "cards.py:train", *CARD, "--output", "out", "--json")
    assert ran.code == 0
    assert ran.document["measured"] is None
    predicted = Footprint.from_json((folder / "out" / "footprint.json").read_text())
    assert ran.document["predicted"] == predicted.to_dict()
    assert predicted.timeline and predicted.at_peak
    assert not (folder / "out" / "measured.json").exists()
    page = (folder / "out" / "measure.html").read_text()
    assert "Predicted to fit" in page and "What is live at the peak" in page
    assert "4070 Laptop, not measured" in cli("measure", "cards.py:train", *CARD).out


@pytest.mark.parametrize("line", [CARD, ()], ids=["a card", "here"])
def test_every_budget_of_the_front_buys_its_plan(cli: Cli, folder: Path, line: tuple[str, ...]) -> None:
    document = planned(cli, "cards.py:train", *line, "--pareto", "--output", "out")
    front = Front.from_json((folder / "out" / "front.json").read_text())
    assert document["front"] == front.to_dict()
    budgets, seconds = zip(*((point.budget_bytes, point.seconds) for point in front.points))
    # Here times are measured, and on a busy machine a few rows at a time may well be the fastest of all.
    assert len(front.points) >= (3 if line else 1)
    # The plain step comes first also where growing segments take less for it.
    assert list(budgets) == sorted(set(budgets), reverse=True) and list(seconds[1:]) == sorted(set(seconds[1:]))
    assert seconds[0] == min(seconds)
    assert (folder / "out" / "front.svg").read_text().startswith("<svg")
    for number, point in enumerate(front.points, start=1):
        assert Plan.from_json((folder / "out" / f"plan-{number}.json").read_text()) == point.plan
    if line:
        bought = planned(cli, "cards.py:train", *line, "--budget", f"{budgets[1]}B")
        assert bought["plan"]["levers"] == front.points[1].plan.levers
        assert bought["plan"]["predicted_seconds"] == pytest.approx(seconds[1])


def test_the_front_is_a_table_for_people_and_one_question_at_a_time(cli: Cli) -> None:
    told = cli("plan", "cards.py:train", *CARD, "--pareto").out
    assert "the plain step" in told and "1.00x" in told and "predicted, not measured" in told
    assert cli("plan", "autoencoder", "--pareto", "--table").code == 2
