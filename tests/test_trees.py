"""Nested batches: which leaves carry rows, and how they are cut, joined and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samegrad import trees
from samegrad.errors import BadInput, UsageError


class Pair(NamedTuple):
    images: Tensor
    labels: Tensor


class Rows:
    """Rows that are no tensor yet."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape, self.dtype = tuple(data.shape), data.dtype

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.data[start:stop]


X, Y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
NESTED: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "mapping": {"x": X, "labels": Y},
    "named tuple": Pair(X, Y),
    "nested": {"views": [X, (X + 1, Y)], "meta": {"temperature": 0.5, "name": "a"}},
    "with a shared leaf": (X, torch.eye(3)),
    "row source": (Rows(X), Y),
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves_of(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", NESTED)
def test_cut_and_joined_again_a_batch_is_itself(name: str) -> None:
    batch = NESTED[name]
    layout = trees.find_rows(batch)
    assert layout.rows == 7
    parts = [trees.slice_rows(batch, layout, start, stop) for start, stop in ((0, 3), (3, 6), (6, 7))]
    whole = trees.slice_rows(batch, layout, 0, 7)
    for axis, *pieces, expected in zip(layout.axes, *map(trees.leaves_of, parts), trees.leaves_of(whole)):
        if axis is None:
            assert all(piece is expected for piece in pieces)
        else:
            assert torch.equal(torch.cat(pieces, axis), expected)


@pytest.mark.parametrize("name", NESTED)
def test_a_part_is_nested_as_the_batch_is(name: str) -> None:
    batch = NESTED[name]
    part = trees.slice_rows(batch, trees.find_rows(batch), 1, 2)
    assert type(part) is type(batch)
    if isinstance(batch, Mapping):
        assert part.keys() == batch.keys()


def test_a_leaf_of_another_length_is_shared_by_every_chunk() -> None:
    shared = torch.eye(3)
    layout = trees.find_rows((X, shared, 2.0))
    assert layout.axes == (0, None, None)
    assert trees.slice_rows((X, shared, 2.0), layout, 0, 2)[1] is shared


def test_scalars_and_objects_are_never_rows() -> None:
    assert trees.find_rows((torch.tensor(3.0), "text", None, X)).axes == (None, None, None, 0)


def test_one_axis_for_all_leaves() -> None:
    layout = trees.find_rows((X.T, X.T + 1), batch_axes=1)
    assert layout.rows == 7 and layout.axes == (1, 1)
    assert torch.equal(trees.slice_rows((X.T, X.T), layout, 2, 4)[0], X.T[:, 2:4])


def test_axes_may_be_a_prefix_of_the_nesting() -> None:
    batch = ({"a": X, "b": X + 1}, torch.arange(7.0))
    layout = trees.find_rows(batch, batch_axes=(0, None))
    assert layout.axes == (0, 0, None)


def test_a_shared_leaf_with_as_many_entries_as_rows_is_cut_only_without_axes() -> None:
    batch = (X, torch.arange(7.0))
    assert trees.find_rows(batch).axes == (0, 0)
    assert trees.find_rows(batch, batch_axes=(0, None)).axes == (0, None)


def test_axes_that_disagree_in_length_name_the_leaf() -> None:
    with pytest.raises(BadInput, match=r"batch\['y'\] has 6 rows.*7"):
        trees.find_rows({"x": X, "y": Y[:6]}, batch_axes={"x": 0, "y": 0})


def test_axes_nested_otherwise_are_refused_with_the_batch_paths() -> None:
    with pytest.raises(UsageError, match=r"batch\[0\], batch\[1\]"):
        trees.find_rows((X, Y), batch_axes={"x": 0})


@pytest.mark.parametrize("leaf", [torch.tensor(1.0), 3, "text"])
def test_rows_on_a_leaf_that_has_no_such_axis_name_the_leaf(leaf: Any) -> None:
    with pytest.raises(UsageError, match=r"axis 0 of batch\[1\]"):
        trees.find_rows((X, leaf), batch_axes=(0, 0))


def test_a_batch_without_rows_names_every_leaf() -> None:
    with pytest.raises(BadInput, match=r"batch\['a'\] is a int.*batch\['b'\] is Tensor\(\)"):
        trees.find_rows({"a": 1, "b": torch.tensor(1.0)})


def test_an_empty_batch_is_refused_by_its_leaf() -> None:
    with pytest.raises(BadInput, match=r"batch\[0\] has no rows"):
        trees.find_rows((X[:0], Y[:0]))


def test_the_signature_leaves_out_the_row_count_only() -> None:
    def signature(batch: Any, **axes: Any) -> str:
        return trees.find_rows(batch, **axes).signature(batch)

    assert signature((X, Y)) == signature((X[:3], Y[:3]))
    others = [(X.double(), Y), (X[:, :1], Y), [X, Y, Y], {"x": X, "y": Y}, (X, 1.0), (X, torch.eye(3))]
    assert len({signature(b) for b in [(X, Y), *others]}) == len(others) + 1
    assert signature((X, Y), batch_axes=(0, None)) != signature((X, Y))


def test_parts_are_views_without_a_graph() -> None:
    leaf = X.clone().requires_grad_()
    [part] = tensors(trees.slice_rows(leaf, trees.find_rows(leaf), 2, 4))
    assert not part.requires_grad and part.untyped_storage()._cdata == leaf.untyped_storage()._cdata


def test_rows_are_taken_in_any_order() -> None:
    layout = trees.find_rows(NESTED["row source"])
    x, y = trees.take_rows(NESTED["row source"], layout, [5, 0, 5])
    assert torch.equal(x, X[[5, 0, 5]]) and torch.equal(y, Y[[5, 0, 5]])


def test_a_tensor_is_no_row_source_and_a_reader_is() -> None:
    assert trees.is_row_source(Rows(X)) and not trees.is_row_source(X) and not trees.is_row_source([1, 2])


def test_storage_is_counted_once_for_tied_and_overlapping_tensors() -> None:
    base = torch.zeros(10, dtype=torch.float64)
    assert trees.storage_bytes([base, base[2:], base.view(2, 5), base.detach()]) == 80
    assert trees.storage_bytes([base, base.clone()]) == 160


def test_a_row_is_counted_over_all_row_leaves() -> None:
    batch = (X.T.double(), Y, torch.eye(3))
    layout = trees.find_rows(batch, batch_axes=(1, 0, None))
    assert trees.row_bytes(batch, layout) == 2 * 8 + 8


@given(st.integers(1, 200), st.integers(1, 250))
def test_even_sizes_add_up_and_only_the_last_is_shorter(batch_rows: int, rows: int) -> None:
    sizes = trees.even_sizes(batch_rows, rows)
    assert sum(sizes) == batch_rows
    assert all(size == min(rows, batch_rows) for size in sizes[:-1]) and 1 <= sizes[-1] <= rows


def test_moving_copies_no_leaf_that_is_there_already() -> None:
    moved = trees.move((X, "text"), torch.device("cpu"))
    assert moved[0] is X and moved[1] == "text"
