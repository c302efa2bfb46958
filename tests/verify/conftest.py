"""One browser for every test that opens a report; and an attack that is not what a test is about, but runs all the same."""

from dataclasses import dataclass, replace

import pytest
from certificates import certificate, hostile
from chromium import CHROMIUM, DRIVER, FLAGS, Browser

from liborth_cli.verify import report
from liborth_cli.verify.check import option
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.checks.relearn import RelearnOptions


@dataclass(frozen=True)
class Quick(RelearnOptions):
    relearn_steps: int = option(2, "Two steps.")


@pytest.fixture
def quick_attack(monkeypatch):
    monkeypatch.setitem(CHECKS, "relearn", replace(CHECKS["relearn"], options=Quick))


@pytest.fixture(scope="session")
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
