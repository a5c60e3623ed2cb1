"""What stands in the content of messages beside text: images and time series, and where their files come from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moexpand.data.attached import RATE_KEY, Attached, checked
from moexpand.data.chat_template import IMAGE, SERIES
from moexpand.data.parts import Unusable

KINDS = {"image": "image", "image_url": "image", "time_series": "series"}
"""Types of items of a content list that bring a file."""
SHOWN = {"image": {"type": "image", "image": "image"}, "series": {"type": "time_series", "time_series": "time_series"}}
"""What templates are given in their place: these ask whether there is one, not which."""
_KEYS = {"image": ("image", "image_url", "path", "url"), "series": ("time_series", "path", "url")}
"""Of an item of a message's content, under which its file may stand."""


class Supply:
    """Files of a row for the places in its messages that name none, in their order."""

    def __init__(self, images: Iterable[Any], series: Iterable[tuple[Any, Any]]) -> None:
        self._left = {"image": [(name, None) for name in images], "series": list(series)}

    def next(self, kind: str) -> tuple[Any, Any]:
        """Name and sampling rate of the next file of a kind; None and None behind the last."""
        return self._left[kind].pop(0) if self._left[kind] else (None, None)

    def check_used(self, attached: Sequence[Attached]) -> None:
        """Refuse a row that names a file for which no message has a place.

        Raises:
            Unusable: `image_count` or `series_count`.
        """
        for kind, left in self._left.items():
            named = [entry.file for entry in attached]
            without = [name for name, _ in left if name not in named]
            if without:
                raise Unusable(f"{kind}_count", f"the row names the {kind} {without[0]!r}, and no message has a place for it")


def attached_by_item(number: int, kind: str, item: Mapping[str, Any], supply: Supply) -> Attached:
    """The file of an image or a time series in a message's content.

    Args:
        number: of the message.
        kind: image or series.
        item: of the content, such as {"type": "time_series", "time_series": "a.npy", "sampling_rate": 500}.
        supply: gives the file where the item names none.

    Raises:
        Unusable: `image_name`, `remote_image`, `series_name`, `series_remote`, `series_rate`.
    """
    given = next((item[key] for key in _KEYS[kind] if item.get(key) is not None), None)
    given = given.get("url") if isinstance(given, dict) else given
    name, rate = supply.next(kind) if given is None else (given, item.get(RATE_KEY))
    return checked(
        kind, name, rate, f" of message {number}", f"{'an image' if kind == 'image' else 'a series'} of message {number}"
    )


def flat(content: Any) -> str:
    """List content as one string, images and series by their marks."""
    if isinstance(content, str):
        return content
    marks = {"image": IMAGE, "time_series": SERIES}
    return "".join(marks.get(item["type"]) or item["text"] for item in content)


def series_as_text(content: Any) -> Any:
    """List content with the mark of a series as a text in its place; a string where only texts are left."""
    if isinstance(content, str):
        return content
    content = [{"type": "text", "text": SERIES} if item["type"] == "time_series" else item for item in content]
    return content if any(item["type"] == "image" for item in content) else flat(content)
