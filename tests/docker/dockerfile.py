"""What a Dockerfile says, with build arguments filled in."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILES = (ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu")


@dataclass(frozen=True)
class Dockerfile:
    """One Dockerfile of one stage: (instruction, value) in order, and the build arguments with their defaults."""

    instructions: list[tuple[str, str]]
    arguments: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        """Parse `path`; comments are dropped, continued lines joined."""
        parsed = DockerfileParser(fileobj=BytesIO(path.read_bytes())).structure
        instructions = [(item["instruction"], item["value"]) for item in parsed if item["instruction"] != "COMMENT"]
        given = [shlex.split(value)[0].partition("=") for name, value in instructions if name == "ARG"]
        return cls(instructions, {name: default for name, _, default in given})

    def values(self, instruction: str) -> list[str]:
        """The values of every `instruction`, build arguments filled in."""
        return [self.fill_in(value) for name, value in self.instructions if name == instruction]

    def fill_in(self, value: str) -> str:
        """`value` with the defaults of build arguments in place of ${NAME}."""
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments.get(match[1], match[0]), value)

    def copied(self) -> list[str]:
        """Every source of every COPY."""
        return [source for value in self.values("COPY") for source in shlex.split(value)[:-1]]

    def exec_form(self, instruction: str) -> list[str]:
        """The words of the last ENTRYPOINT or CMD, which must be JSON."""
        return json.loads(self.values(instruction)[-1])
