"""Structured records as text: CSV and jsonl rows, templates with named columns, and a system prompt for each domain.

A template file (YAML or JSON):

    domains:
      chemistry: {system: "You are a chemist. You answer from measured data."}
    templates:
      solubility:
        domain: chemistry
        text:
          - "{name} ({smiles}) dissolves in water to {log_s} log mol/L."
          - "Water solubility of {smiles}: log S = {log_s}."

A placeholder is a column's name in braces, taken literally: no attributes, no formats, nothing that runs. `{{` and `}}` are
braces. Which text a row gets is decided by the seed and the row's key, among the texts whose columns the row has. A domain's
samples begin with its system prompt, as the model's chat template writes it, without loss. Two domains never share a prompt:
the prompt is what tells the model which of them it is in.
"""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moexpand.base.errors import InputError
from moexpand.data.chat import system_parts
from moexpand.data.chat_template import ChatTemplate
from moexpand.data.parts import Part, Unusable, text_part
from moexpand.data.tally import Tally

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_ENDINGS = (".jsonl", ".ndjson")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` reads for bytes that are no UTF-8."""


@dataclass(frozen=True)
class RecordSample:
    """One row as a sample."""

    parts: list[Part]
    text: str
    """The filled text alone, for filters."""
    template: str
    variant: int
    """Which of the template's texts was filled, from 0."""
    domain: str | None


@dataclass(frozen=True)
class _Text:
    pieces: tuple[tuple[str, bool], ...]
    """Text, and whether it names a column."""

    @property
    def columns(self) -> set[str]:
        return {piece for piece, column in self.pieces if column}


@dataclass(frozen=True)
class _Template:
    texts: tuple[_Text, ...]
    domain: str | None


class RecordTemplates:
    """The templates of one file.

    Args:
        path_or_mapping: a YAML or JSON file, or what one holds.
        chat_template: the model's; needed where a template has a domain.

    Raises:
        InputError: names the template or domain that is wrong.
    """

    def __init__(self, path_or_mapping: str | Path | Mapping[str, Any], chat_template: ChatTemplate | None = None) -> None:
        given = path_or_mapping
        where = "the record templates" if isinstance(given, Mapping) else f"the record templates in {given}"
        content = given if isinstance(given, Mapping) else read_templates(Path(given))
        if not isinstance(content, Mapping) or not set(content) <= {"domains", "templates"}:
            raise InputError(f"At the top of {where} there must be 'templates' and, optionally, 'domains', and nothing else.")
        self.systems = _systems(content.get("domains") or {}, where)
        """Domain -> system prompt."""
        templates = content.get("templates")
        if not isinstance(templates, Mapping) or not templates:
            raise InputError(f"There is no template in {where}; give at least one under 'templates'.")
        self._templates = {str(name): _template(str(name), entry, self.systems, where) for name, entry in templates.items()}
        self._openings: dict[str, list[Part]] = {}
        for domain in sorted({template.domain for template in self._templates.values() if template.domain}):
            if chat_template is None:
                raise InputError(f"The domain {domain!r} has a system prompt, and there is no chat template to write it with.")
            self._openings[domain] = system_parts(chat_template, self.systems[domain])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the templates, in the order of the file."""
        return tuple(self._templates)

    def fill(self, row: Mapping[str, Any], key: str, seed: int, template: str | None = None) -> RecordSample:
        """Fill a template from a row.

        Args:
            row: column -> value. Text stands as it is, everything else as JSON; an empty or null value is a missing one.
            key: names the row; with `seed` it decides which text is taken.
            template: its name; may be left out where the file has one template.

        Raises:
            Unusable: `missing_field`, where no text of the template has all its columns in the row.
            InputError: no such template.
        """
        name = self._named(template)
        chosen = self._templates[name]
        values = {column: text for column, value in row.items() if (text := _value(value)) is not None}
        fitting = [number for number, text in enumerate(chosen.texts) if text.columns <= values.keys()]
        if not fitting:
            lacking = sorted(chosen.texts[0].columns - values.keys())
            raise Unusable("missing_field", f"the row has nothing under {lacking[0]!r}, which the template {name} needs")
        digest = hashlib.blake2b(f"{seed}\0{name}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
        variant = fitting[int.from_bytes(digest, "little") % len(fitting)]
        text = "".join(values[piece] if column else piece for piece, column in chosen.texts[variant].pieces)
        opening = self._openings[chosen.domain] if chosen.domain else []
        return RecordSample([*map(dict, opening), text_part(text)], text, name, variant, chosen.domain)

    def _named(self, template: str | None) -> str:
        if template is None and len(self._templates) == 1:
            return next(iter(self._templates))
        if template not in self._templates:
            raise InputError(f"There is no record template {template!r}; there are {', '.join(self._templates)}.")
        return template

    def owner(self, system: str) -> str | None:
        """The domain whose system prompt this is, white space and case aside: other data may not use it."""
        return next((domain for domain, prompt in self.systems.items() if _bare(prompt) == _bare(system)), None)


def read_templates(path: Path) -> Any:
    """What a file of templates holds, for `RecordTemplates`.

    Raises:
        InputError: it cannot be read, or is neither YAML nor JSON.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The record templates {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The record templates {path} are neither YAML nor JSON: {error}.") from None


def _systems(domains: Any, where: str) -> dict[str, str]:
    if not isinstance(domains, Mapping):
        raise InputError(f"'domains' of {where} must map each domain's name to {{system: ...}}.")
    systems: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, entry in domains.items():
        system = entry.get("system") if isinstance(entry, Mapping) and set(entry) == {"system"} else None
        if not isinstance(system, str) or not system.strip():
            raise InputError(f"The domain {name!r} of {where} must have one key, system, with its system prompt.")
        other = owners.setdefault(_bare(system), str(name))
        if other != str(name):
            raise InputError(
                f"The domains {other!r} and {name!r} of {where} share one system prompt (white space and case aside);"
                " the prompt is what keeps domains apart, so give each its own."
            )
        systems[str(name)] = system
    return systems


def _bare(system: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", system).casefold().split())


def _template(name: str, entry: Any, systems: Mapping[str, str], where: str) -> _Template:
    if isinstance(entry, str | list):
        entry = {"text": entry}
    if not isinstance(entry, Mapping) or not set(entry) <= {"text", "domain"}:
        raise InputError(f"The template {name!r} of {where} must be a text, a list of texts, or have the keys text and domain.")
    texts = entry.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"The template {name!r} of {where} must have a text, or a list of texts, none of them empty.")
    domain = None if entry.get("domain") is None else str(entry["domain"])
    if domain is not None and domain not in systems:
        raise InputError(f"The template {name!r} of {where} has the domain {domain!r}, which is not among its domains.")
    return _Template(tuple(_parsed(text, name, where) for text in texts), domain)


def _parsed(text: str, name: str, where: str) -> _Text:
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append((text[end : match.start()], False))
        end = match.end()
        if match[1] is not None:
            pieces.append((match[1].strip(), True))
        elif len(match[0]) == 2:
            pieces.append((match[0][0], False))
        else:
            raise InputError(f"In the template {name!r} of {where} a brace stands alone in {text!r}; write {{{{ or }}}} for one.")
    pieces.append((text[end:], False))
    return _Text(tuple(piece for piece in pieces if piece[0] or piece[1]))


def _value(value: Any) -> str | None:
    """A cell as text; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # A lone surrogate (a broken escape in JSON) has no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def read_rows(path: Path, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, column -> value) of every row of a CSV, TSV or jsonl file, UTF-8 with or without a byte-order mark.

    Rows that can be used are counted as kept, the others as dropped: `not_csv`, `wrong_columns`, `not_utf8`, `not_json`,
    `not_object`. Empty lines are no rows. Values of CSV are text.

    Raises:
        InputError: the file cannot be read, has another ending, or its header is empty or names a column twice.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in DELIMITERS and ending not in JSON_ENDINGS:
        known = ", ".join((*DELIMITERS, *JSON_ENDINGS))
        raise InputError(f"The records {path} have the ending {ending!r}; it must be one of {known}.")
    try:
        if ending in DELIMITERS:
            # Bytes that are no UTF-8 become surrogates, so that they cost their own row and not the rest of the file.
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
                yield from _csv_rows(csv.reader(stream, delimiter=DELIMITERS[ending], strict=True), path, tally)
        else:
            with open(path, "rb") as lines:
                yield from _json_rows(lines, tally)
    except OSError as error:
        raise InputError(f"The records {path} cannot be read: {error.strerror}.") from None


def _csv_rows(reader: Any, path: Path, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise InputError(f"The header of {path} is not CSV: {error}.") from None
            tally.drop("not_csv")
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if any(_NOT_UTF8.search(name) for name in header):
                raise InputError(f"The header of {path} is not UTF-8.")
            if "" in header or len(set(header)) != len(header):
                raise InputError(f"The header of {path} must name every column, and each once; it is {', '.join(header)!r}.")
        elif len(cells) != len(header):
            tally.drop("wrong_columns")
        elif any(_NOT_UTF8.search(cell) for cell in cells):
            tally.drop("not_utf8")
        else:
            tally.keep()
            yield f"line {line}", dict(zip(header, cells, strict=True))


def _json_rows(lines: Iterable[bytes], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text, parse_constant=_no_constant)
        except UnicodeDecodeError:
            tally.drop("not_utf8")
            continue
        except (ValueError, RecursionError):
            tally.drop("not_json")
            continue
        if not isinstance(row, dict):
            tally.drop("not_object")
            continue
        tally.keep()
        yield f"line {number}", row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
