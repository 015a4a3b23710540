"""Every setting once, with its unit, its default and where the papers speak of it.

A run's `config.yaml` is these dataclasses, resolved; the command line is built from them, so that a
flag, a line of YAML and a field are one thing. A method is a row of `methods.METHODS`: named values for some of them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cheaplunch.errors import UserError
from cheaplunch.files import write_text
from cheaplunch.methods import METHODS, VOLUMETRIC
from cheaplunch.prompting import FROM_TRUTH, Prompting


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """What is read and which slices of it are the exemplars."""

    data: Path = setting(Path(), "folder with the labelled images (nnU-Net raw layout)")
    axis: Literal["axial", "coronal", "sagittal"] = setting("axial", "which slices of a volume are used")
    window: tuple[float, float] | None = setting(
        None,
        "intensities that become 0 and 1, for CT as in -125 275, in YAML [-125, 275] (§3.1); "
        "default: a CT window, 0..255 for 8-bit images, otherwise percentiles of each volume",
    )
    exemplars: int = setting(9, "labelled slices to learn from (§3.2)")
    exemplar_percent: float | None = setting(
        None, "as many as this percentage of the training slices with at least 10 px of foreground, instead (§3.2)"
    )
    strategy: Literal["auto", "spread", "most-classes", "random", "all"] = setting(
        "auto",
        "how they are chosen: most-classes or random as in §3.2, or spread over the organs' heights (auto: spread, and "
        "most-classes for a single one); all: every slice with foreground, whatever --exemplars says",
    )
    exemplar_file: Path | None = setting(None, "CSV with the columns case,slice that names the exemplars instead")
    classes: tuple[str, ...] | None = setting(
        None, "classes to train and score, the others being background; default: all of them"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network and what of it is trained (§2.2)."""

    backbone: str = setting(
        "lite-medsam",
        "pretrained network: lite-medsam, mobile-sam, sam-vit-b, sam-vit-l, sam-vit-h, medsam-vit-b, "
        "tiny-random (for tests), a folder with a transformers SAM, or a hub id (docs/backbones.md); "
        "or a plain network without pretraining, by the name of its method (docs/methods.md)",
    )
    weights: Path | None = setting(
        None, "checkpoint of that backbone: a file, or a transformers folder; default: the published one"
    )
    image_size: int | None = setting(
        None,
        "side of the square network input in px; default: 224 for lite-medsam, 448 for mobile-sam, 512 for the ViTs, "
        "half of it for images up to 96 px; zero-shot: as published (256; 1024 for all but lite-medsam)",
    )
    pixels: Literal["as-pretrained", "as-they-are"] = setting(
        "as-pretrained", "what the network sees: colours normalised as in its pretraining, or 0 to 1 as SAMed's"
    )
    head: Literal["two", "classes"] = setting(
        "two",
        "what comes out: background and target of each prompt (§2.2), or background and every class at once, "
        "without prompts, as SAMed's",
    )
    class_names: tuple[str, ...] | None = setting(None, "what its outputs are, in their order; found in the data")
    training_prompts: str = setting(
        "point",
        "what it learns to be asked with: point (§2.2), box, clicks:N (one to N of a simulated user who sees the "
        "answers), text (docs/msa.md), or none (for the head classes)",
    )
    text_file: Path | None = setting(
        None, "YAML with more texts of the classes, in the form of those that come along (docs/msa.md, Text)"
    )
    clip: str = setting(
        "openai/clip-vit-base-patch32", "CLIP, whose text tower embeds texts: a transformers folder or a hub id"
    )
    text_width: int | None = setting(None, "numbers in the embedding of a text; found in CLIP")
    tuning: Literal["lora", "adapter", "decoder", "linear", "full", "none"] = setting(
        "lora",
        "what is trained: LoRA in the encoder beside the decoder, MSA's adapters in both, the decoder alone, one "
        "linear layer on the encoder, the encoder in full beside the decoder, or nothing",
    )
    lora_rank: int = setting(4, "rank r of the LoRA updates (§2.2)")
    adapter_parts: tuple[str, ...] = setting(
        ("encoder", "decoder", "prompt"),
        "of MSA's parts (docs/msa.md): adapters in the encoder and in the decoder, the prompt in the decoder's first, "
        "and depth, the encoder's attention across slices of a volume, which learns from whole exemplars (--real-share "
        "1, the default with it) among the slices around them",
    )
    depth: int = setting(
        5,
        "slices in a slab: with the adapter part depth an odd number, 1 being the network without it (MSA: not "
        "stated); of a network named -3d any from 2 on, beyond 16 (swin-unetr-3d: 32) at the cost of its next multiple",
    )
    adapter_width: int = setting(64, "channels of an adapter's bottleneck (AdaptFormer's; MSA: not stated)")
    adapter_scale: float = setting(0.1, "s of the adapters beside an MLP (AdaptFormer's; MSA: not stated)")
    adapter_prompts: bool = setting(
        False,
        "beside MSA's adapters, train the prompt encoder's embeddings of the prompts in use, as the other methods do "
        "(MSA: SAM's own parameters stay frozen)",
    )
    decoder_tuning: Literal["lora", "frozen", "full"] = setting(
        "lora", "of the mask decoder's transformer: LoRA (§2.2), nothing, or all of it (SAMed's default)"
    )
    head_start: Literal["pretrained", "fresh"] = setting(
        "pretrained", "where the two outputs start: at SAM's own mask (zero-shot), or at random as SAMed's"
    )
    mask: Literal["single", "best"] = setting(
        "single", "zero-shot: SAM's mask 0, made for one answer, or of its other three the one with the best score"
    )
    smooth_mm: float = setting(
        0.8,
        "in prediction: standard deviation in mm over which an organ's logits are averaged from slice to slice; 0 for "
        "each slice on its own, as the paper has it. Nothing changes where slices are more than three times that apart",
    )


@dataclass(frozen=True)
class SynthesisConfig:
    """Ranges of the transforms of Eq. 1–3; the paper names the transforms but not their ranges."""

    synthetic: int = setting(1800, "size of the synthesized set (§3.3: 1800 for Synapse, 4500 for BraTS)")
    synthetic_set: Path | None = setting(
        None, "folder that `cheaplunch synthesize` wrote, to take the samples from instead of making them in training"
    )
    real_share: float = setting(
        0.5,
        "share of the set that is an exemplar itself, transformed as a whole, instead of pasted (paper: not stated)",
    )
    drop: float = setting(
        0.25, "probability that an organ of the exemplar is not pasted, so that slices with few organs occur too"
    )
    rotation_deg: float = setting(20.0, "largest rotation, either way")
    scale: float = setting(0.3, "largest relative change of size, either way")
    shift: float = setting(0.04, "largest move of a pasted organ, either way, as a share of the side (of 224 px: 9 px)")
    flip: float = setting(
        0.0, "probability of a left-right flip, and of an up-down flip, of a pasted organ and of a background"
    )
    balance: bool = setting(
        False,
        "draw a class first and then an exemplar that shows it, so that rare classes occur as often as common ones "
        "(paper: not stated)",
    )
    paste: Literal["hard", "soft"] = setting(
        "hard", "an organ's edge: as cut out (Eq. 1: where the foreground is above 0), or mixed with what is behind it"
    )
    blur_px: float = setting(1.5, "largest standard deviation of the Gaussian blur, in px of the network input")
    intensity: float = setting(0.4, "largest change of brightness (added) and of contrast and gamma (relative)")


@dataclass(frozen=True)
class TrainingConfig:
    """Loss, optimiser and schedule (§3.3)."""

    steps: int = setting(800, "optimiser steps")
    batch_size: int = setting(1, "images a step, of all processes together")
    prompts_per_image: int = setting(4, "(class, point) pairs on each image, which share one pass of the encoder")
    furthest_share: float = setting(
        0.5, "share of the training points that are furthest from the boundary, as a careful user clicks (paper: 0)"
    )
    empty_share: float = setting(
        0.0,
        "share of the images that are slices without organs; for networks that are asked about every slice and so must "
        "learn them: without prompts, or by texts (then 0.2, but for the adapter part depth)",
    )
    augmentation: Literal["none", "samed"] = setting(
        "none", "of every sample, synthesized or not, on top: samed is a quarter turn and a flip, or a small rotation"
    )
    learning_rate: float = setting(2e-3, "of AdamW, at its top (§3.3: 0.001; see docs/choices.md)")
    weight_decay: float = setting(0.01, "of AdamW, on everything but biases and norms (paper: not stated)")
    warmup_steps: int = setting(80, "steps in which the learning rate rises (§3.3: number not stated)")
    decay: Literal["exponential", "polynomial"] = setting(
        "exponential", "how it falls after that (§3.3), or as SAMed's (1 − t/T)^0.9"
    )
    final_lr: float = setting(0.05, "learning rate at the last step, relative; of the polynomial where it is cut off")
    ce_weight: float = setting(1.0, "λ1 of the loss (§3.3)")
    dice_weight: float = setting(0.8, "λ2 of the loss (§3.3)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: bf16 where the processor has it")
    accumulate: int = setting(1, "parts that a batch is taken in, one after the other, to save memory")
    gradient_checkpointing: bool = setting(
        False, "keep only each block's input for the backward pass and compute the rest again: less memory, more time"
    )
    compile: bool = setting(False, "torch.compile for the encoder: a minute or more at the start")
    validation_cases: int = setting(
        0, "training cases held out; the adapter is then of the step that does best on them, never on the test cases"
    )
    validate_every: int = setting(100, "steps between two looks at the validation cases")
    patience: int = setting(0, "stop after so many looks without a better one; 0: take every step")
    checkpoint_every: int = setting(100, "steps between checkpoints for --resume")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "none", "also log there, through accelerate; tensorboard writes into the run's folder"
    )


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run, whole."""

    method: str = "cheap-lunch"
    seed: int = setting(0, "of every random choice; equal seeds give equal adapters on the same machine")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


ADAPTER_PARTS = ("encoder", "decoder", "prompt", "depth")

NAMES = tuple[str, ...]  # the type of a setting that takes any number of names

GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "synthesis": SynthesisConfig,
    "training": TrainingConfig,
}


def settings() -> dict[str, tuple[str | None, dataclasses.Field]]:
    """Every setting's name → (its group, or None at the top; its field)."""
    named: dict[str, tuple[str | None, dataclasses.Field]] = {
        item.name: (None, item) for item in dataclasses.fields(RunConfig) if "help" in item.metadata
    }
    for group, kind in GROUPS.items():
        named |= {item.name: (group, item) for item in dataclasses.fields(kind)}
    return named


def build_config(method: str, values: Mapping[str, Any]) -> RunConfig:
    """A run of `method` with `values` (setting name → value) in place of the method's own."""
    if method not in METHODS:
        raise UserError(f"--method {method} is not known; choose one of: {', '.join(METHODS)}")
    merged = {**METHODS[method], **values}
    if "depth" in merged.get("adapter_parts", ()):
        merged.setdefault("real_share", 1.0)  # what is pasted is on one slice alone (`_check_slabs`)
    elif merged.get("training_prompts") == "text":
        merged.setdefault("empty_share", 0.2)
    known = settings()
    unknown = sorted(merged.keys() - known.keys())
    if unknown:
        raise UserError(f"there is no setting {unknown[0]}; `cheaplunch finetune --help` lists them")
    merged = {name: _typed(name, value) for name, value in merged.items()}
    grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    top: dict[str, Any] = {}
    for name, value in merged.items():
        group = known[name][0]
        (grouped[group] if group else top)[name] = value
    config = RunConfig(method=method, **top, **{group: GROUPS[group](**grouped[group]) for group in GROUPS})
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Raises UserError for a value no run can have."""
    positive = {
        "--exemplars": config.data.exemplars,
        "--synthetic": config.synthesis.synthetic,
        "--steps": config.training.steps,
        "--batch-size": config.training.batch_size,
        "--prompts-per-image": config.training.prompts_per_image,
        "--lora-rank": config.model.lora_rank,
        "--adapter-width": config.model.adapter_width,
        "--depth": config.model.depth,
        "--learning-rate": config.training.learning_rate,
        "--checkpoint-every": config.training.checkpoint_every,
        "--final-lr": config.training.final_lr,
        "--accumulate": config.training.accumulate,
        "--validate-every": config.training.validate_every,
    }
    for flag, value in positive.items():
        if not 0 < value < math.inf:  # and not NaN
            raise UserError(f"{flag} is {value}; it must be above 0")
    for name, (group, _) in settings().items():
        value = getattr(getattr(config, group) if group else config, name)
        if name != "seed" and isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it cannot be negative")
    for flag, share in {
        "--real-share": config.synthesis.real_share,
        "--flip": config.synthesis.flip,
        "--drop": config.synthesis.drop,
        "--furthest-share": config.training.furthest_share,
        "--empty-share": config.training.empty_share,
    }.items():
        if not 0 <= share <= 1:
            raise UserError(f"{flag} is {share}; it is a share between 0 and 1")
    if config.training.batch_size % config.training.accumulate:
        raise UserError(
            f"--accumulate {config.training.accumulate} does not divide --batch-size {config.training.batch_size}"
        )
    for part in config.model.adapter_parts:
        if part not in ADAPTER_PARTS:
            raise UserError(f"--adapter-parts {part} is not known; choose from: {', '.join(ADAPTER_PARTS)}")
    if config.training.patience and not config.training.validation_cases:
        raise UserError("--patience needs cases to look at; add --validation-cases N")
    own = METHODS[config.method].get("backbone")
    if own not in (None, config.model.backbone):
        raise UserError(
            f"--backbone {config.model.backbone}: --method {config.method} is a network of its own; leave it out"
        )
    _check_model(config.model)
    _check_slabs(config)
    if config.training.empty_share and config.model.head != "classes" and config.model.training_prompts != "text":
        raise UserError(
            "--empty-share: nothing can be pointed at on a slice without organs; it goes with --head classes or "
            "--training-prompts text"
        )
    size = config.model.image_size
    if size is not None and (size < 32 or size % 8):
        raise UserError(f"--image-size is {size}; it must be a multiple of 8, at least 32")
    percent = config.data.exemplar_percent
    if percent is not None and not 0 < percent <= 100:
        raise UserError(f"--exemplar-percent is {percent}; it must be above 0 and at most 100")
    if config.data.classes == ():
        raise UserError("--classes names none; leave it out for all of them")
    window = config.data.window
    if window is not None and window[0] >= window[1]:
        raise UserError(f"--window is {list(window)}; its first value must be the smaller one")


def _check_model(model: ModelConfig) -> None:
    kind, clicks = training_prompting(model)
    if (
        kind not in ("point", "box", "clicks", "text", "none")
        or clicks < 1
        or (kind == "clicks") != (":" in model.training_prompts)
    ):
        raise UserError(
            f"--training-prompts {model.training_prompts} is not known; choose: point, box, clicks:N, text, none"
        )
    if (kind == "none") != (model.head == "classes") and model.tuning != "none":
        fitting = "none" if model.head == "classes" else "point, box, clicks:N or text"
        raise UserError(f"--head {model.head} goes with --training-prompts {fitting}, not {model.training_prompts}")
    if model.text_file is not None and kind != "text":
        raise UserError("--text-file does nothing without --training-prompts text; add it, or leave the file out")
    if model.tuning == "linear" and model.head != "classes":
        raise UserError("--tuning linear takes no prompts; add --head classes --training-prompts none")
    if model.mask == "best" and model.tuning != "none":
        raise UserError("--mask best is of SAM as it is (--method zero-shot); a trained network has one answer")


def _check_slabs(config: RunConfig) -> None:
    depth, volumetric = config.model.depth, config.model.backbone in VOLUMETRIC
    if volumetric and depth == 1:
        flat = config.model.backbone.removesuffix("-3d")
        raise UserError(f"--depth is 1; {config.model.backbone} sees several slices at once: --method {flat} sees one")
    if not volumetric and depth % 2 == 0:
        raise UserError(f"--depth is {depth}; it must be odd: a slice, and as many before it as behind it")
    if slab_slices(config.model) == 1:
        return
    for needed, missing in {
        "give --real-share 1": config.synthesis.real_share < 1,
        "give --empty-share 0": config.training.empty_share > 0 and not volumetric,
        "leave out --synthetic-set": config.synthesis.synthetic_set is not None,
    }.items():
        if missing:
            named = f"--backbone {config.model.backbone}" if volumetric else "--adapter-parts depth"
            raise UserError(f"{named} learns from exemplars among the slices around them; {needed}")


def slab_slices(model: ModelConfig) -> int:
    """How many slices of a volume the network sees at once: 1 unless it has MSA's depth branch or is 3-D."""
    if model.backbone in VOLUMETRIC:
        return model.depth
    return model.depth if model.tuning == "adapter" and "depth" in model.adapter_parts else 1


def training_prompting(model: ModelConfig) -> tuple[str, int]:
    """The kind of the prompts in training, and the most clicks; 0 where what stands there means nothing."""
    kind, colon, count = model.training_prompts.partition(":")
    return kind, int(count) if count.isdecimal() else 0 if colon else 1


def asked_by_text(model: ModelConfig) -> bool:
    """Whether it is texts that say what the network is to find."""
    return model.training_prompts == "text" and model.tuning != "none"


def prompts_for(model: ModelConfig) -> str:
    """What `--prompts` is where nothing is said: what the network was trained to be asked with."""
    if model.tuning == "none":
        return "furthest"
    return {"point": "furthest", "none": "auto"}.get(model.training_prompts, model.training_prompts)


def check_prompting(model: ModelConfig, prompting: Prompting) -> None:
    """Raises UserError where the network cannot be asked so."""
    free = model.head == "classes" and model.tuning != "none"
    if free and prompting.kind != "auto":
        raise UserError(f"--prompts {prompting}: the network takes no prompts; leave it out, or give --prompts auto")
    if asked_by_text(model) and prompting.kind != "text":
        raise UserError(f"--prompts {prompting}: the network has learned from texts alone; give --prompts text")
    if prompting.kind == "text" and not asked_by_text(model):
        raise UserError(
            "--prompts text: the network has learned no texts (--training-prompts text); choose one of: "
            f"{', '.join(FROM_TRUTH)}"
        )
    if not free and prompting.kind == "auto":
        raise UserError(f"--prompts auto: the network has to be prompted; choose one of: {', '.join(FROM_TRUTH)}")


def as_values(config: RunConfig) -> dict[str, Any]:
    """The run's settings by name, in plain types; `build_config` turns them back."""
    values: dict[str, Any] = {"method": config.method, "seed": config.seed, "device": config.device}
    for group in GROUPS:
        values |= dataclasses.asdict(getattr(config, group))
    return {name: _plain(value) for name, value in values.items()}


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with `values` (setting name → value) in place of its own."""
    merged = {**as_values(config), **values}
    return build_config(merged.pop("method"), merged)


def save_config(config: RunConfig, path: Path) -> None:
    write_text(yaml.safe_dump(as_values(config), sort_keys=False), path)


def load_config(path: Path) -> RunConfig:
    """The run that `save_config` wrote."""
    values = read_yaml(path)
    method = values.pop("method", None)
    if method is None:
        raise UserError(f"{path} has no line `method:`; is it the config.yaml of a run?")
    return build_config(method, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Setting name → value; names may be written as flags are (`image-size`)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give an existing YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a list of `setting: value` lines")
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(named.keys() - settings().keys() - {"method"})
    if unknown:
        raise UserError(f"{path}: there is no setting {unknown[0]}; `cheaplunch finetune --help` lists them")
    return named


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def setting_type(name: str) -> Any:
    """The type of a setting, less "or None": bool, int, float, str, Path, a Literal, two numbers or any names."""
    group, _ = settings()[name]
    hint = typing.get_type_hints(GROUPS[group] if group else RunConfig)[name]
    return next(kind for kind in typing.get_args(hint) or [hint] if kind is not type(None)) if _optional(hint) else hint


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _typed(name: str, value: Any) -> Any:
    """`value` as the setting's own type; UserError where it is another. YAML writes paths as text and 1e-3 as text."""
    kind, flag = setting_type(name), f"--{name.replace('_', '-')}"
    if value is None:
        if settings()[name][1].default is not None:
            raise UserError(f"{flag} has no value; give one, or leave the line out")
        return None
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{flag} is {value}; choose one of: {', '.join(typing.get_args(kind))}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{flag} is {value}; it must be true or false")
        return value
    if kind == NAMES:
        names = [value] if isinstance(value, str) else value
        if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
            raise UserError(f"{flag} is {value}; it must be a list of names, as in [liver, spleen]")
        return tuple(names)
    try:
        if typing.get_origin(kind) is tuple:
            low, high = value
            return float(low), float(high)
        if kind is int and not isinstance(value, (int, str)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        wanted = {int: "a whole number", float: "a number"}.get(kind, "two numbers, as in [-125, 275]")
        raise UserError(f"{flag} is {value}; it must be {wanted}") from None
