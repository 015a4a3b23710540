"""Which slices to label, which to train on, and which are background (Cheap Lunch §3.2)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cheaplunch.data.index import SliceArea, SliceIndex
from cheaplunch.errors import UserError

Strategy = Literal["auto", "spread", "most-classes", "random", "all"]

MIN_FOREGROUND_PX = 10  # §3.1: BraTS slices count as tumour slices from ten pixels on
MIN_APART = 0.1  # of the slices of a volume that can be exemplars: nearer ones show nearly the same


@dataclass(frozen=True, order=True)
class SliceKey:
    """One slice of one case, numbered from 0 along the axis in use."""

    case_id: str
    slice_number: int


def pick_exemplars(
    index: SliceIndex,
    count: int,
    strategy: Strategy,
    rng: np.random.Generator,
    volumes: Mapping[str, str] | None = None,
) -> list[SliceKey]:
    """`count` slices of `index` to learn from; raises UserError where there are not so many to choose from.

    The paper takes `most-classes` where there are several classes and `random` where there is one. `auto` is
    `spread`, which taught more from as few slices on training cases held out (docs/choices.md), and `most-classes`
    for a single one, which has to show them all. A slice with pixels that nobody decided on is never taken. `all`
    takes every other slice that is worth it, whatever `count`.

    `volumes` gives case id → volume where a case may be a single slice of one: `most-classes` looks for the fullest
    slice of each volume.
    """
    worth = _worth(index)
    if strategy == "all":
        return sorted(_key(index.slices[i]) for i in worth)
    if len(worth) < count:
        raise UserError(
            f"--exemplars {count}: only {len(worth)} training slices have {MIN_FOREGROUND_PX} px of foreground; "
            "ask for fewer or label more"
        )
    if strategy == "random":
        chosen = sorted(rng.choice(worth, size=count, replace=False).tolist())
        return [_key(index.slices[i]) for i in chosen]
    if strategy == "most-classes" or (strategy == "auto" and count == 1):
        chosen = _most_classes(index, worth, count, rng, volumes or {})
    else:
        chosen = _spread(index, worth, count, rng)
    return sorted(_key(index.slices[i]) for i in chosen)


def _spread(index: SliceIndex, worth: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Slices at evenly spread shares of the foreground, from as many volumes as there are.

    The i-th of N comes from the i-th volume of a random order: the slice in which, from below, (i + ½) / N of the
    volume's foreground has been passed, every class measured against its own largest area. So the ends of organs are
    seen as well as their middles, and large slices, where most of an organ lies, more often than small ones. A class
    that this misses takes its largest slice, in place of the slice whose classes are shown most often.
    """
    part = (index.area_px / np.maximum(index.area_px.max(axis=0), 1)).sum(axis=1)  # (N,)
    by_case = _by_case(index, worth)
    order = rng.permutation(sorted(by_case)).tolist()
    shares = (rng.permutation(count) + 0.5) / count
    chosen: list[int] = []
    for turn, share in enumerate(shares):
        slices = [i for i in by_case[order[turn % len(order)]] if i not in chosen]
        slices = slices or [i for i in worth if i not in chosen]
        passed = np.cumsum(part[slices])
        chosen.append(slices[int(np.searchsorted(passed, share * passed[-1], side="right"))])
    decided = np.array([not s.ignored_px for s in index.slices])
    shown = (index.area_px > 0) & decided[:, None]
    for k in np.flatnonzero(shown.any(axis=0) & ~shown[chosen].any(axis=0)):
        times = shown[chosen].sum(axis=0)
        spare = max(range(count), key=lambda n: min(times[shown[chosen[n]]]))
        chosen[spare] = int(np.argmax(index.area_px[:, k] * decided))
    return chosen


def _most_classes(
    index: SliceIndex, worth: Sequence[int], count: int, rng: np.random.Generator, volumes: Mapping[str, str]
) -> list[int]:
    """From each of `count` random volumes the slice with the most classes; then a second from each, and so on.

    A single one comes from a volume that has a slice of as many classes as any, since it has to show them all.
    Ties go to the larger area, every class measured against its own largest so that a liver does not outvote a
    kidney. Two slices of one volume are never neighbours and at least `MIN_APART` of its candidates apart, or as far
    as they can be where that is too far.
    """
    largest = np.maximum(index.area_px.max(axis=0), 1)
    by_case = _by_case(index, worth, volumes)

    def merit(i: int) -> tuple[int, float]:
        return int((index.area_px[i] > 0).sum()), float((index.area_px[i] / largest).sum())

    order = rng.permutation(sorted(by_case)).tolist()
    if count == 1:
        most = max(merit(i)[0] for i in worth)
        order = [case for case in order if any(merit(i)[0] == most for i in by_case[case])]
    chosen: dict[str, list[int]] = {case: [] for case in order}
    while sum(map(len, chosen.values())) < count:
        for case in order:
            if sum(map(len, chosen.values())) == count:
                break
            left = [i for i in by_case[case] if i not in chosen[case]]
            if chosen[case] and left:
                apart = {i: min(abs(i - taken) for taken in chosen[case]) for i in left}
                enough = min(max(2, MIN_APART * len(by_case[case])), max(apart.values()))
                left = [i for i in left if apart[i] >= enough]
            if left:
                chosen[case].append(max(left, key=merit))
    return [i for picked in chosen.values() for i in picked]


def count_of_percent(index: SliceIndex, percent: float) -> int:
    """So many per cent of the slices that can be exemplars, at least one (§3.2: 0.5, 1 and 3 % of BraTS)."""
    return max(1, round(len(_worth(index)) * percent / 100))


def _worth(index: SliceIndex) -> list[int]:
    """Slices that can be exemplars: foreground enough, and no pixel that nobody decided on."""
    areas = zip(index.slices, index.area_px.sum(axis=1), strict=True)
    return [i for i, (s, area) in enumerate(areas) if area >= MIN_FOREGROUND_PX and not s.ignored_px]


def _by_case(index: SliceIndex, worth: Sequence[int], volumes: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """Slices of each case, or of each volume where `volumes` says that a case is a part of one."""
    by_case: dict[str, list[int]] = {}
    for i in worth:
        case = index.slices[i].case_id
        by_case.setdefault((volumes or {}).get(case, case), []).append(i)
    return by_case


def require_every_class(index: SliceIndex, exemplars: Iterable[SliceKey], source: str) -> None:
    """Raises UserError naming the classes that no exemplar shows: they could not be learned."""
    areas = {_key(area): area.area_px for area in index.slices}
    shown = np.sum([areas[key] for key in exemplars], axis=0)
    absent = [name for name, area in zip(index.labels, shown, strict=True) if not area]
    if absent:
        raise UserError(
            f"{source}: no exemplar shows {', '.join(absent)}; "
            "ask for more exemplars, or name slices that show every class with --exemplar-file"
        )


def background_slices(index: SliceIndex) -> list[SliceKey]:
    """Slices none of whose pixels are foreground (§2.1: "without organs or tumors"), or may be."""
    return [_key(area) for area in index.slices if not area.has_foreground and not area.ignored_px]


def write_exemplars(path: Path, index: SliceIndex, exemplars: Iterable[SliceKey]) -> None:
    """CSV: case, slice, and the area of every class in px, for the reader."""
    areas = {_key(area): area.area_px for area in index.slices}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "slice", *(f"{name}_px" for name in index.labels)])
        for key in exemplars:
            writer.writerow([key.case_id, key.slice_number, *areas[key]])


def read_exemplars(path: Path, index: SliceIndex) -> list[SliceKey]:
    """The slices that a CSV with at least the columns `case` and `slice` names, all of which must be in `index`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exemplar-file {path} cannot be read: {error}") from error
    known = {_key(area): area for area in index.slices}
    chosen = []
    for line, row in rows:
        try:
            key = SliceKey(row["case"], int(row["slice"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}, line {line}: needs the columns case and slice (a whole number)") from None
        if key not in known:
            raise UserError(f"{path}, line {line}: there is no slice {key.slice_number} of {key.case_id} in training")
        if not known[key].has_foreground:
            shows = f"slice {key.slice_number} of {key.case_id} shows no class"
            raise UserError(f"{path}, line {line}: {shows}; leave it out")
        if known[key].ignored_px:
            where = f"slice {key.slice_number} of {key.case_id}"
            raise UserError(
                f"{path}, line {line}: {where} has pixels labelled to be ignored; label them or leave it out"
            )
        chosen.append(key)
    if not chosen:
        raise UserError(f"--exemplar-file {path} names no slice; add lines of case,slice")
    return sorted(set(chosen))


def _key(area: SliceArea) -> SliceKey:
    return SliceKey(area.case_id, area.slice_number)
