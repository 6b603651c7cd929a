"""The page at / in a headless Chromium, as a person uses it. Writes screenshots below build/page. `make test-page`."""

import pathlib
import unittest

from playwright.sync_api import sync_playwright

import server_fixture

SCREENSHOTS = server_fixture.ROOT / "build/page"


class PageTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0", "--max-num-sequences", "1")

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

    def setUp(self):
        self.page = self.browser.new_page(viewport={"width": 900, "height": 620})
        self.addCleanup(self.page.close)
        self.errors = []
        self.urls = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.origin = f"http://127.0.0.1:{self.server.ports['http']}/"
        self.page.goto(self.origin)

    def tearDown(self):
        self.page.screenshot(path=str(SCREENSHOTS / f"{self._testMethodName}.png"))
        self.assertEqual(self.errors, [])
        self.assertEqual([url for url in self.urls if not url.startswith(self.origin)], [], "nothing from elsewhere")

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
