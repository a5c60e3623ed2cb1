"""How captions of figures and tables begin: "Figure 3:", "Tab. 2.", "TABLE IV"."""

import re

NUMBER = r"(?:[A-Z][.\-]?)?\d+(?:[.\-\u2013]\d+)*|[IVXL]+(?![a-z])"
WORD = r"(?:(?:supplementary|supplemental|extended data)\s+)?(fig(?:ure|\.)?|scheme|tab(?:le|\.)?)"
CAPTION = re.compile(rf"^{WORD}\s*({NUMBER})\s*([:.|\u2014\u2013-]?)(?=\s|$)", re.I)
BARE = re.compile(rf"^{WORD}\s*(?:{NUMBER})$", re.I)
"""A label that has a row to itself, without a mark."""
ALONE = re.compile(rf"^{WORD}\s*(?:{NUMBER})\s*[:.|\u2014\u2013-]?$", re.I)
"""A label that has a row to itself: the caption's text stands below it."""


def label_of(text: str) -> tuple[str, str]:
    """(fig, scheme or tab, number) with which a caption begins; two empty strings where it does not begin so."""
    match = CAPTION.match(text)
    if match is None:
        return "", ""
    word = match.group(1).lower()
    return ("scheme" if word == "scheme" else word[:3]), match.group(2)
