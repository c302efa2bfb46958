"""What the report looks like in a real browser: sizes, widths, contrast, dark, print, and without its script."""

import pytest
from chromium import NEEDED

pytestmark = NEEDED


def test_the_figures_are_there(browser):
    browser.open("real.html")
    sizes = browser.run("""return Array.from(document.querySelectorAll(".canvas svg"), (svg) => {
        const box = svg.getBoundingClientRect();
        return [box.width, box.height, svg.querySelectorAll(".line, .mark").length];
    })""")
    assert len(sizes) == 8
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
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_a_wide_screen_shows_whole_tables(browser):
    browser.open("real.html", width=1280)
    cut = """return Array.from(document.querySelectorAll(".scroll, .panels"))
        .filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.innerText.slice(0, 60))"""
    assert browser.run(cut) == []
    browser.open("real.html", width=700, media="print")
    browser.run("document.getElementById('whole').checked = true")
    assert browser.run(cut) == []


def test_type_stays_readable_on_a_phone(browser):
    browser.open("real.html", width=390)
    browser.find(".open-all").click()
    smallest = browser.run("""return Math.min(...Array.from(document.querySelectorAll(".canvas text"), (text) => {
        const svg = text.ownerSVGElement;
        return parseFloat(getComputedStyle(text).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width;
    }))""")
    assert smallest >= 10.5


def test_names_inside_plots_do_not_cover_each_other(browser):
    for width in (390, 1280):
        browser.open("real.html", width=width)
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
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
    browser.run("document.getElementById('whole').checked = true")
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


def test_a_box_that_scrolls_shows_that_more_lies_below(browser):
    browser.open("real.html")
    height, inside, shadows, attached = browser.run("""
        const box = document.querySelector(".scroll.tall"), style = getComputedStyle(box);
        return [box.clientHeight, box.scrollHeight, style.backgroundImage, style.backgroundAttachment];""")
    assert inside > height + 100
    assert shadows.count("linear-gradient") == 2
    assert attached == "local, scroll", "the cover goes along with the rows, the shadow stays at the edge"
