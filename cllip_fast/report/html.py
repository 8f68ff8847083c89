"""HTML by functions: what is not `Html` is escaped, so that no caption, phrase or name can become markup."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

_VOID = ("img", "link", "meta")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; children that are None are left out, and so are attributes that are None.

    A trailing underscore of an attribute's name is dropped (`class_`), others become hyphens (`aria_label`).
    """
    given = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*parts: object) -> Html:
    """Elements and texts one after the other; None is left out."""
    return Html(
        "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    )


def image(picture: Image.Image, alt: str) -> Html:
    """A picture inside the page, as JPEG."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=85, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt, width=picture.width, height=picture.height)


def table(
    header: list[object], rows: list[list[object]], *, caption: str, numbers: bool = False, class_: str | None = None
) -> Html:
    """A table in a box of its own that scrolls sideways; the first cell of a row heads it.

    Args:
        header: of the columns.
        numbers: align all columns but the first at the right.
    """
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    kind = " ".join(filter(None, ["numbers" if numbers else None, class_])) or None
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=kind)
    return scroll(whole, label=caption)


def scroll(content: Html, *, label: str) -> Html:
    """A box that scrolls sideways, by keyboard too, so that the page never does."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def note(text: str) -> Html:
    """A line that says what is missing."""
    return tag("p", text, class_="note")
