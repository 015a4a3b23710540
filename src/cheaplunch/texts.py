"""What is said of each class in words: texts to learn from, and texts held out for tests. Knows no model.

Free-text descriptions of each target, as Medical SAM Adapter §2.3 has them; they are in `texts.yaml` beside this file,
which is also the form of a file of the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cheaplunch.errors import UserError

SHIPPED = Path(__file__).with_name("texts.yaml")
UNIONS = 64  # texts of several classes that a run draws from
MOST_CLASSES = 3  # in one text

Texts = Mapping[str, tuple[str, ...]]
"""Class, as the data name it → what may be said of it."""


@dataclass(frozen=True)
class Union:
    """A text of several classes, which asks for all of them as one."""

    text: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Phrasings:
    """What is said of the classes of one dataset."""

    training: Texts
    """The first of a class is what it is called. Of every class, in the order of the data."""
    held_out: Texts
    """Never trained with."""
    unions: tuple[Union, ...] = ()
    """Trained with; none where there is one class."""

    @property
    def all(self) -> list[str]:
        each = [text for texts in (*self.training.values(), *self.held_out.values()) for text in texts]
        return list(dict.fromkeys([*each, *(union.text for union in self.unions)]))

    def names(self, classes: Iterable[str]) -> dict[str, str]:
        """Class → what it is called. UserError for one that was not learned."""
        return {name: self._of(name)[0] for name in classes}

    def tests(self, classes: Collection[str], draws: int) -> list[dict[str, str]]:
        """For each draw class → another of its texts that are held out, or where there are none of those trained with.

        UserError for a class that was not learned, or that has fewer texts.
        """
        texts = {name: self.held_out.get(name) or self._of(name) for name in classes}
        for name, own in texts.items():
            if draws > len(own):
                raise UserError(f"--draws {draws}: {name} has {len(own)} texts to be tested with; ask for no more")
        return [{name: own[draw] for name, own in texts.items()} for draw in range(draws)]

    def _of(self, name: str) -> tuple[str, ...]:
        if name not in self.training:
            raise UserError(f"there are no texts of the class {name}: the run has learned {', '.join(self.training)}")
        return self.training[name]


def read_phrasings(classes: Sequence[str], own: Path | None, rng: np.random.Generator) -> Phrasings:
    """The package's texts of these classes, after those of the user's `own` file; those of several come from `rng`.

    UserError where a file does not follow the form, where a text is trained with and held out, or says two classes.
    """
    files = [_read(path) for path in ([own] if own else []) + [SHIPPED]]
    if own is not None:
        unknown = sorted(files[0].described - {in_words(name) for name in classes})
        if unknown:
            raise UserError(f"{own}: the data have no class {unknown[0]!r}; they have {', '.join(classes)}")
    templates = [text for file in files for text in file.training.templates]
    held_templates = [text for file in files for text in file.held_out.templates]
    described, training, held_out = {}, {}, {}
    for name in classes:
        said = [text for file in files for text in file.training.classes.get(in_words(name), ())]
        described[name] = said = said or [in_words(name)]
        held = [text for file in files for text in file.held_out.classes.get(in_words(name), ())]
        # The name comes first, also where no template is the name alone.
        training[name] = _unique([said[0], *(_fill(t, said[0]) for t in templates), *said])
        held_out[name] = _unique([*held, *(_fill(t, said[0]) for t in held_templates)])
    unions = _unions(described, templates, rng)
    _check(training, held_out, unions)
    return Phrasings(training, held_out, unions)


def _unions(
    described: Mapping[str, Sequence[str]], templates: Sequence[str], rng: np.random.Generator
) -> tuple[Union, ...]:
    """Classes at random, two or three of them: their names in a template, or a description of each; no text twice."""
    classes, found = list(described), dict[str, Union]()
    if len(classes) < 2:
        return ()
    for _ in range(UNIONS):
        count = int(rng.integers(2, min(MOST_CLASSES, len(classes)) + 1))
        chosen = [classes[k] for k in rng.permutation(len(classes))[:count]]
        if templates and rng.random() < 0.5:
            text = _fill(_any_of(templates, rng), _listed([described[name][0] for name in chosen]))
        else:
            text = _listed([_any_of(described[name], rng) for name in chosen])
        found.setdefault(text, Union(text, tuple(chosen)))
    return tuple(found.values())


def _check(training: Texts, held_out: Texts, unions: Iterable[Union]) -> None:
    """Raises UserError where a text says two things, or would be tested with after all."""
    meant: dict[str, str] = {}
    for name, texts in training.items():
        for text in texts:
            if meant.setdefault(text, name) != name:
                raise UserError(f"the text {text!r} is of {meant[text]} and of {name}; give each its own (--text-file)")
    trained = {*meant, *(union.text for union in unions)}
    for name, texts in held_out.items():
        for text in texts:
            if text in trained:
                raise UserError(f"the text {text!r} of {name} is held out and trained with; leave one (--text-file)")


def _any_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def _fill(template: str, name: str) -> str:
    return template.replace("{name}", name)


def _listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def in_words(name: str) -> str:
    """A class's name in words: kidney_right → kidney right."""
    return " ".join(re.split(r"[\s_/-]+", name.lower())).strip()


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    templates: tuple[str, ...]
    classes: Texts


@dataclass(frozen=True)
class _File:
    training: _Part
    held_out: _Part

    @property
    def described(self) -> set[str]:
        return {*self.training.classes, *self.held_out.classes}


def _read(path: Path) -> _File:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--text-file {path} cannot be read ({error.strerror}); give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--text-file {path} is not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"--text-file {path} has no `classes:` with a list of texts for each class (docs/msa.md)")
    held_out = content.pop("held_out", {})
    return _File(_part(path, content), _part(path, held_out, "held_out: "))


def _part(path: Path, content: Any, where: str = "") -> _Part:
    if not isinstance(content, dict) or not isinstance(content.get("classes", {}), dict):
        raise UserError(f"--text-file {path}: {where}classes is a class → list of texts (docs/msa.md)")
    unknown = sorted(map(str, content.keys() - {"templates", "classes"}))
    if unknown:
        raise UserError(f"--text-file {path}: {where}{unknown[0]} is not known; write templates, classes or held_out")
    templates = _list(path, f"{where}templates", content.get("templates", []))
    for template in templates:
        if "{name}" not in template:
            raise UserError(f"--text-file {path}: the template {template!r} has no {{name}} in it; add it")
    classes = {
        in_words(str(name)): _list(path, f"{where}{name}", texts) for name, texts in content.get("classes", {}).items()
    }
    return _Part(templates, classes)


def _list(path: Path, where: str, texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"--text-file {path}: {where} is no list of texts; write `- a text` lines")
    return _unique(" ".join(text.split()) for text in texts)
