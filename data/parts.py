"""Samples as ordered parts, and parts as token ids with a loss flag each.

A part is a JSON object of one of these forms:

    {"text": "..."}                                    plain text: names of special tokens in it are ordinary characters
    {"text": "...", "loss": false}                     not trained on
    {"text": "...", "special": true}                   markup written by us: names of special tokens become these tokens
    {"image": "png"} or {"image": "0.jpg"}             the sample's member with this ending
    {"series": "npy", "rate": 100.0}                   likewise a time series, with its sampling rate in Hz where it is known

Neighbouring texts are tokenised as one text, as a tokenizer would split the whole sample, with one exception: text is cut where
the loss begins or ends. A prompt is tokenised on its own when the model is asked, so its ids must not depend on the answer.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.series import is_rate
from moexpand.data.tokens import Tokenizer

Part = dict[str, Any]

VISION_TOKENS = (
    ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    ("<img>", "<IMG_CONTEXT>", "</img>"),
)
"""How families write an image (before, once per vision token, after): Qwen-VL and Intern-S1-Pro; InternVL and Intern-S1."""

SERIES_TOKENS = ("<|ts|>", "<TS_CONTEXT>", "<|/ts|>")
"""How Intern-S1-Pro writes a time series: before, once per token of the series, after."""

_PLACEHOLDERS = (*((convention, "an image") for convention in VISION_TOKENS), (SERIES_TOKENS, "a series"))
_SERIES_NAME = re.compile(r"(?:[0-9]+\.)?npy")
_IMAGE_NAME = re.compile(r"(?:[0-9]+\.)?[a-z0-9]+")
_NO_SPANS = np.zeros((0, 2), dtype=np.int64)
_KEYS = {"text": {"text", "loss", "special"}, "image": {"image"}, "series": {"series", "rate"}}


class Unusable(Exception):
    """One record or conversation that makes no sample: `reason` is counted, `detail` is for people, and the build goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids, without an end-of-text token."""

    ids: np.ndarray
    """int32 [n]"""
    loss: np.ndarray
    """bool [n]: this token is to be predicted (the flag belongs to the token itself, not to the one before it)"""
    image_spans: np.ndarray
    """int64 [images, 2]: first place of an image's vision tokens in `ids`, and the place after the last"""


def text_part(text: str, loss: bool = True, special: bool = False) -> Part:
    """A text part that leaves out what is the default."""
    part: Part = {"text": text}
    if not loss:
        part["loss"] = False
    if special:
        part["special"] = True
    return part


def check_parts(parts: Any) -> None:
    """Refuse what is no list of parts.

    Raises:
        InputError: names the first wrong part and what is wrong with it.
    """
    if not isinstance(parts, list) or not parts:
        raise InputError(f"A sample's parts must be a list with at least one part, but it is {_short(parts)}.")
    for number, part in enumerate(parts):
        problem = _problem(part)
        if problem:
            raise InputError(f"Part {number} of a sample, {_short(part)}, {problem}.")


def _problem(part: Any) -> str:
    if not isinstance(part, dict):
        return "is not a JSON object"
    kinds = [kind for kind in _KEYS if kind in part]
    if len(kinds) != 1:
        return "must have either 'text', 'image' or 'series'"
    kind = kinds[0]
    unknown = sorted(str(key) for key in part if key not in _KEYS[kind])
    if unknown:
        return f"has the key {unknown[0]!r}, and a part with {kind!r} may only have {', '.join(sorted(_KEYS[kind]))}"
    if not isinstance(part[kind], str):
        return f"must have a string as {kind!r}"
    for flag in ("loss", "special"):
        if not isinstance(part.get(flag, False), bool):
            return f"must have true or false as {flag!r}"
    if kind == "image" and not _IMAGE_NAME.fullmatch(part["image"]):
        return "must name the image by the ending of its member, such as 'png' or '0.png'"
    if kind == "series" and not is_series(part["series"]):
        return "must name the series by the ending of its member, 'npy' or '0.npy'"
    if "rate" in part and not is_rate(part["rate"]):
        return "must have a finite number above 0 as 'rate', in Hz"
    return ""


def is_series(member: str) -> bool:
    """Whether a member of this extension can be a time series; `0.npy` is one of several."""
    return _SERIES_NAME.fullmatch(member) is not None


def encode_parts(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    image_tokens: Sequence[int] | None,
    series_tokens: Sequence[int] | None = None,
) -> EncodedSample:
    """Turn parts into token ids.

    Args:
        parts: of one sample; see `check_parts`.
        tokenizer: whose special tokens the markup of the parts uses.
        image_tokens: vision tokens of each image part, in their order. An image becomes the token that opens one, this many
            placeholders, and the token that closes it, none of them with loss. None leaves images out: the ids are those with
            images but for those that stand for them.
        series_tokens: likewise of each series part.

    Raises:
        InputError: not as many numbers as images or series, a number below 1, a tokenizer without such tokens, or placeholders
            written as text.
    """
    if len(parts) == 1 and not image_tokens and not series_tokens and "text" in parts[0] and not parts[0].get("special", False):
        ids = np.array(tokenizer.encode(parts[0]["text"]), dtype=np.int32)
        return EncodedSample(ids, np.full(len(ids), parts[0].get("loss", True), dtype=bool), _NO_SPANS)
    _check_counts(parts, "image", image_tokens, "vision tokens")
    _check_counts(parts, "series", series_tokens, "tokens")
    collected = _Collector(tokenizer)
    images, series = iter(image_tokens or ()), iter(series_tokens or ())
    for part in parts:
        if "image" in part and image_tokens is not None:
            collected.add_image(next(images))
        elif "series" in part and series_tokens is not None:
            collected.add_series(next(series))
        elif "text" not in part:
            collected.end_text()  # what is left out parts the texts beside it all the same
        elif part.get("special", False):
            collected.add_markup(part["text"], part.get("loss", True))
        else:
            collected.add_text(part["text"], part.get("loss", True))
    return collected.finish()


def encode_text(parts: Sequence[Part], tokenizer: Tokenizer) -> EncodedSample:
    """The text of a sample whose images and series are left out: the ids of `encode_parts` without those that stand for them."""
    return encode_parts(parts, tokenizer, None)


def _check_counts(parts: Sequence[Part], kind: str, counts: Sequence[int] | None, what: str) -> None:
    if counts is None:
        return
    found = sum(kind in part for part in parts)
    if found != len(counts) or any(count < 1 for count in counts):
        raise InputError(
            f"A sample has {found} {kind} parts, but its {'images' if kind == 'image' else kind} have {list(counts)} {what};"
            f" each {kind} part needs one number of at least 1."
        )


class _Collector:
    """Ids and flags as they grow; text is held back until it ends, because its ids depend on what follows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._loss: list[bool] = []
        self._spans: list[tuple[int, int]] = []
        self._held: list[str] = []
        self._held_loss = True

    def add_text(self, text: str, loss: bool) -> None:
        if not text:
            return
        if loss != self._held_loss:
            self.end_text()
            self._held_loss = loss
        self._held.append(text)

    def add_markup(self, text: str, loss: bool) -> None:
        end = 0
        for match in control_pattern(control_tokens(self._tokenizer)).finditer(text):
            self.add_text(text[end : match.start()], loss)
            self.end_text()
            for (_, pad, _), kind in _PLACEHOLDERS:
                if match[0] == pad:
                    raise InputError(f"The markup {_short(text)} writes {pad} as text; write {kind} part instead.")
            self._append([self._tokenizer.specials[match[0]]], loss)
            end = match.end()
        self.add_text(text[end:], loss)

    def add_image(self, count: int) -> None:
        self.end_text()
        start, pad, end = vision_ids(self._tokenizer)
        first = len(self._ids) + 1
        self._append([start, *[pad] * count, end], False)
        self._spans.append((first, first + count))

    def add_series(self, count: int) -> None:
        self.end_text()
        start, pad, end = series_ids(self._tokenizer)
        self._append([start, *[pad] * count, end], False)

    def _append(self, ids: list[int], loss: bool) -> None:
        self._ids += ids
        self._loss += [loss] * len(ids)

    def end_text(self) -> None:
        """What comes next is tokenised by itself."""
        text = "".join(self._held)
        self._held = []
        if text:
            self._append(self._tokenizer.encode(text), self._held_loss)

    def finish(self) -> EncodedSample:
        self.end_text()
        spans = np.array(self._spans, dtype=np.int64).reshape(-1, 2)
        return EncodedSample(np.array(self._ids, dtype=np.int32), np.array(self._loss, dtype=bool), spans)


def control_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The added tokens that markup can name. Runs of white space and single characters are text, not markup."""
    return tuple(token for token in tokenizer.specials if len(token) > 1 and token.strip())


@lru_cache(maxsize=32)
def control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds control tokens in a text; where several begin at one place, the longest, as Hugging Face's tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def vision_tokens(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The first convention of `VISION_TOKENS` whose three tokens are all among `names`."""
    known = set(names)
    return next((convention for convention in VISION_TOKENS if known.issuperset(convention)), None)


def vision_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of the tokens that open an image, hold a vision token's place, and close it.

    Raises:
        InputError: the tokenizer has no such tokens.
    """
    convention = vision_tokens(tokenizer.specials)
    if convention is None:
        known = " or ".join(" ".join(tokens) for tokens in VISION_TOKENS)
        raise InputError(f"The tokenizer {tokenizer.name} has no tokens for images ({known}); leave images out, or use another.")
    start, pad, end = (tokenizer.specials[token] for token in convention)
    return start, pad, end


def series_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of the tokens that open a time series, hold the place of one of its tokens, and close it.

    Raises:
        InputError: the tokenizer has no such tokens.
    """
    missing = [token for token in SERIES_TOKENS if token not in tokenizer.specials]
    if missing:
        raise InputError(
            f"The tokenizer {tokenizer.name} has no {missing[0]}, and time series need {', '.join(SERIES_TOKENS)}; leave series"
            " out, or use another."
        )
    start, pad, end = (tokenizer.specials[token] for token in SERIES_TOKENS)
    return start, pad, end


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
