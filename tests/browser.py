"""Headless Chromium for tests of HTML: opens a page, and tells its console errors and every request it made.

    from tests.browser import browser, open_page  # noqa: F401  `browser` is a fixture; skips without Chromium

    def test_page(browser, tmp_path):  # noqa: F811
        page = open_page(browser, tmp_path / "report.html")
        assert page.errors == [] and page.requests == []

Chromium and its driver are Debian's (`apt-get install chromium chromium-driver`); nothing is downloaded.
"""

import atexit
import base64
import functools
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"
CHROMEDRIVER = "/usr/bin/chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--lang=en",
)


@dataclass(frozen=True)
class Page:
    """What opening a page led to: console errors and warnings, and addresses asked for besides the page itself."""

    errors: list[str]
    requests: list[str]


@pytest.fixture(scope="session")
def browser():
    """A selenium driver of headless Chromium with an empty profile; all test modules share one."""
    for program in (CHROMIUM, CHROMEDRIVER):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt-get install chromium chromium-driver)")
    pytest.importorskip("selenium", reason="selenium is not installed")
    return start_chromium()


@functools.cache
def start_chromium():
    """Start Chromium once in this process; it ends with the process."""
    from selenium import webdriver

    profile_dir = tempfile.mkdtemp(prefix="chromium-")
    atexit.register(shutil.rmtree, profile_dir, ignore_errors=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile_dir}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    atexit.register(driver.quit)
    return driver


def open_page(driver, path, *, width=1280, height=900, dark=False, wait_s=0.3):
    """Open a local file at a width in pixels, in light or dark mode, and return its errors and requests."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    address = Path(path).resolve().as_uri()
    driver.get("about:blank")
    collect(driver)  # what earlier pages left in the logs
    driver.get(address)
    time.sleep(wait_s)  # a late request or error of a timer, an observer or an image shows up
    return collect(driver, page_address=address)


def collect(driver, *, page_address=""):
    """Return errors and requests since the last call."""
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    requests = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            address = message["params"].get("request", message["params"])["url"]
            if address.split("#")[0] != page_address and not address.startswith("data:"):
                requests.append(address)
    return Page(errors=errors, requests=requests)


def save_screenshot(driver, path, *, whole_page=True):
    """Write a PNG picture of the page that is open and return its path."""
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole_page, "format": "png"})
    Path(path).write_bytes(base64.b64decode(shot["data"]))
    return path
