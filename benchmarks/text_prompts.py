"""Texts as prompts on hippocampus: each class asked for by texts that training never saw, and by the other class's.

One network is fine-tuned with `--training-prompts text` and asked about every slice of every test volume by each
held-out text of each class (texts.yaml). Dice of what a text gives, before classes are merged, against the mask of its
own class and of the other; and of a text of both classes against their union.

CLIP is --clip, where its weights are at hand. Without it a text tower is drawn at random, with CLIP's own vocabulary
(which the package open_clip_torch ships) and two layers: twelve at random blur words, so that a linear layer trained on
the run's texts mistakes one held-out text in six, with two none. It knows nothing of language: to it two texts are
alike where they share words in like places. So it measures the way from a text to a mask, and how the loss treats texts
of classes that are not there, and nothing of what CLIP would add.

It goes on where it stopped: the run is in --run, and volumes that the JSON holds are not asked about again.
"""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import DATA, HERE, arguments, console, machine, progress, versions
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cheaplunch import runtime
from cheaplunch.config import build_config
from cheaplunch.data.cases import load_case
from cheaplunch.data.layouts import open_dataset
from cheaplunch.files import write_json
from cheaplunch.interactive import open_model
from cheaplunch.models.weights import PackagedFile
from cheaplunch.prediction import segment_texts
from cheaplunch.runs import RunFolder
from cheaplunch.training import finetune

VOCABULARY = PackagedFile(
    package="open-clip-torch",
    version="3.3.0",
    file="open_clip/bpe_simple_vocab_16e6.txt.gz",
    sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)
LAYERS = 2
BUDGET = {"image_size": 112, "batch_size": 1, "warmup_steps": 50, "checkpoint_every": 20}


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs" / "text-prompts", metavar="RUN")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="CLIP (default: a text tower drawn at random)")
    parser.add_argument("--method", default="cheap-lunch", help="cheap-lunch, msa, … (default: %(default)s)")
    parser.add_argument("--exemplars", type=int, default=9, metavar="N")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of one image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    runtime.keep_freed_memory()
    runtime.use_cores()
    clip = options.clip or random_clip(options.run.with_name(f"{options.run.name}-clip"))
    named = ("data", "exemplars", "steps", "seed")
    values = {**BUDGET, **{name: getattr(options, name) for name in named}, "clip": str(clip)}
    config = build_config(options.method, {**values, "training_prompts": "text"})
    ask(finetune(config, options.run, options.run.exists(), tell), options)


def tell(done: int, total: int, record: dict[str, float]) -> None:
    if done % 20 == 0:
        console.print(f"step {done} of {total}: loss {record['loss']:.3f}")


def ask(run: RunFolder, options: Namespace) -> None:
    """Asks about every test volume that the JSON lacks, and writes it after each."""
    config = run.load_config()
    model, dataset = open_model(run, config), open_dataset(options.data)
    assert model.texts is not None
    phrasings, labels = model.texts.phrasings, dict(model.labels)
    draws = min(len(texts) for texts in phrasings.held_out.values())
    wordings = [*phrasings.tests(labels, draws), phrasings.names(labels)]  # the last is one to learn from
    # A text of all classes, of held-out ones: CLIP is needed for it.
    several = " and ".join(wordings[0].values())
    asked = [model.texts.ask({labels[name]: text for name, text in own.items()}) for own in wordings]
    asked.append(dict.fromkeys(labels.values(), model.texts.vectors([several])[0]))
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    cases: dict[str, Any] = found.get("cases", {})
    todo = [case for case in dataset.split("test") if case.label is not None and case.id not in cases]
    for case in progress(todo, "asking"):
        loaded = load_case(case, dataset, model.window, model.axis)
        assert loaded.label is not None
        truth = {name: loaded.label == number for name, number in labels.items()}
        *by_class, both = segment_texts(model.predictor, loaded, asked, list(labels.values()))
        cases[case.id] = {
            "texts": [
                {
                    name: {other: dice(mask > 0.5, truth[other]) for other in labels}
                    for name, mask in zip(labels, one.probabilities, strict=True)
                }
                for one in by_class
            ],
            "several": dice(both.probabilities[0] > 0.5, np.any(list(truth.values()), axis=0)),
        }
        write(options, wordings, several, cases)
    console.print(f"written: {options.out}")


def write(options: Namespace, wordings: list[dict[str, str]], several: str, cases: dict[str, Any]) -> None:
    """Means over volumes before the volumes themselves; of each text, whose mask it was compared with → Dice."""
    names = list(wordings[0])
    texts = [
        {
            "text": own[name],
            "of": name,
            "held out": number < len(wordings) - 1,
            "dice": {
                other: round(fmean(case["texts"][number][name][other] for case in cases.values()), 4) for other in names
            },
        }
        for number, own in enumerate(wordings)
        for name in names
    ]
    held_out = [one for one in texts if one["held out"]]
    own_of = [one["dice"][one["of"]] for one in held_out]
    other_of = [one["dice"][other] for one in held_out for other in names if other != one["of"]]
    result = {
        "clip": "as given" if options.clip else f"drawn at random, {LAYERS} layers, CLIP's vocabulary",
        "volumes": len(cases),
        "held-out texts, own mask: mean and lowest": [round(fmean(own_of), 4), min(own_of)],
        "held-out texts, other mask: mean and highest": [round(fmean(other_of), 4), max(other_of)],
        "texts": texts,
        "several": {"text": several, "dice": round(fmean(case["several"] for case in cases.values()), 4)},
    }
    settings = {**BUDGET, **{name: getattr(options, name) for name in ("method", "exemplars", "steps", "seed")}}
    whole = {"machine": machine(), "versions": versions(), "settings": {"data": options.data.name, **settings}}
    write_json({**whole, **result, "cases": cases}, options.out)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    total = int(mask.sum() + truth.sum())
    return round(2 * int((mask & truth).sum()) / total, 6) if total else 1.0


def random_clip(folder: Path) -> Path:
    """A transformers folder with CLIP's vocabulary and a text tower of its width, drawn from one seed."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(VOCABULARY.fetch("the vocabulary", None, lambda _: None), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    # As the original tokenizer numbers them: printable bytes, the others as letters from 256 on, ends of words, merges.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in [*printable, *range(256, 256 + 256 - len(printable))]]
    joined = ["".join(merge.split()) for merge in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    write_json({token: number for number, token in enumerate(tokens)}, folder / "vocab.json")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(vocab_size=len(tokens), num_hidden_layers=LAYERS, **size, **ends)
        CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
