"""The README's own lines: the program runs, the commands exist, the figures are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_program_with_your_model_runs(capsys: Any) -> None:
    [program] = blocks("python")
    batches = [(torch.randn(32, 4), torch.randint(0, 3, (32,))) for _ in range(3)]
    names = {"make_model": lambda: nn.Linear(4, 3), "loader": batches, "torch": torch, "F": F}
    exec(compile(program, "README.md", "exec"), names)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Budget 6.00 GiB")
    assert told[-1] == "True"


def test_the_two_commands_do_their_own_set_up() -> None:
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("pip install")]
    assert commands == ["pip install -e '.[recipes]' && samegrad demo", "pip install -e '.[test]' && pytest"]


def test_every_figure_names_a_result_that_is_there() -> None:
    scripts = re.findall(r"`python benchmarks/(\w+)\.py", README)
    assert scripts
    commands = [json.loads(path.read_text())["command"] for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    for script in scripts:
        assert (ROOT / "benchmarks" / f"{script}.py").is_file()
        assert any(f"benchmarks/{script}.py" in command for command in commands), script


def test_the_figures_are_those_of_the_results() -> None:
    overhead, gpu, exact = result("engine_overhead"), result("autoencoder_gpu"), result("exactness")
    assert f"| {exact['worst_share_of_contract']:.2f} of what float64" in README
    both = (overhead["single_pass"]["median_ratio"], overhead["two_pass"]["median_ratio"])
    assert "{:.2f} / {:.2f} times".format(*both) in README
    assert max(both) <= 1.05
    card = [value for value in result("engine_overhead_cuda").values() if isinstance(value, dict)]
    by_case = [case["median_ratio"] for case in card if "median_ratio" in case]
    assert "| {1:.3f}, {3:.3f}, {5:.3f} / {0:.3f}, {2:.3f}, {4:.3f} times |".format(*by_case) in README
    batchnorm, contract = result("exact_batchnorm")["cases"], result("contract_cuda")
    lockstep = batchnorm["lockstep, every cut kept"]
    reordered = batchnorm["plain, rows in another order"]["largest_relative_error"]
    flops, error = lockstep["flops_over_plain"], lockstep["largest_relative_error"]
    assert f"{flops:.2f} times, {error:.0e} ({reordered:.0e} when" in README
    assert lockstep["flops_over_plain"] <= 1.4 and lockstep["largest_relative_error"] <= 1e-11
    assert contract["all_same"] and f"same, {len(contract['cases'])} of {len(contract['cases'])} |" in README
    for name, row in result("what_others_do").items():
        if isinstance(row, dict) and "samegrad" in row:
            assert f"| {row['accumulated_means']:.2f} | {row['samegrad']:.0e} |" in README, name
    assert f"{len(result('exact_table')['table'])} rows" in README
    shares = [place["host_speed_fraction"] for place in gpu["places"]]
    assert f"{min(shares) * 100:.0f} to {max(shares) * 100:.0f} % of the speed" in README
    assert min(shares) >= 0.9
    for budget in gpu["budgets"]:
        assert f"{budget['measured_peak_reserved_bytes'] / 2**30:.2f}" in README
        assert budget["measured_peak_reserved_bytes"] <= budget["budget_bytes"]
    for budget in result("autoencoder_budget")["budgets"]:
        assert budget["measured_peak_bytes"] <= budget["budget_bytes"]
        assert abs(budget["measured_over_predicted"] - 1) < 0.1


def test_the_figures_of_speed_within_a_budget_are_those_of_the_results() -> None:
    gpt = result("budget_sweep_h100")["workloads"]["gpt2"]
    ours, compiled = (gpt["cells"][name] for name in ("12.5 samegrad", "100 plain compiled"))
    assert f"inside {ours['budget_bytes'] / 1e9:.1f} GB" in README
    assert ours["peak_reserved_bytes"] <= ours["budget_bytes"]
    plain_bytes, compiled_bytes = gpt["plain_reserved_bytes"], compiled["peak_reserved_bytes"]
    assert f"reserves {plain_bytes / 1e9:.0f} GB, compiled {compiled_bytes / 1e9:.0f})" in README
    over = [ours["seconds"] / seconds for seconds in (gpt["plain_seconds"], compiled["seconds"])]
    assert "| {:.2f}, {:.2f} |".format(*over) in README
    larger, other = (gpt["cells"][f"25 {name}"] for name in ("samegrad", "checkpointing compiled"))
    assert f"inside {larger['budget_bytes'] / 1e9:.1f} GB; the best of" in README
    seconds = (gpt["plain_seconds"], compiled["seconds"])
    shares = [larger["seconds"] / seconds[0], larger["seconds"] / seconds[1], other["seconds"] / seconds[0]]
    assert "| {:.2f}, {:.2f}; {:.2f} |".format(*shares) in README
    fitting = [cell["seconds"] for name, cell in gpt["cells"].items() if name.startswith("25 ") and cell["fits"]]
    assert larger["seconds"] == min(fitting) and other["seconds"] == sorted(fitting)[1]
    flow = result("flow_style_gpu")["cells"]
    budgeted = [flow[f"bfloat16 32 samegrad {budget}"] for budget in ("8GiB", "4GiB", "2GiB")]
    assert all(cell["within_budget"] and cell["verdict"] == "same" for cell in budgeted)
    assert all(cell["gradient_difference"] == 0 for cell in budgeted)
    assert "| {:.2f}, {:.2f}, {:.2f} |".format(*(cell["speed_of_plain"] for cell in budgeted)) in README
    assert f"by hand has {flow['bfloat16 32 checkpointed']['speed_of_plain']:.2f} |" in README
    assert f"reserves {flow['bfloat16 32 plain']['peak_bytes'] / 2**30:.1f} GiB" in README
    large = [flow[f"bfloat16 240 samegrad {budget}"] for budget in ("8GiB", "4GiB")]
    assert all(cell["within_budget"] and cell["verdict"] == "same" for cell in large)
    by_hand, plain = flow["bfloat16 240 checkpointed"], flow["bfloat16 240 plain"]
    assert f"by hand has {by_hand['speed_of_plain']:.2f} in {by_hand['peak_bytes'] / 2**30:.1f} GiB" in README
    assert f"plain step reserves {plain['peak_bytes'] / 2**30:.0f} GiB" in README
    assert "| {:.2f}, {:.2f} | `python benchmarks/flow_style_gpu.py --rows 240".format(
        *(cell["speed_of_plain"] for cell in large)
    ) in README  # fmt: skip


def test_the_figures_of_small_budgets_not_compiled_are_those_of_the_results() -> None:
    cells = result("plan_speed_gpu")["cells"]

    def times(case: str, *shares: int) -> list[str]:
        return [f"{1 + cells[f'{case} at {share}%']['more_time']:.2f}" for share in shares]

    gpt = times("gpt2 32 bf16", 50, 25, 10)
    photographs = [times(f"resnet50 192 {precision}", 65, 50) for precision in ("fp32", "bf16")]
    assert f"| {', '.join(gpt)}; {', '.join(map(' and '.join, photographs))} |" in README


def test_the_figures_of_planning_are_those_of_the_results() -> None:
    found = result("prediction")["independent"]
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "steady_cap_bytes")
    allocated, reserved, cap = (found[name] for name in names)
    medians = f"{allocated['median'] * 100:.2f}, {reserved['median'] * 100:.1f}, {cap['median'] * 100:.1f} %"
    worst = f"{abs(allocated['worst']) * 100:.1f}, {abs(reserved['worst']) * 100:.1f}, {abs(cap['worst']) * 100:.0f} %"
    assert f"peaks of {allocated['cases']} steps" in README
    assert f"median off {medians}; worst {worst} |" in README
    judged = [case["errors"] for case in result("prediction")["cases"] if not case["calibrates"]]
    assert len(judged) == 36 and min(errors["peak_reserved_bytes"] for errors in judged) > -0.016
    assert sum(errors["steady_cap_bytes"] > 0.15 for errors in judged) == 4
    allocator, chains = result("allocator_gpu")["summary"], result("plan_quality")
    assert f"{allocator['exact']} of {allocator['runs']} ({allocator['exact_with_own_addresses']} where" in README
    assert f"at most {chains['largest_time_of_best']:.5f} times its time" in README
    assert f"{len(chains['chains'])} chains, {len(chains['fractions'])} budgets each" in README
    head = result("chunk_loss_cuda")["positions_of_a_chunk"]["4096"]
    share, time = head["activation_bytes_over_plain"], head["step_seconds_over_plain"]
    assert f"| {share:.2f}, {time:.2f} of the plain step's |" in README


def test_no_result_says_where_somebody_keeps_the_sources() -> None:
    kept = re.compile(r"(?<![\w.])/[^\s\"]*src/samegrad")
    assert kept.search('"why": "waits at /somewhere/src/samegrad/step.py:3"')
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert kept.search(path.read_text()) is None, path.name


PAGES = sorted(ROOT.glob("src/samegrad/recipes/*/README.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.parent.name for page in PAGES])
def test_no_page_of_a_recipe_has_a_place_that_was_never_filled(page: Path) -> None:
    empty = re.compile(r"^[A-Z][A-Z_]{3,}$", re.MULTILINE)
    assert empty.search(page.read_text()) is None
    assert empty.search(f"{page.read_text()}\nTABLES\n")
