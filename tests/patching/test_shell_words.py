"""Words of scripts, what variables hold, and flags added in every style that there is."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tied.patching.edits import apply_edits
from megatron_tied.patching.expressions import integer, integers
from megatron_tied.patching.shell import read_shell
from megatron_tied.patching.shell_variables import Variables, followed
from megatron_tied.patching.shell_words import scan_arguments, scan_script


def words(text: str) -> list[tuple[str, list[str]]]:
    return [(group.kind, [word.text for word in group.words]) for group in scan_script(text).groups]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b # c\nd", [("command", ["a", "b"]), ("command", ["d"])]),
        ("a \\\n  b; c|d && e", [("command", [*"ab"]), ("command", ["c"]), ("command", ["d"]), ("command", ["e"])]),
        ("a 8\\\n b", [("command", ["a", "8", "b"])]),
        ("a#b c", [("command", ["a#b", "c"])]),
        ("X=(a 'b' # c\n d)", [("array", ["a", "'b'", "d"])]),
        ('X+=" a \\\n b" # c', [("string", ["a", "b"])]),
        ("a $(b c; d) ${X:-e f} `g h`", [("command", ["a", "$(b c; d)", "${X:-e f}", "`g h`"])]),
        ("a 'b c'", [("command", ["a", "'b c'"]), ("string", ["b", "c"])]),
        ('a "b $(c "d e")"', [("command", ["a", '"b $(c "d e")"']), ("string", ["b", '$(c "d e")'])]),
        ("X=1 Y=2 a", [("command", ["a"])]),
        ("export X=1 Y", [("command", ["export", "Y"])]),
        ("if a; then b; fi", [("command", ["a"]), ("command", ["b"])]),
        ("f() { a; }", [("command", ["a"])]),
        ("case $X in\n  --a) b ;;\nesac", [("command", ["case", "$X", "in"]), ("command", ["b"])]),
        ("( ( a ); b )\nc", [("command", ["a"]), ("command", ["b"]), ("command", ["c"])]),
        ("a >", [("command", ["a"])]),
        ("a >\nb", [("command", ["a"]), ("command", ["b"])]),
        ("a < <(b c)", [("command", ["a"]), ("command", ["b", "c"])]),
        ("a 2>&1 >b <c d", [("command", ["a", "d"])]),
        ("a <<E b\nc 'd\nE\ne", [("command", ["a", "b"]), ("command", ["e"])]),
        ("a <<-'E'\n\tc d\n\tE\ne", [("command", ["a"]), ("command", ["c", "d"]), ("command", ["e"])]),
        ("(( X << 2 ))\n(a b)", [("command", ["a", "b"])]),
        ("[[ $a =~ ^(x|y)$ ]] && b", None),
        ('a\\ b c\\"d', [("command", ["a\\ b", 'c\\"d'])]),
    ],
)
def test_words(text: str, expected: list[tuple[str, list[str]]] | None) -> None:
    found = words(text)
    assert found == expected if expected is not None else found[-1] == ("command", ["b"])


def test_words_of_a_file_of_arguments() -> None:
    (group,) = scan_arguments("# it's\n--a ([0]*1+[1]*2) # b\n--c 'd'\\\n\n").groups
    assert [word.text for word in group.words] == ["--a", "([0]*1+[1]*2)", "--c", "'d'"]


@pytest.mark.parametrize(
    ("script", "text", "expected"),
    [
        ("X=8", "$X", "8"),
        ("X='8'", '"${X}"', "8"),
        ("X=$Y", "$X", None),
        ("", "${X:-4}", "4"),
        ("", "${X-${Y:-6}}", "6"),
        ("X=${1:-3}", "$X", "3"),
        ("X=$1", "${X:-3}", None),
        ("X=${X:-3}", "$X", "3"),
        ("X=2; X=${X:-3}", "$X", "2"),
        ("X=2; Y=$((X * 4 + 1))", "$Y", "9"),
        ("X=2; Y=$(($X*${X}))", "$Y", "4"),
        ("X=$(nproc)", "$X", None),
        ("if a; then X=1; else X=2; fi", "$X", None),
        ("if a; then X=1; else X=1; fi", "$X", "1"),
        ("if a; then X=1; fi; X=3", "$X", "3"),
        ("X=a; X+=b", "$X", "a b"),
        ("X=$X", "$X", None),
        ("X=1", "'a'$X'b'", "a1b"),
        ("X=1", "'$X'", "$X"),
        ("X=1", "a`X`", None),
        ("X='$Y'", "$X", None),
        ("X=(--a 1)", "${X[@]}", "--a 1"),
    ],
)
def test_variables(script: str, text: str, expected: str | None) -> None:
    scanned, variables = scan_script(script), Variables()
    list(followed(scanned, variables))
    assert variables.resolved(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("([0]*3+[1]*2)", [0, 0, 0, 1, 1]),
        ("([1]+[0])*2", [1, 0, 1, 0]),
        ("2*[1]", [1, 1]),
        ("[0,1,1]", [0, 1, 1]),
        ("\\(\\[0\\]*1+[1]\\)", [0, 1]),
        ("[1]*10**9", None),
        ("[1]*1000000", None),
        ("__import__('os').system('true')", None),
        ("[x]", None),
        ("'([0] + [1]*2)'", [0, 1, 1]),
        ("3", None),
        ("[True]", None),
    ],
)
def test_lists(text: str, expected: list[int] | None) -> None:
    assert integers(text) == expected


def test_sums() -> None:
    assert [integer(text) for text in ("8*2+1", "(7-1)/4", "7%4", "-3", "1/0", "a", "[1]")] == [
        17,
        1,
        3,
        -3,
        None,
        None,
        None,
    ]


VALUES = st.sampled_from(["1", "0.5", "aux_loss", "1,2,3", "'99,1,0'", "${A}", "[0]*1+[1]*2"])
FLAGS = st.lists(st.tuples(st.sampled_from(["--seed", "--lr", "--split", "--bf16"]), VALUES | st.none()), max_size=5)
STYLES = {
    "array": ("A=1; X=(", "\n    ", "\n)\nprogram ${X[@]}\n"),
    "array on a line": ("A=1; X=(", " ", ")\nprogram ${X[@]}\n"),
    "string": ('A=1; X=" \\\n    ', " \\\n    ", ' \\\n"\nprogram $X\n'),
    "string without backslashes": ('A=1; X="', "\n\t", '"\nprogram $X\n'),
    "command": ("A=1; program \\\n  ", " \\\n  ", "\n"),
    "line": ("A=1; program ", " ", "\n"),
    "appended": ('A=1; X="--log"; X="$X ', " ", '"\nprogram $X\n'),
}


@settings(max_examples=60, deadline=None)
@given(style=st.sampled_from(sorted(STYLES)), before=FLAGS, after=FLAGS, joined=st.booleans(), crowded=st.booleans())
def test_flags_are_added_and_nothing_else_changes(
    style: str,
    before: list[tuple[str, str | None]],
    after: list[tuple[str, str | None]],
    joined: bool,
    crowded: bool,
) -> None:
    opening, between, closing = STYLES[style]
    anchor = "--num-experts=8" if joined else "--num-experts 8"
    lines = [" ".join(filter(None, pair)) for pair in before], [" ".join(filter(None, pair)) for pair in after]
    # Several flags on the line of the number of experts, or one on each.
    middle = (
        " ".join([*lines[0][-1:], anchor, *lines[1][:1]])
        if crowded
        else between.join([*lines[0][-1:], anchor, *lines[1][:1]])
    )
    text = opening + between.join([*lines[0][:-1], middle, *lines[1][1:]]) + closing
    file = read_shell(scan_script(text))
    patched = apply_edits(text, file.edits({"--moe-tie-group-size": "4"}, launcher=True))
    ours = ["--moe-tie-group-size=4"] if joined else ["--moe-tie-group-size", "4"]
    expected = arguments(text)
    place = expected.index(anchor) + 1 if joined else expected.index("--num-experts") + 2
    assert arguments(patched) == [*expected[:place], *ours, *expected[place:]]


def arguments(script: str) -> list[str]:
    """What bash makes of a script's arguments for `program`; no file has a name that a pattern could match."""
    program = "set -f; program() { printf '%s\\n' \"$@\"; }\n"
    done = subprocess.run(["bash", "-c", program + script], check=True, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.splitlines()
