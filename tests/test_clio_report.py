"""The page of Clio in headless Chromium: tree, map, search and colours, hostile texts, 100,000 points, no requests."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from llm_parts.clio.comparison import COMPARISON_TITLE, compare_hierarchies
from llm_parts.clio.report import LINE_BREAK, explorer_data, render_clio_report
from llm_parts.clio.taxonomy import ClioReport, ClusterName, Hierarchy, Level, count_sizes
from tests.browser import browser, collect, open_page  # noqa: F401

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
COLOURS, THINGS = ("Red", "Green", "Blue"), ("cars", "pets")


def make_report(n=1200, *, n_each=2, hostile=True):
    """Three colours over six colour-and-things over 6 * n_each base clusters; linkage has things on top instead."""
    n_base = 6 * n_each
    mids = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    base = [
        ClusterName(f"{mids[i // n_each]} no. {i}", f"Users asked about {mids[i // n_each]}.") for i in range(n_base)
    ]
    if hostile:
        base[0] = ClusterName(f"{HOSTILE} first", HOSTILE)
    named = [ClusterName(mid, f"About {mid}.") for mid in mids]
    low = np.arange(n_base) // n_each
    by_llm = Hierarchy(
        "llm", [Level([ClusterName(c, f"All in {c}.") for c in COLOURS], np.arange(6) // 2), Level(named, low)], 9, 0.1
    )
    by_linkage = Hierarchy(
        "linkage", [Level([ClusterName(t, f"All {t}.") for t in THINGS], np.arange(6) % 2), Level(named, low)], 8, 0.1
    )
    rng = np.random.default_rng(0)
    labels = np.arange(n) % (n_base + 1) - 1  # every so-manieth is noise
    centres = rng.normal(0, 5, (n_base + 1, 2))
    hover = [
        f"asked about {mids[label // n_each] if label >= 0 else 'nothing'}, case {i}" for i, label in enumerate(labels)
    ]
    hover[1] = f"needle {HOSTILE}\nand a second line"
    rows = compare_hierarchies([by_llm, by_linkage], base_labels=labels, true_labels=labels, centroids=None)
    return ClioReport(
        conversation_ids=[f"conv-{i}" for i in range(n)],
        base_labels=labels,
        base_names=base,
        hierarchies=[by_llm, by_linkage],
        map_xy=(centres[labels] + rng.normal(0, 0.4, (n, 2))).astype(np.float32),
        hover=hover,
        facets={
            "request": hover,
            "language": ["English", "Русский", HOSTILE][:3] * (n // 3),
            "concern": [1.0, 2.0, None] * (n // 3),
        },
        tables=[("Warnings", [{"warning": "few users"}]), (COMPARISON_TITLE, rows), (HOSTILE, [{HOSTILE: HOSTILE}])],
        audit={"masked": {"mail": 3}, HOSTILE: HOSTILE},
    )


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return render_clio_report(make_report()).write(tmp_path_factory.mktemp("clio") / "report.html")


def run(driver, script):
    """Run a script in the page, with the explorer as `e`; wait for the frame that it may have asked for."""
    head = "const e = document.querySelector('[data-explorer]').explorer;"
    result = driver.execute_script(head + script)
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")
    return result


def open_report(driver, path, **size):
    """Open the page and bring the explorer into sight, without the smooth scrolling that a click would miss."""
    page = open_page(driver, path, **size)
    driver.execute_script("document.querySelector('.explorer').scrollIntoView({behavior: 'instant', block: 'start'})")
    return page


def rows_shown(driver):
    """The names of the rows of the tree that can be seen."""
    return run(
        driver,
        "return [...document.querySelectorAll('.explorer .row')].filter((row) => row.offsetParent)"
        ".map((row) => row.querySelector('b').textContent)",
    )


def click(driver, name):
    found = driver.find_elements("xpath", f"//div[contains(@class, 'row')][.//b[text()='{name}']]")
    next(row for row in found if row.is_displayed()).click()


def point_at(driver, row):
    """Move the pointer onto the point of a conversation; returns the chain, to click."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = driver.find_element("css selector", ".explorer canvas")
    x, y, width, height = run(
        driver, f"const [x, y] = e.map.place(e.map.x[{row}], e.map.y[{row}]); return [x, y, ...e.map.size];"
    )
    chain = ActionChains(driver).move_to_element_with_offset(canvas, round(x - width / 2), round(y - height / 2))
    chain.perform()
    return chain


def n_colors(driver):
    """How many colours the pixels of the map have."""
    return run(
        driver,
        "const { width, height } = e.map.canvas;"
        "return new Set(new Uint32Array(e.map.brush.getImageData(0, 0, width, height).data.buffer)).size",
    )


# --- Without a browser -----------------------------------------------------------------------------------------------


def test_hostile_texts_stay_texts():
    page = render_clio_report(make_report()).to_html()
    outside_data = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.S)
    assert "<script" not in outside_data and "<img src=x" not in outside_data
    assert "script-src 'sha256-" in page and "unsafe" not in page[:900]
    assert "innerHTML" not in page and "eval(" not in page


def test_arrays_are_packed_and_texts_are_lines():
    report = make_report(39, hostile=False)
    report.map_xy[3] = np.nan
    data = explorer_data(report, count_sizes(report.base_labels, n_clusters=12))
    x = np.frombuffer(base64.b64decode(data["x"]), "<u2")
    assert len(x) == 39 and x[3] == 0xFFFF and np.delete(x, 3).max() <= 60_000
    assert len(data["texts"].split("\n")) == 39 and LINE_BREAK in data["texts"].split("\n")[1]
    assert [facet["name"] for facet in data["facets"]] == ["language", "concern"]  # requests are too many to colour by
    assert data["facets"][1]["values"] == ["1", "2"] and json.dumps(data)


def test_texts_of_conversations_in_no_cluster_are_withheld():
    report = make_report(hostile=False)
    assert "asked about nothing" not in render_clio_report(report).to_html()
    assert "asked about nothing" in render_clio_report(replace(report, show_outsiders=True)).to_html()


def test_rare_values_of_facets_are_not_shown():
    report = make_report(39, hostile=False)
    languages = ["English"] * 20 + ["Russian"] * 16 + ["Basque"] * 3
    texts = [f"text {i % 20}" for i in range(39)]  # few values, each of one or two people
    report = replace(report, facets={"language": languages, "request": texts})
    data = explorer_data(report, count_sizes(report.base_labels, n_clusters=12))
    assert [(facet["name"], facet["values"], facet["counts"]) for facet in data["facets"]] == [
        ("language", ["English", "Russian"], [20, 16])
    ]
    assert base64.b64decode(data["facets"][0]["codes"])[-3:] == b"\xff\xff\xff"


def test_of_very_many_conversations_a_sample_is_shown(monkeypatch):
    monkeypatch.setattr("llm_parts.clio.report.MAX_SHOWN", 13)
    report = make_report(39, hostile=False)
    sizes = count_sizes(report.base_labels, n_clusters=12)
    data = explorer_data(report, sizes)
    assert (
        len(data["texts"].split("\n")) == 13 and data["ids"].startswith("conv-0\n") and data["ids"].endswith("conv-38")
    )
    assert data["total"] == 39 and data["noise"] == 3 and sum(size for *_, size in data["baseClusters"]) == 36
    assert "13 of 39 conversations" in render_clio_report(report).to_html()


def nearly_empty_reports():
    """No conversation at all; and one that has no place on the map, no text and no hierarchy over its cluster."""
    flat = [Hierarchy("llm", [], calls=0, cost=0.0)]
    empty = ClioReport([], np.zeros(0, np.int64), [], flat, np.zeros((0, 2), np.float32), [], {}, [])
    none_on_map = ClioReport(["a"], np.array([0]), [ClusterName("x", "")], [], np.full((1, 2), np.nan), [""], {}, [])
    return empty, none_on_map


# --- In Chromium -----------------------------------------------------------------------------------------------------


def test_tree_opens_level_by_level_and_switches(browser, page_path):  # noqa: F811
    page = open_report(browser, page_path)
    assert page.errors == [] and page.requests == []
    assert sorted(rows_shown(browser)) == ["Blue", "Green", "Red"]
    click(browser, "Green")
    assert {"Green cars", "Green pets"} < set(rows_shown(browser)) and "Green cars no. 4" not in rows_shown(browser)
    click(browser, "Green cars")
    click(browser, "Green cars no. 4")
    shown = browser.find_element("css selector", ".explorer .side").text
    assert "Users asked about Green cars." in shown and "asked about Green cars, case 5" in shown  # examples
    assert run(browser, "return e.crumbs.innerText").split("\n")[-2:] == ["Green cars no. 4", "92 · 7.7%"]
    click(browser, "Green")
    click(browser, "Green")  # a second click folds it up
    assert "Green cars" not in rows_shown(browser)
    browser.find_element("xpath", "//button[text()='By linkage']").click()
    assert sorted(rows_shown(browser)) == ["cars", "pets"]
    run(browser, "e.select(e.tree.byLevel[3][11]); e.useTree(e.trees[0])")  # a base cluster stays chosen
    assert run(browser, "return [e.chosen.name, e.chosen.parent.parent.name]") == ["Blue pets no. 11", "Blue"]
    assert collect(browser).errors == []


def test_tree_is_walked_by_keys(browser, page_path):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    open_report(browser, page_path)
    first = browser.find_element("css selector", ".explorer .row[tabindex='0']")
    for keys in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER):
        browser.switch_to.active_element.send_keys(keys) if keys != Keys.ARROW_RIGHT else first.send_keys(keys)
        first = browser.switch_to.active_element
    chosen = run(
        browser,
        "return [e.chosen.depth, e.chosen === [...e.view.items].find(([, s]) => s.row === document.activeElement)[0]]",
    )
    assert chosen == [2, True]
    assert browser.switch_to.active_element.get_attribute("aria-selected") == "true"


def test_search_finds_clusters_and_conversations(browser, page_path):  # noqa: F811
    open_report(browser, page_path)
    box = browser.find_element("css selector", ".explorer input[type=search]")
    box.send_keys("needle SECOND")
    run(browser, "clearTimeout(e.timer); e.find()")
    found = browser.find_element("css selector", ".explorer .found").text
    assert "Clusters: 0" in found and "Conversations: 1" in found and "<img src=x" in found
    assert [mark.text for mark in browser.find_elements("css selector", ".found mark")] == ["needle", "second"]
    assert run(browser, "return [...e.hits]") == [1]
    box.clear()
    box.send_keys("green pets")
    run(browser, "clearTimeout(e.timer); e.find()")
    assert "Clusters: 3" in browser.find_element("css selector", ".explorer .found").text
    browser.find_element("css selector", ".found .hits button").click()
    assert run(browser, "return [e.chosen.name, e.search.value, e.pane.hidden]") == ["Green pets", "", False]
    run(browser, "e.search.value = 'conv-77'; e.find()")
    assert run(browser, "return [...e.hits]")[:2] == [77, 770]
    run(browser, "e.search.value = 'no such thing'; e.find()")
    assert run(browser, "return e.hits.length") == 0
    run(browser, "e.search.value = ''; e.find()")
    assert run(browser, "return [e.hits, e.found.hidden]") == [None, True]
    assert browser.execute_script("return window.pwned") is None and collect(browser).errors == []


def test_map_hovers_picks_and_colours(browser, page_path):  # noqa: F811
    open_report(browser, page_path)
    row = 8  # of base cluster 7, under Green pets
    chain = point_at(browser, row)
    shown = run(browser, "return e.map.marked")
    tip = browser.find_element("id", "tip").text
    assert run(browser, f"return e.base[{shown}]") == 7 and "Green › Green pets" in tip and f"conv-{shown}" in tip
    chain.click().perform()
    assert run(browser, "return e.chosen.name") == "Green"
    point_at(browser, row).click().perform()
    point_at(browser, row).click().perform()
    assert run(browser, "return e.chosen.name") == "Green pets no. 7"
    zoom = run(browser, "const before = e.map.view.zoom; e.lookAtChosen(); return [before, e.map.view.zoom]")
    assert zoom[1] > 2 * zoom[0]
    run(browser, "e.map.reset(); e.select(e.tree.root); e.recolor('facet-1')")
    assert run(browser, "return e.legend.innerText").split("\n") == ["1", "400", "2", "400"]
    assert browser.execute_script("return window.pwned") is None and collect(browser).errors == []


def test_noise_is_grey_and_what_is_not_chosen_is_faint(browser, page_path):  # noqa: F811
    open_report(browser, page_path)
    colors = run(browser, "return [0, 1, 14].map((row) => [e.map.isGrey[row], e.base[row]])")
    assert colors == [[1, -1], [0, 0], [0, 0]]
    before = n_colors(browser)
    run(browser, "e.select(e.tree.root.children[0])")
    assert n_colors(browser) < before  # the colours of two of three top-level clusters are gone
    browser.find_element("css selector", ".explorer .noise").click()
    assert run(browser, "return e.hits.length") == sum(label < 0 for label in make_report().base_labels)


def test_narrow_and_dark_pages_hold_together(browser, page_path):  # noqa: F811
    page = open_report(browser, page_path, width=400, dark=True)
    assert page.errors == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert run(browser, "return e.map.theme.paper") == [23, 26, 32]


def test_pages_of_next_to_nothing_open(browser, tmp_path):  # noqa: F811
    for number, report in enumerate(nearly_empty_reports()):
        page = open_report(browser, render_clio_report(report).write(tmp_path / f"{number}.html"), wait_s=0.1)
        assert page.errors == [] and len(rows_shown(browser)) == number
        run(browser, "e.search.value = 'x'; e.find(); e.lookAtChosen(); e.map.zoomBy(2); e.map.nearest(5, 5, 9)")
        assert collect(browser).errors == []


def test_a_hundred_thousand_points_stay_usable(browser, tmp_path):  # noqa: F811
    report = make_report(99_999, n_each=160)
    path = render_clio_report(report).write(tmp_path / "large.html")
    assert path.stat().st_size < 25_000_000
    page = open_report(browser, path, wait_s=0.5)
    assert page.errors == [] and page.requests == []
    assert run(browser, "return e.map.n") == 99_999 and n_colors(browser) > 50
    chain = point_at(browser, 5000)
    assert run(browser, "return e.map.marked") is not None and browser.find_element("id", "tip").is_displayed()
    chain.click().perform()
    assert run(browser, "return e.chosen.depth") == 1
    # A point is found again by its place at every zoom, as by looking at all of them.
    places = """
        const { map } = e;
        e.select(e.tree.root);
        return [1, 4, 30].map((zoom) => {
          map.reset(); map.zoomBy(zoom); map.render();
          let right = 0;
          for (let row = 0; row < map.n; row += 997) {
            const [left, top] = map.place(map.x[row], map.y[row]);
            const found = map.nearest(left, top, 6);
            right += found !== null && map.x[found] === map.x[row] && map.y[found] === map.y[row];
          }
          return right;
        });"""
    assert run(browser, places) == [101, 101, 101]
    run(browser, "e.search.value = 'green cars case 9'; e.find()")
    words = ("green", "cars", "case", "9")
    n_found = sum(
        all(word in text.lower() for word in words) or all(word in name for word in words)
        for text, name in zip(report.hover, report.conversation_ids, strict=True)
    )
    assert n_found > 500 and run(browser, "return e.hits.length") == n_found
    assert collect(browser).errors == []
