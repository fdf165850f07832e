"""What cuDNN takes for a convolution and gives back: copies with channels innermost, and parts of a weight's gradient.

The fast kernels read tensors with channels innermost, padded to whole 16 bytes. Others are copied: what is read, what
is written and, where the kernel has more than one place, the weight. The gradient of a weight is a sum over rows and
places; where its tiles are fewer than the multiprocessors it is made in parts, which are kept in float32. A pointwise
convolution is a product of matrices and needs no copies, but its weight's gradient is made row by row.

Read off recorded histories, which it meets to within a few hundred bytes in most cases and misses by up to a copy where
cuDNN's heuristics choose otherwise; ``library_calibration`` holds the constants and says on what they were fitted. The
limits below are where the recorded choices change; what lies between two recorded shapes is not known better.
"""

from __future__ import annotations

from samegrad.measure.events import Convolution
from samegrad.measure.library_calibration import LibraryCalibration

_FLOAT32_BYTES = 4
# With fewer channels than these a strided pointwise convolution reads in place.
_FEWEST_COPIED_FORWARD, _FEWEST_COPIED_BACKWARD = 128, 256
# Up to so many channels, and for sums of so many places, float32 kernels write their outputs in place.
_MOST_WRITTEN_IN_PLACE, _PLACES_WRITTEN_IN_PLACE = 64, range(19_000, 150_000)
# Up to so many channels under a small kernel, float32 is read and its weight's gradient made in place.
_MOST_READ_IN_PLACE, _SMALL_KERNEL_PIXELS = 3, 9
# Pictures of fewer places are products with channels innermost.
_FEWEST_PIXELS_IN_PLACE = 64
# Up to so many channels a pointwise weight's gradient of float32 is not made row by row.
_MOST_CHANNELS_COPIED = 32
# A pointwise weight's gradient of float32 is made row by row if that takes at most so many times the copies.
_MOST_TIMES_COPIES = 4
# A part sums over at least so many places.
_FEWEST_PLACES_OF_PART = {4: 900, 2: 6144}


def forward_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the forward."""
    # Kernels of float32 skip channels that are not there.
    padded_bytes = constants.padded_bytes if element_bytes < _FLOAT32_BYTES else element_bytes
    if _is_strided(shape) and shape.inputs < _FEWEST_COPIED_FORWARD:
        return 0
    if _is_read_in_place(shape, element_bytes):
        return 0
    writes = not (
        element_bytes == _FLOAT32_BYTES
        and shape.kernel_pixels == _SMALL_KERNEL_PIXELS
        and shape.inputs <= _MOST_WRITTEN_IN_PLACE
        and shape.rows * shape.output_pixels in _PLACES_WRITTEN_IN_PLACE
    )
    return _copies_bytes(shape, element_bytes, padded_bytes, constants, writes=writes)


def input_gradient_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the gradient by what the convolution reads."""
    if element_bytes == _FLOAT32_BYTES and _is_strided(shape) and shape.inputs < _FEWEST_COPIED_BACKWARD:
        return 0
    if shape.pointwise and shape.input_pixels < _FEWEST_PIXELS_IN_PLACE and not shape.channels_last:
        return _images_bytes(shape, element_bytes) + constants.alignment_bytes
    return _copies_bytes(shape, element_bytes, constants.padded_bytes, constants)


def weight_gradient_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The workspace of the gradient by the weight."""
    if shape.groups > 1 or _is_read_in_place(shape, element_bytes):
        return 0
    if shape.pointwise:
        return _pointwise_weight_bytes(shape, element_bytes, constants)
    copies_bytes = _copies_bytes(shape, element_bytes, constants.padded_bytes, constants)
    return copies_bytes + _parts_bytes(shape, element_bytes, constants)


def _pointwise_weight_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    by_row_bytes = shape.rows * shape.inputs * shape.outputs * _FLOAT32_BYTES
    copies_bytes = _images_bytes(shape, element_bytes) + constants.alignment_bytes
    if element_bytes < _FLOAT32_BYTES:
        return min(by_row_bytes, copies_bytes)
    # Outputs that have to be padded are copied too.
    few = shape.inputs <= _MOST_CHANNELS_COPIED or shape.outputs * element_bytes < constants.padded_bytes
    if few or by_row_bytes > _MOST_TIMES_COPIES * copies_bytes:
        return copies_bytes
    return by_row_bytes


def _parts_bytes(shape: Convolution, element_bytes: int, constants: LibraryCalibration) -> int:
    """The parts of a weight's gradient, 0 where it is made in one."""
    padded = constants.padded_bytes // element_bytes
    # Kernels of 16-bit numbers leave one multiprocessor of eleven to others.
    blocks = constants.multiprocessors
    if element_bytes < _FLOAT32_BYTES or shape.inputs < padded:
        blocks -= blocks // 11
    inputs = shape.inputs
    if inputs < padded:
        if element_bytes == _FLOAT32_BYTES and shape.input_pixels >= shape.output_pixels * shape.kernel_pixels:
            # Patches side by side are a product.
            return 0
        # Channels and places under the kernel are one side of the product; two blocks share a multiprocessor.
        inputs = padded
        parts = 2 * blocks // (_tiles_of(shape.outputs, constants) * _tiles_of(inputs * shape.kernel_pixels, constants))
    else:
        tiles = _tiles_of(shape.outputs, constants) * _tiles_of(inputs, constants) * shape.kernel_pixels
        most = shape.rows * shape.output_pixels // _FEWEST_PLACES_OF_PART[element_bytes]
        narrow = element_bytes < _FLOAT32_BYTES and inputs < constants.tile_channels
        parts = blocks // tiles if narrow else min(blocks // tiles, most)
        inputs = _in_whole_tiles(inputs, constants)
    outputs = _in_whole_tiles(shape.outputs, constants)
    return parts * inputs * outputs * shape.kernel_pixels * _FLOAT32_BYTES if parts > 1 else 0


def _is_strided(shape: Convolution) -> bool:
    """Whether it has one place under its kernel and skips others."""
    return shape.kernel_pixels == 1 and not shape.pointwise


def _is_read_in_place(shape: Convolution, element_bytes: int) -> bool:
    return (
        element_bytes == _FLOAT32_BYTES
        and shape.inputs <= _MOST_READ_IN_PLACE
        and 1 < shape.kernel_pixels <= _SMALL_KERNEL_PIXELS
    )


def _images_bytes(shape: Convolution, element_bytes: int) -> int:
    """What is read and what is written, once each."""
    return shape.rows * (shape.inputs * shape.input_pixels + shape.outputs * shape.output_pixels) * element_bytes


def _copies_bytes(
    shape: Convolution, element_bytes: int, padded_bytes: int, constants: LibraryCalibration, *, writes: bool = True
) -> int:
    """Copies with channels innermost; ``writes``: also of what is written."""
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
    copies = read + weight + (written if writes else 0)
    return copies + constants.alignment_bytes if copies else 0


def _tiles_of(channels: int, constants: LibraryCalibration) -> int:
    return -(-channels // constants.tile_channels)


def _in_whole_tiles(channels: int, constants: LibraryCalibration) -> int:
    """Channels that a part has room for: half a tile or whole ones."""
    half = constants.tile_channels // 2
    return half if channels <= half else _tiles_of(channels, constants) * constants.tile_channels
