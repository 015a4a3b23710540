"""Tables of trained models on real data, a data set at a time, in pieces that go on where they stopped.

few-exemplars  Cheap Lunch with and without synthesis from few slices and many, the full set, and the weights untuned,
               all with the same steps (one image each) at the same input size, one point a class and slice. "Without"
               still moves and varies the exemplars as wholes; with the fewest, a third row does not even do that.
targets        Cheap Lunch with the most exemplars of that list and steps for some fifteen minutes of two cores.
longer         the rows with the fewest exemplars again, with three times the steps, where overfitting would show.

Every row is fine-tuned and scored on the test cases in this process and written, case by case, as soon as it is done;
rows that the JSON holds are not done again. The table, made by `compare`, is written beside it after each row. Nothing
is chosen on these cases: the settings stand in this file. Seconds of training are told, but other jobs may have run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, arguments, console, machine, progress, slug, versions

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.evaluation.comparison import compare
from cheaplunch.evaluation.evaluations import Run, mean_of_runs
from cheaplunch.evaluation.formats import markdown
from cheaplunch.files import write_text
from cheaplunch.models.segmenter import build_segmenter, load_segmenter
from cheaplunch.prompting import Prompting
from cheaplunch.scoring import Assessment, assess
from cheaplunch.training import finetune

BUDGET = {"steps": 160, "warmup_steps": 16, "image_size": 112}
EXEMPLARS = {"hippocampus": (1, 5, 9, 36), "chaos": (1, 5, 10), "lgg": (3, 9, 45)}
THREE = (0, 1, 2)  # seeds
AS_THEY_ARE = {"real_share": 1.0, "rotation_deg": 0, "scale": 0, "shift": 0, "blur_px": 0, "intensity": 0}


@dataclass(frozen=True)
class Trained:
    """A row of a table: one model, or the mean of several that differ by their seed."""

    label: str
    method: str = "cheap-lunch"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    prompts: Prompting = Prompting()


def few_exemplars(dataset: str) -> list[Trained]:
    """Three seeds everywhere on hippocampus, elsewhere for the rows with the fewest exemplars."""
    counts = EXEMPLARS[dataset]
    everywhere = dataset == "hippocampus"
    rows = [Trained("untuned", "zero-shot", {"image_size": BUDGET["image_size"]})]
    for count in counts:
        rows += ways(count, BUDGET, THREE if everywhere or count == counts[0] else (0,), count == counts[0])
    return [*rows, Trained("full set", "full-set", BUDGET, THREE if everywhere else (0,))]


def longer(dataset: str) -> list[Trained]:
    return ways(EXEMPLARS[dataset][0], {**BUDGET, "steps": 480, "warmup_steps": 48}, (0,), True)


def ways(count: int, settings: Mapping[str, Any], seeds: tuple[int, ...], all_three: bool) -> list[Trained]:
    """With and without synthesis, and with `all_three` also the exemplars as they are."""
    named = {"nothing moved or varied": AS_THEY_ARE} if all_three else {}
    named |= {"without synthesis": {"real_share": 1.0}, "with synthesis": {}}
    said = f"{count} exemplar{'' if count == 1 else 's'}"
    return [
        Trained(f"{said}, {words}", "cheap-lunch", {**settings, "exemplars": count, **way}, seeds)
        for words, way in named.items()
    ]


def targets(dataset: str) -> list[Trained]:
    """The default settings but for the steps, which are fewer where the input is larger."""
    count = EXEMPLARS[dataset][-1]
    steps = {"hippocampus": 800, "chaos": 400, "lgg": 400}[dataset]
    settings = {"exemplars": count, "steps": steps, "warmup_steps": steps // 10}
    return [Trained(f"{count} exemplars, {steps} steps", "cheap-lunch", settings)]


TABLES = {"few-exemplars": few_exemplars, "longer": longer, "targets": targets}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="hippocampus, chaos or lgg")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs there (default: thrown away)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="these alone (default: all of the table's)")
    parser.set_defaults(out=None)
    options = parser.parse_args()
    runtime.keep_freed_memory()
    runtime.use_cores()
    rows = TABLES[options.table](options.data.name)
    out = options.out or HERE / "results" / f"{options.table}-{options.data.name}-{slug()}.json"
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else {}
    seeds = options.seeds or sorted({seed for row in rows for seed in row.seeds})
    plan = [(row, seed) for seed in seeds for row in rows if seed in row.seeds]
    for row, seed in progress([(row, seed) for row, seed in plan if place(row, seed) not in found], options.table):
        found[place(row, seed)] = scored(row, seed, options)
        write(out, options, found)
        write_text(table(rows, found), out.with_suffix(".md"))
    console.print(f"written: {out} and {out.with_suffix('.md').name}")


def place(row: Trained, seed: int) -> str:
    return f"{row.label}, seed {seed}"


def scored(row: Trained, seed: int, options: Namespace) -> dict[str, Any]:
    """The evaluation of a model trained now, with what its training took."""
    config = build_config(row.method, {**row.settings, "data": options.data, "seed": seed})
    device = runtime.pick_device(config.device)
    precision = runtime.pick_precision(config.training.precision, device)
    assessment = Assessment(options.data, row.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        facts: dict[str, Any] = {}
        if config.model.tuning == "none":
            segmenter = build_segmenter(config.model)
        else:
            where = options.work / place(row, seed).replace(", ", "-").replace(" ", "-") if options.work else None
            run = finetune(config, where or Path(scratch) / "run", resume=bool(where and where.exists()))
            config = run.load_config()
            said = json.loads(run.environment.read_text(encoding="utf-8"))
            facts = {name: said[name] for name in ("training_seconds", "trained_parameters", "peak_memory_bytes")}
            steps = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
            last = steps[-len(steps) // 4 :]
            facts["loss_of_last_quarter"] = sum(step["loss"] for step in last) / len(last)
            shutil.rmtree(run.checkpoint, ignore_errors=True)
            segmenter = load_segmenter(config.model, run.adapter)
        result = assess(segmenter.to(device), config, assessment, precision, Path(scratch) / "masks")["strict"]
    kept = ("id", "patient", "class", "dice", "hd95", "iou", "nsd")
    cases = [{name: shortened(case[name]) for name in kept if name in case} for case in result["cases"]]
    return {**result, **facts, "seed": seed, "cases": cases}


def shortened(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def write(out: Path, options: Namespace, found: Mapping[str, Any]) -> None:
    """A line a row: the file is read by people, and differs by the rows that came."""
    settings = {"table": options.table, "data": options.data.name}
    lines = [f"  {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in found.items()]
    head = {"machine": machine(), "versions": versions(), "settings": settings}
    body = json.dumps(head, indent=2)[:-2] + ',\n  "rows": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    write_text(body, out)


def table(rows: list[Trained], found: Mapping[str, Any]) -> str:
    """By `compare`; a row of which some seeds are there is the mean of those."""
    runs = []
    for row in rows:
        there = {place(row, seed): found[place(row, seed)] for seed in row.seeds if place(row, seed) in found}
        if there:
            result = mean_of_runs(there) if len(there) > 1 else next(iter(there.values()))
            runs.append(Run(row.label, row.label, result))
    return markdown(compare(runs, tables=[]))


if __name__ == "__main__":
    main()
