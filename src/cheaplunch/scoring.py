"""A model over the test cases: predict, write the masks, score them by a protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cheaplunch import processes
from cheaplunch.config import PromptKind, RunConfig
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import Dataset, open_dataset
from cheaplunch.data.slices import Window, from_slices
from cheaplunch.data.volume import write_mask
from cheaplunch.errors import UserError
from cheaplunch.evaluation.protocols import score_labels
from cheaplunch.evaluation.tables import CaseScore, summarise
from cheaplunch.material import pick_window
from cheaplunch.models.segmenter import Segmenter
from cheaplunch.prediction import Predictor, segment_with_oracle
from cheaplunch.runtime import Precision
from cheaplunch.synthesis import derive_seed


@dataclass(frozen=True)
class Assessment:
    """How a model is put to the test."""

    data: Path
    prompts: PromptKind = "furthest"
    protocol: str = "strict"
    box_margin_px: float = 0.0
    nsd_tolerance: float = 2.0
    """mm under `strict`, voxels under `paper`."""
    seed: int = 0


def open_for_scoring(config: RunConfig, assessment: Assessment) -> tuple[Dataset, Window]:
    """The data to be tested on, seen through the run's window."""
    dataset = open_dataset(assessment.data)
    return dataset, pick_window(config, dataset)


def zero_shot_of(config: RunConfig) -> RunConfig:
    """The same network, weights, input size and window as `config`'s, with nothing trained."""
    return replace(config, method="zero-shot", model=replace(config.model, tuning="none"))


def assess(
    segmenter: Segmenter,
    config: RunConfig,
    assessment: Assessment,
    precision: Precision,
    masks: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Predicts every labelled test case into `masks` and returns the JSON of DESIGN §1.

    Scores are of the merged label maps as written. Under `accelerate launch` or `torchrun` the processes share the
    cases and each returns the whole. `progress` is told (cases done, of how many) of this process.
    """
    dataset, window = open_for_scoring(config, assessment)
    cases = [case for case in dataset.split("test") if case.label is not None]
    if not cases:
        raise UserError(f"--data {assessment.data} has no labelled test case; add imagesTs and labelsTs")
    predictor = Predictor(segmenter, precision)
    masks.mkdir(parents=True, exist_ok=True)
    on_cpu = predictor.device.type == "cpu"
    group = processes.join(on_cpu)
    mine = cases[group.process_index :: group.num_processes]
    rows: list[CaseScore] = []
    unit = "mm"
    for done, case in enumerate(mine, start=1):
        loaded = load_case(case, dataset, window, config.data.axis)
        rng = np.random.default_rng(derive_seed(assessment.seed, "prompts", case.id))
        predicted = segment_with_oracle(predictor, loaded, assessment.prompts, rng, assessment.box_margin_px)
        predicted = from_slices(predicted, config.data.axis)  # (Z, Y, X)
        truth = from_slices(loaded.label, config.data.axis)  # pyright: ignore[reportArgumentType]
        write_mask(predicted, loaded.volume, masks / case.mask_name)
        scores = score_labels(
            predicted,
            truth,
            dataset.labels,
            loaded.volume.spacing,
            protocol=assessment.protocol,
            nsd_tolerance=assessment.nsd_tolerance,
        )
        unit = loaded.volume.unit
        rows += [CaseScore(case.id, name, score) for name, score in scores.items()]
        if progress is not None:
            progress(done, len(mine))
    place = {case.id: number for number, case in enumerate(cases)}
    rows = sorted(processes.gather(rows, on_cpu), key=lambda row: place[row.case_id])
    return summarise(
        rows,
        protocol=assessment.protocol,
        prompts=assessment.prompts,
        oracle_prompts=True,
        backbone=config.model.backbone,
        method=config.method,
        unit=unit,
        nsd_tolerance=assessment.nsd_tolerance,
        patients={case.id: case.patient for case in cases},
        rng=np.random.default_rng(derive_seed(assessment.seed, "bootstrap")),
    )
