"""The words of a shell script and where they stand: what becomes an argument, of which command or variable.

No shell is modelled here: only what decides where a word begins and ends, and which words belong together, namely
quotes, substitutions, comments, arrays, continuations, here-documents and the ends of commands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.edits import line_around, line_number

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_DECLARING = frozenset({"export", "local", "declare", "readonly", "typeset"})
_OPENING = frozenset({"if", "while", "until", "for", "case", "select", "{"})
_CLOSING = frozenset({"fi", "done", "esac", "}"})
_BETWEEN = frozenset({"then", "else", "elif", "do", "!", "time"})
# A document that goes to the terminal, and to no file or program.
_SHOWS = re.compile(r"\s*cat\b(?![^\n]*(?:>\s*[^\s&]|\|))")
_SPACE = " \t\r\n"
_ENDS_A_COMMAND = ";&|\n"
# What ends a word, beside blanks.
_IN_COMMANDS, _IN_ARGUMENTS = ";&|<>()", ""


@dataclass(frozen=True)
class Word:
    """One word as written, quotes and variables included. holds_words: a quoted part is a group of its own."""

    text: str
    start: int
    end: int
    holds_words: bool = False

    @property
    def plain(self) -> str:
        """The word without its quotes."""
        return re.sub(r"(?<!\\)[\"']", "", self.text)


@dataclass
class Group:
    """Words that become arguments together.

    kind: of a "command", the elements of an "array", the words in a quoted "string", or a file of "arguments".
    start, end: of the text that holds the words, quotes and brackets left out.
    """

    kind: Literal["command", "array", "string", "arguments"]
    start: int
    end: int = 0
    words: list[Word] = field(default_factory=list)


@dataclass(frozen=True)
class Assignment:
    """`name=value` or `name+=value`: the value as written. conditional: it may not happen."""

    name: str
    value: str
    start: int
    appends: bool
    conditional: bool


@dataclass(frozen=True)
class Script:
    """Everything found in a script, in the order of its text."""

    text: str
    groups: Sequence[Group]
    assignments: Sequence[Assignment]


def scan_script(text: str) -> Script:
    """The words of a shell script. Raises ConfigError where a quote or bracket is never closed."""
    scanner = _Scanner(text)
    scanner.commands(len(text))
    return Script(
        text,
        sorted((group for group in scanner.groups if group.words), key=lambda group: group.start),
        sorted(scanner.assignments, key=lambda one: one.start),
    )


def scan_arguments(text: str) -> Script:
    """The words of a file that holds arguments and comments only."""
    scanner = _Scanner(text)
    group = scanner.open("arguments")
    scanner.list_of_words(group, len(text), closing=None)
    return Script(text, [group, *(each for each in scanner.groups if each is not group and each.words)], [])


class _Scanner:
    """Walks through a text once; `at` is where it is, `depth` how many conditions, loops, functions are around it."""

    def __init__(self, text: str, at: int = 0, depth: int = 0):
        self.text, self.at, self.depth = text, at, depth
        self.groups: list[Group] = []
        self.assignments: list[Assignment] = []
        self.brackets = self.cases = 0
        self.documents: list[tuple[str, bool]] = []

    def open(self, kind: Literal["command", "array", "string", "arguments"]) -> Group:
        group = Group(kind, self.at)
        self.groups.append(group)
        return group

    def commands(self, end: int) -> None:
        """Everything up to `end`, as commands."""
        group = self.open("command")
        while self.at < end:
            char = self.text[self.at]
            if self._blank():
                continue
            if char == "#":
                self._comment(end)
            elif char in _ENDS_A_COMMAND:
                self.at += 1
                group = self._next_command(group)
                if char == "\n":
                    self._here_documents(end)
            elif char in "<>":
                self._redirection()
            elif char == "(" and not self._are_arguments(group):
                self._bracket()
                group = self._next_command(group)
            elif char == ")" and not self._are_arguments(group):
                # One that nothing has opened ends a pattern of `case`: no command, and no arguments.
                if self.brackets == 0:
                    group.words.clear()
                self.brackets = max(0, self.brackets - 1)
                self.at += 1
                group = self._next_command(group)
            else:
                self._command_word(group)
        self._close(group)

    def list_of_words(self, group: Group, end: int, closing: str | None) -> None:
        """Words up to `closing`, comments left out, as in an array."""
        while self.at < end:
            if self._blank(newlines=True):
                continue
            if self.text[self.at] == "#":
                self._comment(end)
            elif self.text[self.at] == closing:
                break
            else:
                group.words.append(self._word(closing or _IN_ARGUMENTS))
        else:
            if closing is not None:
                raise self._unclosed("(", group.start)
        group.end = self.at

    def _next_command(self, group: Group) -> Group:
        self._close(group)
        return self.open("command")

    def _close(self, group: Group) -> None:
        if group.words:
            group.start, group.end = group.words[0].start, group.words[-1].end

    def _are_arguments(self, group: Group) -> bool:
        """Whether this is a line of arguments, where brackets are letters; a pattern of `case` may look like one."""
        return bool(group.words) and group.words[0].text.startswith("--") and not self.cases

    def _blank(self, newlines: bool = False) -> bool:
        for blank in (" ", "\t", "\r", "\\\n", "\\\r\n", *(["\n"] if newlines else [])):
            if self.text.startswith(blank, self.at):
                self.at += len(blank)
                return True
        return False

    def _continuation(self) -> bool:
        return self.text.startswith(("\\\n", "\\\r\n"), self.at)

    def _comment(self, end: int) -> None:
        found = self.text.find("\n", self.at)
        self.at = end if found < 0 else min(found, end)

    def _command_word(self, group: Group) -> None:
        declares = bool(group.words) and group.words[0].text in _DECLARING
        match = _ASSIGNMENT.match(self.text, self.at) if not group.words or declares else None
        if match:
            self._assignment(match)
            return
        word = self._word(_IN_ARGUMENTS if self._are_arguments(group) else _IN_COMMANDS)
        if word.text.isdecimal() and self.text[self.at : self.at + 1] in ("<", ">"):
            return  # the number of what is redirected
        if group.words or word.text not in _OPENING | _CLOSING | _BETWEEN:
            group.words.append(word)
            self._function(group)
            return
        self.depth = max(0, self.depth + (word.text in _OPENING) - (word.text in _CLOSING))
        self.cases = max(0, self.cases + (word.text == "case") - (word.text == "esac"))
        if word.text in ("for", "case", "select"):
            group.words.append(word)

    def _function(self, group: Group) -> None:
        if len(group.words) == 1 and self.text.startswith("()", self.at):
            self.at += 2
            group.words.clear()

    def _assignment(self, match: re.Match[str]) -> None:
        start, self.at = self.at, match.end()
        value = self.at
        if self.text.startswith("(", self.at):
            self.at += 1
            group = self.open("array")
            self.list_of_words(group, len(self.text), closing=")")
            self.at += 1
        elif self.at < len(self.text) and self.text[self.at] not in _SPACE + _IN_COMMANDS:
            self._word(_IN_COMMANDS, is_value=True)
        value_text, conditional = self.text[value : self.at], self.depth > 0
        self.assignments.append(Assignment(match.group(1), value_text, start, match.group(2) == "+", conditional))

    def _word(self, ends: str, is_value: bool = False) -> Word:
        start, count = self.at, len(self.groups)
        while self.at < len(self.text) and self.text[self.at] not in _SPACE + ends and not self._continuation():
            self._part(self.text[self.at], is_value)
        # Nothing may be left standing where the walk would stop for ever.
        self.at = max(self.at, start + 1)
        return Word(self.text[start : self.at], start, self.at, len(self.groups) > count)

    def _part(self, char: str, is_value: bool) -> None:
        """One character of a word, or all that a quote or a substitution encloses."""
        if char == "\\":
            self.at += 2
        elif char in "\"'":
            self._quoted(char, is_value)
        elif not self._substitution():
            self.at += 1

    def _substitution(self) -> bool:
        for opening, closing in (("${", "}"), ("$(", ")"), ("`", "`")):
            if self.text.startswith(opening, self.at):
                self._enclosed(opening, closing)
                return True
        return False

    def _enclosed(self, opening: str, closing: str) -> None:
        start = self.at
        self.at += len(opening)
        nested = 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\\":
                self.at += 2
                continue
            if char == closing:
                nested -= 1
            elif char in "\"'" and opening == "$(":
                self._skip_quoted(char)
                continue
            elif char == opening[-1]:
                nested += 1
            self.at += 1
            if nested == 0:
                return
        raise self._unclosed(opening, start)

    def _skip_quoted(self, quote: str) -> tuple[int, int]:
        start = self.at
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == quote:
                self.at += 1
                return start + 1, self.at - 1
            if quote == '"' and char == "\\":
                self.at += 2
            elif quote == "'" or not self._substitution():
                self.at += 1
        raise self._unclosed(quote, start)

    def _quoted(self, quote: str, is_value: bool) -> None:
        start, end = self._skip_quoted(quote)
        inside = self.text[start:end]
        if is_value or any(blank in inside for blank in _SPACE):
            group = Group("string", start, end)
            group.words = split_quoted(self.text, start, end)
            self.groups.append(group)

    def _redirection(self) -> None:
        document = re.compile(r"<<-?\s*([\"'\\]?)(\w+)").match(self.text, self.at)
        if document and not self.text.startswith("<<<", self.at):
            line = line_around(self.text, self.at)
            shown = _SHOWS.match(self.text[line.start : line.end])
            self.documents.append((document.group(2), shown is not None))
            self.at = document.end() + len(document.group(1))
            return
        while self.at < len(self.text) and self.text[self.at] in "<>&|":
            self.at += 1
        while self._blank():
            pass
        if self.at < len(self.text) and self.text[self.at] not in "(\n":
            self._word(_IN_COMMANDS)

    def _bracket(self) -> None:
        if self.text.startswith("((", self.at) and (end := self.text.find("))", self.at)) >= 0:
            self.at = end + 2
            return
        self.brackets += 1
        self.at += 1

    def _here_documents(self, end: int) -> None:
        """The bodies that begin here: scripts of their own, or prose, which is left out."""
        for name, shown in self.documents:
            closing = re.compile(rf"^[ \t]*{re.escape(name)}[ \t\r]*$", re.MULTILINE).search(self.text, self.at)
            stop = min(end, closing.start() if closing else end)
            inner = _Scanner(self.text, self.at, self.depth + 1)
            try:
                inner.commands(stop)
            except ConfigError:
                inner.groups.clear()
            if inner.at <= stop and not shown:
                self.groups += inner.groups
                self.assignments += inner.assignments
            self.at = min(end, closing.end() if closing else end)
        self.documents.clear()

    def _unclosed(self, opening: str, start: int) -> ConfigError:
        valid = "is opened here and never closed: must be a shell script, or a file of arguments"
        return ConfigError(Problem(f"line {line_number(self.text, start)}", opening, valid))


def split_quoted(text: str, start: int, end: int) -> list[Word]:
    """The words between two quotes, which a shell makes of a string that is used without quotes."""
    words = []
    pattern = re.compile(
        r"(?:\\\r?\n|\s)+"  # between words
        r"|((?:\$\{[^}]*\}|\$\([^)]*\)|\\(?!\r?\n).|'[^'\n]*'|\\?[^\s\\])+)",
        re.DOTALL,
    )
    at = start
    while at < end and (match := pattern.match(text, at, end)):
        if match.group(1):
            words.append(Word(match.group(1), match.start(), match.end()))
        at = match.end() if match.end() > at else at + 1
    return words
