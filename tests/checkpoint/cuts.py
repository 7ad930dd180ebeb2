"""Ways to cut tensors into rectangles, drawn by Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

Box = tuple[tuple[int, ...], tuple[int, ...]]

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Rectangles, as (offsets, sizes), that together are the tensor: cut in two, and each part again."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axes = [axis for axis, size in enumerate(sizes) if size > 1]
        if not axes:
            boxes.append((offsets, sizes))
            continue
        axis = draw(st.sampled_from(axes))
        cut = draw(st.integers(1, sizes[axis] - 1))
        boxes.append((offsets, _with(sizes, axis, cut)))
        boxes.append((_with(offsets, axis, offsets[axis] + cut), _with(sizes, axis, sizes[axis] - cut)))
    return boxes


def place(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of a rectangle in its tensor."""
    return tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
