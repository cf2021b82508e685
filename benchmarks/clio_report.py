"""How usable the report of Clio is with 100,000 conversations in headless Chromium, beside the plain scatter report.

    python benchmarks/clio_report.py --rows 100000 --out benchmarks/results/clio_report.md

The peer is the map of `common.report`, which holds its points as JSON numbers and draws an arc for each, made to draw
all of them. Chromium draws without a GPU here. Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from machine import describe_machine, load_average, machine_lines

from common.report import Report
from llm_parts.clio.levels import plan_levels
from llm_parts.clio.report import render_clio_report
from llm_parts.clio.taxonomy import ClioReport, ClusterName, Hierarchy, Level
from tests.browser import CHROMIUM, open_page, start_chromium

WORDS = [
    *("refund", "card", "account", "travel", "hotel", "recipe", "garden", "python"),
    *("essay", "music", "health", "phone", "tax", "loan", "visa"),
]
N_FRAMES = 8
MAX_OPEN_S = 60
OURS = "document.querySelector('[data-explorer]').explorer.map"
# A canvas puts off what it is told to draw until a pixel is asked for.
PAINT = "map.brush.getImageData(0, 0, 1, 1);"
# Each way of asking the page to draw a frame at a zoom, and to look for the point under the pointer.
SCRIPTS = {
    "ours": {
        "ready": f"return Boolean({OURS}?.image)",
        "frame": f"const map = {OURS}; map.zoomBy(arguments[0]); map.render(); {PAINT}",
        "hover": f"const map = {OURS}; map.mark(map.nearest(arguments[0], 300, 12)); {PAINT}",
    },
    "plain": {
        "ready": "return Boolean(window.maps?.[0]?.size)",
        "frame": f"const map = window.maps[0]; map.zoom = Math.max(1, map.zoom * arguments[0]); map.draw(); {PAINT}",
        "hover": f"const map = window.maps[0]; map.hovered = map.nearest(arguments[0], 300, 12); map.draw(); {PAINT}",
    },
}


def make_report(n_rows: int) -> ClioReport:
    """A report of so many conversations, a hundredth as many base clusters, and two levels in two hierarchies."""
    rng = np.random.default_rng(0)
    n_base = max(20, n_rows // 100)
    n_middle, n_top = plan_levels(n_base, n_levels=2, n_top=10)
    middle_of, top_of = np.arange(n_base) % n_middle, np.arange(n_middle) % n_top
    labels = rng.integers(-1, n_base, n_rows)
    centres = rng.normal(0, 6, (n_top, 2))[top_of[middle_of]] + rng.normal(0, 1.5, (n_base, 2))
    sentences = [" ".join(words) for words in rng.choice(WORDS, (n_rows, 16))]
    levels = [Level(_names(n_top, "top"), top_of), Level(_names(n_middle, "middle"), middle_of)]
    return ClioReport(
        conversation_ids=[f"conversation-{row:06d}" for row in range(n_rows)],
        base_labels=labels,
        base_names=_names(n_base, "base"),
        hierarchies=[Hierarchy(kind, levels, calls=0, cost=0.0) for kind in ("llm", "linkage")],
        map_xy=(centres[labels] + rng.normal(0, 0.3, (n_rows, 2))).astype(np.float32),
        hover=sentences,
        facets={"language": rng.choice(["English", "Russian"], n_rows).tolist()},
        tables=[],
    )


def _names(n_names: int, kind: str) -> list[ClusterName]:
    return [
        ClusterName(f"{kind} {WORDS[number % 15]} {number}", f"Users asked about {WORDS[number % 15]}.")
        for number in range(n_names)
    ]


def write_plain(report: ClioReport, path: Path) -> Path:
    """The same points on the map of `common.report`, all of them."""
    page = Report("Plain")
    top_of_base = report.hierarchies[0].levels[0].parent_of[report.hierarchies[0].levels[1].parent_of]
    labels = [f"top {top_of_base[label]}" if label >= 0 else "noise" for label in report.base_labels]
    page.add_scatter(
        "Map", report.map_xy, labels=labels, hover_texts=report.hover, muted_label="noise", max_points=len(labels)
    )
    # The page keeps its maps to itself; the benchmark has to get at one of them.
    html = page.to_html().replace("new ScatterMap(root)", "(window.maps ??= []).push(new ScatterMap(root))")
    html = html.replace("Content-Security-Policy", "not-a-policy", 1)  # it would refuse the changed script
    path.write_text(html, encoding="utf-8")
    return path


def measure(driver: Any, path: Path, kind: str) -> dict[str, float]:
    """Seconds until the map stands, and milliseconds of a frame and of a hover."""
    scripts = SCRIPTS[kind]
    started = time.perf_counter()
    open_page(driver, path, width=1440, height=1000, wait_s=0)
    while not driver.execute_script(scripts["ready"]):
        if time.perf_counter() - started > MAX_OPEN_S:
            raise RuntimeError(f"{path.name} did not open in {MAX_OPEN_S} s")
        time.sleep(0.02)
    opened = time.perf_counter() - started
    zooms = [1.5] * (N_FRAMES // 2) + [1 / 1.5] * (N_FRAMES // 2)
    frames = [_milliseconds(driver, scripts["frame"], zoom) for zoom in zooms]
    hovers = [_milliseconds(driver, scripts["hover"], 200 + 40 * step) for step in range(N_FRAMES)]
    return {
        "page, MB": path.stat().st_size / 1e6,
        "open, s": opened,
        "frame, median ms": float(np.median(frames)),
        "frame, longest ms": max(frames),
        "hover, median ms": float(np.median(hovers)),
    }


def _milliseconds(driver: Any, script: str, argument: float) -> float:
    body = f"const started = performance.now(); {{ {script} }} return performance.now() - started;"
    return float(driver.execute_script(body, argument))


def measure_search(driver: Any, path: Path) -> float:
    """Milliseconds of a search for two words in all texts and names, the list of hits and the map included."""
    open_page(driver, path, width=1440, height=1000)
    head = "const e = document.querySelector('[data-explorer]').explorer; e.search.value = 'visa refund';"
    driver.execute_script(f"{head} e.find();")  # the first search makes the lower case of all texts
    return float(driver.execute_script(f"{head} const t = performance.now(); e.find(); return performance.now() - t;"))


def to_page(ours: dict[str, float], plain: dict[str, float], search_ms: float, *, n_rows: int) -> str:
    """The results as Markdown."""
    lines = [
        f"# The report of Clio with {n_rows:,} conversations",
        "",
        f"Written by `python benchmarks/clio_report.py --rows {n_rows}`. Load average {load_average()} at the end.",
        "",
        *(f"- {line}" for line in machine_lines(describe_machine())),
        "",
        "| what | plain scatter report | Clio's report | ratio |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {plain[name]:.2f} | {ours[name]:.2f} | {plain[name] / max(ours[name], 1e-9):.1f}x |"
            for name in ours
        ),
        f"| search of all texts, ms | | {search_ms:.0f} | |",
        "",
        "Clio's page also holds the tree of both hierarchies and all base clusters, which the plain one",
        "does not. Frames are drawn at zooms from 1 to 5 and back. A frame below 16 ms is drawn at every refresh.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make both pages, measure them in turn, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if not Path(CHROMIUM).exists():
        print(f"{CHROMIUM} is not installed (apt-get install chromium chromium-driver): nothing is measured")
        return 0
    report = make_report(arguments.rows)
    driver = start_chromium()
    with tempfile.TemporaryDirectory() as folder:
        ours_path = render_clio_report(report).write(Path(folder) / "ours.html")
        plain_path = write_plain(report, Path(folder) / "plain.html")
        plain = measure(driver, plain_path, "plain")
        ours = measure(driver, ours_path, "ours")
        page = to_page(ours, plain, measure_search(driver, ours_path), n_rows=arguments.rows)
    print(page)
    if arguments.out:
        arguments.out.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
