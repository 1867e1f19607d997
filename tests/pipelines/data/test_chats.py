"""Chats: tokens are those of transformers with the same settings, and marks are where the rendered text has them."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from residua.store.examples.index import Example
from tests.pipelines.dataset_samples import make_tokenizer

USER, ASSISTANT = "user", "assistant"
BOS = {"bos_token": "<s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
PLAIN = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}(no){% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
)


def byte_tokenizer(template: Any = PLAIN, merges: list[tuple[str, str]] | None = None) -> Any:
    """Return a tokenizer whose tokens are bytes, or what `merges` make of them."""
    words = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += ["".join(pair) for pair in merges or []]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=backend, **BOS)
    tokenizer.chat_template = template
    return tokenizer


def read(source: object, tokenizer: Any, **options: Any) -> tuple[list[Example], DatasetReport]:
    report = DatasetReport()
    settings = DatasetSettings(**options)
    return list(read_examples(source, settings=settings, tokenizer=tokenizer, report=report)), report


def chat(*contents: Any) -> list[dict[str, Any]]:
    """Return messages by turns of the user and the assistant."""
    return [{"role": (USER, ASSISTANT)[i % 2], "content": content} for i, content in enumerate(contents)]


def ids(example: Example) -> list[int]:
    return list(example.input_ids)


def kept_texts(source: object, tokenizer: Any, **options: Any) -> tuple[list[str], DatasetReport]:
    examples, report = read(source, tokenizer, positions="assistant", **options)
    return [tokenizer.decode(example.input_ids[example.positions]) for example in examples], report


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"add_generation_prompt": True}, {"add_generation_prompt": True}),
    ({"tools": TOOLS}, {"tools": TOOLS}),
    ({"tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
    ({"chat_template": "{{ messages[0].content }}!"}, {"chat_template": "{{ messages[0].content }}!"}),
    (
        {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    (
        {"add_generation_prompt": True, "chat_template_kwargs": '{"enable_thinking": false}'},
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    ({"chat_template_kwargs": {"continue_final_message": True}}, {"continue_final_message": True}),
]


@pytest.mark.parametrize(("options", "theirs"), SETTINGS)
def test_tokens_are_those_of_transformers_with_the_same_settings(
    options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    tokenizer = byte_tokenizer()
    for messages in (chat("hi", "yes"), chat("é", "b\n", "c", "")):
        (example,), report = read([messages], tokenizer, **options)
        assert ids(example) == tokenizer.apply_chat_template(messages, return_dict=False, **theirs)
        assert report.notes() == []


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1]}}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": USER, "content": "q"}, {"role": ASSISTANT, "tool_calls": [CALL]}],
        [{"role": USER, "content": "q"}, {"role": ASSISTANT, "content": None, "tool_calls": [CALL]}],
        [{"role": USER, "content": "q"}, {"role": ASSISTANT, "content": "", "tool_calls": None}],
        [{"role": USER, "content": ""}],
    ],
)
def test_parts_and_messages_without_content_are_rendered_as_transformers_does(messages: list[dict[str, Any]]) -> None:
    tokenizer = byte_tokenizer(PLAIN.replace("{% else %}", "{% elif m.content is defined %}"))
    (example,), report = read([messages], tokenizer)
    assert ids(example) == tokenizer.apply_chat_template(messages, return_dict=False)
    assert report.notes() == []


def test_parts_that_the_template_writes_out_as_a_list_are_noted() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    parts = [{"role": USER, "content": [{"type": "text", "text": "a"}]}]
    examples, report = read([parts, chat("b"), parts], tokenizer)
    assert [ids(example) for example in examples[:2]] == [
        tokenizer.apply_chat_template(messages, return_dict=False) for messages in (parts, chat("b"))
    ]
    assert report.n_written_parts == 2
    assert any("2 chats have contents in parts" in note for note in report.notes())


def test_fields_that_arrow_adds_to_parts_are_not_seen_by_the_template() -> None:
    template = "{% for p in messages[0].content %}{% if 'name' in p %}!{{ p.name }}{% endif %}{{ p.text }}{% endfor %}"
    parts = [{"role": USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "name": "n"}]}]
    tokenizer = byte_tokenizer(template)
    expected = tokenizer.apply_chat_template(parts, return_dict=False)
    for source in ([{"messages": parts}], datasets.Dataset.from_list([{"messages": parts}])):
        (example,), _ = read(source, tokenizer)
        assert ids(example) == expected


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": USER, "text": "hi"}, "role and content.* role, text"),
        ({"from": "human", "value": "hi"}, "role and content"),
        ({"role": USER, "content": [{"type": "image", "url": "x"}]}, "part of type 'image'"),
        ({"role": USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type 'image_url'"),
        ({"role": USER, "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "'input_audio'"),
    ],
)
def test_messages_that_would_lose_something_are_refused(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=f"row 1: .*{words}"):
        read([chat("a"), [message]], byte_tokenizer())


OTHER = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}]


class TestTools:
    def test_each_chat_has_those_of_its_row(self) -> None:
        tokenizer = byte_tokenizer()
        given: list[Any] = [TOOLS, None, [], json.dumps(OTHER), ""]
        examples, _ = read([{"messages": chat("q"), "tools": tools} for tools in given], tokenizer)
        expected = [
            tokenizer.apply_chat_template(chat("q"), tools=tools, return_dict=False)
            for tools in (TOOLS, None, None, OTHER, None)
        ]
        assert [ids(example) for example in examples] == expected
        assert all("tools" not in example.columns for example in examples)

    def test_another_column_or_the_same_for_all(self) -> None:
        tokenizer = byte_tokenizer()
        rows = [{"messages": chat("q"), "functions": TOOLS, "tools": OTHER}]
        for option, tools in (("functions", TOOLS), ("tools", OTHER), (OTHER, OTHER)):
            (example,), _ = read(rows, tokenizer, tools=option)
            assert ids(example) == tokenizer.apply_chat_template(chat("q"), tools=tools, return_dict=False)

    def test_a_tokenizer_with_a_template_for_tools_uses_it(self) -> None:
        tokenizer = byte_tokenizer({"default": "D", "tool_use": "T{{ tools | tojson }}", "rag": "R"})
        rows = [{"messages": chat("q"), "tools": tools} for tools in (TOOLS, None)]
        examples, _ = read(rows, tokenizer)
        expected = [tokenizer.apply_chat_template(chat("q"), tools=t, return_dict=False) for t in (TOOLS, None)]
        assert [ids(example) for example in examples] == expected
        (example, *_), report = read(rows, tokenizer, chat_template="rag")
        assert tokenizer.decode(ids(example)) == "R"
        assert report.n_without_tools == 1
        assert any("1 chats have tools" in note for note in report.notes())

    @pytest.mark.parametrize("tools", ["[", 5, ["f"], {"name": "f"}])
    def test_what_is_no_list_of_schemas_is_refused_with_its_row(self, tools: object) -> None:
        rows = [{"messages": chat("q"), "tools": given} for given in (None, tools)]
        with pytest.raises(DatasetError, match=r"row 1: its tools are not"):
            read(rows, byte_tokenizer())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": "functions"}, "tools='functions': .*no such column"),
        ({"tools": TOOLS, "chat_template": "{{ messages }}"}, "tools=: .* does not use tools"),
        ({"tools": ["f"]}, "tools=: 'f' is not the JSON schema"),
        ({"tools": "[1"}, "tools='\\[1' is not JSON"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs='{' is not JSON"),
        ({"chat_template_kwargs": "[]"}, "chat_template_kwargs=.* JSON object"),
        ({"chat_template_kwargs": {"enable_thoughts": 1}}, "does not use 'enable_thoughts'"),
        ({"chat_template_kwargs": {"tools": []}}, "tools=: use it"),
        ({"chat_template_kwargs": {"padding": True}}, "padding is no argument"),
        ({"chat_template_kwargs": {"documents": [float("nan")]}}, "cannot be written as JSON"),
        ({"add_generation_prompt": True, "chat_template": "{{ messages }}"}, "add_generation_prompt=: "),
        ({"chat_template": "tool_use"}, "chat_template='tool_use' is neither a file"),
        ({"add_special_tokens": True}, "add_special_tokens=True is for texts"),
    ],
)
def test_settings_that_could_have_no_effect_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read([{"messages": chat("a")}], byte_tokenizer(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": TOOLS},
        {"add_generation_prompt": True},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"a": 1}},
    ],
)
def test_settings_of_chats_are_refused_for_texts(options: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="is for chats, and column 'text' holds text"):
        read(["a"], byte_tokenizer(), **options)


def test_a_template_from_a_file_is_kept_in_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}é", encoding="utf-8")
    (example,), _ = read([chat("a")], byte_tokenizer(None), chat_template=str(path))
    assert byte_tokenizer().decode(ids(example)) == "aé"
    assert DatasetSettings(chat_template=str(path)).rules()["chat_template"] == "{{ messages[0].content }}é"
    path.write_bytes(b"\xff{{")
    with pytest.raises(DatasetError, match=r"chat_template=.*own\.jinja' cannot be read"):
        read([chat("a")], byte_tokenizer(None), chat_template=str(path))


def test_settings_that_are_not_given_are_not_in_a_plan() -> None:
    assert not DatasetSettings().rules().keys() & {
        "add_special_tokens",
        "chat_template",
        "add_generation_prompt",
        "tools",
        "chat_template_kwargs",
    }
    assert DatasetSettings(add_special_tokens=False).rules()["add_special_tokens"] is False
    as_text, as_value = DatasetSettings(tools=json.dumps(TOOLS)), DatasetSettings(tools=TOOLS)
    assert as_text.rules() == as_value.rules()


CHATS = [
    chat("q", "yes"),
    chat("q", ""),
    chat("", "a b", "", "c"),
    chat("q", " ", "r", "\n\n"),
    chat("q", "é你😀", "r", "x", "s", "", "t", "y"),
    [{"role": ASSISTANT, "content": ""}, {"role": USER, "content": "secret"}, {"role": ASSISTANT, "content": "x"}],
    [{"role": ASSISTANT, "content": " led"}, {"role": USER, "content": "a"}],
    [{"role": ASSISTANT, "content": "same"}, {"role": USER, "content": "same"}] * 3,
]


class TestMarks:
    """Each piece of a chat is known, so the assistant's letters are."""

    @pytest.mark.parametrize("messages", CHATS)
    def test_every_turn_is_marked_and_nothing_else(self, messages: list[dict[str, Any]]) -> None:
        answers = "".join(m["content"] for m in messages if m["role"] == ASSISTANT)
        tokenizer = byte_tokenizer(MARKED)
        examples, report = read([messages, chat("a", "b")], tokenizer, positions="assistant")
        marked = [tokenizer.decode(example.input_ids[example.positions]) for example in examples]
        assert marked == ([answers, "b"] if answers else ["b"])
        assert report.n_without_rows == (0 if answers else 1)
        assert (report.n_shared_tokens, report.n_lost_turns) == (0, 0)
        if answers:
            assert ids(examples[0]) == tokenizer.apply_chat_template(messages, return_dict=False)

    @pytest.mark.parametrize("messages", CHATS)
    @pytest.mark.parametrize(
        "template",
        [
            "{%- for m in messages -%}\n {{ m.role }} {% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} "
            "{%- endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
            "{% macro turn(m) %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}\n  {{ m.content }}\n"
            "{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endmacro %}"
            "{% for m in messages %}{{ turn(m) }}{% endfor %}",
            "{% for m in messages %}{% set text %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endset %}({{ text }}){% endfor %}",
        ],
    )
    def test_wherever_the_template_has_the_block(self, messages: list[dict[str, Any]], template: str) -> None:
        tokenizer = byte_tokenizer(template)
        examples, _ = read([messages, chat("a", "b")], tokenizer, positions="assistant")
        answers = "".join(m["content"] for m in messages if m["role"] == ASSISTANT)
        if answers.strip():
            marked = tokenizer.decode(examples[0].input_ids[examples[0].positions])
            assert marked.replace(" ", "").replace("\n", "") == answers.replace(" ", "").replace("\n", "")
            assert ids(examples[0]) == tokenizer.apply_chat_template(messages, return_dict=False)

    def test_a_token_with_letters_of_both_is_not_the_assistants(self) -> None:
        tokenizer = byte_tokenizer(MARKED, merges=[(":", "x"), ("z", ";"), ("Ġ", "w")])
        messages = chat("q", "xyz", "q", "x", "q", "ab")
        (text,), report = kept_texts([messages], tokenizer)
        assert text == "yab"
        assert (report.n_shared_tokens, report.n_lost_turns) == (3, 1)
        assert any("3 tokens hold letters" in note for note in report.notes())
        assert any("1 turns of the assistant have no token" in note for note in report.notes())

    def test_a_space_beside_a_turn_may_share_its_token(self) -> None:
        tokenizer = byte_tokenizer(MARKED.replace("A:", "A: "), merges=[("Ġ", "w")])
        (text,), report = kept_texts([chat("q", "w")], tokenizer)
        assert (text, report.n_shared_tokens) == (" w", 0)

    def test_turns_that_begin_where_no_token_is_are_not_lost(self) -> None:
        template = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %} {{ m.content }} "
        tokenizer: Any = make_tokenizer(
            template + "{% endgeneration %}{% else %} {{ m.content }} {% endif %}{% endfor %}"
        )
        (text,), _ = kept_texts([chat("a", "b c", "d", "e", "f", "g")], tokenizer)
        assert text == "b c e g"

    def test_windows_keep_their_marks(self) -> None:
        tokenizer = byte_tokenizer(MARKED)
        texts, _ = kept_texts([chat("q", "abcdefgh", "r", "ijk")], tokenizer, max_length=7)
        assert "".join(texts) == "abcdefghijk"

    def test_a_template_that_reads_its_own_output_is_refused(self) -> None:
        template = (
            "{% set text %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ text | length }}"
        )
        with pytest.raises(DatasetError, match=r"row 0: positions='assistant': .*column:NAME"):
            kept_texts([chat("abc")], byte_tokenizer(template))


@pytest.mark.parametrize("prefix", ["", "<s>"])
@pytest.mark.parametrize("end", ["", " </s>"])
def test_a_chat_has_one_start_token_as_messages_and_as_text(prefix: str, end: str) -> None:
    template = f"{{{{ bos_token }}}} {{% for m in messages %}}{{{{ m.content }}}} {{% endfor %}}{end}"
    tokenizer: Any = make_tokenizer(template, single=f"{prefix} $A{end}".strip())
    messages = chat("a b", "c")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    (as_chat,), _ = read([messages], tokenizer)
    (as_text, other), report = read([rendered, "d"], tokenizer)
    assert ids(as_chat) == expected
    if prefix:
        assert ids(as_text) == expected
        assert report.n_own_start == 1
        assert any("1 texts begin with the tokenizer's start token" in note for note in report.notes())
    assert ids(other) == tokenizer("d")["input_ids"]


def test_special_tokens_are_added_as_asked() -> None:
    tokenizer: Any = make_tokenizer(single="<s> $A </s>")
    texts = ["a b", "<s> a", "<s> <s> b"]
    for added in (True, False):
        examples, report = read(texts, tokenizer, add_special_tokens=added)
        assert [ids(example) for example in examples] == tokenizer(texts, add_special_tokens=added)["input_ids"]
        assert report.n_doubled_start == (2 if added else 1)
        assert any("begin with the tokenizer's start token twice" in note for note in report.notes())


def test_a_doubled_start_token_is_counted_wherever_it_comes_from() -> None:
    tokenizer: Any = make_tokenizer("{{ bos_token }} {{ messages[0].content }}")
    _, report = read([chat("<s> a"), chat("a")], tokenizer)
    assert report.n_doubled_start == 1
    _, report = read([[0, 0, 5], [0, 5], [5, 0, 0], [0]], tokenizer)
    assert report.n_doubled_start == 1
    _, report = read([np.array([0, 0, 5])], None)
    assert report.n_doubled_start == 0


def test_the_first_row_with_a_value_shows_what_a_column_holds() -> None:
    tokenizer = byte_tokenizer()
    examples, report = read([{"messages": None}, {"messages": []}, {"messages": chat("a")}], tokenizer)
    assert [ids(example) for example in examples] == [tokenizer.apply_chat_template(chat("a"), return_dict=False)]
    assert report.n_empty == 2
