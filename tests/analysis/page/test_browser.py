"""The page as Chromium draws it from a disk: numbers, deep links, keys, hostile texts, and rows fetched by range."""

from itertools import pairwise

import numpy as np
import pytest

import residua
from tests.analysis.page.conftest import HOSTILE, LENGTHS, WORDS, Made
from tests.browser import Tab
from tests.plain_zarr import plain_array
from tests.servers.files import serving_files

STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
SCORES = "[...table.querySelectorAll('.score')].map(node => [+node.dataset.score, +node.dataset.row])"
VALUE = "document.querySelector('.values td[data-by=\"{}\"]')"

CONTRAST = """(() => {
  const light = (text) => {
    const [red, green, blue] = text.match(/[\\d.]+/g).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrasts = [...document.querySelectorAll('.strip .token, .toggle')].map((node) => {
    const style = getComputedStyle(node);
    if (style.backgroundColor === 'rgba(0, 0, 0, 0)') return 21;
    const [high, low] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  });
  return Math.min(...contrasts);
})()"""
"""The lowest contrast of a text with its own background, as WCAG 2 defines it."""


def address(made: Made, fragment: str = "") -> str:
    return f"{(made.page / 'index.html').as_uri()}{fragment}"


@pytest.mark.parametrize(
    ("example", "site", "token", "by"),
    [
        (0, "resid_post.0", 5, "norm"),
        (3, "resid_post.1", 0, "distance"),
        (5, "resid_post.1", 9, "channel:2"),
        (2, "q.1", 4, "norm"),
    ],
)
def test_a_deep_link_selects_a_token_whose_number_is_that_of_the_rows(
    made: Made, tab: Tab, example: int, site: str, token: int, by: str
) -> None:
    tab.open(address(made, f"#example={example}&site={site}&token={token}&by={by}"))
    shown = float(tab.wait(f"{VALUE.format(by)}.dataset.value"))
    rows = plain_array(made.archive, f"sites/{site.replace('.', '/')}").reshape(sum(LENGTHS), -1).astype(np.float64)
    row = rows[STARTS[example] + token]
    expected = {
        "norm": np.linalg.norm(row),
        "distance": np.linalg.norm(row - rows.mean(0)),
        "channel:2": row[2],
    }[by]
    assert shown == pytest.approx(expected, rel=1e-6)
    assert tab.run("document.querySelector('#row-number').textContent") == str(STARTS[example] + token)
    assert tab.run("document.querySelector('.strip .selected').dataset.position") == str(token)
    assert tab.run("document.querySelector('.heading h2').textContent") == f"Example {example}"
    assert tab.run("document.querySelector('.field select').value") == site
    background = tab.run("getComputedStyle(document.querySelector('.strip .selected')).backgroundColor")
    assert background.startswith("rgb(")


def test_texts_of_the_archive_stay_texts(made: Made, tab: Tab) -> None:
    tab.problems.clear()
    for fragment in ("", "#example=0&token=0", "#view=directions&site=q.1", "#view=heads"):
        tab.open(address(made, fragment))
        assert tab.run("document.querySelectorAll('main img, main script, main b').length") == 0
        assert tab.run("document.title").startswith("acts.zarr")
    tab.open(address(made, "#example=0"))
    assert tab.wait("document.querySelector('.strip .token').textContent") == HOSTILE
    shown = tab.run("[...document.querySelectorAll('.strip .token')].map(node => node.textContent)")
    assert shown == [word.replace("\n", "↵") for word in WORDS[: LENGTHS[0]]]
    assert tab.run("document.querySelector('.columns dd').textContent") == f"{HOSTILE} 0"
    assert not tab.problems


def test_nothing_is_loaded_but_the_folder(made: Made, tab: Tab) -> None:
    tab.requests.clear()
    tab.open(address(made, "#example=1&site=resid_post.1&token=1&lens=on"))
    tab.wait("document.querySelector('.readouts')")
    folder = made.page.as_uri()
    assert {one for one in tab.requests if not one.startswith((folder, "about:", "data:"))} == set()
    assert any("readouts" in one for one in tab.requests)


def test_keys_step_through_examples_tokens_and_sites(made: Made, tab: Tab) -> None:
    tab.open(address(made, "#example=1&site=resid_post.0&by=norm"))
    tab.wait("document.querySelector('.strip .token')")
    for key, expected in (
        ("j", "example=2"),
        ("ArrowDown", "example=3"),
        ("k", "example=2"),
        ("l", "token=0"),
        ("l", "token=1"),
        ("]", "site=resid_post.1"),
        ("b", "by=distance"),
        ("r", "lens=on"),
    ):
        tab.key(key)
        assert expected in tab.wait(f"location.hash.includes('{expected}') && location.hash")
    tab.key("/")
    assert tab.run("document.activeElement.type") == "search"
    tab.run("document.activeElement.value = 'é'; document.activeElement.dispatchEvent(new Event('input'))")
    with_word = [i for i, length in enumerate(LENGTHS) if 8 in {(i + at) % len(WORDS) for at in range(length)}]
    assert tab.wait(
        "document.querySelectorAll('.entries .entry').length < 6 && document.querySelectorAll('.entries .entry').length"
    ) == len(with_word)
    tab.key("Escape")
    tab.key("?")
    assert tab.run("document.querySelector('#keys').open") is True


def test_the_strongest_rows_are_listed_with_a_link_to_their_example(made: Made, tab: Tab) -> None:
    tab.open(address(made, "#view=directions&site=resid_post.1&by=channel:2"))
    tab.wait("document.querySelectorAll('.rows').length == 2")
    found = tab.run(f"[...document.querySelectorAll('.rows')].map(table => {SCORES})")
    scores = made.values["resid_post.1"][:, 2].astype(np.float64)
    for lines, sign in zip(found, (1, -1), strict=True):
        best = sorted((-sign * scores[start:stop]).min() for start, stop in pairwise(STARTS))[:3]
        assert [line[0] for line in lines] == pytest.approx([-sign * one for one in best])
        assert [scores[line[1]] for line in lines] == pytest.approx([line[0] for line in lines])
    tab.run("document.querySelector('.rows a').click()")
    assert tab.wait("document.querySelector('#row-number').textContent") == str(found[0][0][1])


def test_light_and_dark_keep_texts_legible(made: Made, tab: Tab) -> None:
    tab.open(address(made, "#example=0&site=resid_post.1&by=channel:2"))
    tab.wait("document.querySelector('.strip .token')")
    for _ in range(2):
        assert tab.wait(CONTRAST) >= 4.5
        before = tab.run("document.documentElement.dataset.theme")
        tab.run("document.querySelector('#theme').click()")
        assert tab.run("document.documentElement.dataset.theme") != before
        tab.wait("document.querySelector('.strip .token')")


def test_a_row_of_an_archive_on_a_web_server_is_fetched_by_range(made: Made, tab: Tab) -> None:
    with serving_files(made.archive.parent) as server:
        residua.page(f"{server.url}/acts.zarr", made.page.parent / "remote", sites="resid_post.*", lens_examples=0)
        tab.open(f"{server.url}/remote/index.html#example=3&site=resid_post.1&token=2&by=norm")
        tab.wait("document.querySelector('.fetched button')")
        server.forget()
        tab.run("document.querySelector('.fetched button').click()")
        norm = float(tab.wait("document.querySelector('.fetched [data-norm]').dataset.norm"))
        row = made.values["resid_post.1"][STARTS[3] + 2].astype(np.float64)
        assert norm == pytest.approx(np.linalg.norm(row), rel=1e-9)
        (path,) = server.requests
        assert path == f"/acts.zarr/sites/resid_post/1/c/{(STARTS[3] + 2) // 16}/0"
        server.altered.add("0")
        tab.open(f"{server.url}/remote/index.html#example=2&site=resid_post.1&token=2&by=norm")
        tab.wait("document.querySelector('.fetched button')")
        tab.run("document.querySelector('.fetched button').click()")
        assert "checksum" in tab.wait("document.querySelector('.fetched .note').textContent")
