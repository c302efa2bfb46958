"""The report in a real browser: headless Chromium, driven by Selenium."""

import csv
import json
import os
import shutil
import time

import pytest
from certificates import HOSTILE, certificate, hostile, samples

from liborth_cli.verify import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip


class Browser:
    """One Chromium; pages are opened in it one after the other."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def open(self, name, width=1280, dark=False, media="", script=True):
        """Open a report and return what the browser wrote about it: its console, and the addresses it asked for."""
        self.devtools("Emulation.setScriptExecutionDisabled", value=not script)
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get((self.folder / name).as_uri())
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return self.driver.get_log("browser"), asked

    def devtools(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def point(self, x, y):
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])


KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Tab": 9, "End": 35, "Escape": 27}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("reports")
    report.write(folder / "real.html", certificate())
    report.write(folder / "deep.html", certificate(100))
    report.write(folder / "hostile.html", hostile())
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver, folder)
    finally:
        driver.quit()


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


def test_the_figures_are_there(browser):
    browser.open("real.html")
    sizes = browser.run("""return Array.from(document.querySelectorAll(".canvas svg"), (svg) => {
        const box = svg.getBoundingClientRect();
        return [box.width, box.height, svg.querySelectorAll(".line, .mark").length];
    })""")
    assert len(sizes) == 7
    assert all(width > 300 and height > 200 and parts >= 2 for width, height, parts in sizes)
    outside = browser.run("""return Array.from(document.querySelectorAll(".canvas svg text")).filter((text) => {
        const box = text.getBoundingClientRect(), page = document.documentElement.getBoundingClientRect();
        return box.left < page.left || box.right > page.right;
    }).length""")
    assert outside == 0


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("name", ["real.html", "deep.html", "hostile.html"])
def test_no_width_scrolls_sideways(browser, name, width):
    browser.open(name, width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_a_wide_screen_shows_whole_tables(browser):
    browser.open("real.html", width=1280)
    cut = """return Array.from(document.querySelectorAll(".scroll, .panels"))
        .filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.innerText.slice(0, 60))"""
    assert browser.run(cut) == []
    browser.open("real.html", width=700, media="print")
    assert browser.run(cut) == []


def test_type_stays_readable_on_a_phone(browser):
    browser.open("real.html", width=390)
    smallest = browser.run("""return Math.min(...Array.from(document.querySelectorAll(".canvas text"), (text) => {
        const svg = text.ownerSVGElement;
        return parseFloat(getComputedStyle(text).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width;
    }))""")
    assert smallest >= 10.5


def test_names_inside_plots_do_not_cover_each_other(browser):
    for width in (390, 1280):
        browser.open("real.html", width=width)
        covered = browser.run("""
            const hits = [];
            for (const svg of document.querySelectorAll(".canvas svg")) {
                const texts = Array.from(svg.querySelectorAll("text"), (t) => [t.textContent, t.getBoundingClientRect()]);
                texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
                    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                    if (across > 1 && down > 5) hits.push([a, b]);
                }));
            }
            return hits;""")
        assert covered == []


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
        const svg = document.querySelector(".canvas svg"); svg.scrollIntoView({ block: "center", behavior: "instant" });
        const mark = svg.querySelectorAll(".mark.s0")[5].getBoundingClientRect();
        return [mark.left + mark.width / 2, mark.top + mark.height / 2];""")
    browser.point(*box)
    tip = browser.find(".tip")
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
        "return Array.from(document.querySelectorAll('h3')).find((h) => h.textContent === arguments[0]).id", title
    )


def test_the_keyboard_reads_a_plot(browser):
    browser.open("real.html")
    for _ in range(40):
        browser.press("Tab")
        if browser.run("return document.activeElement.classList.contains('canvas')"):
            break
    tip = browser.find(".tip")
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
    button = browser.find("figure.plot .data button:nth-child(3)")
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
    browser.run("arguments[0].focus({ focusVisible: true })", browser.find(".canvas"))
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


# Contrast by WCAG 2.2: of each text against the first opaque paper behind it. A canvas turns any colour into numbers.
CONTRAST = """
const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (colour) => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return Array.from(pen.getImageData(0, 0, 1, 1).data); };
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = (node) => { for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255]; };
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const worst = [];
const holds = (node) => Array.from(node.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim());
for (const node of document.querySelectorAll("body *")) {
    if (node.closest("script, title") || !holds(node)) continue;
    const style = getComputedStyle(node);
    worst.push([ratio(rgb(node.tagName === "text" ? style.fill : style.color), paper(node)), 4.5, node.outerHTML.slice(0, 90)]);
}
for (const node of document.querySelectorAll(".canvas .line, .canvas .mark, .canvas .base, .sign")) {
    const style = getComputedStyle(node);
    worst.push([ratio(rgb(node.matches(".mark") ? style.fill : style.stroke), paper(node)), 3, node.outerHTML.slice(0, 90)]);
}
return worst.filter(([got, wanted]) => !(got >= wanted)).map((w) => w.join(" "));
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_the_paper(browser, dark):
    browser.open("deep.html", dark=dark)
    assert browser.run(CONTRAST) == []


def test_every_series_colour_stands_out(browser):
    for dark in (False, True):
        browser.open("real.html", dark=dark)
        browser.run("""document.querySelectorAll(".canvas .line").forEach((line, i) => {
            line.setAttribute("class", `line s${i % 8}`); });""")
        assert browser.run("return document.querySelectorAll('.canvas .line').length") >= 8
        assert browser.run(CONTRAST) == []


def test_dark_and_light_follow_the_reader(browser):
    lightness = []
    for dark in (False, True):
        browser.open("real.html", dark=dark)
        lightness.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert lightness == ["rgb(255, 255, 255)", "rgb(20, 22, 26)"]


def test_print_is_on_white_and_shows_everything(browser):
    browser.open("real.html", dark=True, media="print")
    assert browser.run("return getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#ffffff"
    assert not browser.find(".data").is_displayed()
    cut = browser.run("""return Array.from(document.querySelectorAll(".scroll"))
        .filter((box) => box.scrollHeight > box.clientHeight + 1 && getComputedStyle(box).overflowY !== "visible").length""")
    assert cut == 0
    assert browser.devtools("Page.printToPDF")["data"].startswith("JVBERi0")


def test_it_is_complete_without_its_script(browser):
    browser.open("real.html", script=False)
    try:
        document = browser.devtools("DOM.getDocument", depth=1)["root"]["nodeId"]
        count = {
            selector: len(browser.devtools("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"])
            for selector in (".canvas svg .line", ".mark title", ".heat td", "table.sortable tr", ".tip")
        }
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
    assert count[".canvas svg .line"] >= 10
    assert count[".mark title"] > 100
    assert count[".heat td"] == 24 * 7 + 1
    assert count["table.sortable tr"] > 50
    assert count[".tip"] == 0
