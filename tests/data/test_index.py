"""The index says what is in the files, and reads a file again only where it changed."""

import os
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from cheaplunch.data import index as module
from cheaplunch.data.index import CaseRecord, in_order, index_slices, read_records
from cheaplunch.data.layouts import open_dataset
from cheaplunch.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAPLUNCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def reads(monkeypatch):
    """Ids of the cases that were really read, in any order."""
    seen = []
    real = module.read_record

    def counting(case, *more, **named):
        seen.append(case.id)
        return real(case, *more, **named)

    monkeypatch.setattr(module, "read_record", counting)
    return seen


def records(root, **named) -> list[CaseRecord]:
    dataset = open_dataset(root)
    return list(read_records(dataset, dataset.cases, **named))


# ---- what it says


def test_a_record_by_hand(folder, save_nifti):
    """Two slices of 1 × 4 voxels, X towards left, where the file's i runs towards the right."""
    image = np.array([[1, 2], [3, 4], [5, 6], [7, 10]], np.float32).reshape(4, 1, 2)
    label = np.array([[1, 0], [1, 0], [0, 2], [0, 0]], np.uint8).reshape(4, 1, 2)
    affine = np.diag([0.5, 2, 3, 1])
    affine[:3, 3] = 7
    save_nifti(folder / "imagesTr" / "case_1_0000.nii.gz", image, affine)
    save_nifti(folder / "labelsTr" / "case_1.nii.gz", label, affine)
    record = next(record for record in records(folder) if record.case_id == "case_1")
    assert record.problem is None and record.placed
    assert (record.shape_vox, record.spacing_mm, record.orientation) == ((2, 1, 4), (3, 2, 0.5), "RAS")
    (channel,) = record.channels
    assert (channel.minimum, channel.maximum, channel.mean) == (1, 10, 4.75)
    assert channel.std == pytest.approx(image.std()) and channel.percentiles[1] == 4.5
    assert record.area_px == ((2, 0), (0, 1)) and record.total_px == (2, 1) and record.ignored_px == (0, 0)
    # Along X, from the patient's right to the left, the file's i = 3, 2, 1, 0: label 1 on the last two, 2 on i = 2.
    assert record.centre_x == (0.75, 0.375)


def test_percentiles_of_a_large_volume_come_from_some_of_its_voxels(monkeypatch):
    channel = np.random.default_rng(0).normal(size=(20, 64, 64)).astype(np.float32)
    exact = module._intensities(channel)
    monkeypatch.setattr(module, "_SAMPLE", 5000)
    some = module._intensities(channel)
    assert some.percentiles == pytest.approx(exact.percentiles, abs=0.15) and some.percentiles != exact.percentiles
    assert replace(some, percentiles=()) == replace(exact, percentiles=())


def test_the_same_voxels_have_one_hash_however_the_file_turns_them(folder):
    path = folder / "imagesTr" / "case_2_0000.nii.gz"
    image = nib.load(path)
    nib.save(image.as_reoriented([[1, -1], [0, 1], [2, -1]]), path)
    hashes = {record.image_hash for record in records(folder)}
    assert len(hashes) == 1


def test_pixels_to_ignore_are_counted_by_themselves(folder, edit_json, save_nifti):
    edit_json(labels={"background": 0, "one": 1, "two": 2, "ignore": 3})
    label = np.zeros((4, 3, 2), np.uint8)
    label[0, :, 0], label[1, 0, 1] = 3, 1
    save_nifti(folder / "labelsTr" / "case_1.nii.gz", label)
    dataset = open_dataset(folder)
    index = index_slices(dataset, [case for case in dataset.cases if case.id == "case_1"])
    assert [(s.area_px, s.ignored_px) for s in index.slices] == [((0, 0), 3), ((1, 0), 0)]


# ---- what is read again


def test_a_second_run_reads_nothing_and_a_touched_file_one_case(folder, reads):
    first = records(folder)
    assert sorted(reads) == ["case_1", "case_10", "case_2"]
    reads.clear()
    assert records(folder) == first and reads == []
    label = folder / "labelsTr" / "case_2.nii.gz"
    os.utime(label, ns=(0, label.stat().st_mtime_ns + 1))
    assert records(folder) == first and reads == ["case_2"]
    assert index_slices(open_dataset(folder), open_dataset(folder).cases).axis == "axial" and reads == ["case_2"]
    records(folder, axis="coronal")
    assert len(reads) == 4


def test_other_names_for_the_labels_read_all_again(folder, edit_json, reads):
    records(folder)
    reads.clear()
    edit_json(labels={"background": 0, "two": 2, "one": 1})
    assert records(folder)[0].total_px == (2, 1) and len(reads) == 3


@pytest.mark.parametrize("damage", [lambda t: t[:300], lambda t: "{}", lambda t: t.replace("0.5", "0.6")])
def test_a_damaged_cache_is_made_anew(folder, reads, cache, damage):
    first = records(folder)
    (file,) = cache.iterdir()
    text = file.read_text()
    file.write_text(damage(text))
    assert file.read_text() != text
    reads.clear()
    assert records(folder) == first and len(reads) == 3
    assert file.read_text() == text


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch, reads):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHEAPLUNCH_CACHE", str(tmp_path / "file"))
    assert records(folder) == records(folder) and len(reads) == 6


def test_only_so_many_datasets_are_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEPT", 2)
    for axis in ("axial", "coronal", "axial", "sagittal"):
        records(folder, axis=axis)
    assert sorted(file.name.partition("-")[2] for file in cache.iterdir()) == ["axial.txt", "sagittal.txt"]


# ---- bad cases


def test_the_first_bad_case_is_said_and_what_was_read_is_kept(folder, save_nifti, reads):
    for id_ in ("case_2", "case_10"):
        save_nifti(folder / "imagesTr" / f"{id_}_0000.nii.gz", np.full((4, 3, 2), np.nan, np.float32))
    dataset = open_dataset(folder)
    cases = sorted(dataset.cases, key=lambda case: ("case_1", "case_2", "case_10").index(case.id))
    with pytest.raises(UserError, match="case_2_0000.nii.gz has 24 NaN"):
        index_slices(dataset, cases)
    reads.clear()
    with pytest.raises(UserError, match="case_2_0000.nii.gz has 24 NaN"):  # a problem is never taken from the cache
        index_slices(dataset, cases)
    assert "case_1" not in reads and "case_2" in reads


def test_an_image_is_described_though_its_label_does_not_fit(folder, save_nifti):
    save_nifti(folder / "labelsTr" / "case_2.nii.gz", np.ones((4, 3, 1), np.uint8))
    record = next(record for record in records(folder) if record.case_id == "case_2")
    assert "labelsTr/case_2.nii.gz has shape (4, 3, 1)" in (record.problem or "")
    assert record.shape_vox == (2, 3, 4) and not record.labelled


# ---- several at a time


def test_what_readers_warn_of_may_name_a_patient_and_stays_unsaid(recwarn):
    assert list(in_order(lambda number: warnings.warn("DOE^JANE", stacklevel=1), [1, 2, 3], workers=2)) == [None] * 3
    assert not recwarn.list
    warnings.warn("said again", stacklevel=1)
    assert len(recwarn.list) == 1


def test_four_workers_find_what_one_finds_in_the_order_of_the_cases(tmp_path, save_nifti, folder):
    random = np.random.default_rng(1)
    for number in range(12):
        image = random.normal(size=(8, 8, 4)).astype(np.float32)
        save_nifti(folder / "imagesTr" / f"more_{number}_0000.nii.gz", image)
        save_nifti(folder / "labelsTr" / f"more_{number}.nii.gz", random.integers(0, 3, image.shape, np.uint8))
    dataset = open_dataset(folder)
    told = []
    alone = records(folder, workers=1, progress=lambda *done: told.append(done))
    for file in (tmp_path / "cache" / "index").iterdir():
        file.unlink()
    assert records(folder, workers=4) == alone
    assert [record.case_id for record in alone] == [case.id for case in dataset.cases]
    assert told == [(n, 15) for n in range(1, 16)]
