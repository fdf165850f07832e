"""What cuDNN takes for a convolution and gives back: copies with channels innermost, and parts of a weight's gradient.

The fast kernels read tensors with channels innermost, padded to whole 16 bytes. Others are copied: what is read, what
is written and, where the kernel has more than one place, the weight. The gradient of a weight is a sum over rows and
places; where its tiles are fewer than the multiprocessors it is made in parts, which are kept in float32. A pointwise
convolution is a product of matrices and needs no copies, but its weight's gradient is made row by row.

Read off recorded histories, which it meets to within a few hundred bytes in most cases and misses by up to a copy where
cuDNN's heuristics choose otherwise; ``library_calibration`` holds the constants and says on what they were fitted.
"""

from __future__ import annotations

from samegrad.measure.events import Convolution
from samegrad.measure.library_calibration import LibraryCalibration

_FLOAT32_BYTES = 4


def forward_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the forward."""
    # Kernels of float32 skip channels that are not there, and take every second place without a copy.
    padded_bytes = constants.padded_bytes if element_bytes < _FLOAT32_BYTES else element_bytes
    if shape.kernel_pixels == 1 and element_bytes == _FLOAT32_BYTES:
        return 0
    return _copies_bytes(shape, element_bytes, padded_bytes, constants)


def input_gradient_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the gradient by what the convolution reads."""
    return _copies_bytes(shape, element_bytes, constants.padded_bytes, constants)


def weight_gradient_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the gradient by the weight."""
    if shape.groups > 1:
        return 0
    part_bytes = shape.inputs * shape.outputs * shape.kernel_pixels * _FLOAT32_BYTES
    if shape.pointwise:
        images_bytes = shape.rows * (shape.inputs * shape.input_pixels + shape.outputs * shape.output_pixels)
        copies_bytes = images_bytes * element_bytes + constants.alignment_bytes
        return min(shape.rows * part_bytes, copies_bytes)
    parts = constants.multiprocessors // _tiles(shape, constants)
    copies_bytes = _copies_bytes(shape, element_bytes, constants.padded_bytes, constants)
    return copies_bytes + (parts * part_bytes if parts > 1 else 0)


def _copies_bytes(shape: Convolution, element_bytes: int, padded_bytes: int, constants: LibraryCalibration) -> int:
    if shape.pointwise or shape.groups > 1:
        return 0
    inputs, outputs = (
        -(-channels * element_bytes // padded_bytes) * padded_bytes for channels in (shape.inputs, shape.outputs)
    )
    read, written = shape.rows * shape.input_pixels * inputs, shape.rows * shape.output_pixels * outputs
    weight = inputs * shape.outputs * shape.kernel_pixels if shape.kernel_pixels > 1 else 0
    if shape.channels_last:
        # What lies right already is copied only to be padded.
        read, weight = (read, weight) if inputs != shape.inputs * element_bytes else (0, 0)
        written = written if outputs != shape.outputs * element_bytes else 0
    copies = read + written + weight
    return copies + constants.alignment_bytes if copies else 0


def _tiles(shape: Convolution, constants: LibraryCalibration) -> int:
    """Tiles of the matrices that a weight's gradient is, one for each place under the kernel."""
    tile = constants.tile_channels
    return -(-shape.outputs // tile) * -(-shape.inputs // tile) * shape.kernel_pixels
