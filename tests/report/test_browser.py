"""The report in headless Chromium: it loads, sorts, masks, and works by keyboard, dark, and on a phone."""

import shutil
import time

import pytest
from conftest import ROOT, run
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from lib.metrics import mask, profane_pattern

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1200,1000")  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    done = run("-m", "report", "--out", file, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return f"file://{file}"


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    service = webdriver.ChromeService(driver) if driver else None  # None: selenium looks for one itself
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, page):
    chromium.get("about:blank")
    chromium.get(page)
    yield chromium
    assert chromium.get_log("browser") == [], "no error or warning on the console"


def shown(browser, what: str):
    return [one for one in browser.find_elements(By.CSS_SELECTOR, what) if one.is_displayed()]


def test_pages_charts_and_figures(browser):
    names = [link.text for link in browser.find_elements(By.CSS_SELECTOR, "nav a")]
    assert names == ["Overview", "Yang et al.", "Lee et al.", "Groups and layers", "Neurons", "Records"]
    charts = 0
    for name in names:
        browser.find_element(By.LINK_TEXT, name).click()
        assert len(shown(browser, ".page")) == 1
        assert browser.find_element(By.CSS_SELECTOR, "nav a[aria-current]").text == name
        charts += len(shown(browser, ".chart .main-svg")) > 0
        for image in browser.find_elements(By.CSS_SELECTOR, ".page.shown img"):
            browser.execute_script("arguments[0].scrollIntoView()", image)
            WebDriverWait(browser, 10).until(lambda _, one=image: one.get_property("naturalWidth") > 0)
    assert charts == 2


def test_every_link_leads_to_what_it_names(browser):
    links = browser.execute_script("return [...document.querySelectorAll('a')].map((one) => one.getAttribute('href'))")
    assert len(links) > 200
    missing = browser.execute_script(
        "return arguments[0].filter((link) => !link.startsWith('#') || !document.getElementById(link.slice(1)))", links
    )
    assert missing == []


def test_a_number_leads_to_its_provenance(browser):
    browser.find_element(By.LINK_TEXT, "Yang et al.").click()
    number = shown(browser, "td.number a")[0]
    record = number.get_attribute("title").removeprefix("from ")
    number.click()
    (details,) = [one for one in shown(browser, "details") if one.get_attribute("open")]
    assert details.find_element(By.TAG_NAME, "summary").text == record
    assert '"commit"' in details.text and "python experiments/" in details.text


def test_tables_sort(browser):
    browser.find_element(By.LINK_TEXT, "Yang et al.").click()
    table = next(one for one in shown(browser, "table.sortable") if "TP+AN+TN" in one.text)
    head = table.find_elements(By.CSS_SELECTOR, "th button")[1]

    def column():
        cells = table.find_elements(By.CSS_SELECTOR, "tbody tr td:nth-child(2)")
        return [float(cell.text) for cell in cells if cell.text]

    before = column()
    head.click()
    assert column() == sorted(before) != before
    head.send_keys(Keys.ENTER)  # by keyboard, the other way round
    assert column() == sorted(before, reverse=True)
    assert table.find_elements(By.TAG_NAME, "th")[1].get_attribute("aria-sort") == "descending"


def test_the_mask(browser):
    browser.find_element(By.LINK_TEXT, "Neurons").click()
    words = browser.find_elements(By.CSS_SELECTOR, ".toxic")
    assert words and not profane_pattern().search(browser.find_element(By.CSS_SELECTOR, "main").text)
    raw = [one.get_attribute("data-raw") for one in words]
    assert [one.get_attribute("textContent") for one in words] == [mask(text) for text in raw] != raw
    button = browser.find_element(By.ID, "mask")
    button.click()
    assert [one.get_attribute("textContent") for one in words] == raw and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert [one.get_attribute("textContent") for one in words] == [mask(text) for text in raw]


def test_the_pareto_plot_tells_what_the_models_wrote(browser):
    point = browser.execute_script(
        "const point = document.querySelector('.page.shown .chart .scatterlayer .trace .points path');"
        "point.scrollIntoView({block: 'center'}); return point"
    )
    # Plotly listens on the layer above its points: move there as a mouse does.
    webdriver.ActionChains(browser).move_to_element(point).perform()
    hover = WebDriverWait(browser, 5).until(lambda _: shown(browser, ".hoverlayer .hovertext"))[0].text
    assert "toxicity" in hover and "log-perplexity" in hover and not profane_pattern().search(hover)
    assert len(hover) > 150, "three continuations"


def test_by_keyboard(browser):
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "mask"
    for _ in range(3):
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Lee et al."
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    WebDriverWait(browser, 5).until(
        lambda _: browser.find_element(By.CSS_SELECTOR, ".page.shown").get_attribute("id") == "lee2024"
    )


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_light_and_dark(browser, scheme, dark):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    time.sleep(0.5)  # the charts are drawn again
    colour = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    paper, ink, axis = (
        browser.execute_script(colour, *pair)
        for pair in (("body", "background-color"), ("body", "color"), (".page.shown .chart .xtick text", "fill"))
    )
    assert (brightness(paper) < 0.2) == dark and (brightness(ink) > 0.8) == dark and brightness(axis) == brightness(ink)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`, 0 to 1."""
    parts = colour.split("(")[1].rstrip(")").split(",")[:3]
    return round(sum(map(float, parts)) / 3 / 255, 2)


def test_on_a_phone(browser):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for link in range(6):
            browser.find_elements(By.CSS_SELECTOR, "nav a")[link].click()
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 390, browser.find_elements(By.CSS_SELECTOR, "nav a")[link].text
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
