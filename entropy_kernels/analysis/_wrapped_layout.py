"""A constrained layout that wraps the titles of panels, which matplotlib's own lets run into each other."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from entropy_kernels.analysis import plot_style as style


class WrappedLayout(ConstrainedLayoutEngine):
    """Breaks what :func:`plot_style.title` has set at the width of its axes, a title above the lines of its note."""

    _before: list[str] | None = None

    def execute(self, fig: Figure) -> None:  # type: ignore[override]
        """Lay out, as often as wrapped lines change the axes that they are wrapped to."""
        found = [pair for ax in fig.axes if ax.get_visible() and (pair := _title_and_note(ax))]
        if self._before is None:  # lines that are not broken yet would make their axes narrower
            for text in (text for pair in found for text in pair):
                text.set_in_layout(False)
        super().execute(fig)
        for _ in range(3):
            for title, note in found:
                assert title.axes is not None
                # that of its place: an aspect would narrow it the more, the more lines stand above it
                width = title.axes.get_position(original=True).width * fig.bbox.width
                for text in (title, note):
                    style.wrap(text, str(text.get_label())[1:], width)
            lines = [text.get_text() for pair in found for text in pair]
            if lines == self._before:
                break
            self._before = lines
            for title, note in found:
                _set_above(title.axes, title, note)
            super().execute(fig)


def _set_above(ax: Any, title: Text, note: Text) -> None:
    """The title above the lines of its note, both with a say in how high the axes become."""
    height = note.get_window_extent().height * 72 / ax.figure.dpi if note.get_text() else 0
    pad = style.NOTE_ABOVE + 3 + height
    look = {name: getattr(title, f"get_{name}")() for name in ("fontsize", "fontweight", "color")}
    ax.set_title(title.get_text(), loc="left", va="bottom", pad=pad, **look)
    title.set_in_layout(True)
    note.set_in_layout(True)


def _title_and_note(ax: Any) -> tuple[Text, ...]:
    texts = {text.get_gid(): text for text in ax.get_children() if isinstance(text, Text)}
    return tuple(texts[name] for name in (style.TITLE, style.NOTE)) if style.TITLE in texts else ()
