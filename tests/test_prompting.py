"""What `--prompts` and the flags beside it say."""

import pytest

from cheaplunch.errors import UserError
from cheaplunch.prompting import Prompting, read_prompting


def test_prompts_as_they_are_said():
    assert read_prompting("clicks:12") == Prompting("clicks", 12)
    assert str(read_prompting("clicks:12")) == "clicks:12"
    assert str(read_prompting("one-click")) == "one-click"
    assert read_prompting("box", 2.0, box_jitter_px=3.0) == Prompting("box", 1, 2.0, 0.0, 3.0)
    for words in ("clicks", "clicks:", "clicks:0", "clicks:-1", "clicks:many", "box:3", "", "guess"):
        with pytest.raises(UserError, match="--prompts"):
            read_prompting(words)
    with pytest.raises(UserError, match="--point-jitter does nothing with --prompts auto"):
        read_prompting("auto", point_jitter_px=2)
