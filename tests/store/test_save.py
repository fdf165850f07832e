"""What is saved comes back bit for bit, a failed save changes nothing, and healthy checkpoints stay."""

from __future__ import annotations

import ast
import errno
import json
import math
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import samegrad.store
from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.store import load_checkpoint, save_checkpoint
from samegrad.store.faults import Action, planned
from samegrad.store.plain_state import from_plain, to_plain

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Random bits that are a finite value of ``dtype``."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(shape, dtype=torch.float64, generator=generator)
    if dtype.is_complex:
        return torch.complex(numbers, torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
    return (numbers * 50).abs().to(dtype) if not dtype.is_signed else (numbers * 50).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.detach().resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def round_trip(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    save_checkpoint(folder, step=1, tensors={"model": tensors}, state={})
    return dict(load_checkpoint(folder).tensors["model"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(folder: Path, dtype: torch.dtype) -> None:
    saved = {"plain": values(dtype, (3, 5)), "scalar": values(dtype, ()), "empty": values(dtype, (0, 4))}
    loaded = round_trip(folder, saved)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert same_bits(loaded[name], tensor), name


def test_strided_tensors_come_back_with_their_values(folder: Path) -> None:
    base = values(torch.float32, (4, 6, 8, 2))
    saved = {
        "transposed": base.clone().transpose(0, 2),
        "every_second": base.clone()[::2, 1::2],
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "expanded": values(torch.float32, (1, 3)).expand(5, 3),
        "conjugate": values(torch.complex64, (4,)).conj(),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    loaded = round_trip(folder, saved)
    for name, tensor in saved.items():
        assert same_bits(loaded[name], tensor), name


def test_signed_zero_subnormals_and_nan_bits_are_kept(folder: Path) -> None:
    bits = torch.tensor([-(2**31), 1, 0x7FC01234, 0x7F800000], dtype=torch.int32)
    assert torch.equal(round_trip(folder, {"w": bits.view(torch.float32)})["w"].view(torch.int32), bits)


def test_tied_tensors_are_stored_once_and_come_back_tied(folder: Path) -> None:
    weight = values(torch.float32, (64, 32))
    loaded = round_trip(folder, {"encoder": weight, "decoder": weight, "transposed": weight.T, "row": weight[3]})
    stored = (folder / "step-00000001" / "model.safetensors").stat().st_size
    assert stored < 2 * weight.numel() * weight.element_size()
    assert same_bits(loaded["decoder"], weight)
    assert same_bits(loaded["transposed"], weight.T)
    assert same_bits(loaded["row"], weight[3])
    loaded["encoder"][3, 1] = 7.0
    assert loaded["decoder"][3, 1] == loaded["transposed"][1, 3] == loaded["row"][1] == 7.0


def test_equal_but_separate_tensors_do_not_come_back_tied(folder: Path) -> None:
    weight = values(torch.float32, (4,))
    loaded = round_trip(folder, {"a": weight, "b": weight.clone(), "c": weight.to(torch.int32)})
    loaded["a"].zero_()
    assert same_bits(loaded["b"], weight)
    assert same_bits(loaded["c"], weight.to(torch.int32))


def test_overlapping_windows_and_reinterpreted_bits_keep_their_values(folder: Path) -> None:
    base = values(torch.float32, (10,))
    late, pairs = values(torch.float32, (10,)), values(torch.complex64, (4,))
    saved = {
        "left": base[:7],
        "right": base[3:],
        "bits": base.view(torch.int32),
        "long_after": late[3:],
        "short_before": late[:2],
        "pairs": pairs,
        "conjugate": pairs.conj(),
    }
    loaded = round_trip(folder, saved)
    for name, tensor in saved.items():
        assert same_bits(loaded[name], tensor), name


def test_the_files_are_ordinary_safetensors(folder: Path) -> None:
    saved = {"w": values(torch.bfloat16, (3, 2)), "n": values(torch.int64, (2,)), "flag": values(torch.bool, (3,))}
    path = save_checkpoint(folder, step=1, tensors={"model": saved}, state={})
    for name, tensor in safetensors.torch.load_file(path / "model.safetensors").items():
        assert same_bits(tensor, saved[name])


def test_every_tensor_starts_where_its_dtype_is_aligned(folder: Path) -> None:
    saved = {str(i): values(dtype, (3,)) for i, dtype in enumerate([torch.bool, *DTYPES])}
    data = (save_checkpoint(folder, step=1, tensors={"m": saved}, state={}) / "m.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    for name, tensor in saved.items():
        real_bytes = tensor.element_size() // (2 if tensor.is_complex() else 1)
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % real_bytes == 0, name


def test_only_safetensors_and_json_are_written_and_no_code_here_pickles(folder: Path) -> None:
    path = save_checkpoint(folder, step=1, tensors={"model": {}, "rng": {}}, state={"a": 1})
    assert names(path) == ["manifest.json", "model.safetensors", "rng.safetensors", "state.json"]
    for source in Path(samegrad.store.__file__).parent.glob("*.py"):
        tree = ast.parse(source.read_text())
        words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        words |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not {"pickle", "marshal", "shelve"} & words
        assert not {"torch.save", "torch.load", "eval", "exec"} & called


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=4) | st.integers() | st.sampled_from(["$tuple", "$float"]), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def typed(value: Any) -> Any:
    """``value`` with types in it, since 1 == True == 1.0."""
    if isinstance(value, (list, tuple)):
        return type(value), [typed(part) for part in value]
    if isinstance(value, dict):
        return dict, [(typed(key), typed(part)) for key, part in value.items()]
    return type(value), repr(value)


@settings(max_examples=80, deadline=None)
@given(PLAIN)
def test_plain_values_come_back_through_json_with_their_types(value: Any) -> None:
    text = json.dumps(to_plain(value, place="v"), allow_nan=False)
    assert typed(from_plain(json.loads(text), place="v")) == typed(value)


def test_infinities_and_a_scheduler_come_back_in_the_state(folder: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5, 5])
    state = {"best": math.inf, "scheduler": scheduler.state_dict()}
    save_checkpoint(folder, step=1, tensors={}, state=state)
    loaded = load_checkpoint(folder).state
    assert loaded == state
    assert type(loaded["scheduler"]["milestones"]) is Counter


@pytest.mark.parametrize(
    ("tensors", "state", "place"),
    [
        ({}, {"a": {"b": [0, torch.zeros(1)]}}, "state.a.b.1"),
        ({}, {"f": print}, "state.f"),
        ({"model": {"w": torch.eye(2).to_sparse()}}, {}, "tensors['model']['w']"),
        ({"model": {"w": torch.empty(2, device="meta")}}, {}, "tensors['model']['w']"),
        ({"../model": {}}, {}, "'../model'"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_place_before_anything_is_made(
    folder: Path, tensors: Any, state: Any, place: str
) -> None:
    with pytest.raises(UsageError) as caught:
        save_checkpoint(folder, step=1, tensors=tensors, state=state)
    assert place in str(caught.value)
    assert not folder.exists()


# --- the disk refuses


def test_too_little_free_space_is_refused_with_the_numbers_before_writing(folder: Path) -> None:
    save_checkpoint(folder, step=1, tensors={"model": {"w": torch.ones(2)}}, state={})
    # One float spread over 2**48 bytes: no disk here has them, and no memory is taken.
    huge = torch.ones(1).expand(2**46)
    with pytest.raises(EnvironmentProblem) as caught:
        save_checkpoint(folder, step=2, tensors={"model": {"w": huge}}, state={})
    assert "needed 282 TiB" in caught.value.found
    assert "free" in caught.value.found
    assert str(folder) in caught.value.found
    assert names(folder) == ["step-00000001"]


def save_with_a_small_disk(folder: Path, limit_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    with pytest.raises(EnvironmentProblem) as caught:
        save_checkpoint(folder, step=2, tensors={"model": {"w": torch.full((50_000,), 2.0)}}, state={})
    assert str(folder) in caught.value.found
    assert "needed" in caught.value.found
    assert f"{limit_bytes} bytes (ulimit -f)" in caught.value.found
    assert "ulimit -f" in caught.value.do
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EFBIG


@pytest.mark.parametrize("limit_bytes", [0, 100, 150_000])
def test_a_disk_full_in_the_middle_leaves_the_previous_checkpoint_and_nothing_else(
    folder: Path, fork: Callable[..., int], wait: Callable[..., int], limit_bytes: int
) -> None:
    save_checkpoint(folder, step=1, tensors={"model": {"w": torch.ones(50_000)}}, state={})
    assert wait(fork(lambda: save_with_a_small_disk(folder, limit_bytes))) == 0
    assert names(folder) == ["step-00000001"]
    assert torch.equal(load_checkpoint(folder).tensors["model"]["w"], torch.ones(50_000))


@pytest.mark.parametrize(
    "point",
    ["save.begun", "save.inside_file", "save.file_done", "save.files_done", "save.manifest_done",
     "save.folder_synced", "save.old_aside"],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 2], ids=["same step again", "next step"])
def test_an_error_at_any_point_before_the_rename_takes_everything_back(folder: Path, point: str, step: int) -> None:
    save_checkpoint(folder, step=1, tensors={"model": {"w": torch.ones(3)}}, state={})
    with planned(point, Action.NO_SPACE), pytest.raises(EnvironmentProblem, match="No space left"):
        save_checkpoint(folder, step=step, tensors={"model": {"w": torch.zeros(3)}}, state={})
    assert names(folder) == ["step-00000001"]
    assert torch.equal(load_checkpoint(folder, strict=True).tensors["model"]["w"], torch.ones(3))


def test_an_interrupt_while_writing_takes_everything_back(folder: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with planned("save.inside_file", Action.TERMINATE), pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, step=1, tensors={"model": {"w": torch.ones(3)}}, state={})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names(folder) == []


# --- which checkpoints stay


def save_value(folder: Path, step: int, value: float, keep: int = 2) -> None:
    save_checkpoint(folder, step=step, tensors={"model": {"w": torch.tensor([1.0, value])}}, state={}, keep=keep)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_good_checkpoints_stay_and_older_ones_go(folder: Path, keep: int) -> None:
    for step in range(1, 6):
        save_value(folder, step, 0.0, keep)
    assert names(folder) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64], ids=str)
def test_values_that_are_not_finite_never_rotate_a_healthy_checkpoint_out(
    folder: Path, bad: float, dtype: torch.dtype
) -> None:
    for step in range(1, 4):
        save_value(folder, step, 0.0)
    for step in range(4, 9):
        tensors = {"model": {"ok": torch.ones(2), "w": torch.tensor([1.0, bad]).to(dtype)}}
        save_checkpoint(folder, step=step, tensors=tensors, state={}, keep=2)
    assert names(folder) == ["step-00000002", "step-00000003", "step-00000008"]
    loaded = load_checkpoint(folder)
    assert loaded.step == 3
    (warning,) = loaded.warnings
    assert "step-00000008 holds values that are not finite (model: w)" in warning
    assert "step-00000003" in warning


def test_the_next_good_save_clears_what_was_not_finite(folder: Path) -> None:
    for step, value in [(1, 0.0), (2, 0.0), (3, math.nan), (4, 0.0)]:
        save_value(folder, step, value)
    assert names(folder) == ["step-00000002", "step-00000004"]


def test_the_same_saves_with_finite_values_do_rotate(folder: Path) -> None:
    for step in range(1, 9):
        save_value(folder, step, 0.0)
    assert names(folder) == ["step-00000007", "step-00000008"]


def test_a_not_finite_save_of_the_same_step_keeps_the_good_one(folder: Path) -> None:
    save_value(folder, 1, 5.0)
    save_value(folder, 1, math.nan)
    assert load_checkpoint(folder).tensors["model"]["w"][1] == 5.0


def test_with_nothing_but_not_finite_ones_the_newest_loads_with_a_warning(folder: Path) -> None:
    for step in (1, 2, 3):
        save_value(folder, step, math.nan)
    loaded = load_checkpoint(folder)
    assert loaded.step == 3
    assert "not finite" in loaded.warnings[0]
    assert names(folder) == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_does_not_count_as_one_to_keep(folder: Path) -> None:
    for step in (1, 2):
        save_value(folder, step, float(step))
    (folder / "step-00000002" / "model.safetensors").write_bytes(b"")
    save_value(folder, 3, 3.0)
    assert "step-00000001" in names(folder)


def test_going_back_to_an_earlier_step_sets_later_checkpoints_aside(folder: Path) -> None:
    for step in (10, 20):
        save_value(folder, step, float(step))
    save_value(folder, 15, 15.0)
    assert load_checkpoint(folder).step == 15
    (aside,) = [name for name in names(folder) if name.startswith("abandoned-")]
    assert aside.endswith("step-00000020")


def test_a_damaged_checkpoint_never_takes_the_place_of_a_sound_one_of_its_step(folder: Path) -> None:
    save_value(folder, 1, 5.0)
    shutil.copytree(folder / "step-00000001", folder / "step-00000001.replaced")
    weights = folder / "step-00000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with planned("save.old_aside", Action.NO_SPACE), pytest.raises(EnvironmentProblem):
        save_value(folder, 1, 6.0)
    assert load_checkpoint(folder).tensors["model"]["w"][1] == 5.0


def test_saving_a_step_again_gives_the_new_values(folder: Path) -> None:
    save_value(folder, 1, 1.0)
    save_value(folder, 1, 2.0)
    assert load_checkpoint(folder).tensors["model"]["w"][1] == 2.0
    assert names(folder) == ["step-00000001"]


@pytest.mark.gpu
def test_cuda_tensors_are_copied_one_at_a_time_and_come_back_bit_for_bit(folder: Path) -> None:
    weight = values(torch.float32, (64, 32)).cuda()
    saved = {"w": weight, "tied": weight, "t": weight.T, "half": weight.bfloat16(), "scalar": weight[0, 0].clone()}
    before = torch.cuda.memory_allocated()
    loaded = round_trip(folder, saved)
    assert torch.cuda.memory_allocated() == before
    for name, tensor in saved.items():
        assert same_bits(loaded[name], tensor), name


def test_a_file_that_bears_a_checkpoints_name_is_not_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "step-00000001").write_text("theirs")
    with pytest.raises(EnvironmentProblem, match="step-00000001 is no folder, and is in the way"):
        save_checkpoint(folder, step=1, tensors={"model": {}}, state={})
    assert names(folder) == ["step-00000001"] and (folder / "step-00000001").read_text() == "theirs"
