"""What the paper leaves open, one setting at a time, on training cases held out; the test cases take no part.

Every variant differs from the defaults by the settings named, takes as many steps (160 of one image, at 112 px) and is
scored by the mean Dice over eight held-out volumes, one point a class and slice, furthest from the boundary. Another
seed draws other held-out volumes and other exemplars. Variants that the JSON holds are not done again; docs/choices.md
has the figures.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import DATA, arguments, progress, write

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.training import finetune

STEPS = 160
VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "no decay of the learning rate": {"final_lr": 1.0},
    "outputs start fresh": {"head_start": "fresh"},
    "weight decay 0.1": {"weight_decay": 0.1},
    "exemplars are not in the set": {"real_share": 0.0},
    "one prompt an image (paper)": {"prompts_per_image": 1},
    "decay to 0.005": {"final_lr": 0.005},
}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--exemplars", type=int, default=9, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    options = parser.parse_args()
    runtime.keep_freed_memory()
    runtime.use_cores()
    found: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    scores: dict[str, dict[str, float]] = {name: found.get(name, {}) for name in VARIANTS}
    plan = [(name, str(seed)) for seed in options.seeds for name in VARIANTS if str(seed) not in scores[name]]
    for name, seed in progress(plan, "choices"):
        settings = {
            "data": options.data,
            "exemplars": options.exemplars,
            "seed": int(seed),
            "steps": STEPS,
            "warmup_steps": STEPS // 10,
            "image_size": 112,
            "validation_cases": 8,
            "validate_every": STEPS,
            **VARIANTS[name],
        }
        with tempfile.TemporaryDirectory() as scratch:
            run = finetune(build_config("cheap-lunch", settings), Path(scratch) / "run")
            last = run.metrics.read_text(encoding="utf-8").splitlines()[-1]
        scores[name][seed] = json.loads(last)["validation_dice"]
        write(options, scores)


if __name__ == "__main__":
    main()
