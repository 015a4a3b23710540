"""What is said of each class: the shipped texts, the user's own, texts of several classes, and what is held out."""

import numpy as np
import pytest
import yaml

from cheaplunch.data.recipes import RECIPES
from cheaplunch.errors import UserError
from cheaplunch.texts import MOST_CLASSES, SHIPPED, UNIONS, Phrasings, in_words, read_phrasings


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_class_of_the_papers_data_is_described():
    described = {in_words(name) for name in yaml.safe_load(SHIPPED.read_text())["classes"]}
    classes = {name for recipe in RECIPES for name in recipe.labels}
    assert {in_words(name) for name in classes} <= described
    assert {"anterior", "posterior", "liver", "kidney left", "right kidney", "spleen", "tumour"} <= described


def test_a_class_is_found_whatever_its_spelling_and_one_unknown_has_its_name():
    texts = read_phrasings(["Kidney_Right", "islet-cells"], None, rng()).training
    assert texts["Kidney_Right"][0] == "right kidney"
    assert "the bean-shaped organ at the right of the spine" in texts["Kidney_Right"]
    assert "segment the right kidney" in texts["Kidney_Right"]
    assert texts["islet-cells"][:2] == ("islet cells", "the islet cells")


def test_what_is_held_out_is_never_trained_with():
    phrasings = read_phrasings(["anterior", "posterior"], None, rng())
    assert phrasings == read_phrasings(["anterior", "posterior"], None, rng())  # no chance in it but the generator's
    held = {text for texts in phrasings.held_out.values() for text in texts}
    trained = {text for texts in phrasings.training.values() for text in texts}
    assert held and not held & (trained | {union.text for union in phrasings.unions})
    assert "please show me the anterior hippocampus" in phrasings.held_out["anterior"]
    asked = phrasings.tests(["posterior", "anterior"], 2)
    assert [list(one) for one in asked] == [["posterior", "anterior"]] * 2
    assert [one["anterior"] for one in asked] == list(phrasings.held_out["anterior"][:2])
    with pytest.raises(UserError, match="--draws 9: posterior has 3 texts"):
        phrasings.tests(["posterior", "anterior"], 9)
    with pytest.raises(UserError, match="no texts of the class spleen: the run has learned anterior, posterior"):
        phrasings.tests(["spleen"], 1)


def test_where_nothing_is_held_out_the_texts_of_training_are_asked_with():
    assert Phrasings({"a": ("one", "two")}, {"a": ()}).tests(["a"], 2) == [{"a": "one"}, {"a": "two"}]


def test_texts_of_several_classes_name_each_of_them():
    phrasings = read_phrasings(["liver", "spleen", "stomach"], None, rng())
    described = yaml.safe_load(SHIPPED.read_text())["classes"]
    assert len(phrasings.unions) > UNIONS / 2
    for union in phrasings.unions:
        assert 2 <= len(set(union.classes)) == len(union.classes) <= MOST_CLASSES
        assert all(any(text in union.text for text in described[name]) for name in union.classes)
    joined = {union.text for union in phrasings.unions}
    assert any(text.startswith("segment the ") and ", " in text and " and " in text for text in joined)
    assert read_phrasings(["liver"], None, rng()).unions == ()


def test_the_users_own_come_first(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "templates: ['a slice of {name}']\nclasses: {Liver: [hepar]}\n"
        "held_out: {classes: {liver: ['the hepar, if you please']}}\n"
    )
    phrasings = read_phrasings(["liver", "spleen"], own, rng())
    assert phrasings.training["liver"][:2] == ("hepar", "a slice of hepar")
    assert "all lobes of the liver" in phrasings.training["liver"]
    assert phrasings.held_out["liver"][0] == "the hepar, if you please"
    assert "a slice of spleen" in phrasings.training["spleen"]


@pytest.mark.parametrize(
    ("content", "naming"),
    [
        ("classes: [liver]", "classes is a class → list of texts"),
        ("- liver", "has no `classes:`"),
        ("classes: {liver: hepar}", "liver is no list of texts"),
        ("held_out: {classes: {liver: ['']}}", "held_out: liver is no list of texts"),
        ("classes: {lung: [breath]}", "the data have no class 'lung'; they have liver, spleen"),
        ("templates: [a slice]", r"the template 'a slice' has no \{name\} in it"),
        ("texts: []", "texts is not known"),
        ("classes: {liver: [", "is not valid YAML"),
        ("classes: {liver: [spleen]}", "the text 'spleen' is of liver and of spleen"),
        ("held_out: {classes: {liver: [all lobes of the liver]}}", "is held out and trained with"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, content, naming):
    own = tmp_path / "own.yaml"
    own.write_text(content)
    with pytest.raises(UserError, match=naming) as raised:
        read_phrasings(["liver", "spleen"], own, rng())
    assert "\n" not in str(raised.value) and "text-file" in str(raised.value) or str(own) in str(raised.value)
