"""What cuDNN takes for convolutions on the card at hand, over a grid of layers: forward and both gradients, each alone.

    python benchmarks/convolutions_gpu.py            measures: writes convolutions.csv, and judges it as below
    python benchmarks/convolutions_gpu.py --judge    the table that is there: writes convolutions_gpu.json

Layers are square ones with the channels and the pictures of residual networks and U-Nets. ``cudnn.benchmark`` is off,
TF32 allowed. The table of a card goes to ``src/samegrad/measure/calibration``. Judged are the rules that hold without
one, and reading every pass across from the layers of other numbers of rows; within means to a hundredth of what the
layer reads and writes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _results
import torch
from torch import Tensor

from samegrad.measure.library_calibration import calibrate_libraries
from samegrad.measure.measured_convolutions import FOLDER, Layer, MeasuredConvolutions, Pass, read_layers
from samegrad.measure.workspaces import convolution_bytes

# (kernel, stride) with channels (read, written), as residual networks and U-Nets have them.
KERNELS = {
    (3, 1): ((32, 32), (64, 64), (96, 32), (128, 128), (64, 128), (128, 256), (192, 64), (256, 256), (256, 128),
             (384, 128), (256, 512), (512, 256), (512, 512), (768, 256)),
    (3, 2): ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)),
    (1, 2): ((64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)),
    (1, 1): ((64, 3), (64, 64), (64, 256), (128, 512), (192, 64), (256, 64), (512, 128), (256, 1024), (1024, 256)),
    (7, 2): ((3, 64),),
}  # fmt: skip
SIDES = (7, 8, 14, 16, 28, 32, 56, 64, 112, 128)
ROWS = (8, 16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_BYTES = 2**30
WITHIN = 0.01
TABLE = FOLDER / "convolutions_h100.csv"


def layers() -> Iterator[Layer]:
    """Of the grid, those that fit; nothing is measured of them yet."""
    for dtype, ((kernel, stride), channels) in itertools.product(DTYPES, KERNELS.items()):
        for (inputs, outputs), side, rows in itertools.product(channels, SIDES, ROWS):
            layer = Layer(dtype, kernel, stride, inputs, outputs, side, rows, 0, 0, 0)
            most = max(inputs * side**2, outputs * layer.output_side**2)
            # Strided layers of photographs, and pictures that a kernel fits into.
            if rows * most * 4 <= MOST_BYTES and kernel <= side and (kernel < 7 or side >= 56):
                yield layer


def measured(layer: Layer) -> Layer:
    """With the bytes that each pass takes beside its result."""
    dtype = DTYPES[layer.dtype]
    x = torch.randn(layer.rows, layer.inputs, layer.side, layer.side, device="cuda").to(dtype)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel, device="cuda").to(dtype)
    how: list[Any] = [[layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], False, [0, 0], 1]
    forward, output = beside(lambda: torch.ops.aten.convolution(x, weight, None, *how))
    cotangent, backward = torch.ones_like(output), torch.ops.aten.convolution_backward
    read, _ = beside(lambda: backward(cotangent, x, weight, None, *how, [True, False, False]))
    of_weight, _ = beside(lambda: backward(cotangent, x, weight, None, *how, [False, True, False]))
    return layer._replace(forward_bytes=forward, input_gradient_bytes=read, weight_gradient_bytes=of_weight)


def beside(run: Callable[[], Any]) -> tuple[int, Tensor]:
    """Bytes that ``run`` takes and gives back beside the tensor that it returns, and that tensor."""
    run()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    [result] = [leaf for leaf in (returned if isinstance(returned, tuple) else (returned,)) if leaf is not None]
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - result.nbytes, result


def judged(table: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """The share of ``table`` that is told right, by dtype and pass: by rules, and from layers of other rows alone."""
    rules = dataclasses.replace(calibrate_libraries((9, 0), "2.11.0"), convolutions=None)
    right: dict[str, dict[str, list[bool]]] = {}
    for rows in sorted({layer.rows for layer in table}):
        left = (layer for layer in table if layer.rows != rows)
        others = MeasuredConvolutions(left, read_across=set(itertools.product((2, 4), Pass)))
        ways = {"rules": rules, "read across": dataclasses.replace(rules, convolutions=others)}
        for layer, which in itertools.product((one for one in table if one.rows == rows), Pass):
            shape, element = layer.shape, layer.element_bytes
            pictures = shape.inputs * shape.input_pixels + shape.outputs * shape.output_pixels
            for way, calibration in ways.items():
                off = abs(convolution_bytes(which, shape, element, calibration) - layer.taken_bytes(which))
                shares = right.setdefault(f"{layer.dtype} {which.name.lower()}", {}).setdefault(way, [])
                shares.append(off < WITHIN * shape.rows * pictures * element)
    return {name: {way: sum(hits) / len(hits) for way, hits in ways.items()} for name, ways in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true")
    arguments = parser.parse_args()
    path = TABLE
    if not arguments.judge:
        torch.backends.cudnn.benchmark = False
        path = Path(os.environ.get("OUT", _results.RESULTS)) / "convolutions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Layer._fields)
            writer.writerows(measured(layer) for layer in layers())
    table = read_layers(path)
    _results.write("convolutions_gpu", {"layers": len(table), "within": judged(table)})


if __name__ == "__main__":
    main()
