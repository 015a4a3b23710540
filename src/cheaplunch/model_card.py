"""What an exported network says about itself: the facts of its run, and the page that tells them.

Nothing of a patient and nothing of the machine: counts instead of cases, settings without paths.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from cheaplunch import __version__
from cheaplunch.config import RunConfig, as_values, setting_type
from cheaplunch.data.slices import Window
from cheaplunch.evaluation.tables import describe_prompts
from cheaplunch.models.backbones import ALIASES, BACKBONES, Backbone
from cheaplunch.models.heads import Head
from cheaplunch.pages import render
from cheaplunch.runs import RunFolder, read_json

HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
"""Licences of backbones, as the hub's cards call them; any other is "other"."""

_OUTPUTS = {
    "two": "background and target; the logit of the foreground is target - background",
    "single": "one mask, the logit of the foreground",
}
_NOT_TOLD = ("data", "device", "checkpoint_every", "tracker", "classes")


def describe_run(run: RunFolder, config: RunConfig, head: Head) -> dict[str, Any]:
    """Facts that travel with a network's file, in plain types: what it was trained on, and how to prepare an image."""
    classes, exemplars, cases = _read_exemplars(run.exemplars)
    window = config.data.window
    return {
        "cheaplunch": __version__,
        "method": config.method,
        "backbone": backbone_name(config),
        "outputs": _OUTPUTS[head],
        "classes": classes,
        "window": list(window) if window else {"percentiles": list(Window().percentiles)},
        "axis": config.data.axis,
        "data": _last_part(_environment(run).get("dataset") or "not named"),
        "exemplars": exemplars,
        "exemplar_cases": cases,
    }


def write_card(run: RunFolder, config: RunConfig, about: Mapping[str, Any], use: str, values: Mapping[str, Any]) -> str:
    """The model card, in Markdown; `use` names the template with the section on how to run it, filled from `values`."""
    backbone = BACKBONES.get(about["backbone"])
    environment = _environment(run)
    return render(
        "model_card.md.j2",
        {"figure": _figure, "cell": _cell},
        about=about,
        use=use,
        values=values,
        licence=HUB_LICENCES.get(backbone.licence, "other") if backbone else "other",
        backbone_licence=backbone.licence if backbone else "not known here; ask its publisher",
        trained_on=backbone.trained_on if backbone else "not known here",
        prompts=_prompts_before(backbone),
        settings=_settings(config),
        steps=config.training.steps,
        seed=config.seed,
        fingerprint=environment.get("data_fingerprint"),
        split=environment.get("split"),
        notes=environment.get("notes", []),
        evaluations=_evaluations(run.evaluations),
    )


def backbone_name(config: RunConfig) -> str:
    """A backbone's name or hub id; of a folder only that it is one."""
    name = ALIASES.get(config.model.backbone, config.model.backbone)
    if name in BACKBONES or (name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()):
        return name
    return "a local transformers folder"


def _prompts_before(backbone: Backbone | None) -> str:
    return backbone.prompts if backbone else "as its publisher says"


def _read_exemplars(path: Path) -> tuple[list[str], int, int]:
    """Class names, how many slices, and of how many cases."""
    if not path.is_file():
        return [], 0, 0
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        rows = list(lines)
    classes = [name.removesuffix("_px") for name in lines.fieldnames or () if name.endswith("_px")]
    return classes, len(rows), len({row["case"] for row in rows})


def _environment(run: RunFolder) -> dict[str, Any]:
    return read_json(run.environment) if run.environment.is_file() else {}


def _settings(config: RunConfig) -> dict[str, Any]:
    """Setting → value; of a path only whether one was given."""
    values = {name: value for name, value in as_values(config).items() if name not in (*_NOT_TOLD, "method", "seed")}
    values["backbone"] = backbone_name(config)
    return {name: _told(name, value) for name, value in values.items()}


def _told(name: str, value: Any) -> Any:
    if value is None:
        return "–"
    if setting_type(name) is Path:
        return "a local one"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `evaluate` left in the run: per protocol and kind of prompts the figures, without the cases."""
    found = []
    for path in sorted(folder.glob("*/fine-tuned.json")):
        tuned, before = read_json(path), path.with_name("zero-shot.json")
        found.append(
            {
                "tuned": {name: value for name, value in tuned.items() if name != "cases"},
                "zero_shot": read_json(before)["mean"] if before.is_file() else None,
                "prompts": describe_prompts(tuned["prompts"], tuned["oracle_prompts"]),
            }
        )
    return found


def _last_part(name: str) -> str:
    """A data set's name, were it a path: what it ends in."""
    return PureWindowsPath(name).name or name


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(text: object) -> str:
    """Text in one line of Markdown, in a table too; an apostrophe would be escaped as in HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("'", "’")
