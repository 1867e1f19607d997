"""The page of benchmarks is what its script writes."""

import runpy

from tests.pages import ROOT


def test_the_page_holds_the_results_that_are_there_and_nothing_else() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    assert (ROOT / "benchmarks" / "README.md").read_text() == script["page"](), "run python benchmarks/run.py page"
