"""What a message asks for where a model lacks tokenizer or processor: no argument of Python on the command line."""

from pathlib import Path

import pytest

from residua.pipelines.capture.images import load_processor
from residua.pipelines.data.missing_files import to_give
from residua.store.base.errors import PlanError
from residua.store.base.naming import naming_flags


def test_the_command_line_is_told_of_the_folder_of_the_model() -> None:
    assert to_give("tokenizer", "AutoTokenizer") == "pass tokenizer=transformers.AutoTokenizer.from_pretrained(...)"
    with naming_flags():
        asked = to_give("tokenizer", "AutoTokenizer")
    assert "the folder of --model" in asked
    assert "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)" in asked
    assert "tokenizer=" not in asked


@pytest.mark.parametrize(
    ("on", "said"), [(True, r"of --model /\S+ could.*into the folder"), (False, r"pass processor=")]
)
def test_a_folder_without_a_processor(on: bool, said: str, tmp_path: Path) -> None:
    with naming_flags(on), pytest.raises(PlanError, match=said):
        load_processor(tmp_path, None)
