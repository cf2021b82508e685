"""The scatter works offline in a real browser and shows names as texts; sheets and grids show the right images."""

import base64
import io
import json
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

from image_parts.exports import write_projector
from image_parts.grids import caption, choose_grid, choose_samples
from image_parts.records import NOISE, ClusteredImages, ImageRecord
from image_parts.scatter_html import build_scatter, choose_points, cluster_color, write_scatter
from image_parts.settings import ImageSettings
from image_parts.sprites import fit_square, load_thumbnails, pack_sprites, square_sprite
from image_parts.visualize import draw_pictures
from tests.browser import browser, collect, open_page, save_screenshot  # noqa: F401  (browser is a fixture)

HOSTILE = [
    "<script>window.pwned=1</script>.png",
    "</script><img src=x onerror=window.pwned=1>.png",
    "a\"'onmouseover='window.pwned=1.png",
    "&lt;b&gt; \u2028 new\nline.png",
    "not utf-8 \udcff.png",
    "<!--<script>.png",
]


def make_clustered(labels, *, names=None, coordinates=None, size=(64, 48), folder=Path("/nowhere")):
    labels = np.asarray(labels, dtype=np.int64)
    n = len(labels)
    names = names or [f"image_{i:04d}.png" for i in range(n)]
    records = [ImageRecord(folder / name, name, f"{i:064x}", *size, 1234 + i, 0) for i, name in enumerate(names)]
    rng = np.random.default_rng(0)
    if coordinates is None:
        coordinates = rng.normal(size=(n, 3)) + 6 * np.stack([labels % 3, labels // 3, labels * 0], axis=1)
    distances = np.where(labels >= 0, np.arange(n) / n, np.nan)
    floats = np.full(n, 0.5, np.float32)
    return ClusteredImages(
        records, labels, labels, floats, distances.astype(np.float32), np.asarray(coordinates, np.float32)
    )


def flat_thumbnails(n, *, size=80):
    """Thumbnails of one colour each, all different: [n, size, size, 3]."""
    i = np.arange(n)
    colors = np.stack([40 + i * 37 % 200, 40 + i * 91 % 200, 40 + i * 53 % 200], axis=1).astype(np.uint8)
    return np.broadcast_to(colors[:, None, None, :], (n, size, size, 3)).copy()


def page_data(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def sheets_of(html):
    addresses = page_data(html)["sprites"]["sheets"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))) for address in addresses]


# --- Sprite sheets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [80, 50])
def test_every_thumbnail_is_at_its_place_and_bleeds_into_no_other(size):
    thumbnails = flat_thumbnails(700, size=size)
    packed = pack_sprites(thumbnails, max_bytes=10**7)
    sheets = [cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR_RGB) for sheet in packed.sheets]
    for i in range(0, 700, 13):
        place = i % packed.n_per_sheet
        top, left = place // packed.n_columns * packed.cell, place % packed.n_columns * packed.cell
        shown = sheets[i // packed.n_per_sheet][top : top + size, left : left + size].astype(int)
        inside = shown[2 : size // 16 * 16 - 2, 2 : size // 16 * 16 - 2]  # decoders blur colours across one pixel
        assert np.abs(inside - thumbnails[i, 0, 0]).max() < 12


def test_five_thousand_thumbnails_of_noise_stay_under_twenty_megabytes():
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(-1, 40, 5000))
    noise = rng.integers(0, 256, (5000, 80, 80, 3), dtype=np.uint8)  # nothing compresses worse
    page = build_scatter(make_clustered(labels), np.arange(5000), noise, title="noise")
    assert page.n_points == 5000 and len(page.html.encode()) < 20_000_000
    photo = cv2.GaussianBlur(noise.reshape(-1, 80, 3), (0, 0), 4).reshape(noise.shape)
    page = build_scatter(make_clustered(labels), np.arange(5000), photo, title="smooth")
    assert page.thumbnail_size == 80 and len(page.html.encode()) < 20_000_000


def test_fitting_keeps_the_shape_and_fills_with_grey():
    square = fit_square(np.full((100, 400, 3), 9, np.uint8), size=80)
    assert square.shape == (80, 80, 3) and (square[30:50] == 9).all() and (square[:30] == 244).all()
    assert fit_square(np.full((1, 900, 3), 9, np.uint8), size=16).shape == (16, 16, 3)


def test_a_square_sprite_is_row_first_and_grey_where_nothing_is():
    thumbnails = flat_thumbnails(5, size=8)
    sprite = square_sprite(iter(thumbnails), count=5, size=8)
    assert sprite.shape == (24, 24, 3)
    for i, thumbnail in enumerate(thumbnails):
        top, left = i // 3 * 8, i % 3 * 8
        assert (sprite[top : top + 8, left : left + 8] == thumbnail).all()
    assert (sprite[8:16, 16:] == 244).all() and (sprite[16:] == 244).all()


def test_the_projector_shows_colours_as_they_are(tmp_path):
    """OpenCV writes blue first; digits are grey and would not show it."""
    for name, color in (("red.png", (250, 10, 0)), ("blue.png", (0, 10, 250))):
        Image.new("RGB", (16, 16), color).save(tmp_path / name)
    clustered = make_clustered([0, 0], names=["red.png", "blue.png"], folder=tmp_path)
    settings = ImageSettings.model_validate({"visualization": {"thumbnail_size": 16}})
    write_projector(
        clustered, rows=np.arange(2), pca=np.zeros((2, 3), np.float32), settings=settings, folder=tmp_path / "projector"
    )
    with Image.open(tmp_path / "projector" / "sprite.png") as sprite:
        assert sprite.getpixel((8, 8)) == (250, 10, 0) and sprite.getpixel((24, 8)) == (0, 10, 250)


def test_an_image_that_cannot_be_read_any_more_is_crossed_out(tmp_path, caplog):
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "there.png")
    records = make_clustered([0, 0], names=["there.png", "gone.png"], folder=tmp_path).records
    thumbnails = load_thumbnails(records, size=32)
    assert (thumbnails[0, 16, 16] == (1, 2, 3)).all() and len(np.unique(thumbnails[1])) == 2
    assert "1 of 2 images could not be read" in caplog.text


# --- What is drawn ---------------------------------------------------------------------------------------------------


def test_points_are_chosen_evenly_and_no_cluster_is_forgotten():
    clustered = make_clustered([0] * 9000 + [1] * 900 + [2] * 10 + [NOISE] * 90)
    rows = choose_points(clustered, max_points=500)
    assert len(rows) <= 500 and len(set(rows)) == len(rows) and (np.diff(rows) > 0).all()
    counts = {label: int((clustered.labels[rows] == label).sum()) for label in (0, 1, 2, NOISE)}
    assert counts[0] > counts[1] >= counts[NOISE] > 0 and counts[2] == 10
    assert (choose_points(clustered, max_points=10_000) == np.arange(10_000)).all()
    many = make_clustered(np.arange(50))
    assert len(choose_points(many, max_points=7)) == 7


def test_samples_go_from_the_centre_to_the_edge():
    clustered = make_clustered([0] * 100 + [NOISE] * 3)
    assert choose_samples(clustered, 0, n_samples=5).tolist() == [0, 24, 49, 74, 99]
    assert choose_samples(clustered, NOISE, n_samples=5).tolist() == [100, 101, 102]
    assert list(choose_grid(make_clustered(np.arange(200)), n_samples=2)) == list(range(60))


def test_colours_are_valid_and_differ_among_neighbours():
    colors = [cluster_color(label) for label in range(36)]
    assert len(set(colors)) == 36 and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    assert cluster_color(NOISE) not in colors


def test_a_caption_can_be_drawn_whatever_the_name():
    for name in HOSTILE:
        record = make_clustered([0], names=[name]).records[0]
        assert caption(record).isprintable()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """All pictures of 40 small images of different shapes in two clusters and noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    names = []
    for i in range(40):
        pixels = rng.integers(0, 256, (20 + i, 60 - i, 3), dtype=np.uint8)
        names.append(f"{i:02d}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    labels = [0] * 20 + [1] * 15 + [NOISE] * 5
    clustered = make_clustered(labels, names=names, folder=folder)
    settings = ImageSettings(input_dir=str(folder), output_dir="out", progress=False)
    viz_dir = tmp_path_factory.mktemp("out") / "viz"
    return draw_pictures(clustered, settings=settings, viz_dir=viz_dir, n_workers=2)


def test_all_pictures_are_written(pictures):
    assert [path.name for path in pictures.paths] == [
        "interactive_scatter.html",
        "cluster_grid.png",
        "cluster_sizes.png",
        "preprocessing_comparison.png",
    ]
    for path in pictures.paths[1:]:
        with Image.open(path) as image:
            image.load()
            assert image.width >= 500
    assert pictures.n_points == 40


def test_the_grid_has_one_row_of_colour_for_each_cluster(pictures):
    pixels = np.asarray(Image.open(pictures.paths[1]).convert("RGB"))
    for label in (0, 1, NOISE):
        color = [int(cluster_color(label)[i : i + 2], 16) for i in (1, 3, 5)]
        rows = np.flatnonzero((pixels[:, 30] == color).all(axis=1))
        assert len(rows) == 81 and rows[-1] - rows[0] == 80


def test_the_comparison_shows_original_equalised_and_inverted(pictures):
    pixels = np.asarray(Image.open(pictures.paths[3]).convert("L")).astype(int)
    left, tops = 28 + 108, [28 + 74 + i * 206 for i in range(3)]
    original, equalised, inverted = (pixels[top : top + 200, left : left + 200] for top in tops)
    middle = slice(60, 140), slice(90, 110)  # within the picture, off the grey bars
    assert equalised[middle].std() > original[middle].std()
    # Equalisation of a negative is nearly the negative of the equalised: CLAHE is not quite symmetric.
    assert np.corrcoef(equalised[middle].ravel(), inverted[middle].ravel())[0, 1] < -0.9


def test_equal_input_gives_an_equal_page():
    clustered, thumbnails = make_clustered([0, 0, 1, NOISE]), flat_thumbnails(4)
    pages = [build_scatter(clustered, np.arange(4), thumbnails, title="twice").html for _ in range(2)]
    assert pages[0] == pages[1]


def test_odd_coordinates_make_a_page(tmp_path):
    coordinates = [[np.nan, 0, 0], [np.inf, 1, 1], [5, 5, 5], [5, 5, 5]]
    for chosen in (coordinates, [[1, 1, 1]] * 4):
        html = build_scatter(
            make_clustered([0] * 4, coordinates=chosen), np.arange(4), flat_thumbnails(4), title=""
        ).html
        assert "NaN" not in re.search(r'id="data">(.*?)</script>', html, re.S)[1]


# --- In the browser --------------------------------------------------------------------------------------------------

CENTRE = 6  # the point in the middle of the cloud, after the hostile names


@pytest.fixture(scope="module")
def scatter_path(tmp_path_factory):
    """A page of 60 points: hostile names first, then one in the very middle, then the corners of a cube."""
    names = [*HOSTILE, "the middle.png", *(f"{i}.png" for i in range(53))]
    rng = np.random.default_rng(1)
    corners = rng.choice([0.0, 10.0], size=(60, 3)) + rng.normal(size=(60, 3)) * 0.3
    corners[-8:] = [[x, y, z] for x in (-1, 11) for y in (-1, 11) for z in (-1, 11)]
    corners[CENTRE] = 5
    clustered = make_clustered([0, 1, 2] * 20, names=names, coordinates=corners)
    page = build_scatter(clustered, np.arange(60), flat_thumbnails(60), title='<b>hostile</b> & "quoted"')
    return write_scatter(page, tmp_path_factory.mktemp("scatter") / "scatter.html")


def run_script(driver, script):
    return driver.execute_script(script)


def wait_until(driver, script, *, seconds=30):
    """Wait until a script returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := run_script(driver, script)):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.05)
    return value


def real_errors(page):
    """What is not Chromium's own talk about drawing in software."""
    harmless = ("GL Driver Message", "software WebGL", "willReadFrequently", "swiftshader")
    return [error for error in page.errors if not any(word in error for word in harmless)]


def middle_of_plot(driver):
    box = run_script(driver, "const b = document.querySelector('#plot').getBoundingClientRect();"
                             "return [b.left + b.width / 2, b.top + b.height / 2]")  # fmt: skip
    return int(box[0]), int(box[1])


def move_to(driver, x, y):
    actions = ActionBuilder(driver)
    actions.pointer_action.move_to_location(x, y)
    actions.perform()


def drag(driver, *, steps):
    """Drag from where the pointer is; slowly, because the camera looks at the pointer once a frame."""
    chain = ActionChains(driver).click_and_hold().pause(0.15)
    for _ in range(steps):
        chain.move_by_offset(15, 5).pause(0.1)
    chain.release().perform()


def camera(driver):
    return run_script(driver, "return document.querySelector('#plot').layout.scene.camera.eye")


def test_the_scatter_in_a_browser(browser, scatter_path, tmp_path):  # noqa: F811
    page = open_page(browser, scatter_path, width=1100, height=760)
    wait_until(browser, "return document.body.dataset.ready === 'yes'")
    assert run_script(browser, "return document.querySelector('#plot').data[0].x.length") == 60
    assert run_script(browser, "return document.querySelector('h1').textContent") == '<b>hostile</b> & "quoted"'

    # The points are on the screen, in the colours of their clusters.
    pixels = np.asarray(Image.open(save_screenshot(browser, tmp_path / "s.png", whole_page=False)).convert("RGB"))
    plot = pixels[60:700, :740].reshape(-1, 3).astype(int)
    for label in range(3):
        color = [int(cluster_color(label)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(plot - color).max(axis=1) < 12).sum() > 100

    # Hovering shows the thumbnail and the name of the very point.
    x, y = middle_of_plot(browser)
    move_to(browser, x - 30, y - 30)
    move_to(browser, x, y)
    wait_until(browser, f"return document.querySelector('#card canvas')?.dataset.drawn === '{CENTRE}'")
    assert run_script(browser, "return document.querySelector('#card .path').textContent") == "the middle.png"
    shown = run_script(
        browser,
        "const c = document.querySelector('#card canvas').getContext('2d');"
        "return [...c.getImageData(208, 208, 1, 1).data]",
    )
    assert np.abs(np.array(shown[:3]) - flat_thumbnails(60)[CENTRE, 0, 0]).max() < 12
    assert "64 × 48 px" in run_script(browser, "return document.querySelector('#card').innerText")

    # Drag rotates, the wheel zooms, the buttons work.
    before = camera(browser)
    drag(browser, steps=6)
    eye_x = "document.querySelector('#plot').layout.scene.camera.eye.x"
    wait_until(browser, f"return Math.abs({eye_x} - {before['x']}) > 0.01")
    turned = camera(browser)
    origin = ScrollOrigin.from_viewport(x, y)
    ActionChains(browser).scroll_from_origin(origin, 0, -300).perform()
    length = sum(value**2 for value in turned.values())
    wait_until(
        browser,
        "const e = document.querySelector('#plot').layout.scene.camera.eye;"
        f"return Math.abs(e.x ** 2 + e.y ** 2 + e.z ** 2 - {length}) > 0.01",
    )
    click = "[...document.querySelectorAll('header button')].find((b) => b.textContent === '{}').click()"
    run_script(browser, click.format("Pan"))
    wait_until(browser, "return document.querySelector('#plot').layout.scene.dragmode === 'pan'")
    run_script(browser, click.format("Reset view"))
    wait_until(browser, f"return Math.abs({eye_x} - {before['x']}) < 1e-6")
    run_script(browser, click.format("Auto-rotate"))
    wait_until(browser, f"return Math.abs({eye_x} - {before['x']}) > 1e-3")
    run_script(browser, click.format("Reset view"))

    # Choosing a cluster shows its images and fades the others.
    run_script(browser, "document.querySelectorAll('#groups .row')[1].click()")
    assert run_script(browser, "return document.querySelectorAll('.samples canvas').length") == 20
    wait_until(browser, "return [...document.querySelectorAll('.samples canvas')].every((c) => c.dataset.drawn)")
    sizes = run_script(browser, "return document.querySelector('#plot').data[0].marker.size")
    assert sizes[1] == 2 * sizes[0] and sizes[4] == sizes[1]

    # Names are texts: each hostile one is shown as it is, and none of them did anything.
    titles = run_script(browser, "return [...document.querySelectorAll('.samples button')].map((b) => b.title)")
    assert HOSTILE[1] in titles
    assert not run_script(browser, "return window.pwned")
    later = collect(browser, page_address=scatter_path.resolve().as_uri())
    assert real_errors(page) == [] and real_errors(later) == []
    assert [address for address in (*page.requests, *later.requests) if not address.startswith("blob:")] == []


def test_without_webgl_the_page_says_so_and_still_shows_images(browser, scatter_path):  # noqa: F811
    source = (
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) "
        "{ return String(kind).includes('webgl') ? null : get.call(this, kind, ...rest); };"
    )
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page = open_page(browser, scatter_path, dark=True)
        wait_until(browser, "return document.body.dataset.ready === 'without-webgl'")
        assert "no WebGL" in run_script(browser, "return document.querySelector('.message').textContent")
        run_script(browser, "document.querySelectorAll('#groups .row')[0].click()")
        wait_until(browser, "return [...document.querySelectorAll('.samples canvas')].every((c) => c.dataset.drawn)")
        run_script(browser, "document.querySelector('.samples button').click()")
        assert run_script(browser, "return document.querySelector('#card .path').textContent") == HOSTILE[0]
        assert real_errors(page) == [] and page.requests == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": added["identifier"]})
