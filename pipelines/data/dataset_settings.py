"""How a dataset becomes examples: the settings, which are also flags of ``residua capture``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, TypedDict

from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named, setting
from residua.store.base.untrusted import parse_json
from residua.store.selection.positions import PositionRule, parse_positions

_LONG = ("refuse", "split", "truncate")
_OF_CHATS = ("chat_template", "add_generation_prompt", "tools", "chat_template_kwargs")
_MAX_TEMPLATE_BYTES = 2**20
_WITHOUT_EFFECT = ("image_folder", "max_image_pixels")  # on examples: they refuse some, and change none
_OF_GENERATION = ("prompt_column", "temperature", "top_p", "top_k", "generation_kwargs")
_NOT_OF_PROMPTS = ("image_column", "target_column", "max_target_length", "long_examples")
_NOT_OF_THE_TEMPLATE = frozenset(
    (
        "conversation",
        "messages",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    )
)
_OWN_SETTING = ("add_generation_prompt", "chat_template", "tools")


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """How to turn a dataset into examples. Each field is a flag of ``residua capture``.

    Raises:
        DatasetError: A value is out of range or contradicts another.
    """

    text_column: str | None = setting(
        None, "column with the texts, chats or token ids (default: input_ids, text, messages or the only text column)"
    )
    image_column: str | None = setting(
        None,
        "column with images, which a vision-language model gets with the text (default: none; image, images or img for "
        "models that take images alone)",
    )
    image_folder: str | None = setting(
        None,
        "folder of the images that a column names by path; no path may leave it (default: the dataset's own)",
    )
    max_image_pixels: int = setting(2**26, "most pixels of an image; larger ones are refused before decoding")
    target_column: str | None = setting(
        None,
        "encoder-decoders: column with the texts or token ids of the target (default: decoder_input_ids, labels or "
        "target)",
    )
    split: str | None = setting(None, "split of the dataset (default: train, or the only split)")
    subset: str | None = setting(None, "subset (configuration) of a dataset on the hub (default: the dataset's own)")
    dataset_revision: str | None = setting(None, "revision of a dataset on the hub (default: the newest)")
    max_tokens: int | None = setting(None, "stop reading after this many tokens (default: read the full dataset)")
    max_length: int | None = setting(None, "longest example, in tokens (default: what the model takes)")
    max_target_length: int | None = setting(
        None, "encoder-decoders: longest target, in tokens (default: what the model takes)"
    )
    # Longer examples are refused by default: a document in pieces should surprise nobody.
    long_examples: str | None = setting(
        None,
        "what to do with longer examples: refuse, split, truncate (default: split if --max-length is given, "
        "else refuse)",
    )
    min_length: int = setting(1, "shortest example, in tokens; shorter ones are left out and counted")
    positions: str = setting(
        "all", "positions that become rows: all, last, every:N, column:NAME, assistant, generated, prompt"
    )
    drop_special: bool = setting(False, "leave out the rows of special tokens, such as BOS")
    # By default a chat has one BOS, whether it comes as messages or as rendered text.
    add_special_tokens: bool | None = setting(
        None,
        "put the tokenizer's special tokens, such as BOS, around each text (default: on, except for a text that begins "
        "with the start tokens itself)",
    )
    chat_template: str | None = setting(
        None,
        "another chat template for chats: a file, the name of one of the tokenizer's, or the template itself (default: "
        "the tokenizer's)",
    )
    add_generation_prompt: bool = setting(False, "end each chat with the start of an assistant's turn")
    tools: str | Sequence[Any] | None = setting(
        None,
        "tools for the chat template: a column with those of each chat, or a JSON list (default: column tools, if "
        "there is one)",
    )
    chat_template_kwargs: str | Mapping[str, Any] | None = setting(
        None, "JSON object with more arguments of the chat template: '{\"enable_thinking\": false}' (default: none)"
    )

    generate: int | None = setting(
        None,
        "continue each row of the dataset, a prompt, by up to this many tokens of the model's own, and capture both "
        "(default: capture the dataset as it is)",
    )
    prompt_column: str | None = setting(
        None,
        "with --generate: column with the prompts, which are texts, chats or token ids (default: prompt, or as for "
        "--text-column)",
    )
    temperature: float | None = setting(
        None, "with --generate: sample at this temperature (default: take the most probable token)"
    )
    top_p: float | None = setting(
        None,
        "with --generate: sample among the most probable tokens that have this probability together (default: the "
        "model's own setting, or all tokens)",
    )
    top_k: int | None = setting(
        None,
        "with --generate: sample among this many most probable ones (default: the model's own setting, or all tokens)",
    )
    generation_kwargs: str | Mapping[str, Any] | None = setting(
        None,
        "with --generate: more settings of generation, as a JSON object: '{\"repetition_penalty\": 1.1}' "
        "(default: none)",
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_length", "max_target_length", "min_length", "max_image_pixels", "generate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DatasetError(f"{named(name, value)}: it must be at least 1")
        if self.long_examples is not None and self.long_examples not in _LONG:
            raise DatasetError(f"{named('long_examples', self.long_examples)}: choose one of {', '.join(_LONG)}")
        if self.max_length is not None and self.min_length > self.max_length:
            raise DatasetError(
                f"{named('min_length', self.min_length)} is above {named('max_length', self.max_length)}: lower it"
            )
        parse_positions(self.positions)
        if self.generate is None:
            self._refuse_generation()
        else:
            self._check_generation()
        _check_tools(self.given_tools)
        self._check_template()

    def _check_template(self) -> None:
        """Raise DatasetError for arguments that are not the chat template's."""
        _check_json(self.template_arguments, named("chat_template_kwargs"))
        for name in self.template_arguments:
            if name in _OWN_SETTING:
                raise DatasetError(
                    f"{named('chat_template_kwargs')}: {name} has a setting of its own, {named(name)}: use it"
                )
            if name in _NOT_OF_THE_TEMPLATE:
                raise DatasetError(
                    f"{named('chat_template_kwargs')}: {name} is no argument of a chat template: leave it out"
                )

    def _refuse_generation(self) -> None:
        """Raise DatasetError for settings that belong to generated text."""
        given = [name for name in _OF_GENERATION if getattr(self, name) is not None]
        if given:
            raise DatasetError(
                f"{named(given[0], getattr(self, given[0]))} is for generated text: add {named('generate')}, the most "
                "tokens to generate for each prompt, or leave it out"
            )
        if self.rule.of_generation:
            raise DatasetError(
                f"{named('positions', self.positions)} is for text that this capture generates ({named('generate')}): "
                "where the dataset says which tokens are generated, use column:NAME"
            )

    def _check_generation(self) -> None:
        """Raise DatasetError for settings that prompts cannot have."""
        _check_json(self.generation_arguments, named("generation_kwargs"))
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise DatasetError(f"{named(name, value)}: it must be a number above 0")
        for name in _NOT_OF_PROMPTS:
            if getattr(self, name) is not None:
                raise DatasetError(
                    f"{named(name, getattr(self, name))} cannot be combined with {named('generate', self.generate)}: "
                    "prompts are texts, chats or token ids, and are continued whole; leave one of the two out"
                )
        if self.rule.kind == "marked":
            raise DatasetError(
                f"{named('positions', self.positions)} says nothing of tokens that are not generated yet: with "
                f"{named('generate', self.generate)} use generated, prompt, all, last or every:N"
            )
        if None not in (self.prompt_column, self.text_column) and self.prompt_column != self.text_column:
            raise DatasetError(
                f"{named('prompt_column', self.prompt_column)} and {named('text_column', self.text_column)} both name "
                "the column with the prompts: give one of them"
            )

    @property
    def content_column(self) -> str | None:
        """The column with the texts, chats or token ids that the settings name; None if they name none."""
        return self.prompt_column or self.text_column

    @cached_property
    def generation_arguments(self) -> Mapping[str, Any]:
        """The value of `generation_kwargs` as a mapping."""
        given = self.generation_kwargs
        return _parsed(given, "generation_kwargs", dict) if isinstance(given, str) else given or {}

    @property
    def continues_last_message(self) -> bool:
        """Whether the last message of a chat is to go on, instead of another turn."""
        return bool(self.template_arguments.get("continue_final_message"))

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether chats end with the start of an assistant's turn: if asked, and where the model continues them."""
        return self.add_generation_prompt or (self.generate is not None and not self.continues_last_message)

    @cached_property
    def rule(self) -> PositionRule:
        """The parsed `positions`."""
        return parse_positions(self.positions)

    @property
    def tools_column(self) -> str:
        """The column that `tools` names; empty if it gives the tools themselves, or nothing."""
        return self.tools if isinstance(self.tools, str) and not self.tools.lstrip().startswith("[") else ""

    @cached_property
    def given_tools(self) -> list[Any] | None:
        """The tools that `tools` gives for every chat."""
        if self.tools is None or self.tools_column:
            return None
        return _parsed(self.tools, "tools", list) if isinstance(self.tools, str) else list(self.tools)

    @cached_property
    def template_arguments(self) -> Mapping[str, Any]:
        """The value of `chat_template_kwargs` as a mapping."""
        given = self.chat_template_kwargs
        return _parsed(given, "chat_template_kwargs", dict) if isinstance(given, str) else given or {}

    @cached_property
    def template(self) -> str | None:
        """The chat template that `chat_template` gives, or a name among the tokenizer's; a file's content is read.

        Raises:
            DatasetError: The file cannot be read.
        """
        given = self.chat_template
        if given is None or "{" in given or not Path(given).is_file():
            return given
        try:
            if Path(given).stat().st_size > _MAX_TEMPLATE_BYTES:
                raise DatasetError(f"{named('chat_template', given)} is over 1 MiB: it should hold a chat template")
            return Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{named('chat_template', given)} cannot be read: {error}") from error

    @property
    def chat_settings(self) -> list[str]:
        """The settings that are given and concern chats only, as the caller names them."""
        return [named(name) for name in _OF_CHATS if getattr(self, name)]

    @property
    def long_rule(self) -> str:
        """The value of `long_examples`, with the default filled in."""
        return self.long_examples or ("refuse" if self.max_length is None else "split")

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, as a plan records them."""
        values = {
            f.name.removeprefix("dataset_"): getattr(self, f.name)
            for f in fields(DatasetSettings)
            if f.name not in (*_WITHOUT_EFFECT, *_OF_GENERATION)
        }
        # Left out where they are not given: plans made before these settings existed stay what they are.
        optional: dict[str, Json] = {
            "image_column": self.image_column,
            "target_column": self.target_column,
            "max_target_length": self.max_target_length,
            "add_special_tokens": self.add_special_tokens,
            "chat_template": self.template,
            "add_generation_prompt": self.add_generation_prompt or None,
            "generate": self.generate,
            "tools": self.given_tools or self.tools_column or None,
            "chat_template_kwargs": dict(self.template_arguments) or None,
        }
        values |= {"long_examples": self.long_rule, **optional}
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def length_limit(self, model_limit: int | None) -> int | None:
        """Return the most tokens of an example; None if nothing limits it.

        Raises:
            DatasetError: `max_length` is above what the model takes.
        """
        if self.max_length is None:
            return model_limit
        if model_limit is not None and self.max_length > model_limit:
            raise DatasetError(
                f"{named('max_length', self.max_length)}: the model takes {model_limit} tokens: give at most "
                f"{model_limit}"
            )
        return self.max_length


class DatasetOptions(TypedDict, total=False):
    """The fields of `DatasetSettings`, as named arguments."""

    text_column: str | None
    image_column: str | None
    image_folder: str | None
    max_image_pixels: int
    target_column: str | None
    split: str | None
    subset: str | None
    dataset_revision: str | None
    max_tokens: int | None
    max_length: int | None
    max_target_length: int | None
    long_examples: str | None
    min_length: int
    positions: str
    drop_special: bool
    add_special_tokens: bool | None
    chat_template: str | None
    add_generation_prompt: bool
    tools: str | Sequence[Any] | None
    chat_template_kwargs: str | Mapping[str, Any] | None
    generate: int | None
    prompt_column: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    generation_kwargs: str | Mapping[str, Any] | None


def _parsed(text: str, name: str, kind: type) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DatasetError(f"{named(name, text)} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise DatasetError(f"{named(name, text)}: give a JSON {'list' if kind is list else 'object'}")
    return value


def _check_json(value: object, flag: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{flag} cannot be written as JSON: {error}") from error


def _check_tools(tools: list[Any] | None) -> None:
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise DatasetError(
                f"{named('tools')}: {tool!r:.80} is not the JSON schema of a tool; transformers.utils.get_json_schema "
                "makes one of a Python function"
            )
    _check_json(tools, named("tools"))
