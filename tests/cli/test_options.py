"""Flags over environment over files over the recipe over the defaults, wherever a flag stands on the line."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path

import pytest

from samegrad.cli.options import StreamOptions, Switch, parse_call, parse_line
from samegrad.cli.report import ReportOptions
from samegrad.errors import UsageError
from samegrad.recipes import OutOfRange
from tests.cli.conftest import Cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """Options of a toy."""

    num_epochs: int = 300
    """Epochs."""
    learning_rate: float = 1e-3
    budget: str | None = None
    tied: bool = False
    use_amp: bool = True
    again: bool | None = None
    penalty: float = 0.0
    sizes: tuple[int, ...] = ()
    force: Switch = False

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            asked = f"num_epochs {self.num_epochs}"
            raise UsageError(asked=asked, found="below 1", do="1 or more", option="num_epochs")
        if self.penalty and not self.tied:
            raise UsageError(asked="penalty", found="only with tied", do="add --tied", option="penalty")


def read(*line: str) -> ToyOptions:
    return parse_call("toy", [ToyOptions], line, target="toy").part(ToyOptions)


def wrong(*line: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(*line)
    return caught.value


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("num_epochs: 1\nlearning-rate: 0.1\n")
    Path("two.json").write_text('{"num_epochs": 2}')
    return tmp_path


ORIGINS = {
    "default": ((), {}, 300, "default"),
    "one file": (("--config", "one.yaml"), {}, 1, "one.yaml:1"),
    "two files, left to right": (("--config", "one.yaml", "two.json"), {}, 2, "two.json:1"),
    "two files, the other way": (("--config", "two.json", "one.yaml"), {}, 1, "one.yaml:1"),
    "--config twice": (("--config", "one.yaml", "--config", "two.json"), {}, 2, "two.json:1"),
    "environment over file": (("--config", "one.yaml"), {"SAMEGRAD_NUM_EPOCHS": "3"}, 3, "SAMEGRAD_NUM_EPOCHS"),
    "flag before the file": (("--num_epochs", "4", "--config", "one.yaml"), {}, 4, "--num_epochs"),
    "flag after the file": (("--config", "one.yaml", "--num_epochs", "4"), {}, 4, "--num_epochs"),
    "flag over all": (
        ("--num-epochs=4", "--config", "one.yaml"), {"SAMEGRAD_NUM_EPOCHS": "3"}, 4, "--num_epochs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORIGINS)
def test_the_nearest_source_wins_and_is_named(
    case: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, environment, value, origin = ORIGINS[case]
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    call = parse_call("toy", [ToyOptions], line, target="toy")
    assert call.part(ToyOptions).num_epochs == value
    assert call.origins["num_epochs"] == origin
    assert call.given("num_epochs") is (origin != "default")


def test_the_order_of_the_line_changes_nothing(files: Path) -> None:
    groups = (("--num_epochs", "4"), ("--config", "one.yaml", "two.json"), ("--no-use_amp",), ("-q",))
    found = {read(*itertools.chain(*order)) for order in itertools.permutations(groups)}
    assert found == {ToyOptions(num_epochs=4, learning_rate=0.1, use_amp=False)}


@pytest.mark.parametrize("name", ["num_epochs", "num-epochs"])
def test_dashes_and_underscores_are_one_option(name: str) -> None:
    assert read(f"--{name}", "7").num_epochs == 7


@pytest.mark.parametrize(
    ("line", "value"), [(["--no_use_amp"], False), (["--no-use-amp"], False), (["--use_amp"], True), ([], True)]
)
def test_a_truth_can_be_given_both_ways(line: list[str], value: bool) -> None:
    assert read(*line).use_amp is value


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--again", True), ("--no_again", False), ("--no-again -q", False), ("--again --num_epochs 4", True),
        ("--again True", True), ("--again False", False), ("--again=False", False), ("--again None", None), ("", None),
    ],
)  # fmt: skip
def test_a_truth_that_may_be_unset_is_given_like_the_others(line: str, value: bool | None, files: Path) -> None:
    assert read(*line.split()).again is value
    # Over a file that says the other.
    Path("again.json").write_text(f'{{"again": {"false" if value else "true"}}}')
    call = parse_call("toy", [ToyOptions], [*line.split(), "--config", "again.json"], target="toy")
    assert call.part(ToyOptions).again is (value if line else True)
    assert call.origins["again"] == ("--again" if line else "again.json:1")


def test_a_truth_that_may_be_unset_takes_no_other_word() -> None:
    assert "--again: 'maybe' is not true or false" in wrong("--again", "maybe").found


def test_all_mistakes_of_all_sources_are_told_at_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.yaml").write_text("num_epochs: 5\nnum_epoks: abc\nlearning_rate: .nan\nuse_amp: no\n")
    monkeypatch.setenv("SAMEGRAD_SIZES", "1 x")
    error = wrong("--config", "bad.yaml", "--penalty", "much", "--foo", "3", "--num_epochs", "x")
    assert error.exit_code == 2
    for part in (
        "7 mistakes",
        "bad.yaml:2: unknown option 'num_epoks'; did you mean 'num_epochs'?",
        "bad.yaml:3: learning_rate: '.nan' is not a finite number",
        "bad.yaml:4: use_amp: 'no' is not true or false",
        "SAMEGRAD_SIZES: 'x' is not a whole number",
        "unknown option '--foo'",
        "--penalty: 'much' is not a finite number",
        "--num_epochs: 'x' is not a whole number",
    ):
        assert part in error.found


def test_a_mistyped_flag_is_answered_with_the_nearest() -> None:
    assert "unknown option '--num_epoch'; did you mean '--num_epochs'?" in wrong("--num-epoch", "3").found


def test_a_mistyped_variable_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMEGRAD_NUM_EPOCH", "3")
    assert "SAMEGRAD_NUM_EPOCH: no such option; did you mean 'SAMEGRAD_NUM_EPOCHS'?" in wrong().found


def test_variables_of_other_commands_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMEGRAD_CODEBOOK", "3")
    assert read() == ToyOptions()


def test_a_value_out_of_range_is_told_with_its_place(files: Path) -> None:
    Path("low.yaml").write_text("learning_rate: 1\nnum_epochs: 0\n")
    error = wrong("--config", "low.yaml")
    assert (error.found, error.file, error.option) == ("low.yaml:2: below 1", "low.yaml", "num_epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangedOptions:
    """Options that have ranges, and one that needs another."""

    rate: float = 0.1
    width: int = 8
    depth: int = 2
    shares: tuple[float, ...] = (0.5,)
    budget: str | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "width", "depth"):
            value = getattr(self, name)
            if not value > 0:
                raise OutOfRange(asked=f"--{name} {value}", found="it must be positive", do="1", option=name)
        if self.depth > self.width:
            raise UsageError(asked="--depth", found="deeper than wide", do="less", option="depth")


def outside(*line: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_call("toy", [ToyOptions, RangedOptions], line, target="toy")
    return caught.value


def test_all_values_out_of_range_are_told_at_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.yaml").write_text("rate: -1\nlearning_rate: x\nbudget: 8\n")
    monkeypatch.setenv("SAMEGRAD_WIDTH", "0")
    error = outside("--config", "bad.yaml", "--depth", "-3")
    assert error.found.splitlines()[1:] == [
        "    bad.yaml:2: learning_rate: 'x' is not a finite number",
        "    bad.yaml:3: budget 8: a number without a unit",
        "    bad.yaml:1: rate -1.0: it must be positive",
        "    SAMEGRAD_WIDTH: width 0: it must be positive",
        "    --depth -3: it must be positive",
    ]
    assert (error.file, error.option) == ("bad.yaml", "learning_rate")


def test_options_against_each_other_are_judged_once_each_is_right(files: Path) -> None:
    assert outside("--depth", "9").found == "--depth: deeper than wide"
    assert outside("--depth", "9", "--rate", "0").found == "--rate: it must be positive"
    assert "deeper" not in outside("--depth", "9", "--rate", "0", "--width", "0").found


@pytest.mark.parametrize("text", [".nan", "-.inf", "nan", "+.INF", "inf"])
def test_what_is_not_finite_is_answered_with_the_range(files: Path, text: str) -> None:
    Path("nan.yaml").write_text(f"width: 9\nrate: {text}\n")
    says = f"nan.yaml:2: rate: '{text}' is not a finite number"
    found = outside("--config", "nan.yaml").found
    # Infinity lies in this range, and is refused all the same.
    assert found == (says if text.lower() in ("+.inf", "inf") else f"{says}: it must be positive")


@pytest.mark.parametrize("text", ["010", "0x10", "0o7", "1_000", "+5", "-0", "1e3", "true"])
def test_a_whole_number_means_the_same_in_every_source(
    files: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*line: str) -> object:
        try:
            return read(*line).sizes
        except UsageError as error:
            return error.found.partition(": ")[2].removeprefix("sizes: ")

    Path("list.yaml").write_text(f"sizes: [{text}]\n")
    in_file, on_line = answer("--config", "list.yaml"), answer("--sizes", text)
    monkeypatch.setenv("SAMEGRAD_SIZES", text)
    assert in_file == on_line == answer()


@pytest.mark.parametrize("text", ["1", "0", "true", "False", "yes", "on", "2", "None"])
def test_a_truth_means_the_same_in_files_and_the_environment(
    files: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*line: str) -> object:
        try:
            return read(*line).tied
        except UsageError as error:
            return error.found.partition(": ")[2].removeprefix("tied: ")

    Path("truth.yaml").write_text(f"tied: {text}\n")
    in_file = answer("--config", "truth.yaml")
    monkeypatch.setenv("SAMEGRAD_TIED", text)
    assert in_file == answer()


def test_a_list_with_what_is_not_finite_is_refused(files: Path) -> None:
    assert "'nan' is not a finite number" in outside("--shares", "0.5", "nan").found


@pytest.mark.parametrize("text", ["8", "0", "110%", "0%", "6 gigs", "0GiB"])
def test_what_is_no_amount_of_memory_is_refused_where_options_are_read(files: Path, text: str) -> None:
    Path("budget.yaml").write_text(f"budget: {text}\n")
    error = outside("--config", "budget.yaml")
    assert error.found.startswith("budget.yaml:1: ")
    assert (error.file, error.option) == ("budget.yaml", "budget")


@pytest.mark.parametrize(
    ("text", "option", "file"),
    [
        ("tied: true\noptim:\n  nmae: x\n", "optim.nmae", "wrong.yaml"),
        ("num_epoks: 3\n", "num_epoks", "wrong.yaml"),
        ("learning_rate: x\n", "learning_rate", "wrong.yaml"),
    ],
)
def test_a_mistake_names_its_option_and_file(files: Path, text: str, option: str, file: str) -> None:
    Path("wrong.yaml").write_text(text)
    error = wrong("--config", "wrong.yaml")
    assert (error.option, error.file) == (option, file)


def test_a_mistake_on_the_line_names_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (wrong("--foo", "3").option, wrong("--num_epochs", "3", "4").file) == ("foo", None)
    assert wrong("--num_epochs", "x").option == "num_epochs"
    monkeypatch.setenv("SAMEGRAD_NUM_EPOCH", "3")
    assert wrong().option == "num_epoch"


def test_a_flag_may_complete_what_a_file_began(files: Path) -> None:
    Path("half.yaml").write_text("penalty: 0.1\n")
    assert "only with tied" in wrong("--config", "half.yaml").found
    assert read("--config", "half.yaml", "--tied") == ToyOptions(penalty=0.1, tied=True)


def test_a_file_written_for_another_target_is_refused(files: Path) -> None:
    Path("other.json").write_text('{"target": "flow", "num_epochs": 3}')
    assert "other.json:1: this config is for 'flow'" in wrong("--config", "other.json").found


@pytest.mark.parametrize("name", ["json", "quiet", "force", "config"])
def test_what_belongs_to_one_line_is_not_read_from_a_file(files: Path, name: str) -> None:
    Path("switch.yaml").write_text(f"{name}: true\n")
    assert f"unknown option '{name}'" in wrong("--config", "switch.yaml").found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["stray"], "stray"),
        (["--num_epochs"], "--num_epochs"),
        (["--num_epochs", "3", "4"], "4"),
        (["-z"], "-z"),
        (["--config"], "--config"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_usage_error(line: list[str], says: str) -> None:
    assert says in wrong(*line).found


def test_a_required_argument_that_is_missing_is_named() -> None:
    from samegrad.cli.report import ReportOptions

    with pytest.raises(UsageError, match="Missing"):
        parse_line("samegrad report", ReportOptions, ["-q"])


def test_short_flags_stand_for_long_ones() -> None:
    assert parse_call("toy", [ToyOptions], ["-q", "-v"]).part(StreamOptions) == StreamOptions(quiet=True, verbose=True)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_told_without_the_box_around_it(
    cli: Cli, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as raised:
        parse_line("samegrad report", ReportOptions, [])
    assert raised.value.found.startswith("Missing from samegrad report: PATH") and "---" not in raised.value.found


@pytest.mark.parametrize("target", ["steps.py:train", "autoencoder"])
@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**70)])
def test_a_seed_that_no_generator_takes_is_refused(cli: Cli, target: str, seed: str) -> None:
    ran = cli("plan", target, "--random_seed", seed, "--json")
    assert ran.code == 2 and ran.document["error"]["option"] == "random_seed"


@pytest.mark.parametrize("target", ["steps:train", "steps.py", "steps"])
def test_a_file_without_its_ending_or_function_is_recognised(cli: Cli, target: str) -> None:
    ran = cli("plan", target)
    assert ran.code == 2 and ("did you mean 'steps.py:train'?" if ":" in target else "steps.py:NAME") in ran.err
