"""The report in a real browser: nothing but the page is loaded, and everything in it can be read, sorted and taken away."""

import base64
import csv
import json
import os
import re
import time

import pytest
from certificates import HOSTILE, certificate, samples
from chromium import NEEDED

pytestmark = NEEDED


@pytest.mark.parametrize("name", ["real.html", "deep.html", "hostile.html"])
def test_it_loads_without_an_error_or_a_request(browser, name):
    said, asked = browser.open(name)
    assert said == []
    assert asked == [(browser.folder / name).as_uri()]


def test_the_policy_stops_what_is_not_the_page(browser):
    browser.open("real.html")
    browser.run("""
        window.violated = [];
        document.addEventListener("securitypolicyviolation", (e) => window.violated.push(e.effectiveDirective));
        const script = document.createElement("script"); script.textContent = "window.owned = 1"; document.body.append(script);
        const image = document.createElement("img"); image.src = "https://example.invalid/x.png"; document.body.append(image);
        document.body.setAttribute("style", "margin-left: 77px");
        fetch("https://example.invalid/").catch(() => {});
    """)
    time.sleep(0.2)
    assert set(browser.run("return window.violated")) == {"script-src-elem", "img-src", "style-src-attr", "connect-src"}
    assert browser.run("return window.owned === undefined && getComputedStyle(document.body).marginLeft !== '77px'")


def column(browser, index):
    return browser.run(
        """return Array.from(document.querySelectorAll("figure.table:has(th:nth-child(7)) tbody tr"),
        (row) => row.cells[arguments[0]].textContent)""",
        index,
    )


def test_tables_sort_by_click_and_by_key(browser):
    from selenium.webdriver.common.keys import Keys

    browser.open("real.html")
    wanted = [row[5 - 1] for row in samples().figures[0].rows]
    head = browser.find("figure.table th:nth-child(7)")
    button = head.find_element("css selector", "button")
    assert head.get_attribute("aria-sort") is None
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(browser, 6)[-1] == "–"
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    values = column(browser, 4)
    assert [float(v) for v in values[:-1]] == sorted(float(v) for v in values[:-1])
    assert column(browser, 6)[-1] == "–"
    button.send_keys(Keys.SPACE)
    assert [float(v) for v in column(browser, 4)[:-1]] == pytest.approx(
        [w for i, w in enumerate(sorted(wanted, reverse=True)) if i != 7], abs=6e-4
    )
    names = browser.find("figure.table:has(th:nth-child(7)) th:nth-child(3) button")
    names.click()
    assert head.get_attribute("aria-sort") is None
    assert column(browser, 2) == sorted(column(browser, 2))


def test_hovering_shows_the_value(browser):
    browser.open("real.html")
    box = browser.run("""
        const svg = document.querySelector("[data-figure='0'] .canvas svg");
        svg.scrollIntoView({ block: "center", behavior: "instant" });
        const mark = svg.querySelectorAll(".mark.s0")[5].getBoundingClientRect();
        return [mark.left + mark.width / 2, mark.top + mark.height / 2];""")
    browser.point(*box)
    tip = browser.find("[data-figure='0'] .tip")
    assert tip.is_displayed()
    assert tip.text == "reference to general\nposition t: 0.5\nretain loss, nats per token: 1.435 (1.413 to 1.457)"
    inside = browser.run("const t = arguments[0].getBoundingClientRect(); return t.left >= 0 && t.right <= innerWidth", tip)
    assert inside
    browser.point(5, 5)
    assert not tip.is_displayed()


def test_a_long_curve_is_read_at_every_point(browser):
    browser.open("real.html")
    canvas = browser.find("figure:has(#" + title_id(browser, "Singular values of layer 11, down_proj") + ") .canvas")
    browser.run("arguments[0].focus({ focusVisible: true })", canvas)
    for _ in range(3):
        browser.press("ArrowRight")
    assert "index: 4\n" in canvas.find_element("css selector", ".tip").text


def title_id(browser, title):
    return browser.run(
        "return Array.from(document.querySelectorAll('h4')).find((h) => h.textContent === arguments[0]).id", title
    )


def test_the_keyboard_reads_a_plot(browser):
    browser.open("real.html")
    browser.run("document.querySelector('#check-1 summary').focus()")
    for _ in range(10):
        browser.press("Tab")
        if browser.run("return document.activeElement.classList.contains('canvas')"):
            break
    tip = browser.find("[data-figure='0'] .tip")
    assert "position t: 0\n" in tip.text
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press("ArrowRight")
    assert "reference to general\nposition t: 0.1\n" in tip.text
    browser.press("ArrowDown")
    assert "general to fine-tuned\nposition t: 0.1\n" in tip.text
    browser.press("End")
    assert "position t: 1\n" in tip.text
    assert tip.get_attribute("role") == "status"
    browser.press("Escape")
    assert not tip.is_displayed()


def test_every_plot_shows_its_numbers(browser):
    browser.open("real.html")
    button = browser.find("[data-figure='0'] .data button:nth-child(3)")
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    rows = browser.run("return Array.from(document.querySelectorAll('.numbers tbody tr'), (r) => r.innerText)")
    assert len(rows) == 22
    assert rows[0].split("\t") == ["reference to general", "0", "1.412", "1.39", "1.434"]
    button.click()
    assert button.get_attribute("aria-expanded") == "false"


def test_a_hostile_name_stays_text(browser):
    browser.open("hostile.html")
    assert browser.run("return document.title.startsWith('Passed: </script><script>')")
    assert browser.run("return document.images.length + document.scripts.length") == 2
    assert "</script><script>document.title" in browser.find("h1").text
    browser.find("figure.plot .data button:nth-child(3)").click()
    browser.find("figure.table th button").click()
    browser.run("arguments[0].focus({ focusVisible: true })", browser.find("figure .canvas"))
    assert HOSTILE[:60] in browser.find(".tip").text
    assert browser.run("return document.images.length + document.scripts.length") == 2


def fetch(browser, folder, selector):
    browser.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    before = set(os.listdir(folder))
    browser.find(selector).click()
    for _ in range(100):
        new = [name for name in set(os.listdir(folder)) - before if name.endswith((".csv", ".json"))]
        if new:
            return folder / new[0]
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def test_every_figure_downloads_as_csv_and_json(browser, tmp_path):
    browser.open("real.html")
    made = [figure for result in certificate().results for figure in result.to_json()["figures"]]
    path = fetch(browser, tmp_path, "[data-figure='0'] .data button:nth-child(1)")
    assert path.name == "loss-along-the-straight-lines.csv"
    rows = list(csv.reader(path.open(newline="")))
    assert rows[0] == ["series", "position t", "retain loss, nats per token", "low", "high", "mark"]
    series = made[0]["series"][0]
    assert [float(row[2]) for row in rows[1:12]] == pytest.approx(series["y"], rel=1e-8)
    document = json.loads(fetch(browser, tmp_path, "[data-figure='0'] .data button:nth-child(2)").read_text())
    assert document["series"][0]["low"] == pytest.approx(series["low"], rel=1e-8)
    grid = list(csv.reader(fetch(browser, tmp_path, "[data-figure='1'] .data button:nth-child(1)").open(newline="")))
    assert grid[0][1:] == list(made[1]["columns"])
    assert grid[1][4] == ""
    assert browser.driver.get_log("browser") == []


def test_a_spreadsheet_never_takes_a_name_for_a_formula(browser, tmp_path):
    browser.open("hostile.html")
    rows = list(csv.reader(fetch(browser, tmp_path, "figure.table .data button").open(newline="")))
    assert rows[1][0] == HOSTILE
    assert rows[2] == ["'=cmd|calc", ""]


def test_a_phone_sees_findings_and_unfolds_numbers(browser):
    browser.open("real.html", width=390)
    closed = "return Array.from(document.querySelectorAll('.folded')).filter((one) => !one.open).length"
    assert browser.run(closed) == browser.run("return document.querySelectorAll('.folded').length")
    assert browser.find("#check-1 .lead").is_displayed()
    height = browser.run("return document.documentElement.scrollHeight")
    assert height < 6500
    browser.find(".open-all").click()
    assert browser.run("return Array.from(document.querySelectorAll('main .folded')).every((one) => one.open)")
    assert browser.run("return document.documentElement.scrollHeight") > 2 * height
    browser.find(".open-all").click()
    assert not browser.find("[data-figure='0']").is_displayed()
    browser.run("location.hash = '#check-1'")
    time.sleep(0.2)
    assert browser.find("[data-figure='0']").is_displayed()


def pages(browser):
    made = base64.b64decode(browser.devtools("Page.printToPDF", preferCSSPageSize=True)["data"])
    return len(re.findall(rb"/Type\s*/Page\b", made))


def test_it_prints_in_two_pages_and_whole_when_asked(browser):
    browser.open("real.html")
    assert pages(browser) <= 2
    browser.find("#whole").click()
    assert pages(browser) > 4
