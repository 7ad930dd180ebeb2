"""A page as a parser sees it."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """tags: with their attributes, in order; texts: by the id of the section, or "" outside of any; cells: of tables.

    Raises AssertionError where tags are not nested.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"": ""}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def count(self, tag: str) -> int:
        """How many elements have this name."""
        return sum(name == tag for name, _ in self.tags)

    def row(self, label: str) -> list[str]:
        """The cells of the table row that begins with `label`."""
        return next(row[1:] for row in self.rows if row and row[0] == label)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.texts[self._section] = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it; it holds nothing."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that it ends what was begun last."""
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        """Add it to its section and its cell."""
        self.texts[self._section] += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif "td" in self._open and self._open[-1] == "span":
            self.rows[-1][-1] += f" ({data})"
