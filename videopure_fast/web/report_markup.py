"""HTML and SVG made of elements, whose text and attributes are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

NBSP = "\u00a0"  # a space at which no line ends
_VOID = {"meta", "img", "input"}


class Markup(str):
    """Text that is HTML or SVG already. What Python makes of it, as by `+`, is a plain str and is escaped again."""


def element(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """An element. Children that are no Markup are escaped; those, and attributes, that are None are left out.

    Names of attributes are written with dashes for underscores, without one at the end: class_, stroke_width.
    """
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opened = name + "".join(f' {key}="{escape(str(value))}"' for key, value in given)
    return Markup(f"<{opened}>" if name in _VOID else f"<{opened}>{joined(children)}</{name}>")


def joined(children: Iterable[str | None]) -> Markup:
    """Children one after another; those that are no Markup are escaped."""
    return Markup("".join(one if isinstance(one, Markup) else escape(one) for one in children if one is not None))


def table(
    header: Sequence[str], lines: Iterable[Sequence[str]], *, title: str = "The numbers", bold: Sequence[str] = ()
) -> Markup:
    """A table whose first column is text and whose others are numbers; only its title is shown until it is asked for.

    bold: first cells of the rows to be emphasized.
    """

    def row(name: str, cells: Sequence[str], **attributes: str) -> Markup:
        kinds = ({} if place == 0 else {"class_": "number"} for place in range(len(cells)))
        shown = (element(name, cell, **kind, **attributes) for cell, kind in zip(cells, kinds, strict=True))
        return element("tr", *shown, class_="strong" if cells[0] in bold else None)

    head = element("thead", row("th", header, scope="col"))
    body = element("tbody", *(row("td", cells) for cells in lines))
    scrolled = element("div", element("table", head, body), class_="scroll", tabindex=0)
    return element("details", element("summary", title), scrolled)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Swatches with words. entries: the class of a swatch, such as "series-1", and its words."""
    items = (element("li", element("i", class_=kind), words) for kind, words in entries)
    return element("ul", *items, class_="legend muted")
