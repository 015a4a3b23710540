"""The datasets of the papers, and a few more, in the layout in which their owners publish them.

A recipe says which files are images and which their masks, what the masks' values mean, and who trains and who tests.
Patterns are regular expressions of a file's whole name below the folder, capitals or not. A mask belongs to the
image that has the same text in the groups that both patterns name. A new dataset is one more entry of `RECIPES`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cheaplunch.data.conventions.arrays import array_cases
from cheaplunch.data.conventions.classes import classes_file
from cheaplunch.data.conventions.pairs import channels_of, is_plain
from cheaplunch.data.dataset import Case, Dataset, Folder, make_dataset
from cheaplunch.data.labels import Drawings, Ellipse, LabelFiles, Levels, Numbers, Polygons, Rule, SlicePictures
from cheaplunch.data.outlines import read_polygons
from cheaplunch.errors import UserError

ANYWHERE = r"(?:.*/)?"  # the owners' folder may be given, or one above it
PICTURE = r"\.(?:png|jpe?g|tiff?|bmp)"
NIFTI = r"\.nii(?:\.gz)?"

SYNAPSE = {  # TransUNet's numbers
    "aorta": 1,
    "gallbladder": 2,
    "left kidney": 3,
    "right kidney": 4,
    "liver": 5,
    "pancreas": 6,
    "spleen": 7,
    "stomach": 8,
}
BTCV = {**SYNAPSE, "esophagus": 9, "inferior vena cava": 10, "portal and splenic veins": 11, "adrenal glands": 12}
BTCV_TO_SYNAPSE = ((8, 1), (4, 2), (3, 3), (2, 4), (6, 5), (11, 6), (1, 7), (7, 8))
BTCV_TO_OURS = (*BTCV_TO_SYNAPSE, (5, 9), (9, 10), (10, 11), (12, 12), (13, 12))  # MSA has both adrenal glands in one
TRANSUNET_TEST = r"00(?:01|02|03|04|08|22|25|29|32|35|36|38)"
AMOS = {
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior vena cava": 9,
    "pancreas": 10,
    "right adrenal gland": 11,
    "left adrenal gland": 12,
    "duodenum": 13,
    "bladder": 14,
    "prostate/uterus": 15,
}
DISC_AND_CUP = {"disc": (1, 2), "cup": (2,)}  # the disc includes the cup

Found = tuple[list[Case], tuple[str, ...]]  # the cases, and what is left out


@dataclass(frozen=True)
class Recipe:
    name: str
    title: str
    image: str
    labels: Mapping[str, int] = field(default_factory=dict)
    mask: str | None = None  # None: the dataset has none
    rule: Rule = Numbers()
    channels: tuple[str, ...] | None = None  # None: as many as the first image has
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    window: tuple[float, float] | None = None
    id: str = "{id}"
    patient: str = "{id}"
    test: str | None = None  # images that test; without any, it is by patient
    split: str = ""  # the rule of `test` in words
    gather: Callable[[Recipe, Folder], Found] | None = None  # where pairs of names do not say it
    citation: str = ""
    license: str = "see the owners' page"
    how: str = ""  # where the owners give it


def find_recipe(folder: Folder) -> Dataset | None:
    """The dataset by the first recipe that some images, with masks where the recipe has them, follow."""
    for recipe in RECIPES:
        if not folder.might_have(recipe.image) or (not recipe.labels and is_plain(folder)):
            continue  # names like those of unlabelled images, with masks beside them, are somebody's own
        cases, left_out = (recipe.gather or pair_up)(recipe, folder)
        if cases:
            return _dataset(recipe, folder, cases, left_out)
    return None


def pair_up(recipe: Recipe, folder: Folder) -> Found:
    """Images with the masks that share their groups; those without are left out where others have some."""
    masks: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    compiled = re.compile(recipe.mask or "", re.IGNORECASE)
    shared = [group for group in compiled.groupindex if group in re.compile(recipe.image).groupindex]
    if recipe.mask:
        for match in folder.find(recipe.mask):
            masks[tuple(match[group].lower() for group in shared)].append(folder.root / match[0])
        if not masks:
            return [], ()
    cases, without = [], []
    for match in folder.find(recipe.image):
        groups = {name: text or "" for name, text in match.groupdict().items()}
        path, id_ = folder.root / match[0], recipe.id.format(**groups)
        found = masks.get(tuple(groups[group].lower() for group in shared), []) if recipe.mask else []
        if recipe.mask and not found:
            without.append(match[0])
            continue
        if len(found) > 1 and not isinstance(recipe.rule, Drawings):
            raise UserError(f"{found[0]} and {found[1]} are both masks of {match[0]}: keep one")
        label = LabelFiles(tuple(found), recipe.rule) if found else None
        side = "test" if recipe.test and re.fullmatch(recipe.test, match[0], re.IGNORECASE) else "train"
        cases.append(Case(id_, (path,), label, side, recipe.patient.format(**groups)))
    left_out = (f"{len(without)} images without masks, {without[0]} first",) if without and cases else ()
    return cases, left_out


def _dataset(recipe: Recipe, folder: Folder, cases: list[Case], left_out: tuple[str, ...]) -> Dataset:
    sides = {case.split for case in cases}
    if not recipe.labels:
        rule = "no image is labelled: all train, none tests"
    else:
        rule = recipe.split if sides == {"train", "test"} else None
    return make_dataset(
        folder.root,
        cases=cases,
        labels=dict(recipe.labels),
        channel_names=recipe.channels or channels_of(cases[0].images[0]),
        split_rule=rule,
        name=recipe.title,
        layout=recipe.name,
        why=f"{len(cases)} images are named as in {recipe.title}, {_below(cases[0].images[0], folder)} first",
        regions=dict(recipe.regions),
        window=recipe.window,
        left_out=left_out,
        license=recipe.license,
        citation=recipe.citation,
    )


def _below(path: Path, folder: Folder) -> str:
    return path.relative_to(folder.root).as_posix()


# --- what names alone do not say -------------------------------------------------------------------------------------


def _synapse(recipe: Recipe, folder: Folder) -> Found:
    """Not where a classes.csv says that the numbers mean something else, as SAMed's own script has them."""
    return (array_cases(folder), ()) if classes_file(folder.root) is None else ([], ())


def _amos(recipe: Recipe, folder: Folder) -> Found:
    """CT, or MRI where that is all: one window does not fit both. Numbers up to 500 are CT."""
    cases, left_out = pair_up(recipe, folder)
    ct = [case for case in cases if int(case.id.rpartition("_")[2]) <= 500]
    if not ct or len(ct) == len(cases):
        return cases, left_out
    return ct, (*left_out, f"{len(cases) - len(ct)} MRI scans (amos_0507 and on): put them into a folder of their own")


def _tn_scui(recipe: Recipe, folder: Folder) -> Found:
    """Many folders have image/1.png and mask/1.png; these are below one of the challenge's name."""
    named = any("tnscui" in part.lower() for part in (str(folder.root.resolve()), *folder.files[:1]))
    return pair_up(recipe, folder) if named else ([], ())


def _ddti(recipe: Recipe, folder: Folder) -> Found:
    """Without the images that nobody marked, and those whose marks are cut off in the owners' files."""
    cases, left_out = pair_up(recipe, folder)
    good, bad = [], []
    for case in cases:
        try:
            marked = case.label is not None and read_polygons(case.label.paths[0], case.id.rpartition("_")[2])
        except UserError:
            marked = None
        (good if marked else bad).append(case)
    if bad and good:
        left_out += (f"{len(bad)} images without a whole outline in their XML file, {bad[0].id} first",)
    return good, left_out


def _chaos(recipe: Recipe, folder: Folder) -> Found:
    """A case a series folder: the pictures in Ground/ are its slices' masks."""
    series: dict[str, tuple[str, str]] = {}
    for match in folder.find(recipe.image):
        series.setdefault(match["series"], (match["ground"], match["id"]))
    pictures: dict[str, list[Path]] = defaultdict(list)
    for match in folder.find(recipe.mask or ""):
        pictures[match["ground"]].append(folder.root / match[0])
    cases = []
    for place, (ground, id_) in series.items():
        found = pictures.get(ground, [])
        if found:
            label = LabelFiles(tuple(found), recipe.rule)
            cases.append(Case(recipe.id.format(id=id_), (folder.root / place,), label, "train", id_))
    missing = len(series) - len(cases)
    left_out = (f"{missing} series without pictures in Ground",) if missing and cases else ()
    if cases and "MR" in recipe.title and folder.might_have(_CHAOS_CT):
        left_out += ("the CT scans: give the folder CT itself for them",)
    return cases, left_out


_CHAOS_CT = rf"(?P<series>(?P<ground>{ANYWHERE}(?P<id>\d+)/)DICOM_anon)/[^/]+\.dcm"
_CHAOS_MR = rf"(?P<series>(?P<ground>{ANYWHERE}(?P<id>\d+)/T2SPIR/)DICOM_anon)/[^/]+\.dcm"
_GROUND = rf"(?P<ground>{ANYWHERE})Ground/[^/]+\.png"
_CHAOS_CITATION = "Kavur et al., CHAOS Challenge, Medical Image Analysis 69, 101950 (2021)"

# --- the table -------------------------------------------------------------------------------------------------------

RECIPES = (
    Recipe(
        "synapse",
        "Synapse multi-organ CT (TransUNet's slices)",
        image=rf"{ANYWHERE}(?:train_npz/case\d{{4}}_slice\d+\.npz|test_vol_h5/case\d{{4}}\.npy\.h5)",
        labels=SYNAPSE,
        channels=("CT",),
        window=(0.0, 1.0),  # clipped to [-125, 275] HU and scaled before it was published
        split="TransUNet's 18 training and 12 test cases: train_npz trains and test_vol_h5 tests",
        gather=_synapse,
        citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault (2015); "
        "slices: Chen et al., TransUNet, arXiv 2102.04306 (2021)",
        how="by request, as the README of github.com/Beckschen/TransUNet says",
    ),
    Recipe(
        "btcv",
        "Synapse multi-organ CT (BTCV, raw)",
        image=rf"{ANYWHERE}img/img(?P<id>\d{{4}}){NIFTI}",
        mask=rf"{ANYWHERE}label/label(?P<id>\d{{4}}){NIFTI}",
        rule=Numbers(BTCV_TO_OURS),
        labels=BTCV,
        channels=("CT",),
        window=(-125.0, 275.0),
        id="case{id}",
        test=rf"{ANYWHERE}img{TRANSUNET_TEST}{NIFTI}",
        split="TransUNet's 12 test cases test and the others train",
        citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault (2015)",
        how="synapse.org, syn3193805: Abdomen/RawData.zip",
    ),
    Recipe(
        "brats2021",
        "BraTS 2021",
        image=rf"{ANYWHERE}(?P<id>BraTS2021_\d{{5}})_flair{NIFTI}",
        mask=rf"{ANYWHERE}(?P<id>BraTS2021_\d{{5}})_seg{NIFTI}",
        rule=Numbers(((2, 1), (4, 1))),  # whole tumour: necrosis 1, oedema 2, enhancing tumour 4
        labels={"tumour": 1},
        channels=("FLAIR",),
        citation="Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 Benchmark, arXiv 2107.02314 (2021)",
        how="synapse.org, syn25829067 (BraTS 2021)",
    ),
    Recipe(
        "brats2018",
        "BraTS 2018",
        image=rf"{ANYWHERE}(?:HGG|LGG)/(?P<id>[^/]+)/(?P=id)_flair{NIFTI}",
        mask=rf"{ANYWHERE}(?:HGG|LGG)/(?P<id>[^/]+)/(?P=id)_seg{NIFTI}",
        rule=Numbers(((2, 1), (4, 1))),
        labels={"tumour": 1},
        channels=("FLAIR",),
        citation="Menze et al., IEEE TMI 34(10) (2015); Bakas et al., arXiv 1811.02629 (2018)",
        how="med.upenn.edu/sbia/brats2018 (CBICA Image Processing Portal)",
    ),
    Recipe(
        "amos",
        "AMOS 2022",
        image=rf"{ANYWHERE}images(?P<side>Tr|Va|Ts)/(?P<id>amos_\d{{4}}){NIFTI}",
        mask=rf"{ANYWHERE}labels(?P<side>Tr|Va|Ts)/(?P<id>amos_\d{{4}}){NIFTI}",
        labels=AMOS,
        channels=("CT",),
        test=rf"{ANYWHERE}images(?:Va|Ts)/.*",
        split="imagesTr trains and imagesVa tests, and imagesTs where it has labels",
        gather=_amos,
        citation="Ji et al., AMOS: A Large-Scale Abdominal Multi-Organ Benchmark, NeurIPS Datasets (2022)",
        license="CC BY 4.0",
        how="zenodo.org/records/7262581 (amos22.zip)",
    ),
    Recipe(
        "refuge",
        "REFUGE",
        image=rf"{ANYWHERE}(?P<id>[gnVT]\d{{4}})\.jpg",
        mask=rf"{ANYWHERE}Disc_Cup_Masks/{ANYWHERE}(?P<id>[gnVT]\d{{4}})\.bmp",
        rule=Levels(((0, 2), (128, 1), (255, 0))),
        labels={"rim": 1, "cup": 2},
        regions=DISC_AND_CUP,
        channels=("red", "green", "blue"),
        test=rf"{ANYWHERE}T\d{{4}}\.jpg",
        split="the test images (T0001 and on) test; the training and the validation images train",
        citation="Orlando et al., REFUGE Challenge, Medical Image Analysis 59, 101570 (2020)",
        how="refuge.grand-challenge.org: Training400, Validation400, Test400 and their annotations",
    ),
    Recipe(
        "riga",
        "RIGA",
        image=rf"{ANYWHERE}(?P<set>BinRushed(?:1-Corrected|[2-4])|Magrabi\w+|MESSIDOR)/(?P<id>image\d+)prime{PICTURE}",
        mask=rf"{ANYWHERE}(?P<set>BinRushed(?:1-Corrected|[2-4])|Magrabi\w+|MESSIDOR)/(?P<id>image\d+)-\d{PICTURE}",
        rule=Drawings(),
        labels={"rim": 1, "cup": 2},
        regions=DISC_AND_CUP,
        channels=("red", "green", "blue"),
        id="{set}_{id}",
        patient="{set}_{id}",
        test=rf"{ANYWHERE}Magrabi\w+/[^/]+",
        split="Magrabia tests, BinRushed and MESSIDOR train",
        citation="Almazroa et al., Retinal fundus images for glaucoma analysis: the RIGA dataset, Proc. SPIE (2018)",
        how="deepblue.lib.umich.edu/data/concern/data_sets/3b591905z",
    ),
    Recipe(
        "tn-scui",
        "TN-SCUI 2020",
        image=rf"{ANYWHERE}image/(?P<id>\d+)\.png",
        mask=rf"{ANYWHERE}mask/(?P<id>\d+)\.png",
        gather=_tn_scui,
        rule=Numbers(((255, 1),)),
        labels={"nodule": 1},
        citation="Zhou et al., Thyroid Nodule Segmentation and Classification in Ultrasound Images (TN-SCUI 2020)",
        how="tn-scui2020.grand-challenge.org, by request",
    ),
    Recipe(
        "ddti",
        "DDTI",
        image=rf"{ANYWHERE}(?P<patient>\d+)_(?P<id>\d+)\.(?:jpg|png)",
        mask=rf"{ANYWHERE}(?P<patient>\d+)\.xml",
        rule=Polygons(),
        labels={"nodule": 1},
        id="{patient}_{id}",
        patient="{patient}",
        gather=_ddti,
        citation="Pedraza et al., An open access thyroid ultrasound image database, Proc. SPIE 9287 (2015)",
        how="kaggle.com/datasets/dasmehdixtr/ddti-thyroid-ultrasound-images (the owners: cimalab.unal.edu.co)",
    ),
    Recipe(
        "isic",
        "ISIC lesion segmentation",
        image=rf"{ANYWHERE}(?P<id>ISIC_\d{{7}})\.jpg",
        mask=rf"{ANYWHERE}(?P<id>ISIC_\d{{7}})_segmentation\.png",
        rule=Numbers(((255, 1),)),
        labels={"lesion": 1},
        channels=("red", "green", "blue"),
        test=rf"{ANYWHERE}[^/]*Test[^/]*/[^/]+",
        split="the folders of the challenge's test set test, training and validation train",
        citation="Codella et al., Skin Lesion Analysis Toward Melanoma Detection 2018, arXiv 1902.03368 (2019)",
        how="challenge.isic-archive.com/data/#2018, task 1: Input and GroundTruth",
    ),
    Recipe(
        "lgg",
        "LGG MRI segmentation (kaggle_3m)",
        image=rf"{ANYWHERE}(?P<patient>TCGA_\w{{2}}_\w{{4}}_\d{{8}})/(?P<id>(?P=patient)_\d+)\.tif",
        mask=rf"{ANYWHERE}(?P<patient>TCGA_\w{{2}}_\w{{4}}_\d{{8}})/(?P<id>(?P=patient)_\d+)_mask\.tif",
        rule=Numbers(((255, 1),)),
        labels={"tumour": 1},
        channels=("pre-contrast", "FLAIR", "post-contrast"),
        patient="{patient}",
        citation="Buda et al., Computers in Biology and Medicine 109 (2019); TCGA-LGG",
        license="CC BY-NC-SA 4.0",
        how="kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation",
    ),
    Recipe(
        "acdc",
        "ACDC",
        image=rf"{ANYWHERE}(?P<patient>patient\d{{3}})/(?P<id>(?P=patient)_frame\d+){NIFTI}",
        mask=rf"{ANYWHERE}(?P<patient>patient\d{{3}})/(?P<id>(?P=patient)_frame\d+)_gt{NIFTI}",
        labels={"right ventricle": 1, "myocardium": 2, "left ventricle": 3},
        channels=("MRI",),
        patient="{patient}",
        test=rf"{ANYWHERE}testing/.*",
        split="testing tests and training trains, as the folder has it",
        citation="Bernard et al., IEEE TMI 37(11), 2514 (2018)",
        how="humanheart-project.creatis.insa-lyon.fr/database",
    ),
    Recipe(
        "hc18",
        "HC18",
        image=rf"{ANYWHERE}(?P<patient>\d{{3}})_(?P<id>\d?HC)\.png",
        mask=rf"{ANYWHERE}(?P<patient>\d{{3}})_(?P<id>\d?HC)_Annotation\.png",
        rule=Ellipse(),
        labels={"head": 1},
        id="{patient}_{id}",
        patient="{patient}",
        citation="van den Heuvel et al., PLoS ONE 13(8), e0200412 (2018)",
        license="CC BY 4.0",
        how="zenodo.org/records/1327317",
    ),
    Recipe(
        "chaos-mr",
        "CHAOS MR (T2-SPIR)",
        image=_CHAOS_MR,
        mask=_GROUND,
        rule=SlicePictures(Levels(((0, 0), (63, 1), (126, 2), (189, 3), (252, 4)))),
        labels={"liver": 1, "right kidney": 2, "left kidney": 3, "spleen": 4},
        channels=("MRI",),
        id="mr_{id}",
        gather=_chaos,
        citation=_CHAOS_CITATION,
        license="CC BY-NC-SA 4.0",
        how="zenodo.org/records/3431873 (CHAOS_Train_Sets.zip)",
    ),
    Recipe(
        "chaos-ct",
        "CHAOS CT",
        image=_CHAOS_CT,
        mask=_GROUND,
        rule=SlicePictures(Levels(((0, 0), (1, 1), (255, 1)))),
        labels={"liver": 1},
        channels=("CT",),
        id="ct_{id}",
        gather=_chaos,
        citation=_CHAOS_CITATION,
        license="CC BY-NC-SA 4.0",
        how="zenodo.org/records/3431873 (CHAOS_Train_Sets.zip)",
    ),
    Recipe(
        "ham10000",
        "HAM10000",
        image=rf"{ANYWHERE}HAM10000_images[^/]*/(?P<id>ISIC_\d{{7}})\.jpg",
        channels=("red", "green", "blue"),
        citation="Tschandl et al., The HAM10000 dataset, Scientific Data 5, 180161 (2018)",
        license="CC BY-NC 4.0",
        how="doi.org/10.7910/DVN/DBW86T",
    ),
    Recipe(
        "bcn20000",
        "BCN20000",
        image=rf"{ANYWHERE}BCN_?20(?:k|000)[^/]*/(?P<id>[^/]+)\.jpe?g",
        channels=("red", "green", "blue"),
        citation="Combalia et al., BCN20000: Dermoscopic Lesions in the Wild, arXiv 1908.02288 (2019)",
        how="the ISIC archive (challenge.isic-archive.com/data/#2019)",
    ),
    Recipe(
        "eyepacs",
        "EyePACS (diabetic retinopathy detection)",
        image=rf"{ANYWHERE}(?P<patient>\d+)_(?P<id>left|right)\.jpe?g",
        channels=("red", "green", "blue"),
        id="{patient}_{id}",
        patient="{patient}",
        citation="EyePACS; Kaggle Diabetic Retinopathy Detection (2015)",
        how="kaggle.com/c/diabetic-retinopathy-detection",
    ),
    Recipe(
        "radimagenet",
        "RadImageNet",
        image=rf"{ANYWHERE}(?P<set>CT|MR|US)/(?P<part>[^/]+)/(?P<finding>[^/]+)/(?P<id>[^/]+\d{{6}})\.png",
        id="{set}_{part}_{finding}_{id}",
        citation="Mei et al., RadImageNet, Radiology: Artificial Intelligence 4(5), e210315 (2022)",
        how="radimagenet.com, by request",
    ),
)
