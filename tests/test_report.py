"""HTML reports: escaping, formatting, atomic writing, and in Chromium sorting, searching, hovering and silence."""

import json
import math
import re

import numpy as np
import pytest

from common.charts import format_number, nice_ticks, percent
from common.escaping import clip_text, image_url, safe_text
from common.figures import write_bars_png, write_histogram_png, write_lines_png, write_scatter_png
from common.report import Column, Report
from tests.browser import browser, collect, open_page  # noqa: F401

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89"
    b"\x00\x00\x00\rIDATx\x9cc\xf8\xcf\xc0\xf0\x1f\x00\x05\x00\x01\xff\x89\x99=\x1d\x00\x00\x00\x00IEND\xaeB`\x82"
)
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><img src=x onerror='window.pwned = 1'>",
    '" onmouseover="window.pwned = 1',
    "<!-- <script> & ]]> \u2028 \x00 \ud800",
    "\u202eright to left\u202c שלום 👩‍👩‍👧",
    "<img src='https://example.com/pixel.png'>",
]


def hostile_report():
    """A report with every building block, and hostile texts in every place that takes a text."""
    report = Report(HOSTILE[0], HOSTILE[1])
    report.add_facts({HOSTILE[0]: HOSTILE[1], "Rows": 1234567, "Nothing": None}, notes={"Rows": HOSTILE[2]})
    report.add_text("\n\n".join(HOSTILE), title=HOSTILE[1])
    columns = [Column(HOSTILE[0]), Column("Size", "bar"), Column("Purity", "meter", note=HOSTILE[2])]
    rows = [[text, i, i / 10] for i, text in enumerate(HOSTILE)]
    report.add_table(HOSTILE[1], columns, rows, details=[{text: HOSTILE} for text in HOSTILE], note=HOSTILE[5])
    report.add_bars(HOSTILE[0], {text: i for i, text in enumerate(HOSTILE)}, note=HOSTILE[1])
    report.add_bars(HOSTILE[1], [(text, 1) for text in HOSTILE * 6])
    report.add_lines(HOSTILE[0], {text: [(1, 0.5), (2, math.nan)] for text in HOSTILE}, x_label=HOSTILE[0])
    report.add_histogram(HOSTILE[0], [0.1, 0.2, None, math.nan], y_label=HOSTILE[1])
    report.add_scatter(HOSTILE[1], np.random.default_rng(0).random((6, 2)), labels=HOSTILE, hover_texts=HOSTILE)
    report.add_image(PNG, alt=HOSTILE[2], title=HOSTILE[0])
    report.add_images("Gallery", [(PNG, text) for text in HOSTILE])
    return report


def small_report():
    """Four clusters whose order by size, purity and name differs, and a map of three points."""
    report = Report("Purity", "four clusters")
    columns = [Column("Cluster", "number"), Column("Label"), Column("Rows", "bar"), Column("Purity", "meter")]
    rows = [[0, "refund", 30, 0.5], [1, "card lost", 9, 1.0], [2, "transfer", 100, None], [10, "Card stolen", 20, 0.25]]
    details = [["where is my money"], ["I lost it\nsomewhere"], None, ["a thief has it", "gone"]]
    report.add_table("Clusters", columns, rows, details=details, sort_by="Rows", descending=True)
    report.add_histogram("Purity of clusters", [0.5, 1.0, 0.25], bins=[0, 0.5, 1.0], as_percent=True)
    report.add_scatter("Map", [[0, 0], [10, 0], [5, 8]], labels=["a", "a", "b"], hover_texts=["one", "two", "three"])
    return report


# --- without a browser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1,234"),
        (-5, "−5"),
        (0.03125, "0.03125"),
        (1234.567, "1,235"),
        (0.00000056, "5.60e-07"),
        (math.nan, "–"),
        (None, "–"),
        (math.inf, "∞"),
        (np.float32(0.5), "0.5"),
        (np.int64(12000), "12,000"),
        ("as it is", "as it is"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, text):
    assert format_number(value) == text


def test_percent_and_digits():
    assert (percent(0.93125), percent(1, digits=0), percent(math.nan), percent(None)) == ("93.1%", "100%", "–", "–")
    assert format_number(2.5, digits=2) == "2.50"


def test_ticks_are_round_and_cover_the_range():
    assert nice_ticks(0, 14) == [0, 5, 10, 15]
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(7, 7)[0] <= 7 <= nice_ticks(7, 7)[-1]


def test_no_text_becomes_markup():
    page = hostile_report().to_html()
    outside_data = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.S)
    assert "<script" not in outside_data and "onerror='" not in outside_data and "<img src=x" not in outside_data
    assert page.count("<script") == page.count("</script>") == 3  # table, map, and our own
    assert (
        "content=\"default-src 'none'; script-src 'sha256-" in page and "unsafe" not in page.split("</head>")[0][:900]
    )


def test_data_is_json_that_holds_the_texts_unchanged():
    page = hostile_report().to_html()
    blocks = [
        json.loads(block) for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)
    ]
    assert [row[0] for row in blocks[0]["rows"]] == [safe_text(text) for text in HOSTILE]
    assert sorted(blocks[1]["names"]) == sorted(safe_text(text) for text in HOSTILE)


def test_control_characters_are_shown_and_long_texts_cut():
    assert safe_text("a\x00b\x1b\x7f\ud800\tc\n") == "a␀b␛␡\ufffd\tc\n"
    assert clip_text("one  two\nthree") == "one two three"
    assert clip_text("x" * 100_000, n_chars=10) == "xxxxxxxxxx… (100,000 characters)"
    assert clip_text(" " * 100_000 + "late") == "… (100,004 characters)"


def test_pictures_are_known_by_their_first_bytes():
    assert image_url(PNG).startswith("data:image/png;base64,iVBOR")
    with pytest.raises(ValueError, match="not a PNG"):
        image_url(b"<svg onload=alert(1)>")


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs 2 cells"):
        Report("x").add_table("T", [Column("a"), Column("b")], [[1, 2], [3]])
    with pytest.raises(ValueError, match="one entry per row"):
        Report("x").add_table("T", [Column("a")], [[1]], details=[])
    with pytest.raises(ValueError, match="one entry per point"):
        Report("x").add_scatter("M", [[0, 0]], labels=[])


def test_empty_blocks_make_a_page():
    report = Report("Empty")
    report.add_facts({})
    report.add_table("T", [Column("a")], [])
    report.add_bars("B", {})
    report.add_histogram("H", [])
    report.add_lines("L", {"none": []})
    report.add_scatter("S", np.zeros((0, 2)))
    assert "Empty" in report.to_html()


def test_points_without_coordinates_and_beyond_the_limit_are_named():
    report = Report("x")
    points = np.arange(40.0).reshape(20, 2)
    points[3] = np.nan
    report.add_scatter("M", points, max_points=10)
    page = report.to_html()
    assert "Without coordinates and left out: 1." in page and "10 of 19 points are drawn." in page


def test_equal_input_gives_equal_bytes_and_the_write_is_atomic(tmp_path, monkeypatch):
    path = small_report().write(tmp_path / "new" / "report.html")
    first = path.read_bytes()
    assert small_report().write(path).read_bytes() == first

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        hostile_report().write(path)
    assert path.read_bytes() == first and [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_thousand_clusters_with_examples_stay_under_two_megabytes():
    report = Report("Large")
    texts = [
        f"an example text number {i} of about one hundred characters, as people write them to a bank" for i in range(5)
    ]
    rows = [[i, f"label {i}", 100 + i, 0.5, 0.4] for i in range(1000)]
    columns = [Column("Cluster", "number"), Column("Label"), Column("Rows", "bar"), Column("Purity", "meter")]
    report.add_table("Clusters", [*columns, Column("Bound", "percent")], rows, details=[texts] * 1000)
    report.add_bars("Sizes", [(str(row[0]), row[2]) for row in rows])
    report.add_scatter(
        "Map",
        np.random.default_rng(0).random((5000, 2)),
        labels=[i % 1000 for i in range(5000)],
        hover_texts=texts * 1000,
    )
    assert len(report.to_html().encode()) < 2_000_000
    assert "The first 500 of 1,000 are shown." in report.to_html()


@pytest.mark.parametrize("name", ["lines", "histogram", "bars", "scatter"])
def test_pictures_are_written_and_repeat_byte_for_byte(tmp_path, name):
    def draw(path):
        if name == "lines":
            lines = {"purity": [(10, 0.4), (100, 0.7)], "$x$ <b>": [(10, 0.2), (100, math.nan)]}
            return write_lines_png(path, lines, title="Score $ per k", x_label="k", log_x=True, as_percent=True)
        if name == "histogram":
            return write_histogram_png(path, [0.1, 0.2, math.nan], bins=5, as_percent=True)
        if name == "bars":
            return write_bars_png(path, {"a $": 1, "👩": 2})
        return write_scatter_png(path, [[0, 0], [1, 1], [math.nan, 0]], labels=["a", -1, "b"], muted_label=-1)

    first, second = draw(tmp_path / "1.png").read_bytes(), draw(tmp_path / "2.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == second


# --- in Chromium -----------------------------------------------------------------------------------------------------


def cells(driver, column):
    """Texts of one column of the first table, without details."""
    rows = "[...document.querySelectorAll('.data tbody tr:not(.details)')]"
    return driver.execute_script(f"return {rows}.map((row) => row.cells[arguments[0]]?.innerText.trim())", column)


def type_into(driver, text):
    driver.execute_script(
        "const box = document.querySelector('input[type=search]');"
        "box.value = arguments[0]; box.dispatchEvent(new Event('input'))",
        text,
    )


def click_heading(driver, index):
    driver.execute_script("document.querySelectorAll('.data thead th button')[arguments[0]].click()", index)


@pytest.mark.parametrize("dark", [False, True])
def test_hostile_texts_stay_texts_and_nothing_is_requested(browser, tmp_path, dark):  # noqa: F811
    page = open_page(browser, hostile_report().write(tmp_path / "report.html"), dark=dark)
    browser.execute_script("document.querySelector('.toolbar button').click()")  # open all details
    after = collect(browser)
    assert page.errors == [] and page.requests == [] and after.errors == [] and after.requests == []
    assert browser.execute_script("return window.pwned") is None
    assert browser.title == HOSTILE[0]
    shown = browser.execute_script("return [...document.querySelectorAll('.details li')].map(li => li.textContent)")
    assert shown[: len(HOSTILE)] == [clip_text(text) for text in HOSTILE]


def test_policy_stops_what_is_not_ours(browser, tmp_path):  # noqa: F811
    """A negative control: markup put into the page by hand neither runs nor loads, and the logs notice."""
    page = small_report().to_html()
    evil = "<script>window.pwned = 1</script><img src='https://example.com/p.png' onerror='window.pwned = 2'></main>"
    path = tmp_path / "report.html"
    path.write_text(page.replace("</main>", evil), encoding="utf-8")
    result = open_page(browser, path)
    assert browser.execute_script("return window.pwned") is None
    assert len(result.errors) >= 2 and "Content Security Policy" in result.errors[0]


def test_collector_sees_requests(browser, tmp_path):  # noqa: F811
    """A negative control of the tests themselves: a page that does ask for something is caught."""
    path = tmp_path / "page.html"
    path.write_text("<img src='other.png'>", encoding="utf-8")
    assert [address.rsplit("/", 1)[1] for address in open_page(browser, path).requests] == ["other.png"]


def test_table_sorts_with_empty_cells_last(browser, tmp_path):  # noqa: F811
    open_page(browser, small_report().write(tmp_path / "report.html"))
    assert cells(browser, 3) == ["100", "30", "20", "9"]
    click_heading(browser, 3)  # purity: a first click puts the largest on top
    assert cells(browser, 4) == ["100.0%", "50.0%", "25.0%", "–"]
    click_heading(browser, 3)
    assert cells(browser, 4) == ["25.0%", "50.0%", "100.0%", "–"]
    click_heading(browser, 1)
    assert cells(browser, 2) == ["card lost", "Card stolen", "refund", "transfer"]
    script = "return [...document.querySelectorAll('thead th[aria-sort]')].map(h => h.getAttribute('aria-sort'))"
    assert browser.execute_script(script) == ["none", "ascending", "none", "none"]


def test_search_looks_at_cells_and_examples_and_marks_them(browser, tmp_path):  # noqa: F811
    open_page(browser, small_report().write(tmp_path / "report.html"))
    type_into(browser, "CARD")
    assert sorted(cells(browser, 2)) == ["Card stolen", "card lost"]
    assert browser.execute_script("return document.querySelector('.count').textContent") == "2 of 4 rows"
    assert browser.execute_script("return [...document.querySelectorAll('mark')].map(m => m.textContent)") == [
        "Card",
        "card",
    ]
    type_into(browser, "thief gone")
    assert cells(browser, 2) == ["Card stolen"]
    type_into(browser, "(.*")
    assert browser.execute_script("return document.querySelector('.nothing').textContent") == "Nothing found."


def test_rows_open_by_click_and_tell_screen_readers(browser, tmp_path):  # noqa: F811
    open_page(browser, small_report().write(tmp_path / "report.html"))
    assert browser.execute_script("return document.querySelectorAll('td.opener button').length") == 3
    browser.execute_script("document.querySelector('td.opener button').click()")
    assert browser.execute_script("return document.querySelector('.details li').textContent") == "where is my money"
    assert browser.execute_script("return document.querySelector('td.opener button').ariaExpanded") == "true"
    browser.execute_script("document.querySelector('td.opener button').click()")
    assert browser.execute_script("return document.querySelectorAll('.details').length") == 0


def test_hovering_shows_the_text_of_a_point_and_of_a_bar(browser, tmp_path):  # noqa: F811
    from selenium.webdriver import ActionChains

    open_page(browser, small_report().write(tmp_path / "report.html"), height=2000)
    canvas = browser.find_element("css selector", "canvas")
    # The map is 10 wide and 8 high; at one scale for both axes its top point is above the middle.
    ActionChains(browser).move_to_element_with_offset(canvas, 0, -canvas.size["height"] // 2 + 18).perform()
    assert browser.find_element("id", "tip").text.split("\n") == ["b", "three"]
    bar = browser.find_element("css selector", "g[data-tip]")
    ActionChains(browser).move_to_element(bar).perform()
    assert browser.find_element("id", "tip").text == "0.0% to 50.0%: 1 (33.3%)"


def test_pages_turn_and_print_shows_every_row(browser, tmp_path):  # noqa: F811
    report = Report("Many")
    report.add_table("Rows", [Column("n", "number")], [[i] for i in range(60)])
    open_page(browser, report.write(tmp_path / "report.html"))
    assert cells(browser, 0) == [str(i) for i in range(25)]
    browser.execute_script("document.querySelectorAll('.pager button')[1].click()")
    assert cells(browser, 0)[0] == "25"
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert len(cells(browser, 0)) == 60
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert len(cells(browser, 0)) == 25


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_scrolls_sideways(browser, tmp_path, width):  # noqa: F811
    open_page(browser, hostile_report().write(tmp_path / "report.html"), width=width)
    browser.execute_script("document.querySelector('.toolbar button').click()")
    assert browser.execute_script("return document.documentElement.scrollWidth") == width


def test_twenty_thousand_points_are_all_there(browser, tmp_path):  # noqa: F811
    points = np.random.default_rng(0).normal(size=(20_000, 2))
    report = Report("Big")
    report.add_scatter("Map", points, labels=[i % 40 for i in range(20_000)], hover_texts=["text"] * 20_000)
    page = open_page(browser, report.write(tmp_path / "report.html"))
    assert page.errors == []
    assert (
        browser.execute_script("return document.querySelector('canvas').ariaLabel") == "Map: 20,000 points in 40 groups"
    )
    drawn = browser.execute_script(
        "const canvas = document.querySelector('canvas');"
        "const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "let n = 0; for (let i = 3; i < data.length; i += 4) n += data[i] > 0; return n"
    )
    assert drawn > 20_000
