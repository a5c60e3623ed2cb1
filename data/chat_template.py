"""Chat templates: the model's own jinja text, rendered in a sandbox, with marks that keep its markup and the messages apart."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date as calendar_date
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.data.chatml import CHATML
from moexpand.data.parts import SERIES_TOKENS, Unusable, control_pattern, control_tokens, vision_tokens
from moexpand.data.tokens import Tokenizer

MARK, IMAGE, OPEN, CLOSE, SERIES = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
"""Noncharacters of Unicode, which no text has a use for: beside a character that could begin or end a control token, in place
of an image, around what a `{% generation %}` block writes, and in place of a time series."""
FIXED_DATE = "2025-01-01"
THINK, END_THINK = "<think>", "</think>"


class ChatTemplate:
    """One model's way to write a conversation.

    Args:
        sources: jinja text by name: `default`, and `tool_use` for conversations with tools where the model has one.
        tokenizer: whose control tokens the template writes.
        variables: further names that the template sees, such as bos_token.
        origin: where it comes from, for messages.
        date: ISO date that `strftime_now` gives, whatever the day.

    Raises:
        InputError: the text is no jinja, or writes control tokens that swallow the white space beside them.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Tokenizer,
        variables: Mapping[str, str] | None = None,
        origin: str = "the built-in chat template",
        date: str = FIXED_DATE,
    ) -> None:
        self.origin = origin
        self.tokens = control_tokens(tokenizer)
        self.vision = vision_tokens(tokenizer.specials)
        self._variables = dict(variables or {})
        environment = _environment(date)
        try:
            self._compiled = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise InputError(f"{origin} is not a chat template that jinja can read: {error}.") from None
        self._generation = {name: _GENERATION.search(source) is not None for name, source in sources.items()}
        for token in sorted(tokenizer.stripping):
            if any(token in source for source in sources.values()):
                raise InputError(
                    f"{origin} writes {token}, which swallows white space beside it or matches whole words only;"
                    " such tokens are not supported in chat templates."
                )
        # Letters are no borders: a template must still find the names of roles and fields.
        self._first = {token[0] for token in self.tokens if not token[0].isalnum()}
        self._last = {token[-1] for token in self.tokens if not token[-1].isalnum()}
        borders = "".join(map(re.escape, sorted(self._first | self._last)))
        self._border = re.compile(f"[{borders}]" if borders else r"(?!)")
        self._bare = control_pattern(tuple(token for token in self.tokens if token[0].isalnum() and token[-1].isalnum()))
        series = SERIES_TOKENS if set(SERIES_TOKENS) <= set(self.tokens) else None
        image, written = _written(IMAGE, self.vision), _written(SERIES, series)
        self.markup = re.compile(f"(?P<image>{image})|(?P<series>{written})|{control_pattern(self.tokens).pattern}")
        """Finds images, time series and control tokens in rendered text."""
        self._thinking_open: dict[bool | None, bool] = {}

    def mark(self, text: str) -> str:
        """`text` with a mark beside every character with which a control token could begin or end, so that none can be read
        in it, nor across its ends. Lone surrogates become '?', and the five noncharacters used here U+FFFD."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = _MARKS.sub("\ufffd", text)
        text = self._bare.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
        return self._border.sub(self._beside, text)

    def _beside(self, match: re.Match[str]) -> str:
        character = match[0]
        before = MARK if character in self._last else ""
        return before + character + (MARK if character in self._first else "")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """The conversation as the template writes it, marks included.

        Args:
            messages: marked plain JSON data.
            tools: marked descriptions of functions.
            prompt: end with what the model is given to begin its answer.
            enable_thinking: passed on where it is not None.

        Raises:
            Unusable: `template_refused` with the template's own words, or `template_failed`.
        """
        names = dict(self._variables)
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return self._compiled[self._name(tools)].render(
                **names, **thinking, messages=messages, tools=tools, documents=None, add_generation_prompt=prompt
            )
        except _Refused as error:
            raise Unusable("template_refused", str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # a template runs code of its own, which can fail in any way on data it was not made for
            raise Unusable("template_failed", f"{type(error).__name__}: {error}") from None

    def marks_answers(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template says by `{% generation %}` blocks what the model is to write."""
        return self._generation[self._name(tools)]

    def opens_thinking(self, enable_thinking: bool | None) -> bool:
        """Whether the generation prompt ends inside a think block, so that answers hold its end but not its beginning."""
        if enable_thinking not in self._thinking_open:
            try:
                asked = self.render([{"role": "user", "content": "?"}], None, True, enable_thinking)
            except Unusable:
                asked = ""
            self._thinking_open[enable_thinking] = asked.rstrip().endswith(THINK)
        return self._thinking_open[enable_thinking]

    def _name(self, tools: Sequence[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._compiled else "default"


def _written(mark: str, convention: tuple[str, str, str] | None) -> str:
    """Pattern of one image or series: our mark, or the three tokens of a convention, of which templates may write the middle one
    alone."""
    if convention is None:
        return mark
    start, pad, end = map(re.escape, convention)
    return f"{mark}|(?:{start})?{pad}(?:{end})?"


_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKS = re.compile(f"[{MARK}{IMAGE}{OPEN}{CLOSE}{SERIES}]")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_chat_template(name_or_folder: str, tokenizer: Tokenizer, date: str = FIXED_DATE) -> ChatTemplate:
    """The chat template of a model.

    Args:
        name_or_folder: a jinja file; a Hugging Face folder (chat_template.jinja, chat_template.json, or "chat_template" in
            tokenizer_config.json, in this order); or anything else, as the name of a tokenizer, for the built-in template.
        tokenizer: the model's.
        date: what templates that write today's date get, YYYY-MM-DD.

    Raises:
        InputError: no jinja, a date that is none, or no template where the tokenizer lacks ChatML's tokens.
    """
    try:
        calendar_date.fromisoformat(date)
    except ValueError:
        raise InputError(f"The date of chat templates is {date!r}; write it as YYYY-MM-DD.") from None
    place = Path(name_or_folder)
    if place.is_file():
        return ChatTemplate({"default": _text(place)}, tokenizer, _variables(place.parent), str(place), date)
    sources, origin = _sources(place)
    if sources:
        return ChatTemplate(sources, tokenizer, _variables(place), origin, date)
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.specials]
    if missing:
        raise InputError(
            f"{name_or_folder} has no chat template, and its tokenizer has no {missing[0]} for the built-in one;"
            " give a jinja file as the chat template."
        )
    return ChatTemplate({"default": CHATML}, tokenizer, date=date)


def _sources(folder: Path) -> tuple[dict[str, str], str]:
    if (folder / "chat_template.jinja").is_file():
        return {"default": _text(folder / "chat_template.jinja")}, str(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, str):
            return {"default": found}, str(folder / name)
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            if "default" in named:
                return named, str(folder / name)
    return {}, ""


def _variables(folder: Path) -> dict[str, str]:
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    found = {name: config.get(name) for name in _NAMES}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in contents.items() if isinstance(token, str)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"The chat template {file} is not UTF-8.") from None


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` around what the model writes, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("wrap"), [], [], body).set_lineno(line)

    def wrap(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class _SafeNamespace(Namespace):
    """jinja's namespace without underscored names, which could reach the interpreter's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def _environment(date: str) -> ImmutableSandboxedEnvironment:
    """What transformers gives chat templates, with a fixed date."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise _Refused(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.fromisoformat(date).strftime(layout)
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["namespace"] = _SafeNamespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # the marks must stay marks
        text = re.sub(r"[^\x00-\x7f]", lambda m: m[0] if _MARKS.match(m[0]) else json.dumps(m[0])[1:-1], text)
    return text
