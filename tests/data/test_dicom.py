import io
import pickle
import warnings

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from cheaplunch.data.dicom import find_segmentations, find_series
from cheaplunch.data.volume import read_grid, read_label, read_volume, source_files, suffix_of, write_mask
from cheaplunch.errors import UserError

LPS = np.diag([-1, -1, 1, 1])
SECRETS = ("DOE", "JANE", "4711", "19700203", "Clinic")
NAMES = {"left lobe": 2, "tumour": 5}


def cosine(degrees):
    return np.cos(np.deg2rad(degrees))


def oblique_affine():
    """RAS affine near LPS axes: 0.7 × 0.8 × 3 mm, turned by 12° about S."""
    turn = np.array([[cosine(12), -cosine(78), 0], [cosine(78), cosine(12), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-0.7, -0.8, 3]), (31.5, 42.25, -110)
    return affine


def slices_of(array, affine, uid=None, **tags):
    """One CT data set per k of (i, j, k) voxels, int16 or uint16, with its RAS affine. The patient is Jane Doe."""
    lps, uid, study, frame = LPS @ affine, uid or generate_uid(), generate_uid(), generate_uid()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    for k in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "DOE^JANE", "4711", "19700203", "F"
        data.StudyDate = data.SeriesDate = data.ContentDate = "20200304"
        data.StudyTime = data.SeriesTime = data.ContentTime = "120000"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, uid, frame
        data.StudyID = data.AccessionNumber = "4711"
        data.SeriesDescription, data.InstitutionName = "abdomen of JANE DOE", "Clinic"
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", 3, 900 - k
        data.ReferringPhysicianName, data.Manufacturer, data.PositionReferenceIndicator = "", "", ""
        data.ImagePositionPatient = [f"{v:.6f}" for v in apply_affine(lps, (0, 0, k))]
        data.ImageOrientationPatient = [f"{v:.10f}" for v in (lps[:3, :2] / spacing[:2]).T.ravel()]
        data.PixelSpacing, data.SliceThickness = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"], float(spacing[2])
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.Columns, data.Rows = array.shape[:2]
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(array.dtype.kind == "i")
        data.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        for tag, value in tags.items():
            setattr(data, tag, value)
        yield data


def save_series(folder, array, affine, seed=0, uid=None, **tags):
    """Shuffled, in nested folders, with names that say nothing; returns the UID."""
    datasets = list(slices_of(array, affine, uid, **tags))
    for place, number in enumerate(np.random.default_rng(seed).permutation(len(datasets))):
        path = folder / f"part{place % 3}" / f"IM{place:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets[number].save_as(path, enforce_file_format=True)
    return str(datasets[0].SeriesInstanceUID)


def save_report(path, modality="SR"):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = BasicTextSRStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    report.SOPClassUID, report.Modality, report.SeriesInstanceUID = BasicTextSRStorage, modality, generate_uid()
    report.PatientName = "DOE^JANE"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save_as(path, enforce_file_format=True)


def body(shape=(9, 7, 6)):
    return np.random.default_rng(1).integers(-1000, 2000, shape).astype(np.int16)


def array_affine(grid):
    """(x, y, z) of the volume's array → RAS mm, from the file's own affine and nibabel's reorientation."""
    blank = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine)
    return blank.as_reoriented(ornt_transform(io_orientation(grid.affine), axcodes2ornt("LPS"))).affine


def assert_same_in_world(volume, nifti):
    """The same numbers in the arrays, and the arrays at the same place."""
    np.testing.assert_array_equal(volume.array, nifti.array)
    np.testing.assert_allclose(volume.spacing, nifti.spacing, rtol=1e-5)
    np.testing.assert_allclose(array_affine(volume.grid), array_affine(nifti.grid), rtol=0, atol=1e-4)


def check_round_trip(tmp_path, nifti_path):
    image = nib.load(nifti_path)
    array = np.asarray(image.dataobj).astype(np.int16)
    nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "whole.nii.gz")
    uid = save_series(tmp_path / "study" / "abdomen", array, image.affine)
    save_series(tmp_path / "study" / "scout", array[:, :, :1], image.affine)
    save_report(tmp_path / "study" / "abdomen" / "report")
    source = tmp_path / f"study#{uid}"
    assert suffix_of(source) == ".dcm" and len(source_files(source)) == array.shape[2]
    volume, nifti = read_volume([source]), read_volume([tmp_path / "whole.nii.gz"])
    assert_same_in_world(volume, nifti)
    assert_same_in_world(read_volume([tmp_path / "study" / "abdomen"]), nifti)


def test_a_nifti_as_a_dicom_series_reads_equal(tmp_path, save_nifti):
    check_round_trip(tmp_path, save_nifti(tmp_path / "image.nii.gz", body(), oblique_affine()))


@pytest.mark.real
def test_a_real_nifti_as_a_dicom_series_reads_equal(tmp_path, shared_data):
    check_round_trip(tmp_path, sorted((shared_data / "hippocampus" / "imagesTr").glob("*.nii.gz"))[0])


@pytest.mark.parametrize("codes", ["LPS", "LPI", "PSR", "ASL", "LIA", "RAI"])
def test_slices_of_any_orientation_and_direction(tmp_path, codes):
    """Axial, sagittal and coronal, stacked either way; the slice order is along the normal, whatever it was."""
    image = nib.Nifti1Image(body(), oblique_affine())
    image = image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes)))
    nib.save(image, tmp_path / "image.nii")
    save_series(tmp_path / "series", np.asarray(image.dataobj), image.affine)
    volume, nifti = read_volume([tmp_path / "series"]), read_volume([tmp_path / "image.nii"])
    assert_same_in_world(volume, nifti)
    write_mask(nifti.array[0].astype(int) + 1000, volume, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "mask.nii.gz", nifti), nifti.array[0] + 1000)


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    first, second = (save_series(tmp_path / name, body(), oblique_affine()) for name in "ab")
    save_report(tmp_path / "report.dcm")
    save_report(tmp_path / "curve.dcm", "ECG")
    (tmp_path / "notes.txt").write_text("no DICOM")
    found = find_series(tmp_path)
    assert [s.uid for s in found] == sorted((first, second)) and [s.modality for s in found] == ["CT", "CT"]
    by_uid = {s.uid: s for s in found}
    assert by_uid[first].source == tmp_path / f"a#{first}" and by_uid[first].shape == (9, 7, 6)
    with pytest.raises(UserError) as caught:
        read_volume([tmp_path])
    assert first in str(caught.value) and second in str(caught.value) and f"{tmp_path}#UID" in str(caught.value)
    assert read_volume([by_uid[second].source]).grid.header.uid == second
    with pytest.raises(UserError, match="no image series of that"):
        read_volume([tmp_path / "a#1.2.3"])
    with pytest.raises(UserError, match="no DICOM images"):
        (tmp_path / "empty").mkdir()
        read_volume([tmp_path / "empty"])


def test_nothing_of_the_patient_is_kept_or_said(tmp_path):
    uid = save_series(tmp_path / "s", body(), oblique_affine())
    series, volume = find_series(tmp_path)[0], read_volume([tmp_path / "s"])
    for text in (repr(series), repr(volume.grid), str(pickle.dumps((series, volume.grid)))):
        assert not any(secret in text for secret in SECRETS)
    assert pickle.loads(pickle.dumps(series)) == series and series.uid == uid
    for ending in (".nii", ".nrrd", ".mha"):
        write_mask(np.ones((6, 7, 9), int), volume, tmp_path / f"mask{ending}")
        assert not any(s.encode() in (tmp_path / f"mask{ending}").read_bytes() for s in SECRETS)


def test_a_bad_value_is_not_quoted(tmp_path):
    """pydicom's messages and warnings quote what they dislike."""
    for number, data in enumerate(slices_of(body(), oblique_affine())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.SeriesDate = "JANE"
            data.save_as(tmp_path / f"{number}", enforce_file_format=True)
        raw = (tmp_path / f"{number}").read_bytes()
        (tmp_path / f"{number}").write_bytes(raw.replace(b"RescaleX", b"").replace(b"0.80000000", b"JANE DOE47"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="cut off or damaged") as caught:
            read_volume([tmp_path])
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_each_slice_has_its_own_scale_and_monochrome1_is_turned(tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (4, 3, 3)).astype(np.uint16)
    datasets = list(slices_of(array, oblique_affine(), BitsStored=12, HighBit=11))
    for k, data in enumerate(datasets):
        data.RescaleSlope, data.RescaleIntercept = f"{k + 0.5}", f"{-100 * k}"
        data.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    expected = array * (np.arange(3) + 0.5) - 100 * np.arange(3)
    volume = read_volume([tmp_path])
    np.testing.assert_array_equal(volume.array[0], expected.transpose(2, 1, 0).astype(np.float32))
    for k, data in enumerate(datasets):
        data.PhotometricInterpretation = "MONOCHROME1"
        data.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    expected = (4095 - array.astype(int)) * (np.arange(3) + 0.5) - 100 * np.arange(3)
    np.testing.assert_array_equal(read_volume([tmp_path]).array[0], expected.transpose(2, 1, 0).astype(np.float32))
    single = read_volume([tmp_path / "1.dcm"])
    assert single.array.shape == (1, 1, 3, 4) and single.spacing_mm[0] == pytest.approx(3)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_slices(tmp_path, syntax):
    array = np.random.default_rng(0).integers(0, 3000, (64, 64, 3)).astype(np.uint16)
    for k, data in enumerate(slices_of(array, oblique_affine(), RescaleSlope="2", RescaleIntercept="-1024")):
        packed = io.BytesIO()
        if syntax == JPEG2000Lossless:
            Image.fromarray(data.pixel_array).save(packed, "JPEG2000", irreversible=False)
            data.PixelData = encapsulate([packed.getvalue()[packed.getvalue().index(b"\xff\x4f\xff\x51") :]])
            data.file_meta.TransferSyntaxUID = syntax
        else:
            data.compress(syntax)
        data.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    assert pydicom.dcmread(tmp_path / "0.dcm").file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_volume([tmp_path]).array[0], array.transpose(2, 1, 0) * 2.0 - 1024)


def test_a_codec_that_is_not_there_is_named(tmp_path):
    """DICOM's commonest compression, for which pydicom finds no codec of a free licence."""
    for k, data in enumerate(slices_of(body(), oblique_affine())):
        data.PixelData = encapsulate([b"\xff\xd8 no codec comes as far as this \xff\xd9"])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        data.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    assert read_grid([tmp_path]).shape == (9, 7, 6)
    with pytest.raises(UserError, match="0.dcm is packed as JPEG Lossless.*gdcmconv"):
        read_volume([tmp_path])


def enhanced(datasets):
    """The same slices as one multi-frame file, made by highdicom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hd.legacy.LegacyConvertedEnhancedCTImage(
            datasets,
            series_instance_uid=generate_uid(),
            series_number=4,
            sop_instance_uid=generate_uid(),
            instance_number=1,
        )


def test_a_multi_frame_file(tmp_path, save_nifti):
    nifti = read_volume([save_nifti(tmp_path / "image.nii.gz", body() * 2 - 7, oblique_affine())])
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-7", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}
    datasets = list(slices_of(body(), oblique_affine(), **tags))
    order = np.random.default_rng(3).permutation(len(datasets))
    enhanced([datasets[n] for n in order]).save_as(tmp_path / "frames.dcm")
    volume = read_volume([tmp_path / "frames.dcm"])
    assert_same_in_world(volume, nifti)
    assert len(source_files(tmp_path / "frames.dcm")) == 1
    mask = labelled()
    write_mask(mask, volume, tmp_path / "seg.dcm", NAMES)
    np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm", nifti), mask)


# -------------------------------------------------------------------- what is no volume


def stack(change):
    datasets = list(slices_of(body(), oblique_affine()))
    for k, data in enumerate(datasets):
        change(k, data)
    return datasets


def moved(data, along_mm=0.0, sideways_mm=0.0):
    x, y, z = map(float, data.ImagePositionPatient)
    data.ImagePositionPatient = [x, y + sideways_mm, z + along_mm]


FLAWS = {
    "lacks slices after the 3. of 5": lambda k, d: None,
    "1 slices at the place of another": lambda k, d: moved(d, -3 * (k == 3)),
    "2.1 to 3.9 mm apart": lambda k, d: moved(d, 0.9 * (k == 3)),
    "sideways by 5 mm": lambda k, d: moved(d, 0, k),
    "different orientations": lambda k, d: k == 5 and setattr(d, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]),
    "different sizes": lambda k, d: k == 5 and (setattr(d, "Rows", 9), setattr(d, "Columns", 7)),
    "different pixel spacings": lambda k, d: k == 5 and setattr(d, "PixelSpacing", [0.8, 0.9]),
    "does not say where": lambda k, d: delattr(d, "ImagePositionPatient"),
    "zero or NaN spacing": lambda k, d: setattr(d, "PixelSpacing", [0, 0.7]),
    "no perpendicular unit vectors": lambda k, d: setattr(d, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
    "in colour": lambda k, d: (setattr(d, "SamplesPerPixel", 3), setattr(d, "BitsAllocated", 8), setattr(d, "Rows", 2)),
}


@pytest.mark.parametrize("says", FLAWS)
def test_what_is_no_volume_is_said_in_one_line(tmp_path, says):
    for number, data in enumerate(stack(FLAWS[says])):
        if not (says.startswith("lacks") and number == 3):
            data.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match=says) as caught:
        read_volume([tmp_path])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert find_series(tmp_path)[0].flaw in str(caught.value)
    with pytest.raises(UserError, match=says):
        read_grid([tmp_path])


def test_places_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path):
    def rounded(k, data):
        data.ImagePositionPatient = [0, 0, round(0.625 * k, 1)]

    for number, data in enumerate(stack(rounded)):
        data.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    assert read_volume([tmp_path]).spacing_mm[0] == pytest.approx(0.62)


# -------------------------------------------------------------------- SEG


def labelled():
    """(Z, Y, X): label 2 on slices 1 to 3, label 5 on slices 3 and 4; nothing symmetric."""
    mask = np.zeros((6, 7, 9), int)
    mask[1:4, 1:4, 2:5] = 2
    mask[3:5, 4:6, 5:9] = 5
    mask[4, 0, 0] = 5
    return mask


def plain_places(path):
    """(segment number, world place of a set pixel), by the standard's own words and pydicom alone."""
    data = pydicom.dcmread(path)
    shared, found = data.SharedFunctionalGroupsSequence[0], set()
    bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")
    pixels = bits[: data.NumberOfFrames * data.Rows * data.Columns].reshape(-1, data.Rows, data.Columns)
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for frame, own in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(own.PlanePositionSequence[0].ImagePositionPatient, float)
        number = own.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for row, column in np.argwhere(frame):
            place = start + axes[0] * column_mm * column + axes[1] * row_mm * row
            found.add((number, *np.round(place, 2)))
    return found


@pytest.mark.parametrize("stacked", ["upwards", "downwards"])
def test_a_seg_lands_on_its_slices(tmp_path, save_nifti, stacked):
    affine = oblique_affine()
    if stacked == "downwards":
        affine[:3, 3] += affine[:3, 2] * 5
        affine[:3, 2] *= -1
    array = body() if stacked == "upwards" else body()[:, :, ::-1]
    save_series(tmp_path / "s", array, affine)
    nifti = read_volume([save_nifti(tmp_path / "image.nii.gz", body(), oblique_affine())])
    volume, mask = read_volume([tmp_path / "s"]), labelled()
    write_mask(mask, volume, tmp_path / "seg.dcm", NAMES)

    seg = hd.seg.segread(tmp_path / "seg.dcm")
    source = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, source_files(tmp_path / "s"))}
    first = next(iter(source.values()))
    assert (seg.FrameOfReferenceUID, seg.StudyInstanceUID) == (first.FrameOfReferenceUID, first.StudyInstanceUID)
    assert seg.segmentation_type.value == "BINARY" and seg.SoftwareVersions
    described = [seg.get_segment_description(n) for n in seg.segment_numbers]
    assert [d.segment_label for d in described] == ["left lobe", "tumour"]
    assert all(d.algorithm_type.value == "AUTOMATIC" for d in described)
    assert described[0].algorithm_identification.name == "cheaplunch"
    bottom_up = sorted(source, key=lambda uid: source[uid].ImagePositionPatient[2])
    planes = seg.get_pixels_by_source_instance(bottom_up, combine_segments=True, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(planes, np.select([mask == 2, mask == 5], [1, 2]))

    to_lps = LPS @ oblique_affine()  # (i, j, k) = (x, y, z) of the array
    expected = {
        (1 + (mask[z, y, x] == 5), *np.round(apply_affine(to_lps, (x, y, z)), 2)) for z, y, x in np.argwhere(mask)
    }

    def near(found):
        return np.array(sorted((n, round(x, 1), round(y, 1), round(z, 1)) for n, x, y, z in found))

    np.testing.assert_allclose(near(plain_places(tmp_path / "seg.dcm")), near(expected), atol=0.11)

    for like in (volume, nifti):
        np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm", like), mask)
        np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm", like, NAMES), mask)
        renumbered = read_label(tmp_path / "seg.dcm", like, {"tumour": 1, "left lobe": 9})
        np.testing.assert_array_equal(renumbered, np.select([mask == 2, mask == 5], [9, 1]))
    with pytest.raises(UserError, match="segment 'tumour' that the data set does not name"):
        read_label(tmp_path / "seg.dcm", volume, {"left lobe": 2})


def test_an_empty_mask_and_what_is_found_beside_images(tmp_path):
    uid = save_series(tmp_path / "s", body(), oblique_affine())
    volume = read_volume([tmp_path / "s"])
    assert volume.grid.mask_suffix == ".dcm"
    write_mask(np.zeros((6, 7, 9), int), volume, tmp_path / "s" / "seg.dcm", NAMES)
    assert not read_label(tmp_path / "s" / "seg.dcm", volume).any()
    assert [s.uid for s in find_series(tmp_path)] == [uid]
    (found,) = find_segmentations(tmp_path)
    assert (found.path, found.series_uid, found.labels) == (tmp_path / "s" / "seg.dcm", uid, ("left lobe", "tumour"))
    with pytest.raises(UserError, match="without an image"):
        read_volume([tmp_path / "s" / "seg.dcm"])
    with pytest.raises(ValueError, match="does not name"):
        write_mask(np.full((6, 7, 9), 3), volume, tmp_path / "seg.dcm", NAMES)
    assert not (tmp_path / "seg.dcm").exists()


def test_a_seg_of_another_image_or_with_overlaps_is_refused(tmp_path, save_nifti):
    save_series(tmp_path / "s", body(), oblique_affine())
    volume = read_volume([tmp_path / "s"])
    write_mask(labelled(), volume, tmp_path / "seg.dcm", NAMES)
    elsewhere = oblique_affine()
    elsewhere[0, 3] += 0.4
    other = read_volume([save_nifti(tmp_path / "other.nii.gz", body(), elsewhere)])
    with pytest.raises(UserError, match="seg.dcm lies off the image's voxels"):
        read_label(tmp_path / "seg.dcm", other)
    short = read_volume([save_nifti(tmp_path / "short.nii.gz", body()[:, :, :4], oblique_affine())])
    with pytest.raises(UserError, match="seg.dcm lies off the image's voxels"):
        read_label(tmp_path / "seg.dcm", short)
    data = pydicom.dcmread(tmp_path / "seg.dcm")
    first, *_, last = data.PerFrameFunctionalGroupsSequence
    last.PlanePositionSequence = first.PlanePositionSequence
    pixels = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")
    data.PixelData = np.packbits(np.ones_like(pixels), bitorder="little").tobytes()
    data.save_as(tmp_path / "overlap.dcm")
    with pytest.raises(UserError, match="overlap.dcm has segments that overlap"):
        read_label(tmp_path / "overlap.dcm", volume)


def test_a_series_without_a_frame_of_reference_still_gets_a_nifti_mask(tmp_path):
    for number, data in enumerate(slices_of(body(), oblique_affine())):
        del data.FrameOfReferenceUID
        data.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    volume = read_volume([tmp_path])
    with pytest.raises(UserError, match="write the mask as .nii.gz"):
        write_mask(labelled(), volume, tmp_path / "out" / "seg.dcm", NAMES)
    assert not list((tmp_path / "out").iterdir())
    write_mask(labelled(), volume, tmp_path / "out" / "mask.nrrd")
