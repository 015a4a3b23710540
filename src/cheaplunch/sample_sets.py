"""A synthesized set on the disk: written once as an nnU-Net raw folder of pictures, trained from as often as wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cheaplunch.config import SynthesisConfig
from cheaplunch.errors import UserError
from cheaplunch.files import write_json
from cheaplunch.synthesis import Batch, Pool, synthesize

RECORD = "synthesis.json"
_TOGETHER = 16  # samples made in one go


def write_samples(
    folder: Path,
    pool: Pool,
    count: int,
    config: SynthesisConfig,
    seed: int,
    names: Sequence[str],
    origin: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The first `count` samples as an nnU-Net raw folder of PNG: 8-bit images, labels 1…K named `names`.

    One or three channels are one picture each; other numbers of channels become a picture a channel. What the samples
    follow from, `origin`, goes into RECORD with all that `open_samples` needs; it comes last, once the set is whole.
    """
    channels = pool.images.shape[1]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    sizes: list[list[int]] = []
    for start in range(0, count, _TOGETHER):
        indices = range(start, min(start + _TOGETHER, count))
        batch = synthesize(pool, indices, config, seed)
        images = (batch.images * 255).round().to(torch.uint8).cpu()  # (B, C, S, S)
        for index, pixels, label in zip(indices, images, batch.labels.cpu(), strict=True):
            planes = [pixels.permute(1, 2, 0)] if channels == 3 else list(pixels)
            *pictures, mask = _sample_files(folder, index, channels)
            for path, plane in zip(pictures, planes, strict=True):
                Image.fromarray(plane.numpy()).save(path)
            Image.fromarray(label.numpy()).save(mask)
            if progress is not None:
                progress(index + 1, count)
        sizes += batch.sizes.tolist()
    about = {
        "name": "synthetic",
        "channel_names": {str(channel): f"channel {channel}" for channel in range(channels)},
        "labels": {"background": 0, **{name: number for number, name in enumerate(names, start=1)}},
        "numTraining": count,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    record = {
        "origin": origin,
        "seed": seed,
        "channels": channels,
        "sizes_px": sizes,
        "pictures_sha256": _hash_pictures(folder, count, channels),
    }
    write_json(record, folder / RECORD)


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """A set that `write_samples` left on the disk."""

    folder: Path
    origin: dict[str, Any]
    channels: int
    sizes: Tensor
    """(M, 2) as in Batch."""

    def load(self, indices: Sequence[int]) -> Batch:
        """Samples by number, as `synthesize` would give them but for their 8 bits."""
        images, labels = [], []
        for index in indices:
            *pictures, mask = (
                np.asarray(Image.open(path)) for path in _sample_files(self.folder, index, self.channels)
            )
            planes = np.moveaxis(pictures[0], 2, 0) if self.channels == 3 else np.stack(pictures)  # (C, S, S)
            images.append(torch.from_numpy(planes.astype(np.float32) / 255))
            labels.append(torch.from_numpy(mask.copy()))
        return Batch(torch.stack(images), torch.stack(labels), self.sizes[list(indices)])


def open_samples(folder: Path) -> StoredSamples:
    """The set in `folder`, every picture of which is as it was written; UserError where one is not, or is missing."""
    anew = "make the set anew with `cheaplunch synthesize`"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        stored = StoredSamples(folder, record["origin"], record["channels"], torch.tensor(record["sizes_px"]))
        found, written = _hash_pictures(folder, len(stored.sizes), stored.channels), record["pictures_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else f"a damaged {RECORD}"
        raise UserError(f"--synthetic-set {folder} has {what}; {anew}") from error
    if found != written:
        raise UserError(f"--synthetic-set {folder}: its pictures are not those that were written; {anew}")
    return stored


def _sample_files(folder: Path, index: int, channels: int) -> list[Path]:
    """The pictures of a sample, its label last."""
    pictures = 1 if channels == 3 else channels
    images = [folder / "imagesTr" / f"synthetic_{index:05d}_{channel:04d}.png" for channel in range(pictures)]
    return [*images, folder / "labelsTr" / f"synthetic_{index:05d}.png"]


def _hash_pictures(folder: Path, count: int, channels: int) -> str:
    whole = hashlib.sha256()
    for index in range(count):
        for path in _sample_files(folder, index, channels):
            whole.update(path.read_bytes())
    return whole.hexdigest()
