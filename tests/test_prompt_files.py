"""Prompts from files: what each format means, and what is said to a file that does not follow it."""

import json
from pathlib import Path

import pytest

from cheaplunch.errors import UserError
from cheaplunch.interactive import Mark
from cheaplunch.prompt_files import ANY_IMAGE, read_prompts

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
CLASSES = ("liver", "kidney_right", "kidney_left", "spleen")


def test_the_examples_of_the_docs():
    assert read_prompts(EXAMPLES / "prompts.json", CLASSES) == {
        "patient_1.nii.gz": [
            Mark("liver", "voxel", ((80, 120, 14),)),
            Mark("liver", "voxel", ((130, 98, 14),), positive=False),
            Mark("spleen", "world_ras", ((-92.5, -14.0, 37.1),)),
            Mark("kidney_left", "voxel", ((150, 112, 11), (178, 149, 11))),
        ],
        "ward_7/patient_2": [Mark("liver", "world_lps", ((-71.0, 8.5, 22.0),))],
    }
    assert read_prompts(EXAMPLES / "one_image.json", CLASSES) == {
        ANY_IMAGE: [Mark("liver", "voxel", ((80, 120, 14),)), Mark("spleen", "voxel", ((171, 110, 14),))]
    }
    assert read_prompts(EXAMPLES / "slicer.mrk.json", CLASSES) == {
        ANY_IMAGE: [
            Mark("liver", "world_lps", ((-71.0, 8.5, 22.0),)),
            Mark("liver", "world_lps", ((-12.0, 14.0, 22.0),), positive=False),
            Mark("liver", "world_lps", ((-15.5, 40.0, 30.0),), positive=False),
            Mark("spleen", "world_lps", ((88.0, 31.5, 30.0),)),
        ]
    }


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def slicer(*points: dict, **more) -> dict:
    return {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": list(points)} | more]}


def test_slicer_s_labels_and_coordinates(tmp_path):
    points = [{"label": label, "position": [1, 2, 3]} for label in ("T2-1", "T2-1-2", "T2", "- T2-1 ", "T2_7")]
    content = slicer(*points, coordinateSystem="RAS")
    [marks] = read_prompts(write(tmp_path / "p.mrk.json", content), ["T2-1", "T2"]).values()
    # A class that ends in a number is found before the number is taken for Slicer's own.
    assert [(mark.class_name, mark.positive) for mark in marks] == [
        ("T2-1", True),
        ("T2-1", True),
        ("T2", True),
        ("T2-1", False),
        ("T2", True),
    ]
    assert {mark.coordinates for mark in marks} == {"world_ras"}


def test_a_folder_has_a_file_for_each_image(tmp_path):
    write(tmp_path / "a.json", [{"class": "liver", "voxel": [1, 2]}])
    write(tmp_path / "b.mrk.json", slicer({"label": "spleen", "position": [1, 2, 3]}))
    write(tmp_path / "notes.txt", "mine")
    found = read_prompts(tmp_path, CLASSES)
    assert found == {"a": [Mark("liver", "voxel", ((1, 2),))], "b": [Mark("spleen", "world_lps", ((1, 2, 3),))]}
    write(tmp_path / "c.json", {"d": []})
    with pytest.raises(UserError, match=r"c\.json is for the image 'd'"):
        read_prompts(tmp_path, CLASSES)


LIVER = {"class": "liver"}


@pytest.mark.parametrize(
    ("content", "naming"),
    [
        ("{", "is no JSON"),
        ('{"a": [], "a": []}', "'a' is there twice"),
        ("3", "is no file of prompts"),
        ({"a": {"class": "liver"}}, "is no file of prompts"),
        ([7], "entry 1 is no object"),
        ({"a": [{"class": "lung", "voxel": [1, 2, 3]}]}, "entry 1 of 'a': \"class\" is 'lung'; choose of: liver"),
        ([{"voxel": [1, 2, 3]}], '"class" is None'),
        ([LIVER | {"voxel": [1, 2, 3], "lable": 0}], "'lable'"),
        ([LIVER], "needs one of: voxel, world_ras, world_lps, box"),
        ([LIVER | {"voxel": [1, 2, 3], "world_ras": [1, 2, 3]}], "needs one of"),
        ([LIVER | {"voxel": [1]}], "takes three numbers"),
        ([LIVER | {"world_ras": [1, 2]}], "takes three numbers, in mm"),
        ([LIVER | {"voxel": [1, "2", 3]}], "not '2'"),
        ('[{"class": "liver", "voxel": [1, NaN, 3]}]', "not nan"),
        ([LIVER | {"voxel": [1, True, 3]}], "not True"),
        ([LIVER | {"voxel": [1, 10**400, 3]}], r"not 1000+$"),
        ([LIVER | {"voxel": [1, 2, 3], "label": 2}], '"label" is 2'),
        ([LIVER | {"voxel": [1, 2, 3], "label": 0.0}], '"label" is 0.0'),
        ([LIVER | {"box": [[1, 2, 3], [4, 5, 3]]}], "a box is"),
        ([LIVER | {"box": {"voxel": [[1, 2, 3]]}}], "two opposite corners"),
        ([LIVER | {"box": {"voxel": [[1, 2, 3], [4, 5, 3]]}, "label": 0}], "a box with label 0"),
        ({"markups": 3}, "no list of markups"),
        (slicer(type="Line"), "list 1 is a Line"),
        (slicer(coordinateSystem="IJK"), "'IJK'"),
        (slicer(coordinateUnits="um"), "is in um"),
        (slicer({"label": "F-1", "position": [1, 2, 3]}), "list 1, point 1: its label 'F-1' names no class"),
        (slicer({"label": "liver"}), r"point 1 \(liver\): world_lps takes three numbers"),
    ],
)
def test_files_that_do_not_follow(content, naming, tmp_path):
    path = write(tmp_path / "prompts.json", content)
    with pytest.raises(UserError, match=naming) as said:
        read_prompts(path, CLASSES)
    assert str(path) in str(said.value)
    assert "\n" not in str(said.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "prompts.json", CLASSES)
    with pytest.raises(UserError, match="has no prompts in it"):
        read_prompts(tmp_path, CLASSES)
