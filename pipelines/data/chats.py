"""Turn chats into token ids, by the chat template of the tokenizer, and mark the tokens of the assistant's turns.

Ids are those of ``apply_chat_template`` with the settings of the capture. The marks are not transformers' own, which
run on to the end of the chat, or stop, where a turn is empty or begins with a space. Here the template writes a sign
before and after each ``{% generation %}`` block; the signs say which letters are the assistant's, and the tokenizer's
offsets say which tokens these are.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.tokenizer import Tokenizer
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.selection.evaluate import Mask

TOOLS = "tools"
"""The column whose tools are given to the chat template, unless the user names another."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which no text is to contain
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tool_plan")
_NOT_TEXT = re.compile(r"(input_)?(image|video|audio)")


class Chat(NamedTuple):
    """A chat as tokens.

    Attributes:
        ids: Token ids, not checked.
        marked: Which tokens are the assistant's, (tokens); None if that was not asked.
        counts: What is to be reported, by the names of a `DatasetReport`.
    """

    ids: Sequence[int]
    marked: Mask | None
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Renders chats and tokenizes them.

    Attributes:
        tokenizer: The tokenizer, which has a chat template unless the settings give one.
        settings: The template, its arguments, and the position rule.
        tools_column: The column with each chat's tools; empty if there is none.

    Raises:
        DatasetError: There is no such template, or it does not use an argument that the settings give.
    """

    tokenizer: Tokenizer
    settings: DatasetSettings
    tools_column: str
    _marked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        template = self._template(self.settings.given_tools)
        for name in self.settings.template_arguments:
            if name != "continue_final_message" and not _names(template, name):
                raise DatasetError(
                    f"{named('chat_template_kwargs')}: the chat template does not use {name!r}: leave it out"
                )
        if self.settings.adds_generation_prompt and not _names(template, "add_generation_prompt"):
            asked = named("add_generation_prompt" if self.settings.add_generation_prompt else "generate")
            raise DatasetError(f"{asked}: the chat template cannot add one, it does not use add_generation_prompt")
        if self.settings.given_tools and not _names(template, "tools"):
            raise DatasetError(
                f"{named('tools')}: the chat template does not use tools: leave them out, or give another template"
            )
        if self.settings.rule.is_assistant:
            self._marking(template)

    def encoded(self, chat: Sequence[object], tools: object, number: int) -> Chat:
        """Return the tokens of a chat.

        Args:
            chat: Its messages.
            tools: The value of `tools_column`, or None.
            number: The row, for messages.

        Raises:
            DatasetError: The chat cannot be rendered, or the marks cannot be placed.
        """
        listed = self.settings.given_tools or _tools(tools, number)
        template = self._template(listed)
        counts = {"n_without_tools": int(bool(listed) and not _names(template, "tools"))}
        messages = [_message(message, number) for message in chat]
        if self.settings.generate is not None and not self.settings.continues_last_message:
            _refuse_answered(messages, number)
        render = partial(self._rendered, messages, listed or None)
        with naming_row(f"row {number}"):
            ids = render(template, tokenize=True)["input_ids"]
            if any(isinstance(message.get("content"), list) for message in messages):
                text = render(template, tokenize=False)
                counts["n_written_parts"] = int(any(_is_written(message, text) for message in messages))
            if not self.settings.rule.is_assistant:
                return Chat(ids, None, counts)
            text, spans = _without_signs(render(self._marking(template), tokenize=False), number)
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(found["input_ids"]) != list(ids):
            raise DatasetError(
                f"row {number}: {named('positions', 'assistant')}: the chat template does not render the same text "
                "once the assistant's turns are marked; give the mask as a column and use column:NAME"
            )
        offsets = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        return Chat(ids, *_marks(text, spans, offsets, counts))

    def _rendered(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None, template: str, *, tokenize: bool
    ) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=self.settings.adds_generation_prompt,
            tokenize=tokenize,
            return_dict=tokenize,
            **self.settings.template_arguments,
        )

    def _template(self, tools: object) -> str:
        given = self.settings.template
        own = self.tokenizer.chat_template
        names = sorted(own) if isinstance(own, Mapping) else []
        if given is not None and "{" not in given and given not in names:
            raise DatasetError(
                f"{named('chat_template', given)} is neither a file nor a template, nor one of the tokenizer's "
                f"({', '.join(names) or 'which has no templates by name'})"
            )
        try:
            return str(self.tokenizer.get_chat_template(given, tools=tools or None))
        except ValueError as error:  # several templates, and none of the name 'default'
            raise DatasetError(f"{named('chat_template')}: name one of {', '.join(names)}") from error

    def _marking(self, template: str) -> str:
        """Return the template with a sign before and after each generation block.

        Raises:
            DatasetError: It has none, or the tokenizer cannot tell which letters a token stands for.
        """
        if template not in self._marked:
            marked, n = _GENERATION.subn(_sign, template)
            if not n:
                raise DatasetError(
                    f"{named('positions', 'assistant')}: the tokenizer's chat template does not mark the assistant's "
                    f"turns with {{% generation %}}; use a template that does ({named('chat_template')}), or another "
                    "position rule"
                )
            if not getattr(self.tokenizer, "is_fast", False):
                raise DatasetError(
                    f"{named('positions', 'assistant')} needs a fast tokenizer: {type(self.tokenizer).__name__} does "
                    "not say which letters a token stands for; give the mask as a column and use column:NAME"
                )
            self._marked[template] = marked
        return self._marked[template]


def _refuse_answered(messages: Sequence[Mapping[str, object]], number: int) -> None:
    """Raise DatasetError for a chat that is to be continued, and has its answer already."""
    if messages[-1].get("role") == "assistant":
        raise DatasetError(
            f"row {number}: the chat ends with a message of the assistant, so there is nothing to answer: leave that "
            f"message out, or let it go on with {named('chat_template_kwargs')} '{{\"continue_final_message\": true}}'"
        )


@contextmanager
def naming_row(where: str) -> Iterator[None]:
    """Name the row whose chat a chat template refuses; a DatasetError names its row itself."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        # The boundary to the chat template, a program that comes with the tokenizer and may raise anything.
        raise DatasetError(f"{where}: the chat template refuses this chat: {error}") from error


def _names(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _sign(tag: re.Match[str]) -> str:
    # Blocks, as the tag is one: Jinja takes the same spaces and line ends away around them.
    sign = _CLOSE if tag[2] else _OPEN
    return f"{{%{tag[1]} if true %}}{{{{ '{sign}' }}}}{{% endif {tag[3]}%}}"


def _without_signs(text: str, number: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered text without its signs, and where each stretch between two of them lies in it."""
    pieces = re.split(f"([{_OPEN}{_CLOSE}])", text)
    if "".join(pieces[1::2]) != (_OPEN + _CLOSE) * (len(pieces) // 4):
        raise DatasetError(
            f"row {number}: {named('positions', 'assistant')}: the chat template does not write the assistant's turns "
            "one after the other; give the mask as a column and use column:NAME"
        )
    ends = np.cumsum([len(piece) for piece in pieces[::2]]).tolist()
    return "".join(pieces[::2]), list(zip(ends[::2], ends[1::2], strict=False))


def _marks(
    text: str, spans: Sequence[tuple[int, int]], offsets: npt.NDArray[np.int64], counts: Mapping[str, int]
) -> tuple[Mask, Mapping[str, int]]:
    """Return which tokens hold the assistant's letters and no one else's, and `counts` with what is not marked.

    Spaces beside a turn are no letters: a token often holds the space before a word.
    """
    inside = np.zeros(len(text), np.bool_)
    for start, stop in spans:
        inside[start:stop] = True
    is_letter = np.fromiter((not letter.isspace() for letter in text), np.bool_, len(text))

    def n_in_tokens(letters: Mask) -> npt.NDArray[np.int64]:
        n_before = np.concatenate([[0], np.cumsum(letters)])
        return np.asarray(n_before[offsets[:, 1]] - n_before[offsets[:, 0]])

    n_inside, n_outside = n_in_tokens(inside & is_letter), n_in_tokens(~inside & is_letter)
    is_blank = (n_inside == 0) & (n_outside == 0) & (n_in_tokens(inside) > 0) & (n_in_tokens(~inside) == 0)
    marked = ((n_inside > 0) & (n_outside == 0)) | is_blank
    starts, stops = offsets[marked].T
    lost = [
        (start, stop)
        for start, stop in spans
        if is_letter[start:stop].any() and not ((starts < stop) & (stops > start)).any()
    ]
    n_shared = int(((n_inside > 0) & (n_outside > 0)).sum())
    return marked, {**counts, "n_shared_tokens": n_shared, "n_lost_turns": len(lost)}


def message_of(message: object, where: str) -> dict[str, object]:
    """Return the given fields of a message; refuse one without a role, or with nothing that a role could say."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DatasetError(f"{where}: a message needs role and content, found {message!r:.80}")
    kept = given_fields(message)
    if "content" not in message and not kept.keys() & set(_INSTEAD_OF_CONTENT):
        raise DatasetError(
            f"{where}: a message needs role and content, and this one has only {', '.join(map(str, kept))}: "
            f"{message!r:.80}"
        )
    return kept


def given_fields(fields: Mapping[Any, object]) -> dict[str, object]:
    """Return what is not None: Arrow gives each message those of all others, and a template would take them."""
    return {name: value for name, value in fields.items() if value is not None}


def _message(message: object, number: int) -> dict[str, object]:
    kept = message_of(message, f"row {number}")
    content = kept.get("content")
    return kept if not isinstance(content, list | tuple) else {**kept, "content": [_part(it, number) for it in content]}


def _part(part: object, number: int) -> object:
    """Return one of several parts of a content, without the fields that Arrow filled with None."""
    if not isinstance(part, Mapping):
        return part
    kept = given_fields(part)
    kinds = [kind for kind in (*kept, kept.get("type")) if isinstance(kind, str) and _NOT_TEXT.match(kind)]
    if kinds:
        raise DatasetError(
            f"row {number}: a message has a part of type {kinds[-1]!r}, and a capture runs over token ids alone: leave "
            "such chats out"
        )
    return kept


def _is_written(message: Mapping[str, object], text: str) -> bool:
    content = message.get("content")
    return isinstance(content, list) and bool(content) and str(content) in text


def _tools(value: object, number: int) -> list[object]:
    """Return the tools that a row gives: a list of JSON schemas, or their JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"row {number}: its tools are not JSON: {error}") from error
    if value is None:
        return []
    tools: list[object] = list(value) if isinstance(value, list | tuple) else [None]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DatasetError(f"row {number}: its tools are not a list of JSON schemas: {value!r:.80}")
    return tools
