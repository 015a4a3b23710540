"""Tables of trained models on real data, a data set at a time, in pieces that go on where they stopped.

few-exemplars  Cheap Lunch with and without synthesis from few slices and many, the full set, and the weights untuned,
               all with the same steps (one image each) at the same input size, one point a class and slice. "Without"
               still moves and varies the exemplars as wholes; with the fewest, a third row does not even do that.
targets        Cheap Lunch with the most exemplars of that list and steps for some fifteen minutes of two cores.
mild           the rows with the fewest exemplars and the most again, with brightness and sharpness hardly varied: what
               is pasted keeps its contrast to what it is pasted on.
longer         the rows with the fewest exemplars again, with three times the steps, where overfitting would show.
methods        every method on the same few exemplars and on all training slices: all of them on hippocampus, six on the
               others. SAM's learn from as many images at the same input size, a step being four where the method says
               so; the plain networks have a budget of their own, to their plateau. Prompted and automatic stay apart.
msa            Medical SAM Adapter part by part on hippocampus beside LoRA, asked with one, three and five clicks, the
               first at random; on other data the parts together. All learn from whole exemplars, as the depth branch
               has to. Rows called "pretrained" start from --pretrained, made of the same data by `cheaplunch pretrain`.

Every row is fine-tuned and scored on the test cases in a process of its own, so that its peak of memory is its own, and
written, case by case, as soon as it is done; rows that the JSON holds are not done again. The table, made by `compare`,
and what training took are written beside it after each row. Nothing is chosen on these cases: the settings stand in
this file. Seconds of training are told, but other jobs may have run.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import HERE, arguments, console, machine, progress, slug, versions

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.evaluation.comparison import compare
from cheaplunch.evaluation.evaluations import Run, mean_of_runs
from cheaplunch.evaluation.formats import markdown
from cheaplunch.files import write_text
from cheaplunch.methods import METHODS
from cheaplunch.models.segmenter import build_segmenter, load_segmenter
from cheaplunch.prompting import Prompting
from cheaplunch.runs import RunFolder
from cheaplunch.scoring import Assessment, assess
from cheaplunch.training import finetune

BUDGET = {"steps": 160, "warmup_steps": 16, "image_size": 112}
EXEMPLARS = {"hippocampus": (1, 5, 9, 36), "chaos": (1, 5, 10), "lgg": (3, 9, 45)}
THREE = (0, 1, 2)  # seeds
AS_THEY_ARE = {"real_share": 1.0, "rotation_deg": 0, "scale": 0, "shift": 0, "blur_px": 0, "intensity": 0}

MILD = {"intensity": 0.05, "blur_px": 0.3}
PRETRAINED = "--pretrained"  # in place of the weights that this flag names


@dataclass(frozen=True)
class Trained:
    """A row of a table: one model, or the mean of several that differ by their seed."""

    label: str
    method: str = "cheap-lunch"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    prompts: tuple[Prompting, ...] = (Prompting(),)
    """Each is a row of figures for one training."""


def few_exemplars(dataset: str) -> list[Trained]:
    """Three seeds everywhere on hippocampus, elsewhere for the rows with the fewest exemplars."""
    counts = EXEMPLARS[dataset]
    everywhere = dataset == "hippocampus"
    rows = [Trained("untuned", "zero-shot", {"image_size": BUDGET["image_size"]})]
    for count in counts:
        rows += ways(count, BUDGET, THREE if everywhere or count == counts[0] else (0,), count == counts[0])
    return [*rows, Trained("full set", "full-set", BUDGET, THREE if everywhere else (0,))]


def mild(dataset: str) -> list[Trained]:
    fewest, most = EXEMPLARS[dataset][0], EXEMPLARS[dataset][-1]
    settings = {**BUDGET, **MILD}
    return [*ways(fewest, settings, THREE, False), *ways(most, settings, (0,), False)]


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
    """The default settings but for the steps, which are fewer where the input is larger; then other ways."""
    count = EXEMPLARS[dataset][-1]
    steps = {"hippocampus": 800, "chaos": 400, "lgg": 400}[dataset]
    settings = {"exemplars": count, "steps": steps, "warmup_steps": steps // 10}
    rows = [Trained(f"{count} exemplars, {steps} steps", "cheap-lunch", settings)]
    if dataset == "hippocampus":  # these as held-out cases preferred (docs/choices.md)
        rows.append(Trained(f"{rows[0].label}, rank 16", "cheap-lunch", {**settings, "lora_rank": 16}))
    if dataset == "lgg":
        settings = {"exemplars": count, "steps": 800, "warmup_steps": 80, "image_size": 112, **MILD}
        rows.append(Trained(f"{count} exemplars, 800 steps at 112 px, hardly varied", "cheap-lunch", settings))
    return rows


FURTHEST, BOX, AUTO = Prompting(), Prompting("box"), Prompting("auto")
FIVE = (Prompting("clicks", 5),)
PROMPTED = {  # and how each is asked: as it was trained
    "cheap-lunch": (FURTHEST,),
    "medsam": (BOX,),
    "msa": (FURTHEST, Prompting("clicks", 3)),
    "decoder-only": (FURTHEST,),
    "lora-encoder-only": (FURTHEST,),
}
PROMPT_FREE = ("samed", "samed-s", "linear-probe")
PLAIN = {"unet": 2000, "attention-unet": 2000, "segresnet": 1000, "unetr": 600, "swin-unetr": 600, "transunet": 600}
PLAIN_3D = {"unet-3d": 300, "attention-unet-3d": 900, "segresnet-3d": 200, "unetr-3d": 200, "swin-unetr-3d": 150}
TELLING = ("cheap-lunch", "medsam", "msa", "samed", "unet", "attention-unet")
CONTROLS = ("samed-s", "linear-probe", "decoder-only", "lora-encoder-only")  # with few exemplars alone


def methods(dataset: str) -> list[Trained]:
    """Few exemplars first. The plain networks see hippocampus at about its own resolution, as nnU-Net would; the
    other sets need more pixels, and so get fewer steps."""
    names = (*PROMPTED, *PROMPT_FREE, *PLAIN, *PLAIN_3D) if dataset == "hippocampus" else TELLING
    exemplars = {"hippocampus": 9, "chaos": 5, "lgg": 9}[dataset]
    rows = [Trained("untuned", "zero-shot", {"image_size": 112}, prompts=(FURTHEST, Prompting("clicks", 10), BOX))]
    for said, data in {f"{exemplars} exemplars": {"exemplars": exemplars}, "full set": METHODS["full-set"]}.items():
        for name in names:
            if name in CONTROLS and said == "full set":
                continue
            steps, size = 300, 112
            if name in PLAIN or name in PLAIN_3D:
                steps, size = ((PLAIN | PLAIN_3D)[name], 64) if dataset == "hippocampus" else (800, 112)
            settings = {"steps": steps, "warmup_steps": steps // 10, "image_size": size, **data}
            rows.append(Trained(f"{name}, {said}", name, settings, prompts=PROMPTED.get(name, (AUTO,))))
    return rows


def msa(dataset: str) -> list[Trained]:
    """Part by part on hippocampus; three seeds for the first and the last of the parts."""
    exemplars = {"hippocampus": 9, "chaos": 5, "lgg": 9, "hc18": 9}[dataset]
    common = {"steps": 300, "warmup_steps": 30, "image_size": 112, "exemplars": exemplars, "real_share": 1.0}
    parts = ["encoder", "decoder", "prompt", "depth"]
    deep = {"adapter_parts": parts, "depth": 3}
    rows = {
        "LoRA": {},
        "no adapter": {"adapter_parts": []},
        "encoder": {"adapter_parts": parts[:1]},
        "encoder, decoder": {"adapter_parts": parts[:2]},
        "encoder, decoder, prompt": {"adapter_parts": parts[:3]},
        "encoder, decoder, prompt, depth": deep,
        "these and the embeddings of prompts": {**deep, "adapter_prompts": True},
        "no adapter, pretrained": {"adapter_parts": [], "weights": PRETRAINED},
        "encoder, decoder, prompt, pretrained": {"adapter_parts": parts[:3], "weights": PRETRAINED},
    }
    if dataset != "hippocampus":
        flat, deep_too = "encoder, decoder, prompt", "encoder, decoder, prompt, depth"
        asked = {"adapter_parts": parts[:3], "adapter_prompts": True}
        others = {f"{flat}, embeddings of prompts": asked}
        others |= {deep_too: rows[deep_too]} if dataset == "chaos" else {}
        rows = {"LoRA": rows["LoRA"], flat: rows[flat]} | others
    seeds = {name: THREE for name in ("no adapter", "encoder, decoder, prompt, depth") if dataset == "hippocampus"}
    return [
        Trained(name, "cheap-lunch" if name == "LoRA" else "msa", common | way, seeds.get(name, (0,)), FIVE)
        for name, way in rows.items()
    ]


TABLES = {
    "few-exemplars": few_exemplars,
    "mild": mild,
    "longer": longer,
    "targets": targets,
    "methods": methods,
    "msa": msa,
}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="hippocampus, chaos, lgg or hc18")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs there (default: thrown away)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="these alone (default: all of the table's)")
    parser.add_argument("--rows", nargs="+", metavar="WORDS", help="only those whose name holds one of these")
    parser.add_argument(PRETRAINED, type=Path, metavar="FILE", help="weights of the rows that are called so")
    parser.set_defaults(out=None)
    options = parser.parse_args()
    rows = TABLES[options.table](options.data.name)
    out = options.out or HERE / "results" / f"{options.table}-{options.data.name}-{slug()}.json"
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else {}
    seeds = options.seeds or sorted({seed for row in rows for seed in row.seeds})
    chosen = [row for row in rows if not options.rows or any(words in row.label for words in options.rows)]
    if not options.pretrained:
        chosen = [row for row in chosen if row.settings.get("weights") != PRETRAINED]
    plan = [(row, seed) for seed in seeds for row in chosen if seed in row.seeds]
    for row, seed in progress([(row, seed) for row, seed in plan if place(row, seed) not in found], options.table):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            found |= alone.submit(scored, row, seed, options).result()
        write(out, options, found)
        write_text(table(rows, found), out.with_suffix(".md"))
    console.print(f"written: {out} and {out.with_suffix('.md').name}")


def place(row: Trained, seed: int, prompts: Prompting | None = None) -> str:
    """Its key in the JSON; only prompts beyond its first are named."""
    asked = f", {prompts}" if prompts not in (None, row.prompts[0]) else ""
    return f"{row.label}{asked}, seed {seed}"


def scored(row: Trained, seed: int, options: Namespace) -> dict[str, dict[str, Any]]:
    """The evaluations of a model trained now, by their keys, with what its training took."""
    runtime.keep_freed_memory()
    runtime.use_cores()
    settings = {**row.settings, "data": options.data, "seed": seed}
    if settings.get("weights") == PRETRAINED:
        settings["weights"] = options.pretrained
    config = build_config(row.method, settings)
    device = runtime.pick_device(config.device)
    precision = runtime.pick_precision(config.training.precision, device)
    with tempfile.TemporaryDirectory() as scratch:
        facts: dict[str, Any] = {}
        if config.model.tuning == "none":
            segmenter = build_segmenter(config.model)
        else:
            where = options.work / place(row, seed).replace(", ", "-").replace(" ", "-") if options.work else None
            run = finetune(config, where or Path(scratch) / "run", resume=bool(where and where.exists()))
            config = run.load_config()
            facts = took(run)
            shutil.rmtree(run.checkpoint, ignore_errors=True)
            segmenter = load_segmenter(config.model, run.adapter)
        segmenter.to(device)
        found = {}
        for prompts in row.prompts:
            result = assess(segmenter, config, Assessment(options.data, prompts), precision, Path(scratch) / "masks")
            result = result["strict"]
            cases = [{name: shortened(case[name]) for name in KEPT if name in case} for case in result["cases"]]
            found[place(row, seed, prompts)] = {**result, **facts, "seed": seed, "cases": cases}
    return found


KEPT = ("id", "patient", "class", "dice", "hd95", "iou", "nsd")


def took(run: RunFolder) -> dict[str, Any]:
    """What training took and left, and by the loss of its last two quarters whether it had come to an end."""
    said = json.loads(run.environment.read_text(encoding="utf-8"))
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    quarter = max(1, len(losses) // 4)
    return {
        **{name: said[name] for name in ("training_seconds", "trained_parameters", "peak_memory_bytes")},
        "adapter_bytes": sum(file.stat().st_size for file in run.adapter.iterdir()),
        "loss_of_third_quarter": statistics.fmean(losses[-2 * quarter : -quarter]),
        "loss_of_last_quarter": statistics.fmean(losses[-quarter:]),
    }


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
    """By `compare`; a row of which some seeds are there is the mean of those. Below it what training took."""
    runs, costs, clicks = [], [], []
    for row in rows:
        for prompts in row.prompts:
            keys = [place(row, seed, prompts) for seed in row.seeds]
            there = {key: found[key] for key in keys if key in found}
            if there:
                result = mean_of_runs(there) if len(there) > 1 else next(iter(there.values()))
                runs.append(Run(row.label, row.label, result))
                if prompts == row.prompts[0] and "adapter_bytes" in result:
                    costs.append(cost(row.label, result))
                if prompts in FIVE:
                    clicks.append(by_clicks(row.label, list(there.values())))
    parts = [markdown(compare(runs, tables=[]))]
    if clicks:
        parts += ["| mean Dice after | 1 click | 3 clicks | 5 clicks |", "| --- |" + " ---: |" * 3, *clicks, ""]
    if costs:
        head = "|  | trained parameters | adapter, MB | minutes | peak memory, GiB | loss of the last two quarters |"
        parts += [head, "| --- |" + " ---: |" * 5, *costs, ""]
    return "\n".join(parts)


def by_clicks(label: str, seeds: list[Mapping[str, Any]]) -> str:
    """The mean over seeds after one, three and five clicks, with the seeds' standard deviation."""
    cells = []
    for count in ("1", "3", "5"):
        dice = [result["by_clicks"][count] for result in seeds]
        spread = f" ± {statistics.stdev(dice):.3f}" if len(dice) > 1 else ""
        cells.append(f"{statistics.fmean(dice):.3f}{spread}")
    return f"| {label} | {' | '.join(cells)} |"


def cost(label: str, facts: Mapping[str, Any]) -> str:
    return (
        f"| {label} | {facts['trained_parameters']:,} | {facts['adapter_bytes'] / 1e6:.1f} "
        f"| {facts['training_seconds'] / 60:.1f} | {facts['peak_memory_bytes'] / 2**30:.2f} "
        f"| {facts['loss_of_third_quarter']:.3f}, {facts['loss_of_last_quarter']:.3f} |"
    )


if __name__ == "__main__":
    main()
