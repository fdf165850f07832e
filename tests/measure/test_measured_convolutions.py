"""Convolutions that were measured: looked up, read across to other rows, and left to rules where nothing tells them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from samegrad.measure.events import Convolution
from samegrad.measure.library_calibration import calibrate_libraries
from samegrad.measure.measured_convolutions import FOLDER, Layer, MeasuredConvolutions, Pass, read_layers
from samegrad.measure.workspaces import convolution_bytes

H100 = calibrate_libraries((9, 0), "2.11.0")
RULES = dataclasses.replace(H100, convolutions=None)
LAYERS = read_layers(FOLDER / "convolutions_h100.csv")


def tensors_bytes(shape: Convolution, element_bytes: int) -> int:
    read, written = shape.inputs * shape.input_pixels, shape.outputs * shape.output_pixels
    return shape.rows * (read + written) * element_bytes


def test_a_layer_that_was_measured_takes_what_it_took() -> None:
    for layer, which in itertools.product(LAYERS[::7], Pass):
        assert convolution_bytes(which, layer.shape, layer.element_bytes, H100) == layer.taken_bytes(which)


def right_of(read_across: bool, which: Pass) -> float:
    """The share of float32 layers whose workspace is right to a hundredth of their tensors, their rows left out."""
    right = []
    for rows in (8, 32, 128):
        measured = MeasuredConvolutions(layer for layer in LAYERS if layer.rows != rows) if read_across else None
        calibration = dataclasses.replace(H100, convolutions=measured)
        for layer in LAYERS:
            if layer.rows == rows and layer.dtype == "float32":
                found = convolution_bytes(which, layer.shape, 4, calibration)
                right.append(abs(found - layer.taken_bytes(which)) < 0.01 * tensors_bytes(layer.shape, 4))
    return sum(right) / len(right)


@pytest.mark.parametrize("which", [Pass.FORWARD, Pass.INPUT_GRADIENT])
def test_rows_that_were_left_out_are_told_better_than_by_rule(which: Pass) -> None:
    assert right_of(True, which) > right_of(False, which) + 0.05


def test_copies_grow_with_rows_and_the_rest_stays() -> None:
    reads, writes, weight = 64 * 28**2 * 4, 128 * 28**2 * 4, 64 * 128 * 9 * 4
    layer = Layer("float32", 3, 1, 64, 128, 28, 16, 16 * (reads + writes) + weight + 5000, 16 * reads, 0)
    measured = MeasuredConvolutions([layer])
    other = layer.shape._replace(rows=20)
    assert measured.bytes_of(Pass.FORWARD, other, 4) == 20 * (reads + writes) + weight + 5000
    assert measured.bytes_of(Pass.INPUT_GRADIENT, other, 4) == 20 * reads


@pytest.mark.parametrize(
    ("change", "element_bytes"),
    [({"channels_last": True}, 4), ({"groups": 2}, 4), ({"outputs": 120}, 4), ({"kernel_pixels": 25}, 4), ({}, 8)],
)
def test_what_no_layer_tells_is_left_to_rules(change: dict[str, int], element_bytes: int) -> None:
    assert H100.convolutions is not None
    shape = Convolution(16, 64, 128, 28**2, 28**2, 9)
    assert H100.convolutions.bytes_of(Pass.FORWARD, shape, 4) is not None
    assert H100.convolutions.bytes_of(Pass.FORWARD, shape._replace(**change), element_bytes) is None


def test_what_is_no_better_read_across_is_left_to_rules() -> None:
    shape = Convolution(20, 64, 128, 28**2, 28**2, 9)
    for which, element_bytes in ((Pass.WEIGHT_GRADIENT, 4), (Pass.FORWARD, 2)):
        found = convolution_bytes(which, shape, element_bytes, H100)
        assert found == convolution_bytes(which, shape, element_bytes, RULES)


def test_other_cards_have_rules_alone() -> None:
    assert calibrate_libraries((8, 9), "2.11.0").convolutions is None
