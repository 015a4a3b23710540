"""Methods by name: a method is values for settings of `config`, in place of the defaults. Flags and YAML override them.

What each follows, and where it differs, is in docs/methods.md.
"""

from __future__ import annotations

from typing import Any

# Of every network without prompts: it answers on all slices, and so must learn what shows no organ.
_WITHOUT_PROMPTS: dict[str, Any] = {"head": "classes", "training_prompts": "none", "empty_share": 0.2}

# SAMed's own, but for batch and learning rate: 4 in place of 24 images, and so 0.005 · √(4 / 24).
_SAMED: dict[str, Any] = {
    **_WITHOUT_PROMPTS,
    "tuning": "lora",
    "lora_rank": 4,
    "head_start": "fresh",
    "pixels": "as-they-are",
    "ce_weight": 0.2,
    "dice_weight": 0.8,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "decay": "polynomial",
    "final_lr": 0.235,
    "augmentation": "samed",
}


def _plain(network: str) -> dict[str, Any]:
    """A network of `models.baselines`, trained from nothing."""
    return {
        **_WITHOUT_PROMPTS,
        "backbone": network,
        "tuning": "full",
        "dice_weight": 1.0,
        "batch_size": 8,
        "steps": 2000,
        "learning_rate": 1e-3,
    }


# The plain networks that see volumes → how many slices at once; Swin UNETR takes 32 or a multiple.
VOLUMETRIC = {"unet-3d": 16, "attention-unet-3d": 16, "unetr-3d": 16, "swin-unetr-3d": 32, "segresnet-3d": 16}

METHODS: dict[str, dict[str, Any]] = {
    "cheap-lunch": {},
    "zero-shot": {"tuning": "none"},
    # §3.4, "Full Set": all slices as they are, no set of a fixed size. So many samples are not drawn twice.
    "full-set": {"strategy": "all", "real_share": 1.0, "synthetic": 1_000_000},
    "samed": {**_SAMED, "decoder_tuning": "full"},
    "samed-s": {**_SAMED, "decoder_tuning": "lora"},
    "medsam": {
        "tuning": "full",
        "decoder_tuning": "full",
        "training_prompts": "box",
        "dice_weight": 1.0,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
    },
    # Clicks in rounds, as its §2.3. Its depth branch, for volumes alone, has to be asked for (`adapter_parts`).
    "msa": {"tuning": "adapter", "training_prompts": "clicks:3"},
    "decoder-only": {"tuning": "decoder", "decoder_tuning": "full", "learning_rate": 5e-4},
    "lora-encoder-only": {"decoder_tuning": "frozen"},
    "linear-probe": {**_WITHOUT_PROMPTS, "tuning": "linear", "batch_size": 4, "learning_rate": 1e-2},
    "unet": _plain("unet"),
    "attention-unet": _plain("attention-unet"),
    "unetr": _plain("unetr"),
    "swin-unetr": _plain("swin-unetr"),
    "segresnet": _plain("segresnet"),
    "transunet": _plain("transunet"),
    # What is pasted is on one slice alone, so they learn from the exemplars as they are.
    **{
        name: {**_plain(name), "depth": slices, "batch_size": 2, "real_share": 1.0}
        for name, slices in VOLUMETRIC.items()
    },
}
