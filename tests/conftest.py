"""What several tests share: the real weights, small segmenters on them, and a tiny data set."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cheaplunch.config import ModelConfig
from cheaplunch.errors import UserError
from cheaplunch.files import cache_folder
from cheaplunch.models.backbones import BACKBONES, find_weights
from cheaplunch.models.segmenter import Segmenter, build_segmenter


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests leave nothing in the user's cache; weights that are there are used."""
    theirs, own = cache_folder() / "weights", tmp_path_factory.mktemp("cache")
    if theirs.is_dir():
        (own / "weights").symlink_to(theirs.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHEAPLUNCH_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def weights() -> Path:
    """LiteMedSAM's file, from the cache or the installed package."""
    try:
        return find_weights(BACKBONES["lite-medsam"])
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def build(weights):
    """(seed, settings of ModelConfig) → a segmenter on the real weights at 64 px, in eval mode."""

    def make(seed: int = 0, **settings) -> Segmenter:
        config = ModelConfig(**{"image_size": 64, "weights": weights, **settings})
        return build_segmenter(config, seed).eval()

    return make


@pytest.fixture(scope="session")
def zero_shot(build) -> Segmenter:
    return build(tuning="none")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """An nnU-Net folder of three volumes of 6 slices of 32 × 32; 'disc' is bright, 'block' dim.

    The first and the last slice are free of both; the middle two show both.
    """
    root = tmp_path_factory.mktemp("tiny") / "set"
    noise = np.random.default_rng(7)
    row, column = np.mgrid[:32, :32]
    for number in range(3):
        label = np.zeros((32, 32, 6), np.uint8)
        label[(row - 10 - number) ** 2 + (column - 11) ** 2 <= 30, 1:4] = 1
        label[18:28, 17 : 26 + number, 2:5] = 2
        image = np.select([label == 1, label == 2], [200.0, 120.0], 50.0) + noise.normal(0, 8, label.shape)
        for folder, array, ending in (("imagesTr", image, "_0000"), ("labelsTr", label, "")):
            path = root / folder / f"case_{number}{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = array.astype(np.float32) if folder == "imagesTr" else array
            nib.save(nib.Nifti1Image(array, np.diag([-1, -1, 1, 1])), path)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "disc": 1, "block": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A transformers folder of CLIP's text tower, with random weights and letters for tokens."""
    # CLIP's alphabet: the printable bytes stand for themselves, the others for letters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in [*printable, *range(256, 256 + 256 - len(printable))]]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder
