"""Conversations as parts: rendered by the model's own chat template, trained on the assistant's answers alone.

Three things are worth knowing.

- **Nobody writes markup but the template.** Before rendering, every character in a message with which a control token could
  begin or end gets a mark beside it, and the marks are taken out when the rendered text is cut into parts. So "<|im_end|>" in a
  message trains as ten characters, also where a template joins it out of two strings. Only the `<think>` block with which an
  answer begins is left as it is: templates look for it, and it is markup.
- **An answer is what follows its prompt.** The prompt is the rendering of all messages before it, with the generation prompt. If
  the rendered conversation begins with it, and with it and the answer, the answer trains there, end token included. Templates
  that drop the thinking of earlier turns break this; such an answer gets a sample of its own that ends with it, rendered as the
  model will meet it. A template with `{% generation %}` blocks says itself what trains.
- **With `enable_thinking` false, thinking is taken out of the answers**: the prompt says that there is none.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from moexpand.base.errors import InputError
from moexpand.data.attached import Attached, brings_series, parts_of, row_series
from moexpand.data.chat_content import KINDS, SHOWN, Supply, attached_by_item, flat, series_as_text
from moexpand.data.chat_template import CLOSE, END_THINK, FIXED_DATE, MARK, OPEN, THINK, ChatTemplate
from moexpand.data.parts import Part, Unusable, control_pattern, text_part

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
HISTORIES = ("split", "last")
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatSettings:
    """How conversations become samples."""

    enable_thinking: bool | None = None
    """Passed to the chat template; a conversation's own `enable_thinking` goes before it. None leaves it to the template."""
    history: str = "split"
    """Answers that the whole conversation does not show as they are generated: `split` gives each a sample of its own,
    `last` trains on those of the last sample alone."""
    date: str = FIXED_DATE
    """ISO date that templates see as today."""

    def __post_init__(self) -> None:
        if self.history not in HISTORIES:
            raise InputError(f"chat.history is {self.history!r}; it must be one of {', '.join(HISTORIES)}.")


@dataclass(frozen=True)
class ChatSample:
    """One sample of a conversation."""

    parts: list[Part]
    images: tuple[str, ...]
    """File of each image part, in their order; the parts name them `png`, or `0.png`, `1.jpg` where there are several."""
    text: str
    """The answers that train here and the messages that lead to each, without markup, for filters. Every message is in the
    text of one sample alone."""
    answers: int
    """How many answers train here."""
    series: tuple[str, ...] = ()
    """File of each series part, likewise."""


@dataclass(frozen=True)
class RenderedChat:
    """The samples of a conversation, in its order."""

    samples: list[ChatSample]
    untrained: int
    """Answers that train nowhere: skipped with history "last", or not written after their prompt."""


def chat_row(row: Mapping[str, Any], template: ChatTemplate, settings: ChatSettings) -> RenderedChat:
    """A row {"messages": [...], "tools": [...], "images": [...], "series": [...], "sampling_rate": 500, "enable_thinking": true},
    of which all but messages may be missing. See `render_chat`. `tools` may be a string of JSON."""
    tools, thinking = row.get("tools"), row.get("enable_thinking")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise Unusable("tools", "the string under 'tools' is not JSON") from None
    if thinking is None:
        thinking = settings.enable_thinking
    if thinking is not None and not isinstance(thinking, bool):
        raise Unusable("enable_thinking", "it must be true, false or null")
    images = row.get("images") or ()
    images = images if isinstance(images, list | tuple) else [images]
    series = row_series(row) if brings_series(row) else ()
    return render_chat(row.get("messages"), template, tools, thinking, images, settings.history, series)


def render_chat(
    messages: Any,
    template: ChatTemplate,
    tools: Any = None,
    enable_thinking: bool | None = None,
    images: Iterable[str] = (),
    history: str = "split",
    series: Iterable[tuple[Any, Any]] = (),
) -> RenderedChat:
    """Render a conversation as samples that train on its answers.

    Args:
        messages: [{"role": ..., "content": ...}, ...] as chat templates take them, with tool_calls and reasoning_content. Content
            is a string or a list of {"type": "text", "text": ...}, {"type": "image", "image": file} (or image_url) and
            {"type": "time_series", "time_series": file, "sampling_rate": hertz}. What follows the last answer is left out.
        template: the model's.
        tools: descriptions of functions, a list of JSON objects.
        enable_thinking: for the template.
        images: files for the images in messages that name none, in their order.
        history: see `ChatSettings.history`.
        series: likewise of time series, with their sampling rates.

    Raises:
        Unusable: the conversation makes no sample; its reason is to be counted.
    """
    try:
        conversation = _Conversation(template, enable_thinking, Supply(images, series))
        conversation.read(messages, tools)
        if template.marks_answers(conversation.tools):
            return RenderedChat([conversation.by_blocks()], 0)
        return conversation.by_prompts(history)
    except RecursionError:
        raise Unusable("too_deep", "the JSON is nested too deeply") from None


@dataclass
class _Conversation:
    """Marked messages and what they render to."""

    template: ChatTemplate
    enable_thinking: bool | None
    supply: Supply
    messages: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    attached: list[list[Attached]] = field(default_factory=list)
    """Files of each message."""
    tools: list[dict[str, Any]] | None = None
    rendered: dict[tuple[int, bool], str] = field(default_factory=dict)

    # Reading and marking

    def read(self, messages: Any, tools: Any) -> None:
        if not isinstance(messages, list) or not messages:
            raise Unusable("no_messages", "'messages' must be a list with at least one message")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise Unusable("tools", "'tools' must be a list of JSON objects")
        self.tools = self._marked(tools) if tools else None
        last = max((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"), default=-1)
        if last < 0:
            raise Unusable("no_answer", "no message is the assistant's")
        for number, message in enumerate(messages[: last + 1]):
            self._read_message(number, message)
        if self.messages[0]["role"] == "assistant":
            raise Unusable("no_prompt", "the conversation begins with an answer")
        if last + 1 == len(messages):
            self.supply.check_used(self._attached(len(messages)))
        # A template that knows nothing of series gets our mark as one more text in their place. One that knows nothing of images,
        # or of lists, gets one string a message, and all keep their places.
        for kind, without in (("series", series_as_text), ("image", flat)):
            if self._count(kind, len(self.messages)) and not self._writes(kind):
                for message in self.messages:
                    message["content"] = without(message["content"])
                self.rendered.clear()

    def _read_message(self, number: int, message: Any) -> None:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Unusable("role", f"message {number} is not an object with one of the roles {', '.join(ROLES)}")
        message = dict(message)
        role, content = message["role"], message.pop("content", None)
        answer = role == "assistant"
        reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if answer and self.enable_thinking is False:
            reasoning = None
            message = {key: value for key, value in message.items() if key not in REASONING}
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if content is None and answer:
            content = ""
        files: list[Attached] = []
        if isinstance(content, str):
            content, text = self._mark_text(content, answer), content
        elif isinstance(content, list):
            content, text = self._read_list(number, content, answer, files)
        else:
            raise Unusable("content", f"the content of message {number} is neither a string nor a list")
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise Unusable("tool_calls", f"tool_calls of message {number} is not a list of JSON objects")
        if answer and not (flat(content).strip() or calls or reasoning):
            raise Unusable("empty_answer", f"message {number} is an answer without content")
        self.messages.append({**self._marked(message), "role": role, "content": content})
        self.texts.append(text)
        self.attached.append(files)

    def _read_list(self, number: int, content: list[Any], answer: bool, files: list[Attached]) -> tuple[Any, str]:
        """Marked content, a string if it holds nothing else, and its bare text; what it brings is added to `files`."""
        marked: list[dict[str, str]] = []
        texts: list[str] = []
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                texts.append(item["text"])
                marked.append({"type": "text", "text": self._mark_text(item["text"], answer and len(texts) == 1)})
            elif isinstance(kind, str) and kind in KINDS:
                files.append(attached_by_item(number, KINDS[kind], item, self.supply))
                marked.append(dict(SHOWN[KINDS[kind]]))
            else:
                raise Unusable(
                    "content", f"message {number} holds {kind or 'something'!r}; text, images and time series are supported"
                )
        return (marked if files else flat(marked)), "".join(texts)

    def _mark_text(self, text: str, answer: bool) -> str:
        """Marked text; the think block with which an answer begins stays markup, or goes where there is no thinking."""
        block = _THINK_BLOCK.match(text) if answer else None
        if block is None and answer and THINK not in text and self.template.opens_thinking(self.enable_thinking):
            block = _THINK_REST.match(text)
        if block is None:
            return self.template.mark(text)
        if self.enable_thinking is False:
            return self.template.mark(text[block.end() :].lstrip("\n"))
        mark = self.template.mark
        return block[1] + mark(block[2]) + END_THINK + mark(text[block.end() :])

    def _marked(self, value: Any) -> Any:
        """A copy of JSON data with every string marked, keys included."""
        if isinstance(value, str):
            return self.template.mark(value)
        if isinstance(value, dict):
            return {self._marked(key): self._marked(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._marked(entry) for entry in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise Unusable("not_json", f"it holds a value of type {type(value).__name__}")

    # Rendering and finding answers

    def _render(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages, with the generation prompt or without."""
        if (count, prompt) not in self.rendered:
            self.rendered[count, prompt] = self.template.render(self.messages[:count], self.tools, prompt, self.enable_thinking)
        return self.rendered[count, prompt]

    def by_blocks(self) -> ChatSample:
        """The whole conversation, trained on where the template says so."""
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._render(len(self.messages)))
        text, spans, begun = "", [], 0
        for piece in pieces:
            if piece == OPEN:
                begun = len(text)
            elif piece == CLOSE:
                spans.append((begun, len(text)))
            else:
                text += piece
        if not any(start < stop for start, stop in spans):
            raise Unusable("no_answer", "the template's generation blocks are empty")
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self._sample(text, spans, len(self.messages), answers)

    def by_prompts(self, history: str) -> RenderedChat:
        """As few samples as show every answer after the prompt for it; from the last answer backwards."""
        pending = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        samples: list[ChatSample] = []
        untrained = 0
        while pending and not (samples and history == "last"):
            count = pending[-1] + 1
            found = {i: self._span(i, self._render(count)) for i in pending}
            spans = {i: span for i, span in found.items() if span is not None}
            if count - 1 in spans:
                samples.append(self._sample(self._render(count), list(spans.values()), count, list(spans)))
                pending = [i for i in pending if i not in spans]
            else:
                untrained += 1
                pending.pop()
        if not samples:
            raise Unusable("answer_without_prompt", "the template writes no answer after the prompt that it gives for it")
        return RenderedChat(samples[::-1], untrained + len(pending))

    def _span(self, number: int, whole: str) -> Span | None:
        """Where answer `number` stands in `whole`, end token included, if it follows its prompt there."""
        prompt, answered = self._render(number, True), self._render(number + 1)
        if not (answered.startswith(prompt) and whole.startswith(answered)) or len(answered) == len(prompt):
            return None
        end = len(answered)
        for match in control_pattern(self.template.tokens).finditer(answered, len(prompt)):
            if not answered[match.end() :].strip():
                end = match.end()  # the line break after an end token is the template's, not the model's
                break
        return len(prompt), end

    # Cutting into parts

    def _sample(self, rendered: str, spans: list[Span], count: int, answers: list[int]) -> ChatSample:
        attached = self._attached(count)
        of_kind = {kind: [entry for entry in attached if entry.kind == kind] for kind in SHOWN}
        for kind, entries in of_kind.items():
            if (written := self._written(kind, rendered)) != len(entries):
                what = "images" if kind == "image" else "series"
                raise Unusable(f"{kind}_count", f"the template writes {written} of {len(entries)} {what}")
        supplied = {kind: parts_of(entries) for kind, entries in of_kind.items()}
        parts: list[Part] = []
        edges = sorted({0, len(rendered), *(edge for span in spans for edge in span)})
        for start, stop in pairwise(edges):
            loss = any(first <= start and stop <= last for first, last in spans)
            parts += self._cut(rendered[start:stop], loss, supplied)
        led = [number for answer in answers for number in range(self._turn_of(answer), answer + 1)]
        text = "\n\n".join(self.texts[i] for i in led if self.texts[i])
        images, series = (tuple(entry.file for entry in of_kind[kind]) for kind in ("image", "series"))
        return ChatSample(parts, images, text, len(answers), series)

    def _attached(self, count: int) -> list[Attached]:
        """What the first `count` messages bring."""
        return [entry for message in self.attached[:count] for entry in message]

    def _count(self, kind: str, count: int) -> int:
        return sum(entry.kind == kind for entry in self._attached(count))

    def _turn_of(self, answer: int) -> int:
        """The first message after the answer before this one."""
        while answer > 0 and self.messages[answer - 1]["role"] != "assistant":
            answer -= 1
        return answer

    def _writes(self, kind: str) -> bool:
        """Whether the template writes any image or series of the conversation."""
        try:
            return self._written(kind, self._render(len(self.messages))) > 0
        except Unusable:
            return False

    def _written(self, kind: str, rendered: str) -> int:
        return sum(match[kind] is not None for match in self.template.markup.finditer(rendered))

    def _cut(self, text: str, loss: bool, supplied: Mapping[str, Iterator[Part]]) -> list[Part]:
        """Parts of a stretch of rendered text; those of images and series are supplied by kind."""
        parts: list[Part] = []
        end = 0
        pieces: list[tuple[str, bool]] = []  # text, whether it is a control token
        for match in self.template.markup.finditer(text):
            pieces.append((text[end : match.start()].replace(MARK, ""), False))
            end = match.end()
            kind = next((kind for kind in SHOWN if match[kind] is not None), None)
            if kind is None:
                pieces.append((match[0], True))
            else:
                parts += [*self._joined(pieces, loss), next(supplied[kind])]
                pieces = []
        pieces.append((text[end:].replace(MARK, ""), False))
        return parts + self._joined(pieces, loss)

    def _joined(self, pieces: list[tuple[str, bool]], loss: bool) -> list[Part]:
        """One part where reading the joined text finds the same control tokens; else each token and text by itself."""
        text = "".join(piece for piece, _ in pieces)
        places, at = [], 0
        for piece, special in pieces:
            if special:
                places.append((at, at + len(piece)))
            at += len(piece)
        if places == [match.span() for match in control_pattern(self.template.tokens).finditer(text)]:
            return [text_part(text, loss, bool(places))] if text else []
        return [text_part(piece, loss, special) for piece, special in pieces if piece]


_THINK_BLOCK = re.compile(rf"(\s*{THINK})(.*?){END_THINK}", re.DOTALL)
_THINK_REST = re.compile(rf"()(.*?){END_THINK}", re.DOTALL)


def system_parts(template: ChatTemplate, system: str) -> list[Part]:
    """A system message alone, as the template writes it, without loss.

    Raises:
        InputError: the template refuses a conversation of a system message alone, or leaves its text out.
    """
    conversation = _Conversation(template, None, Supply((), ()), [{"role": "system", "content": template.mark(system)}])
    try:
        rendered = conversation._render(1)
    except Unusable as error:
        raise InputError(f"{template.origin} cannot write the system prompt {system!r} by itself ({error.detail}).") from None
    if template.mark(system.strip()) not in rendered:
        raise InputError(f"{template.origin} leaves out the system prompt {system!r}.")
    return conversation._cut(rendered, False, {})
