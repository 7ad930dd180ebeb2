"""Small corpora."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

WORDS = re.findall(
    r"\S+",
    """
    the of and to in that with for was his not but had you are from they this have were all when there which bank
    layer expert router token group tie owner follower prelude coda topology gradient weight café naïve
    """,
)


def make_text(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(("\n", " ", " ", ", ", "  ")) for _ in range(words))


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)))
    return path
