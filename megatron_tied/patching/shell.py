"""Launch scripts and argument files: our flags next to `--num-experts`, our launcher before the script it runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.arguments import Arguments
from megatron_tied.patching.edits import Edit, apply_edits, line_around, line_number
from megatron_tied.patching.launcher import Launch, launch_in
from megatron_tied.patching.shell_variables import Variables, followed
from megatron_tied.patching.shell_words import Group, Script, Word, scan_arguments, scan_script

ANCHOR = "--num-experts"
_FLAG = re.compile(r"--[A-Za-z]")
_WHOLE_VARIABLE = re.compile(r"\$\w+|\$\{\w+(\[[@*]\])?\}")
# Commands whose words go to no training script.
_NO_ARGUMENTS = frozenset({"[", "[[", "test", "echo", "printf", "grep", "sed", "for", "case", "select"})


class Place(NamedTuple):
    """Where a flag stands: in which group, and the positions of its first and last word there."""

    group: int
    first: int
    last: int


@dataclass(frozen=True)
class ShellFile:
    """A script, its arguments so far as they can be known, and where our flags and launcher belong."""

    script: Script
    arguments: Arguments
    anchors: Sequence[Place]
    launches: Sequence[Launch]

    def edits(self, flags: Mapping[str, str], launcher: bool) -> list[Edit]:
        """What to insert. Raises ConfigError if the words of the result would not be the old ones and ours."""
        edits, added = [], {}
        for place in self.anchors if flags else ():
            word = self.script.groups[place.group].words[place.last]
            added[word.end] = [
                part for name, value in flags.items() for part in _parts(self._anchor(place), name, value)
            ]
            edits.append(_flags_edit(self.script, place, flags))
        for launch in self.launches if launcher else ():
            if launch.script is not None and not launch.is_tied:
                added[launch.script.start] = launch.launcher.split()
                edits.append(Edit(launch.script.start, launch.script.start, f"{launch.launcher} "))
        self._prove(edits, added)
        return edits

    def _anchor(self, place: Place) -> Word:
        return self.script.groups[place.group].words[place.first]

    def _prove(self, edits: Sequence[Edit], added: Mapping[int, Sequence[str]]) -> None:
        text = apply_edits(self.script.text, edits)
        kind = self.script.groups[0].kind if self.script.groups else "command"
        again = scan_arguments(text) if kind == "arguments" else scan_script(text)
        if _words(again, {}) == _words(self.script, added) and _shlex_agrees(self.script, again, added):
            return
        place = line_number(self.script.text, edits[0].start)
        valid = "stands where nothing can be added safely: add --moe-tie-group-size by hand"
        raise ConfigError(Problem(f"line {place}", ANCHOR, valid))


def read_shell(script: Script) -> ShellFile:
    """Everything that a patch needs to know of a script."""
    arguments, variables = Arguments(), Variables()
    anchors: list[Place] = []
    found: list[Launch] = []
    printed = -1
    for index in followed(script, variables):
        group = script.groups[index]
        if group.kind == "command" and group.words[0].plain in _NO_ARGUMENTS:
            printed = group.end
        if group.start < printed:
            continue
        if launch := launch_in(group, variables):
            found.append(launch)
        for place in _flags(group, index):
            name, values = _read(group, place, variables)
            arguments.add(name, values, source=index)
            if name == ANCHOR and values:
                anchors.append(place._replace(last=min(place.last, place.first + 1)))
    return ShellFile(script, arguments, anchors, found)


def _flags(group: Group, index: int) -> Iterator[Place]:
    starts = [position for position, word in enumerate(group.words) if _FLAG.match(word.plain) and not word.holds_words]
    for start, following in pairwise([*starts, len(group.words)]):
        last = start
        if "=" not in group.words[start].plain:
            while last + 1 < following and _is_value(group.words[last + 1], last > start):
                last += 1
        yield Place(index, start, last)


def _is_value(word: Word, has_value: bool) -> bool:
    if re.match(r"\s*--?[A-Za-z]", word.plain):
        return False
    # A list of arguments that follows a flag without a value, or with one.
    is_list = _WHOLE_VARIABLE.fullmatch(word.plain) is not None
    return not (is_list and (has_value or "[" in word.plain)) and not (word.plain.endswith(".py") and has_value)


def _read(group: Group, place: Place, variables: Variables) -> tuple[str, list[str | None]]:
    flag_word = group.words[place.first].plain
    name, equals, value = flag_word.partition("=")
    if equals:
        return name, [variables.resolved(value)]
    return name, [variables.resolved(word.text) for word in group.words[place.first + 1 : place.last + 1]]


def _flags_edit(script: Script, place: Place, flags: Mapping[str, str]) -> Edit:
    """Our flags after the anchor: on lines of their own where it is, else on its line."""
    text, group = script.text, script.groups[place.group]
    first, last = group.words[place.first], group.words[place.last]
    ours = [_parts(first, name, value) for name, value in flags.items()]
    inline = Edit(last.end, last.end, "".join(f" {part}" for parts in ours for part in parts))
    line, value_line = line_around(text, first.start), line_around(text, last.end)
    indent = text[line.start : first.start]
    if indent.strip() or _shares_line(group, place, text):
        return inline
    newline, rest = value_line.newline, text[last.end : value_line.end]
    between = text[first.end : last.start] if last is not first else " "
    separator = between if "\n" in between else " "
    lines = [indent + separator.join(parts) for parts in ours]
    continued = rest.strip() == "\\"
    if continued or (not rest.strip() and _may_break_line(script, group, first)):
        return Edit(value_line.end, value_line.end, "".join(f"{newline}{one}{rest}" for one in lines))
    if rest.lstrip()[:1] == "#" and group.kind in ("array", "arguments"):
        return Edit(value_line.end, value_line.end, "".join(f"{newline}{one}" for one in lines))
    if rest.strip() and rest.lstrip()[0] not in "\"')":
        return inline
    joint = newline if _may_break_line(script, group, first) else f" \\{newline}"
    return Edit(last.end, last.end, "".join(f"{joint}{one}" for one in lines))


def _parts(anchor: Word, name: str, value: str) -> list[str]:
    """A flag and its value, quoted and joined as the anchor is."""
    quote = anchor.text[0] if anchor.text[0] in "\"'" else ""
    if "=" in anchor.plain:
        return [f"{quote}{name}={value}{quote}"]
    return [f"{quote}{name}{quote}", f"{quote}{value}{quote}"]


def _shares_line(group: Group, place: Place, text: str) -> bool:
    following = group.words[place.last + 1 : place.last + 2]
    end = line_around(text, group.words[place.last].end).end
    return any(word.start < end for word in following)


def _may_break_line(script: Script, group: Group, first: Word) -> bool:
    """Whether lines of the group end without a backslash: those of arrays do, and of strings that have none."""
    if group.kind in ("array", "arguments"):
        return True
    start = line_around(script.text, first.start).start
    before = script.text[:start].removesuffix("\n").removesuffix("\r")
    is_line_of_flags = group.words[0] is first and group.kind == "command"
    return not before.endswith("\\") and (group.kind == "string" or is_line_of_flags)


def _words(script: Script, added: Mapping[int, Sequence[str]]) -> list[str]:
    """All words, those between them that `added` puts before or after a place, and where groups begin."""
    found: list[str] = []
    for group in script.groups:
        # A line of flags alone is a group that ours may stand beside, not in.
        found += [] if group.kind == "command" and _FLAG.match(group.words[0].text) else [f"({group.kind}"]
        for word in group.words:
            text = "..." if word.holds_words else word.text
            found += [*added.get(word.start, ()), text, *added.get(word.end, ())]
    return found


def _shlex_agrees(before: Script, after: Script, added: Mapping[int, Sequence[str]]) -> bool:
    """Whether the standard library's lexer finds the same words in each changed group; it may not know one at all."""
    lists = ([group for group in script.groups if group.kind != "command"] for script in (before, after))
    for old, new in zip(*lists, strict=True):
        ours = [part for word in old.words for place in (word.start, word.end) for part in added.get(place, ())]
        try:
            words = [_shlexed(script.text[group.start : group.end]) for script, group in ((before, old), (after, new))]
        except ValueError:
            continue
        if len(words[1]) != len(words[0]) + len(ours):
            return False
    return True


def _shlexed(text: str) -> list[str]:
    return shlex.split(re.sub(r"\\\r?\n", " ", text), comments=True)
