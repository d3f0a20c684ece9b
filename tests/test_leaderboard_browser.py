"""The leaderboard's page in a real browser: sorting, filter, links, keyboard, no network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flowkit.eval.leaderboard import LeaderboardSettings, write_leaderboard
from flowkit.eval.records import Record, write_record

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are absent"),
    pytest.mark.skipif(
        importlib.util.find_spec("selenium") is None, reason="selenium is not installed"
    ),
]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync
--disable-component-update --disable-dev-shm-usage --no-first-run --window-size=1400,1000"""
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def write_records(folder: Path) -> None:
    base = Record(
        name="",
        metrics={},
        convention="clean",
        extractor="inception@0123456789ab",
        reference={"name": "cifar10-train", "n": 50_000, "sha256": "ab" * 32},
        num_samples=50_000,
        device="cpu",
        seed=0,
        seeds=[0, 50_000],
    )
    folder.mkdir()
    Image.new("RGB", (300, 300), "orange").save(folder / "grid.png")
    # Values of which neither the alphabet nor the order of entry gives the right order.
    rows = [("beta", 9.5, 1), ("alpha", 10.2, 2), ("gamma", 3.25, 8), (HOSTILE, 100.0, 16)]
    for name, fid, nfe in rows:
        metrics = {"fid": fid} | ({"recall": fid / 1000} if name != "alpha" else {})
        made = replace(base, name=name, metrics=metrics, nfe=nfe, solver="euler", steps=nfe)
        write_record(folder, replace(made, images_per_second=100 / nfe, grid_png="grid.png"))
    legacy = replace(base, name="delta", metrics={"fid": 1.5}, convention="legacy_pytorch", nfe=4)
    write_record(folder, legacy)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    write_records(folder / "records")
    settings = LeaderboardSettings(records=folder / "records", output_dir=folder / "page")
    write_leaderboard(settings)
    return folder / "page" / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, page_path):
    """The page, freshly opened; whatever a test did, nothing was fetched and nothing went wrong."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get("about:blank")
    browser.get(page_path.as_uri())
    yield browser
    complaints = [line["message"] for line in browser.get_log("browser")]
    assert complaints == []
    logged = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = [e["params"] for e in logged if e["method"] == "Network.requestWillBeSent"]
    ours = [one for one in sent if one["documentURL"].startswith("file:")]  # not the start page's
    fetched = {one["request"]["url"].partition("#")[0] for one in ours}
    assert all(url.startswith(("file:", "data:")) for url in fetched)
    assert {url for url in fetched if url.startswith("file:")} == {page_path.as_uri()}


def css(page, selector):
    return page.find_elements("css selector", selector)


def shown_names(page, table=1):
    rows = css(page, f"#table-{table} .entry")
    return [row.find_element("css selector", "b").text for row in rows if row.is_displayed()]


def header(page, label):
    [found] = [b for b in css(page, "#table-1 th button") if b.text.split()[:1] == [label]]
    return found


def shown_values(page, column):
    script = """return [...document.querySelectorAll("#table-1 .entry")].map(
        (row) => row.rows[0].cells[arguments[0]].dataset.value)"""
    return page.execute_script(script, column)


def state(button):
    return button.find_element("xpath", "..").get_attribute("aria-sort")


def index(button):
    return button.find_element("xpath", "..").get_property("cellIndex")


def focused(page):
    return page.switch_to.active_element


def test_best_row_is_first_and_tables_are_apart(page) -> None:
    assert shown_names(page) == ["gamma", "beta", "alpha", HOSTILE]
    assert shown_names(page, 2) == ["delta"]
    assert state(header(page, "FID")) == "ascending"
    page.find_element("css selector", "#table-2 .why summary").click()
    assert "convention differs: legacy_pytorch and clean" in css(page, "#table-2 .why li")[0].text


def test_a_hostile_name_is_text(page) -> None:
    assert page.title == "Leaderboard"
    assert not css(page, ".entry img:not([src^='data:'])")


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_columns_sort_both_ways(page, by) -> None:
    from selenium.webdriver.common.keys import Keys

    def press(label, key=Keys.ENTER):
        button = header(page, label)
        if by == "mouse":
            button.click()
        else:
            page.execute_script("arguments[0].focus()", button)
            button.send_keys(key)

    press("model")
    assert shown_names(page) == [HOSTILE, "alpha", "beta", "gamma"]
    assert state(header(page, "model")) == "ascending" and state(header(page, "FID")) is None
    press("model", Keys.SPACE)
    assert shown_names(page) == ["gamma", "beta", "alpha", HOSTILE]
    assert state(header(page, "model")) == "descending"
    press("NFE")
    assert shown_values(page, index(header(page, "NFE"))) == ["1.0", "2.0", "8.0", "16.0"]
    press("FID")  # by value: 3.25, 9.5, 10.2, 100, not as text
    assert shown_values(page, index(header(page, "FID"))) == ["3.25", "9.5", "10.2", "100.0"]
    press("recall")  # where more is better the first press puts the most first; what lacks is last
    assert shown_values(page, index(header(page, "recall"))) == ["0.1", "0.0095", "0.00325", ""]
    press("recall")
    assert shown_values(page, index(header(page, "recall"))) == ["0.00325", "0.0095", "0.1", ""]


def test_the_filter_keeps_rows_and_their_points(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys("/")
    box = focused(page)
    assert box.get_attribute("id") == "filter"
    box.send_keys("EULER gam")
    assert shown_names(page) == ["gamma"] and shown_names(page, 2) == []
    assert css(page, "#count")[0].text == "1 of 5 rows"
    assert css(page, "#table-2 .empty")[0].is_displayed()
    visible = {p.get_attribute("data-row") for p in css(page, "svg a") if p.is_displayed()}
    [row] = [row for row in css(page, ".entry") if row.is_displayed()]
    assert visible == {row.get_attribute("data-row")}
    box.send_keys(Keys.ESCAPE)
    assert css(page, "#count")[0].text == "5 of 5 rows" and box.get_property("value") == ""


def test_the_front_alone_can_be_shown(page) -> None:
    css(page, "#front")[0].click()
    assert shown_names(page) == ["gamma", "beta"]
    assert css(page, "#table-2 .empty")[0].is_displayed()


def row_of(page, name):
    rows = css(page, ".entry")
    return next(r for r in rows if r.find_element("css selector", "b").text == name)


def test_a_number_leads_to_its_record(page) -> None:
    row = row_of(page, "beta")
    more = row.find_element("css selector", ".more")
    assert not more.is_displayed()
    row.find_element("css selector", "td:nth-of-type(4) a").click()
    assert more.is_displayed()
    record = json.loads(more.find_element("css selector", "pre").text)
    assert record["metrics"]["fid"] == 9.5
    picture = more.find_element("css selector", "img")
    assert picture.get_property("naturalWidth") == 150
    assert focused(page).get_attribute("class") == "toggle"
    focused(page).click()
    assert not more.is_displayed()
    assert focused(page).get_attribute("aria-expanded") == "false"
    row.find_element("css selector", "td:nth-of-type(4) a").click()  # the same address again
    assert more.is_displayed()


def test_a_point_leads_to_its_row_though_the_filter_hides_it(page) -> None:
    from selenium.webdriver.common.keys import Keys

    row = row_of(page, "alpha")
    print_ = row.get_attribute("data-row")
    point = css(page, f'#table-1 svg a[data-row="{print_}"]')[0]
    page.execute_script("arguments[0].focus()", point)
    note = css(page, "#tip")[0]
    assert note.is_displayed() and "alpha" in note.text and "FID 10.2" in note.text
    assert "lit" in row.get_attribute("class")
    page.execute_script("arguments[0].dispatchEvent(new Event('blur'))", point)
    assert not note.is_displayed()
    point.send_keys(Keys.ENTER)
    assert "target" in row.get_attribute("class")
    assert not row.find_element("css selector", ".more").is_displayed()
    css(page, "#filter")[0].send_keys("gamma")
    assert not row.is_displayed()
    page.execute_script("location.hash = arguments[0]", f"#record-{print_}")
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert row.is_displayed() and row.find_element("css selector", ".more").is_displayed()


def test_everything_can_be_reached_by_tab(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.execute_script("""window.seen = []; document.addEventListener("focusin", (event) =>
        seen.push(event.target.id || event.target.className.baseVal || event.target.className
                  || event.target.tagName.toLowerCase()))""")
    box = page.find_element("id", "filter")
    box.send_keys(Keys.TAB * 60)
    page.find_element("tag name", "body").send_keys(Keys.TAB * 60)
    seen = page.execute_script("return window.seen")
    assert {"filter", "front", "theme", "scroll", "toggle", "a", "button", "summary"} <= set(seen)
    assert seen.count("toggle") >= 5  # every row's


def background(page):
    return page.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_light_and_dark(page) -> None:
    def prefer(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    light = background(page)
    prefer("dark")
    dark = background(page)
    assert sum(map(int, light[4:-1].split(","))) > 600 > 150 > sum(map(int, dark[4:-1].split(",")))
    css(page, "#theme")[0].click()
    assert background(page) == light
    prefer("light")


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window(page, width) -> None:
    """Tables scroll in their own frame; the page itself does not scroll sideways."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_script("arguments[0].click()", css(page, ".toggle")[0])
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_script_everything_is_there(page, page_path) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.get(page_path.as_uri())
    assert shown_names(page) == ["gamma", "beta", "alpha", HOSTILE]
    assert all(more.is_displayed() for more in css(page, ".more"))
    assert not css(page, ".tools")[0].is_displayed()
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
