"""Texts as prompts: CLIP's text tower, what a run keeps of it, and the projection to prompt tokens.

Medical SAM Adapter §2.3 takes "the embedding of the text using CLIP as the prompt for training" and says no more of it;
docs/msa.md has what was chosen here. CLIP itself stays as it is and is no part of the network: every text of a run is
embedded once, before the first step, and the embeddings are kept in the run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.utils import logging

from cheaplunch.errors import UserError
from cheaplunch.files import whole_or_nothing, write_json
from cheaplunch.models.weights import endpoint, is_hub_id
from cheaplunch.texts import Phrasings, Union

TOKENS = 4  # prompt tokens a text; a box is two
AT_ONCE = 64  # texts
LISTED = 6  # texts in a message
CLIP_FILES = ["*.json", "merges.txt", "model.safetensors", "pytorch_model.bin"]  # of a repository on the hub
_SAME = 1e-3  # largest difference of one text's embedding here and there, relative to how far texts lie apart


class TextProjection(nn.Module):
    """The embedding of a text → prompt tokens, one linear layer: (…, E) → (…, TOKENS, C)."""

    def __init__(self, width: int, dim: int, generator: torch.Generator):
        """Every text starts as the same tokens, as large as SAM's embeddings of places, and what is learned parts them.

        With weights at random, what is new in a text not trained with would pass through what training never touched.
        """
        super().__init__()
        self.linear = nn.Linear(width, TOKENS * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.linear.bias, generator=generator)

    def forward(self, texts: Tensor) -> Tensor:
        return self.linear(texts).unflatten(-1, (TOKENS, -1))


class TextTower:
    """CLIP's text encoder with its tokenizer; on the CPU, where some dozens of texts take a moment."""

    def __init__(self, name: str):
        """`name`: a transformers folder or a hub id, of CLIP whole or of its text tower. UserError where it is none."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # of use to few runs, and slow to import

        if not Path(name).is_dir() and not is_hub_id(name):
            raise UserError(f"--clip {name}: no such folder, nor a hub id (owner/name); give a folder with CLIP in it")
        try:
            with _quiet():
                folder = name if Path(name).is_dir() else _from_hub(name)
                tokenizer = CLIPTokenizer.from_pretrained(folder)
                found: Any = CLIPTextModelWithProjection.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True
                )
                model, loading = found
        except Exception as error:  # the hub's client lets through what five libraries raise
            reason = " ".join(str(error).split()).split(". ")[0]
            way_out = "give another folder, or a hub id"
            if not Path(name).is_dir():
                elsewhere = f"run `hf download {name} --local-dir DIR` elsewhere"
                way_out = f"{elsewhere} if {endpoint()} cannot be reached here, and give --clip DIR"
            raise UserError(f"--clip {name} cannot be had ({type(error).__name__}: {reason}); {way_out}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise UserError(f"--clip {name} has no {missing[0]}; it is no CLIP with a text tower: give another")
        if len(tokenizer) < 256 or len(tokenizer) > model.config.vocab_size:  # bytes alone are as many
            raise UserError(
                f"--clip {name}: its tokenizer knows {len(tokenizer)} tokens, and its text tower "
                f"{model.config.vocab_size}; add the tokenizer.json, or vocab.json and merges.txt, that belong to it"
            )
        self._tokenizer, self._model = tokenizer, model.eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, E) float32, as CLIP projects them to compare them with images. UserError for one too long."""
        longest = self._model.config.max_position_embeddings
        for text in texts:
            count = len(self._tokenizer(text)["input_ids"])
            if count > longest:
                raise UserError(f"the text {text!r} is {count} tokens long, and CLIP reads {longest}; shorten it")
        parts = []
        for start in range(0, len(texts), AT_ONCE):
            batch = self._tokenizer(list(texts[start : start + AT_ONCE]), padding=True, return_tensors="pt")
            parts.append(self._model(**batch).text_embeds)
        return torch.cat(parts)


def _from_hub(name: str) -> str:
    """The folder of a repository in the hub's cache, fetched where it is not there; one try, not one a file."""
    return snapshot_download(name, allow_patterns=CLIP_FILES, endpoint=os.environ.get("HF_ENDPOINT"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and its list of the image tower's tensors, and the hub's word on each of its tries."""
    verbosity, bar, of_hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if bar:
            logging.enable_progress_bar()


class TextBank:
    """The texts of a run with their embeddings; others are embedded by CLIP, which is looked for only then.

    CLIP's embeddings of texts lie close together, away from zero. What the network is given is the difference to the
    mean over the texts to train with, divided by the root mean square length of those differences: a step of Adam moves
    every weight of the projection by the same, and with 512 numbers of size 1 a few would throw the tokens about.
    """

    def __init__(self, phrasings: Phrasings, embeddings: Mapping[str, Tensor], clip: str, source: str = "the run"):
        """`embeddings`: (E,) of every text of `phrasings`; `clip`: where CLIP is; `source`: of them, in messages."""
        self.phrasings = phrasings
        self._clip = clip
        self._source = source
        self._embeddings = dict(embeddings)
        trained = [text for texts in phrasings.training.values() for text in texts]
        known = torch.stack([embeddings[text] for text in trained])  # (N, E)
        self._centre = known.mean(dim=0)
        self._scale = (known - self._centre).square().sum(dim=-1).mean().sqrt().clamp(min=1e-6)

    @classmethod
    def embedded(cls, phrasings: Phrasings, clip: str) -> TextBank:
        """Every text of `phrasings`, embedded now."""
        texts = phrasings.all
        return cls(phrasings, dict(zip(texts, TextTower(clip)(texts), strict=True)), clip)

    @property
    def width(self) -> int:
        """E."""
        return len(self._centre)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, E), ready for the projection. UserError for an unknown one where CLIP cannot be had."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if unknown:
            self._embed(unknown)
        return (torch.stack([self._embeddings[text] for text in texts]) - self._centre) / self._scale

    def ask(self, texts: Mapping[int, str]) -> dict[int, Tensor]:
        """Class number → its text, to class number → (E,)."""
        return dict(zip(texts, self.vectors(list(texts.values())), strict=True))

    def ask_names(self, labels: Mapping[str, int]) -> dict[int, Tensor]:
        """As `ask`, each class of `labels` by what it is called."""
        return self.ask({labels[name]: text for name, text in self.phrasings.names(labels).items()})

    def _embed(self, texts: Sequence[str]) -> None:
        known = list(self._embeddings)
        try:
            tower = TextTower(self._clip)
        except UserError as error:
            some = ", ".join(map(repr, known[:LISTED])) + (f", … ({len(known)} in all)" if len(known) > LISTED else "")
            raise UserError(
                f"the text {texts[0]!r} is none of those that {self._source} keeps: {some}; "
                f"take one of them, or let CLIP embed it: {error}"
            ) from error
        first, *found = tower([known[0], *texts])
        if first.shape != self._centre.shape or (first - self._embeddings[known[0]]).norm() > _SAME * self._scale:
            raise UserError(f"--clip {self._clip} is another CLIP than {self._source} learned with; give that one")
        self._embeddings |= dict(zip(texts, found, strict=True))

    def save(self, folder: Path) -> None:
        """`embeddings.safetensors`, a row a text, and last `texts.json`: the texts, and which are held out."""
        texts = self.phrasings.all
        rows = torch.stack([self._embeddings[text] for text in texts])
        with whole_or_nothing(folder / EMBEDDINGS) as unfinished:
            unfinished.write_bytes(save({"embeddings": rows}, metadata={"format": "pt"}))
        write_json({"clip": self._clip, **asdict(self.phrasings), "texts": texts}, folder / TEXTS)

    @classmethod
    def load(cls, folder: Path, clip: str) -> TextBank:
        """What `save` wrote; `clip` is where CLIP would be. UserError where it is damaged."""
        try:
            said = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
            training, held_out = ({name: tuple(own) for name, own in said[part].items()} for part in _PARTS)
            unions = tuple(Union(union["text"], tuple(union["classes"])) for union in said["unions"])
            phrasings, rows = Phrasings(training, held_out, unions), load_file(folder / EMBEDDINGS)["embeddings"]
            embeddings = dict(zip(said["texts"], rows, strict=True))
            return cls(phrasings, embeddings, clip, str(folder / TEXTS))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder} is damaged ({error!r}); restore its two files, or train anew") from error

    @staticmethod
    def kept(folder: Path) -> bool:
        return (folder / TEXTS).is_file()


TEXTS, EMBEDDINGS = "texts.json", "embeddings.safetensors"
_PARTS = ("training", "held_out")
