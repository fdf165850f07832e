"""What cuDNN takes for convolutions on the card at hand, over a grid of shapes: forward and both gradients, each alone.

    python benchmarks/convolutions_gpu.py         writes convolutions_gpu.json

Beside each stands what ``measure/convolution_workspaces.py`` says of it, so that a rule can be read off, and judged by
shapes that it was not read off. ``cudnn.benchmark`` is off.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _results
import torch
from torch import Tensor

from samegrad.measure.convolution_workspaces import forward_bytes, input_gradient_bytes, weight_gradient_bytes
from samegrad.measure.events import Convolution
from samegrad.measure.library_calibration import calibrate_libraries

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
PASSES = ("forward", "input_gradient", "weight_gradient")


class Layer(NamedTuple):
    """A convolution of ``rows`` squares of ``side`` places, padded to keep their size."""

    dtype: str
    rows: int
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int

    @property
    def output_side(self) -> int:
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def shape(self) -> Convolution:
        pointwise = self.kernel == 1 and self.stride == 1
        return Convolution(
            self.rows, self.inputs, self.outputs, self.side**2, self.output_side**2, self.kernel**2, 1, pointwise
        )


def layers() -> Iterator[Layer]:
    for dtype, ((kernel, stride), channels) in itertools.product(DTYPES, KERNELS.items()):
        for (inputs, outputs), side, rows in itertools.product(channels, SIDES, ROWS):
            layer = Layer(dtype, rows, inputs, outputs, side, kernel, stride)
            most = max(inputs * side**2, outputs * layer.output_side**2)
            # Strided layers of photographs, and pictures that a kernel fits into.
            if rows * most * 4 <= MOST_BYTES and kernel <= side and (kernel < 7 or side >= 56):
                yield layer


def recorded(layer: Layer) -> dict[str, int]:
    """Bytes that each pass takes beside its result."""
    dtype, padding = DTYPES[layer.dtype], layer.kernel // 2
    x = torch.randn(layer.rows, layer.inputs, layer.side, layer.side, device="cuda").to(dtype)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel, device="cuda").to(dtype)
    how: list[Any] = [[layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1]
    found, output = beside(lambda: torch.ops.aten.convolution(x, weight, None, *how))
    cotangent = torch.ones_like(output)
    taken = {"forward": found}
    backward = torch.ops.aten.convolution_backward
    for name, wanted in (("input_gradient", [True, False, False]), ("weight_gradient", [False, True, False])):
        taken[name], _ = beside(lambda wanted=wanted: backward(cotangent, x, weight, None, *how, wanted))
    return taken


def beside(run: Callable[[], Any]) -> tuple[int, Tensor]:
    """Bytes that ``run`` takes and gives back beside the tensor that it returns, and that tensor."""
    run()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    [result] = [leaf for leaf in (returned if isinstance(returned, tuple) else (returned,)) if leaf is not None]
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - result.nbytes, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.backends.cudnn.benchmark = False
    constants = calibrate_libraries(torch.cuda.get_device_capability(), torch.__version__)
    modelled = dict(zip(PASSES, (forward_bytes, input_gradient_bytes, weight_gradient_bytes)))
    rows, off = [], {name: list[float]() for name in PASSES}
    for layer in layers():
        taken, element = recorded(layer), DTYPES[layer.dtype].itemsize
        said = {name: modelled[name](layer.shape, element, constants) for name in PASSES}
        # Of the tensors it reads and writes: what a peak is made of.
        shape = layer.shape
        tensors = shape.rows * (shape.inputs * shape.input_pixels + shape.outputs * shape.output_pixels) * element
        for name in PASSES:
            off[name].append(abs(said[name] - taken[name]) / tensors)
        rows.append(" ".join(map(str, (*layer, *taken.values(), *said.values()))))
    figures = {
        name: {"median": statistics.median(errors), "within_1_percent": sum(e < 0.01 for e in errors) / len(errors)}
        for name, errors in off.items()
    }
    columns = [*Layer._fields, *(f"{name}_bytes" for name in PASSES), *(f"{name}_modelled_bytes" for name in PASSES)]
    _results.write("convolutions_gpu", {"cudnn": torch.backends.cudnn.version(), "off": figures,
                                        "columns": columns, "layers": rows}, quiet=True)  # fmt: skip
    print(len(rows), "layers;", figures)


if __name__ == "__main__":
    main()
