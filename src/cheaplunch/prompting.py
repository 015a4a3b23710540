"""How a network is asked: what `--prompts` and the flags beside it say, before any setting."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Literal

from cheaplunch.errors import UserError

PromptKind = Literal["furthest", "random", "box", "clicks", "one-click", "text", "auto"]
PROMPT_WORDS = ("furthest", "random", "box", "clicks:N", "one-click", "text", "auto")
"""What `--prompts` takes."""
FROM_TRUTH = PROMPT_WORDS[:-2]


@dataclass(frozen=True)
class Prompting:
    """Who says where to look, how often and how well: `--prompts` and the flags that go with it.

    furthest, random, box: from the truth of each class and slice its point furthest from the boundary, a random
    point, its tight box. clicks: so many of a simulated user, for each class and slice. one-click: one point a class
    and volume, carried through it. text: every class on every slice, by a text of its own that the network has not
    learned from; auto: nothing. Neither is from the truth. All px are the image's own.
    mask_prompt: after the first of several clicks the network is also shown its last answer.
    """

    kind: PromptKind = "furthest"
    clicks: int = 1
    box_margin_px: float = 0.0
    point_jitter_px: float = 0.0
    box_jitter_px: float = 0.0
    mask_prompt: bool = True

    def __str__(self) -> str:
        return f"clicks:{self.clicks}" if self.kind == "clicks" else self.kind

    @property
    def from_truth(self) -> bool:
        return self.kind not in ("text", "auto")

    @property
    def tells_presence(self) -> bool:
        """Whether the prompts also say which classes a slice has."""
        return self.kind in ("furthest", "random", "box", "clicks")

    @property
    def varies(self) -> bool:
        """Whether another draw gives other prompts."""
        jitter_px = self.box_jitter_px if self.kind == "box" else self.point_jitter_px
        return self.kind in ("random", "clicks", "text") or jitter_px > 0


def read_prompting(
    words: str,
    box_margin_px: float = 0.0,
    point_jitter_px: float = 0.0,
    box_jitter_px: float = 0.0,
    mask_prompt: bool = True,
) -> Prompting:
    """`--prompts` as it stands on the command line, and what goes with it. UserError for what means nothing."""
    kind, _, count = words.partition(":")
    if kind not in typing.get_args(PromptKind) or (kind == "clicks") != (count != ""):
        raise UserError(f"--prompts {words} is not known; choose one of: {', '.join(PROMPT_WORDS)}")
    if count and not (count.isdecimal() and int(count) > 0):
        raise UserError(f"--prompts {words}: N is a whole number above 0, as in clicks:5")
    for flag, px, goes in (
        ("--box-margin", box_margin_px, kind == "box"),
        ("--box-jitter", box_jitter_px, kind == "box"),
        ("--point-jitter", point_jitter_px, kind not in ("box", "text", "auto")),
    ):
        if not 0 <= px < math.inf:  # and not NaN
            raise UserError(f"{flag} is {px}; it must be 0 or more px")
        if px and not goes:
            raise UserError(f"{flag} does nothing with --prompts {words}; leave it out")
    if not mask_prompt and kind != "clicks":
        raise UserError(f"--no-mask-prompt does nothing with --prompts {words}; leave it out")
    px = (box_margin_px, point_jitter_px, box_jitter_px)
    return Prompting(typing.cast(PromptKind, kind), int(count or 1), *px, mask_prompt)
