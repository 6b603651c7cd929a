"""The page at / and minitron-bench's report in a headless Chromium, as a person sees them. Writes screenshots below
build/page. `make test-page`."""

import os
import pathlib
import subprocess
import tempfile
import unittest

from playwright.sync_api import sync_playwright

import server_fixture

SCREENSHOTS = server_fixture.ROOT / "build/page"


class BrowserTestCase(server_fixture.ServerTestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.playwright = sync_playwright().start()
        cls.browser = cls.playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        cls.playwright.stop()
        super().tearDownClass()

    def open(self, origin, **options):
        self.page = self.browser.new_page(viewport={"width": 900, "height": 620}, **options)
        self.addCleanup(self.page.close)
        self.origin, self.errors, self.urls = origin, [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(origin)

    def tearDown(self):
        self.page.screenshot(path=str(SCREENSHOTS / f"{self._testMethodName}.png"), full_page=True)
        self.check_errors(self.errors)
        self.assertEqual([url for url in self.urls if not url.startswith(self.origin)], [], "nothing from elsewhere")

    def check_errors(self, errors):
        self.assertEqual(errors, [])


class ReportTest(BrowserTestCase):

    def test_the_report_shows_its_curves_without_a_network(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        report = pathlib.Path(folder.name) / "report.html"
        subprocess.run([os.environ["MINITRON_TEST_BENCH"], "--server", self.server.address, "--num-prompts", "40",
                        "--concurrency", "1,4,16", "--input-len", "64", "--output-len", "32", "--goodput", "ttft:1",
                        "--report", str(report)], check=True, capture_output=True)
        self.open(report.as_uri(), offline=True)
        charts = self.page.locator("figure > svg")
        self.assertEqual(charts.count(), 4 + 4 + 3)  # curves over the load, distributions, open requests of each run
        for chart in charts.all():
            box = chart.bounding_box()
            self.assertGreater(box["width"], 300)
            self.assertGreater(box["height"], 150)
            for line in chart.locator("path, polyline").all():  # nothing is drawn outside its frame
                drawn = line.bounding_box()
                self.assertGreaterEqual(drawn["x"], box["x"])
                self.assertLessEqual(drawn["x"] + drawn["width"], box["x"] + box["width"] + 1)
                self.assertGreaterEqual(drawn["y"], box["y"])
                self.assertLessEqual(drawn["y"] + drawn["height"], box["y"] + box["height"] + 1)
            self.assertGreater(chart.locator("path, polyline").count(), 0)
        self.assertEqual(self.page.locator("script").count(), 0)
        self.assertLessEqual(self.page.evaluate("document.documentElement.scrollWidth"), 900)  # no sideways scrolling
        self.assertIn("16", self.page.locator("table").first.inner_text())


class PageTest(BrowserTestCase):

    flags = ("--http-port", "0", "--max-num-sequences", "1")

    def setUp(self):
        self.open(f"http://127.0.0.1:{self.server.ports['http']}/")

    def check_errors(self, errors):
        # The browser itself logs an answer of 400.
        self.assertEqual([error for error in errors if "status of 400" not in error], [])

    def wait_for_text(self, selector, text):
        self.page.locator(selector).filter(has_text=text).wait_for()

    def generate(self, **fields):
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        self.page.click("#go")

    def test_a_prompt_is_completed_in_colour(self):
        self.generate(prompt="To be or not to be,", max_tokens=60, seed=7, temperature=0.8, top_p=0.95)
        self.wait_for_text("#status", "60 tokens, first after")
        self.page.locator("#go:enabled").wait_for()
        native = self.native.generate("To be or not to be,", 60, seed=7, temperature=0.8)
        self.assertEqual(self.page.locator("#output").inner_text(), "To be or not to be," + native.sequences[0].text)
        tokens = self.page.locator("#output span[title]")
        self.assertGreater(tokens.count(), 20)
        self.assertRegex(tokens.first.get_attribute("title"), r"^logprob -\d")
        self.assertIn("background", tokens.first.get_attribute("style"))

    def test_the_model_and_the_load_are_shown(self):
        self.wait_for_text("#model", "minitron-tiny")
        self.wait_for_text("#load", "0 running, 0 waiting, cache")

    def test_a_bad_value_is_explained(self):
        self.generate(temperature=9)
        self.wait_for_text("#status.error", "temperature")

    def test_stop_ends_a_request_that_waits(self):
        # Fetches of the page wait behind this one, so that there is time to press the button.
        self.page.route("**/v1/completions", lambda route: None)
        self.generate(max_tokens=40)
        self.wait_for_text("#status", "waiting")
        self.page.click("#stop")
        self.wait_for_text("#status", "waiting, stopped")
        self.page.unroute("**/v1/completions")
        self.generate(max_tokens=5, seed=1)
        self.wait_for_text("#status", "5 tokens")


if __name__ == "__main__":
    unittest.main()
