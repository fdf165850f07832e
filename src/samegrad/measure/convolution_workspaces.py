"""What cuDNN takes for a convolution and gives back: copies with channels innermost, and parts of a weight's gradient.

The fast kernels read tensors with channels innermost. Others are copied: what is read, what is written and, where the
kernel has more than one place, the weight, all with the channels of 16-bit tensors padded. The gradient of a weight is
a sum over rows and places; where its tiles are fewer than the multiprocessors it is made in parts, kept in float32.
Read off recorded histories; ``library_calibration`` holds the constants and says on what they were fitted.
"""

from __future__ import annotations

from samegrad.measure.events import Convolution
from samegrad.measure.library_calibration import ConvolutionCalibration

_FLOAT32_BYTES = 4
_SMALL_TILE, _LARGE_TILE = 64, 128


def forward_bytes(shape: Convolution, element_bytes: int, constants: ConvolutionCalibration) -> int:
    """The workspace of the forward."""
    return _copies_bytes(shape, element_bytes, constants)


def input_gradient_bytes(shape: Convolution, element_bytes: int, constants: ConvolutionCalibration) -> int:
    """The workspace of the gradient by what the convolution reads."""
    return _copies_bytes(shape, element_bytes, constants)


def weight_gradient_bytes(shape: Convolution, element_bytes: int, constants: ConvolutionCalibration) -> int:
    """The workspace of the gradient by the weight."""
    weight = _weight_elements(shape)
    if shape.pointwise and shape.groups == 1:
        splits = dict(constants.pointwise_splits).get(element_bytes, 0)
        parts_bytes = splits * weight * _FLOAT32_BYTES
        if parts_bytes <= constants.largest_pointwise_bytes:
            return parts_bytes
        return _image_copies_bytes(shape, element_bytes, constants)
    if shape.groups > 1:
        return 0
    splits = constants.multiprocessors // _tiles(shape)
    parts_bytes = splits * weight * _FLOAT32_BYTES if splits > 1 else 0
    return _copies_bytes(shape, element_bytes, constants) + parts_bytes


def _copies_bytes(shape: Convolution, element_bytes: int, constants: ConvolutionCalibration) -> int:
    if shape.channels_last or shape.pointwise or shape.groups > 1:
        return 0
    weight = 0
    if shape.kernel_pixels > 1:
        weight = _padded(shape.inputs, element_bytes, constants) * shape.outputs * shape.kernel_pixels
    return _image_copies_bytes(shape, element_bytes, constants) + weight * element_bytes


def _image_copies_bytes(shape: Convolution, element_bytes: int, constants: ConvolutionCalibration) -> int:
    if shape.channels_last:
        return 0
    read = _padded(shape.inputs, element_bytes, constants) * shape.input_pixels
    written = _padded(shape.outputs, element_bytes, constants) * shape.output_pixels
    return shape.rows * (read + written) * element_bytes + constants.alignment_bytes


def _padded(channels: int, element_bytes: int, constants: ConvolutionCalibration) -> int:
    multiple = constants.channel_multiple_16_bit if element_bytes == 2 else 1
    return -(-channels // multiple) * multiple


def _weight_elements(shape: Convolution) -> int:
    return shape.inputs * shape.outputs * shape.kernel_pixels // shape.groups


def _tiles(shape: Convolution) -> int:
    """Tiles of the matrix that a weight's gradient is: outputs by inputs and places under the kernel."""
    tile = _SMALL_TILE if shape.outputs <= _SMALL_TILE else _LARGE_TILE
    return -(-shape.outputs // tile) * -(-shape.inputs * shape.kernel_pixels // tile)
