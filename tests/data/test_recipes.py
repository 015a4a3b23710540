"""Each recipe on a miniature of its owners' folder, down to the label values."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.data.recipes import BTCV_TO_OURS, RECIPES, SYNAPSE, TRANSUNET_TEST
from cheaplunch.data.slices import Window, default_window
from cheaplunch.errors import UserError

RGB = np.full((4, 6, 3), 90)
GREY = np.full((4, 6), 90)


@pytest.fixture
def save(tmp_path, save_nifti):
    """(name, values) → the file; volumes are (i, j, k)."""

    def write(name, values, dtype=np.uint8):
        path, values = tmp_path / name, np.asarray(values, dtype)
        if ".nii" in name:
            return save_nifti(path, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
        return path

    return write


def opened(root, name, labelled=True):
    dataset = open_dataset(root, labelled)
    assert dataset.layout == name and "are named as in" in dataset.why and dataset.citation
    return dataset


def ids(dataset, side):
    return [case.id for case in dataset.split(side)]


def label_of(dataset, id_):
    (case,) = (case for case in dataset.cases if case.id == id_)
    loaded = load_case(case, dataset, default_window(dataset))
    assert loaded.image.shape[1] == len(dataset.channel_names)
    return loaded.label


def line(*values):
    """A volume with these values along i, the fastest of its axes; a RAS file, so X runs the other way."""
    return np.array(values).reshape(-1, 1, 1)


# ---- abdomen


def test_btcv_in_the_numbers_and_split_of_transunet(tmp_path, save):
    for id_ in ("0001", "0005", "0006", "0038"):
        save(f"RawData/Training/img/img{id_}.nii.gz", line(*range(14)), np.int16)
        save(f"RawData/Training/label/label{id_}.nii.gz", line(*range(14)))
    dataset = opened(tmp_path, "btcv")
    assert ids(dataset, "train") == ["case0005", "case0006"] and ids(dataset, "test") == ["case0001", "case0038"]
    assert default_window(dataset) == Window(-125, 275) and dataset.channel_names == ("CT",)
    label = label_of(dataset, "case0001")[0, 0, ::-1].tolist()
    organs = ("", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta")
    organs += ("inferior vena cava", "portal and splenic veins", "pancreas", "adrenal glands", "adrenal glands")
    assert label == [dataset.labels.get(organ, 0) for organ in organs]
    assert SYNAPSE.items() < dataset.labels.items() and len(dataset.labels) == 12
    assert sorted(number for number, _ in BTCV_TO_OURS) == list(range(1, 14))


def test_the_synapse_slices(tmp_path):
    for name in ("train_npz", "test_vol_h5"):
        (tmp_path / name).mkdir()
    plane = np.array([[0.0, 8.0]], np.float32)
    np.savez(tmp_path / "train_npz/case0005_slice012.npz", image=plane / 10, label=plane)
    with h5py.File(tmp_path / "test_vol_h5/case0001.npy.h5", "w") as file:
        file["image"], file["label"] = np.stack([plane / 10] * 2), np.stack([plane] * 2)
    dataset = opened(tmp_path, "synapse")
    assert ids(dataset, "train") == ["case0005_slice012"] and ids(dataset, "test") == ["case0001"]
    assert dataset.labels["aorta"] == 1 and dataset.labels["stomach"] == 8 and default_window(dataset) == Window(0, 1)
    assert label_of(dataset, "case0001").tolist() == [[[0, 8]], [[0, 8]]]
    image = load_case(dataset.cases[0], dataset, default_window(dataset)).image
    assert image.ravel().tolist() == pytest.approx([0, 0.8])


def test_amos_takes_ct_and_says_what_it_leaves(tmp_path, save):
    for side, id_ in (("Tr", "0001"), ("Tr", "0507"), ("Va", "0008")):
        save(f"amos22/images{side}/amos_{id_}.nii.gz", line(1, 2), np.int16)
        save(f"amos22/labels{side}/amos_{id_}.nii.gz", line(0, 15))
    save("amos22/imagesTs/amos_0009.nii.gz", line(1, 2), np.int16)
    dataset = opened(tmp_path, "amos")
    assert ids(dataset, "train") == ["amos_0001"] and ids(dataset, "test") == ["amos_0008"]
    assert label_of(dataset, "amos_0001").max() == dataset.labels["prostate/uterus"] == 15
    assert "1 images without masks" in dataset.left_out[0] and "1 MRI scans" in dataset.left_out[1]


# ---- brain


@pytest.mark.parametrize(
    ("name", "place"),
    [("brats2018", "HGG/Brats18_{0}_1/Brats18_{0}_1"), ("brats2021", "BraTS2021_0000{0}/BraTS2021_0000{0}")],
)
def test_brats_is_the_whole_tumour_on_flair(tmp_path, save, name, place):
    for number in range(5):
        for modality in ("flair", "t1", "t1ce", "t2"):
            save(f"{place.format(number)}_{modality}.nii.gz", line(1, 2, 3, 4), np.int16)
        save(f"{place.format(number)}_seg.nii.gz", line(0, 1, 2, 4))
    dataset = opened(tmp_path, name)
    assert len(dataset.split("train")) == 4 and len(dataset.split("test")) == 1
    assert dataset.channel_names == ("FLAIR",) and "flair" in dataset.cases[0].images[0].name
    assert label_of(dataset, dataset.cases[0].id)[0, 0].tolist() == [1, 1, 1, 0]


def test_lgg_by_patient(tmp_path, save):
    for patient in ("TCGA_CS_4941_19960909", "TCGA_HT_8563_19981209"):
        for number in (1, 2):
            save(f"kaggle_3m/{patient}/{patient}_{number}.tif", RGB)
            save(f"kaggle_3m/{patient}/{patient}_{number}_mask.tif", np.eye(4, 6) * 255)
    dataset = opened(tmp_path, "lgg")
    assert len(ids(dataset, "train")) == len(ids(dataset, "test")) == 2
    assert {c.patient for c in dataset.split("train")}.isdisjoint(c.patient for c in dataset.split("test"))
    assert label_of(dataset, dataset.cases[0].id)[0].tolist() == np.eye(4, 6, dtype=int).tolist()


# ---- eye


def test_refuge_the_disc_includes_the_cup(tmp_path, save):
    mask = [[255, 255, 128, 128, 0, 0]] * 4
    for place, id_ in (("Training400/Glaucoma", "g0001"), ("Training400/Non-Glaucoma", "n0001"), ("Test400", "T0001")):
        save(f"{place}/{id_}.jpg", RGB)
    save("Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001.bmp", mask)
    save("Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma/n0001.bmp", mask)
    save("REFUGE-Test-GT/Disc_Cup_Masks/G/T0001.bmp", mask)
    dataset = opened(tmp_path, "refuge")
    assert ids(dataset, "train") == ["g0001", "n0001"] and ids(dataset, "test") == ["T0001"]
    label = label_of(dataset, "T0001")[0]
    assert label[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert [np.isin(label, dataset.scored[name]).sum() for name in ("disc", "cup")] == [16, 8]


def test_riga(tmp_path, save):
    y, x = np.mgrid[:80, :80]
    radius = np.hypot(y - 40, x - 40)
    photograph = np.full((80, 80, 3), 120)
    drawn = photograph.copy()
    drawn[(abs(radius - 30) < 1.5) | (abs(radius - 12) < 1.5)] = 0
    for place in ("BinRushed/BinRushed1-Corrected", "Magrabia/MagrabiFemale", "MESSIDOR"):
        save(f"{place}/image1prime.tif", photograph)
        for expert in range(1, 4):
            save(f"{place}/{'Image' if expert == 1 else 'image'}1-{expert}.tif", drawn)
    save("MESSIDOR/image48-1.tif", drawn)  # a drawing without its photograph, as the owners have one
    dataset = opened(tmp_path, "riga")
    assert ids(dataset, "test") == ["MagrabiFemale_image1"] and len(ids(dataset, "train")) == 2
    label = label_of(dataset, "MESSIDOR_image1")[0]
    assert (label > 0).sum() == pytest.approx(np.pi * 31.5**2, rel=0.03)
    assert (label == 2).sum() == pytest.approx(np.pi * 13.5**2, rel=0.06)


# ---- ultrasound and skin


def test_tn_scui(tmp_path, save):
    for number in (2, 10):
        save(f"TNSCUI2020_train/image/{number}.PNG", GREY)
        save(f"TNSCUI2020_train/mask/{number}.PNG", np.eye(4, 6) * 255)
    dataset = opened(tmp_path, "tn-scui")
    assert dataset.labels == {"nodule": 1} and label_of(dataset, "10").sum() == 4
    opened(tmp_path / "TNSCUI2020_train", "tn-scui")
    (tmp_path / "TNSCUI2020_train").rename(tmp_path / "mine")  # image/1.png and mask/1.png are nobody's names
    assert open_dataset(tmp_path / "mine").layout == "images and masks"


def test_ddti_leaves_out_what_nobody_marked(tmp_path, save):
    for name in ("1_1", "1_2", "2_1", "3_1"):
        save(f"{name}.jpg", GREY)
    square = '[{"points": [{"x": 1, "y": 1}, {"x": 3, "y": 1}, {"x": 3, "y": 2}, {"x": 1, "y": 2}]}]'
    for number, svg in ((1, square), (2, square), (3, square[:-9])):  # the last is cut off, as in the owners' files
        mark = f"<mark><image>1</image><svg>{svg}</svg></mark>"
        (tmp_path / f"{number}.xml").write_text(f"<case><number>{number}</number>{mark}</case>")
    dataset = opened(tmp_path, "ddti")
    assert {case.id for case in dataset.cases} == {"1_1", "2_1"} and "2 images without a whole" in dataset.left_out[0]
    label = label_of(dataset, "1_1")[0]
    assert np.argwhere(label).tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]


def test_hc18_outlines_are_filled(tmp_path, save):
    y, x = np.mgrid[:60, :80]
    distance = np.hypot((y - 30) / 20, (x - 40) / 30)
    for name in ("training_set/000_HC", "training_set/000_2HC", "training_set/001_HC"):
        save(f"{name}.png", np.full((60, 80), 90))
        save(f"{name}_Annotation.png", (abs(distance - 1) < 0.03) * 255)
    save("test_set/000_HC.png", np.full((60, 80), 90))
    dataset = opened(tmp_path / "training_set", "hc18")
    assert {c.patient for c in dataset.cases} == {"000", "001"}
    assert label_of(dataset, "000_2HC").sum() == pytest.approx(
        np.pi * 20.6 * 30.9, rel=0.01
    )  # to the line's outer edge


def test_isic(tmp_path, save):
    for side in ("Training", "Test"):
        number = 1 if side == "Test" else 0
        save(f"ISIC2018_Task1-2_{side}_Input/ISIC_000000{number}.jpg", RGB)
        save(f"ISIC2018_Task1_{side}_GroundTruth/ISIC_000000{number}_segmentation.png", np.eye(4, 6) * 255)
    dataset = opened(tmp_path, "isic")
    assert ids(dataset, "train") == ["ISIC_0000000"] and ids(dataset, "test") == ["ISIC_0000001"]
    assert label_of(dataset, "ISIC_0000000").sum() == 4


def test_acdc(tmp_path, save):
    for side, patient in (("training", "patient001"), ("testing", "patient101")):
        for frame in ("01", "12"):
            save(f"database/{side}/{patient}/{patient}_frame{frame}.nii.gz", line(1, 2, 3, 4), np.int16)
            save(f"database/{side}/{patient}/{patient}_frame{frame}_gt.nii.gz", line(0, 1, 2, 3))
        save(f"database/{side}/{patient}/{patient}_4d.nii.gz", line(1, 2, 3, 4), np.int16)
    dataset = opened(tmp_path, "acdc")
    assert ids(dataset, "test") == ["patient101_frame01", "patient101_frame12"]
    assert dataset.split("train")[0].patient == "patient001"
    label = label_of(dataset, "patient001_frame12")[0, 0].tolist()
    assert label == [dataset.labels[n] for n in ("left ventricle", "myocardium", "right ventricle")] + [0]


# ---- CHAOS


def test_chaos_mr_pictures_lie_on_the_slices_they_are_named_after(tmp_path, save, write_series):
    heights = (10, 5, 0)  # the first file is the highest slice
    for patient in (1, 2):
        scan = tmp_path / f"Train_Sets/MR/{patient}/T2SPIR"
        write_series(scan / "DICOM_anon", heights, "IMG-0002-{:05d}.dcm", "MR")
        for number, values in enumerate(([0, 63, 63, 0], [126, 0, 0, 0], [189, 252, 240, 0]), start=1):
            save(f"{scan.relative_to(tmp_path)}/Ground/IMG-0002-{number:05d}.png", [values, [0, 0, 0, 0]])
    dataset = opened(tmp_path, "chaos-mr")
    assert len(dataset.split("train")) == len(dataset.split("test")) == 1
    label = label_of(dataset, "mr_1")  # (Z, H, W), Z from the lowest
    assert label[:, 0].tolist() == [[3, 4, 4, 0], [2, 0, 0, 0], [0, 1, 1, 0]] and not label[:, 1].any()
    assert len(dataset.fingerprint()) == 64 and dataset.cases[0].mask_name.endswith(".nii.gz")
    save("Train_Sets/MR/1/T2SPIR/Ground/IMG-0002-00002.png", np.full((2, 4), 95))
    with pytest.raises(UserError, match="the grey 95, which is near none"):
        label_of(dataset, "mr_1")


def test_chaos_ct_pictures_are_in_the_order_of_the_slices_names(tmp_path, save, write_series):
    write_series(tmp_path / "CT/1/DICOM_anon", (10, 5, 0), "i{:04d},0000b.dcm", "CT")
    for number in range(3):
        save(f"CT/1/Ground/liver_GT_{number:03d}.png", np.full((2, 4), 255 * (number == 0)))
    dataset = opened(tmp_path, "chaos-ct")
    assert default_window(dataset) == Window(-160, 240)
    assert label_of(dataset, "ct_1").any(axis=(1, 2)).tolist() == [False, False, True]
    (tmp_path / "CT/1/Ground/liver_GT_002.png").unlink()
    with pytest.raises(UserError, match="has 2 pictures for the 3 slices"):
        label_of(open_dataset(tmp_path), "ct_1")


# ---- unlabelled


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ham10000", ["HAM10000_images_part_1/ISIC_0024306.jpg", "HAM10000_images_part_2/ISIC_0029306.jpg"]),
        ("bcn20000", ["BCN_20k_train/BCN_0000000000.jpg", "BCN_20k_train/BCN_0000000001.jpg"]),
        ("eyepacs", ["train/10_left.jpeg", "train/10_right.jpeg"]),
        ("radimagenet", ["radiology_ai/CT/lung/normal/lung-normal000032.png", "radiology_ai/MR/af/x/foot000001.png"]),
    ],
)
def test_images_to_pretrain_on(tmp_path, save, name, files):
    for file in files:
        save(file, RGB)
    dataset = opened(tmp_path, name, labelled=False)
    assert len(dataset.split("train")) == 2 and not dataset.labels and not dataset.split("test")
    assert (len({case.patient for case in dataset.cases}) == 1) == (name == "eyepacs")
    with pytest.raises(UserError, match="2 images and not one mask"):
        open_dataset(tmp_path)


def test_masks_are_not_overlooked_for_a_name_among_unlabelled_sets(tmp_path, save):
    for eye in ("left", "right"):
        save(f"10_{eye}.jpeg", RGB)
        save(f"10_{eye}_mask.png", GREY)
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "images and masks" and all(case.label for case in dataset.cases)


# ---- the table


def test_two_masks_of_one_image(tmp_path, save):
    save("ISIC_0000000.jpg", RGB)
    for place in ("a", "b"):
        save(f"{place}/ISIC_0000000_segmentation.png", GREY)
    with pytest.raises(UserError, match="are both masks of ISIC_0000000.jpg: keep one"):
        open_dataset(tmp_path)


def test_every_recipe_is_told_how_to_get_and_tested_above():
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names) and all(r.citation and r.how and r.license for r in RECIPES)
    assert all(bool(recipe.test) == bool(recipe.split) or recipe.name == "synapse" for recipe in RECIPES)
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in tests for name in names)


def test_transunets_test_cases():
    assert TRANSUNET_TEST.count("|") == 11
