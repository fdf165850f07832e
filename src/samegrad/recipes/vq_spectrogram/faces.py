"""Pictures of faces against pictures of other things, as clips of one patch: a check on real data. Plain numpy.

scikit-image ships 100 faces (of Labelled Faces in the Wild) and 100 squares cut from backgrounds, 25 x 25 grey pixels.
A face is normal. Brightness and contrast are taken out of every picture, so that neither tells one from the other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .data import BANDS, HeldClips, clip_of

MACHINE_TYPE = "faces"
FACES, TRAIN_FACES = 100, 70


def face_clips(split: str) -> HeldClips:
    """(64, 64) pictures, their lowest row first as mel bands are: 70 faces to train on; 30 and 100 others to judge by.

    Raises ModuleNotFoundError without scikit-image, FileNotFoundError where it does not ship the pictures.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    path = Path(spec.submodule_search_locations[0]) / "data" / "lfw_subset.npy"
    if not path.is_file():
        raise FileNotFoundError(f"scikit-image does not ship {path.name} in {path.parent}")
    pictures = np.load(path)
    pictures = pictures - pictures.mean(axis=(1, 2), keepdims=True)
    pictures = pictures / pictures.std(axis=(1, 2), keepdims=True)
    larger = F.interpolate(
        torch.from_numpy(pictures).float().unsqueeze(1), size=(BANDS, BANDS), mode="bilinear", align_corners=False
    ).numpy()
    if split == "train":
        chosen = range(TRAIN_FACES)
    else:
        chosen = range(TRAIN_FACES, len(pictures))
    names = [f"{'normal' if i < FACES else 'anomaly'}_id_00_{i:08d}" for i in chosen]
    return HeldClips([clip_of(name, MACHINE_TYPE) for name in names], [larger[i, 0, ::-1].copy() for i in chosen])
