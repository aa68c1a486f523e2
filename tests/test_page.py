"""The page in a real browser: Chromium or Chrome with its driver, which these tests demand."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import PATIENCE, Server
from fake_hub import FakeHub, demo_files, serving
from test_http import LONG, ask
from test_pull import environment
from test_relay import TAGS, Foreign, running

pytestmark = pytest.mark.clients
EYES = {
    "name": "eyes:latest",
    "capabilities": ["completion", "vision"],
    "details": {"context_length": "$(what a shell would run)"},
}
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
# Puts a picture into the page as a user would who pastes or drops it
GIVE = """
const bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));
const files = new DataTransfer();
files.items.add(new File([bytes], "dot.png", { type: "image/png" }));
const event = arguments[0] === "paste"
  ? new ClipboardEvent("paste", { clipboardData: files, bubbles: true })
  : new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
document.getElementById("prompt").dispatchEvent(event);
"""


class Page:
    """The page of a server in a browser."""

    def __init__(self, driver, url: str, ready: bool = True):
        self.driver, self.url = driver, url
        driver.set_script_timeout(PATIENCE)
        driver.get(url)
        if ready:
            self.until(lambda: "up " in self.text("#status"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        (found,) = self.all(selector)
        return found

    def text(self, selector: str) -> str:
        return "\n".join(found.text for found in self.all(selector))

    def button(self, words: str):
        return next(one for one in self.all("button") if one.text == words and one.is_displayed())

    def until(self, done: Callable[[], object]) -> None:
        """Waits for what the page is to show. An element may be replaced while it is read."""
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if done():
                    return
            except (StaleElementReferenceException, StopIteration, ValueError):
                pass
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.05)

    def choose(self, model: str) -> None:
        self.until(lambda: model in self.text("#model"))
        option = next(one for one in self.all("#model option") if one.text == model)
        option.click()

    def say(self, text: str, model: str = "demo") -> None:
        """Sends a message by the keyboard."""
        self.choose(model)
        self.one("#prompt").send_keys(text, "\ue007")

    def answer(self, text: str, model: str = "demo") -> str:
        """Sends a message; returns the text of the answer when it is there."""
        before = len(self.all("article.assistant"))
        self.say(text, model)
        self.until(lambda: len(self.all("article.assistant")) > before)
        self.until(lambda: self.one("#send").is_displayed())
        return self.all("article.assistant .text")[-1].text

    def model_row(self, name: str):
        rows = self.all("#installed li")
        return next(row for row in rows if row.find_element("css selector", "b").text == name)

    def say_long(self) -> None:
        """Sends a message that takes a while to read."""
        self.choose("demo")
        script = "document.getElementById('prompt').value = arguments[0]"
        self.driver.execute_script(script, LONG)
        self.button("Send").click()

    def console(self) -> list[str]:
        """What the browser complains of since the last look."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> set[str]:
        """The URLs that the browser has asked for since the last look."""
        events = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        sent = [event["message"] for event in events]
        return {
            event["params"]["request"]["url"]
            for event in sent
            if event["method"] == "Network.requestWillBeSent"
        }


def start_browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    if chromium := shutil.which("chromium"):
        options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1300,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


@pytest.fixture(scope="module")
def driver() -> Iterator:
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serving({"mlx-community/Tiny-1B-Instruct-4bit": demo_files()}) as hub:
        yield hub


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    """Another server, whose model can see."""
    TAGS.append(EYES)
    with running(Foreign()) as foreign:
        yield foreign
    TAGS.remove(EYES)


@pytest.fixture(scope="module")
def served(hub: FakeHub, foreign: Foreign, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    env = environment(hub.url, folder / "hub")
    flags = ["--state", str(folder / "presets.json"), "--upstream", foreign.url]
    server = Server(*flags, env=env)
    server.cache = folder / "hub"
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.fixture
def page(driver, served: Server) -> Iterator[Page]:
    """The page, which complains of nothing and asks nobody else, whatever is done with it."""
    page = Page(driver, f"{served.url}/")
    yield page
    assert page.console() == []
    assert {url for url in page.requested() if not url.startswith((page.url, "data:"))} == set()


def test_it_shows_the_server_and_its_models(page: Page, served: Server):
    page.until(lambda: "demo" in page.text("#installed"))
    ask(served, "POST", "/api/generate", {"model": "demo"})
    page.until(lambda: "in memory" in page.model_row("demo").text)
    assert "tools" in page.model_row("demo").text and "MB" in page.model_row("demo").text
    assert "weights" in page.text("#memory") and "held by MLX" in page.text("#memory")
    page.choose("demo")
    line = page.text("#claude-line")
    assert f"ANTHROPIC_BASE_URL={served.url} " in line and line.endswith("claude --model demo")
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" in line
    page.choose("eyes")
    assert "$" not in page.text("#claude-line")
    page.model_row("demo").find_element("css selector", ".load").click()
    page.until(lambda: "in memory" not in page.model_row("demo").text)
    page.model_row("demo").find_element("css selector", ".load").click()
    page.until(lambda: "in memory" in page.model_row("demo").text)


def test_a_chat_is_streamed_and_says_what_it_took(page: Page):
    assert page.answer("say hello there") == "hello there"
    figures = page.all("article.assistant .figures")[-1].text
    assert "demo · prompt " in figures and "tokens/s · first token after" in figures
    assert page.answer("think then say all is well") == "all is well"
    thought = page.all("article.assistant details")[-1]
    assert thought.is_displayed() and thought.get_attribute("open") is None
    assert not thought.find_element("css selector", "div").is_displayed()
    thought.find_element("css selector", "summary").click()
    assert thought.find_element("css selector", "div").text
    page.until(lambda: "/api/chat" in page.text("#done"))
    page.button("New chat").click()
    assert page.all("article") == []
    assert page.answer("say goodbye then") == "goodbye then"
    page.until(lambda: "parts from the cached prompt at token" in page.text("#done .miss"))


def test_markdown_is_shown_and_html_is_text(page: Page):
    evil = "**bold** `code` <img src=x onerror=alert(1)>"
    assert page.answer(f"say {evil}").endswith("<img src=x onerror=alert(1)>")
    assert page.text("article .text strong") == "bold"
    assert page.text("article .text code") == "code"
    assert page.all("article img") == []


MARKDOWN = """# Title
A [link](https://example.com/a_b_c), a [trap](javascript:alert(1)) and <script>alert(1)</script>

- one
  - *two*
3. three

```html
<b>not bold</b>
```
| a | b |
|---|---|
| 1 | **2** |

> quoted ![picture](https://example.com/x.png)
"""


NAMES = {
    *("h3", "p", "a", "ul", "ol", "li", "em", "pre", "code", "strong", "blockquote", "div"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


def test_markdown_becomes_elements_and_nothing_else(page: Page):
    script = """
    const [text, done] = arguments;
    import("/page/markdown.js").then(({ markdown }) => {
      const root = document.createElement("div");
      root.append(...markdown(text));
      done([root.innerHTML, [...root.querySelectorAll("*")].map((one) => one.localName)]);
    });
    """
    html, names = page.driver.execute_async_script(script, MARKDOWN)
    assert {*names} <= NAMES
    assert "&lt;script&gt;" in html and "&lt;b&gt;not bold&lt;/b&gt;" in html
    assert 'href="https://example.com/a_b_c"' in html and 'href="javascript' not in html
    assert "<td><strong>2</strong></td>" in html and "<em>two</em>" in html
    deep, _ = page.driver.execute_async_script(script, "> " * 5000 + "- " * 5000)
    assert deep.count("<blockquote") < 10


HOSTILE = [
    *(f"[x]({scheme}alert(1))" for scheme in ("javascript:", "JaVaScRiPt:", "vbscript:", "data:,")),
    *(f"[x]({blank}javascript:alert(1))" for blank in ("", " ", "\t", "\n", "\x01", "&#9;")),
    *(f"[x]({scheme}://evil.example/x)" for scheme in ("file", "ftp", "intent", "blob", "jar")),
    *(f"[x]({place})" for place in ("//evil.example", "/api/delete", "about:blank", "tel:1", "#x")),
    "[x](javascript&colon;alert(1))",
    "[x](ht\ntp://evil.example)",
    "[x](http://a.example\njavascript:alert(1))",
    '[x](http://a.example "t" onclick=alert(1))',
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[![x](http://evil.example/x.png)](javascript:alert(1))",
    "[[x](javascript:alert(1))](http://a.example)",
    "[*x* `y` <b>](mailto:a@example.org)",
    "![x](http://evil.example/x.png)",
    "![x](data:image/svg+xml,<svg/onload=alert(1)>)",
    "<javascript:alert(1)> <http://evil.example>",
    "http://a.example/\"onclick=alert(1) https://a'b<c>`d`",
    "<script>alert(1)</script><style>*{background:url(http://evil.example)}</style>",
    "<img src=http://evil.example/x onerror=alert(1)><svg onload=alert(1)><iframe src=/>",
    "<a href='javascript:alert(1)' onmouseover=alert(1)>x</a><base href=//evil.example>",
    "&lt;script&gt; &#60;img&#62; \\<b>",
    "```js onload=alert(1)\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\n<b>',
    "~~~__proto__\nx\n~~~",
    "|<script>|[x](javascript:alert(1))|\n|-|-|\n|<img src=x>|**<b>**|",
    "[constructor](__proto__) __proto__ constructor toString",
]


@pytest.mark.parametrize("before", ["", "> ", "- ", "1. ", "# ", "| ", "**", "  - ", "x\n"])
def test_hostile_markdown_runs_nothing_and_asks_nobody(page: Page, before: str):
    script = """
    const [texts, done] = arguments;
    import("/page/markdown.js").then(({ markdown }) => {
      const told = texts.map((text) => {
        const root = document.createElement("div");
        document.getElementById("talk").append(root);
        root.append(...markdown(text));
        const elements = [...root.querySelectorAll("*")];
        for (const link of elements.filter((one) => one.matches("a"))) link.focus();
        return elements.map((one) => [
          one.localName, one.getAttributeNames(), one.protocol ?? "", one.rel ?? "",
        ]);
      });
      setTimeout(() => done(told), 0);
    });
    """
    told = page.driver.execute_async_script(script, [before + text for text in HOSTILE])
    for text, elements in zip(HOSTILE, told, strict=True):
        for name, attributes, protocol, rel in elements:
            assert name in NAMES, (text, name)
            assert {*attributes} <= {"href", "target", "rel", "title", "tabindex", "class", "start"}
            if name == "a":
                assert protocol in ("http:", "https:", "mailto:"), text
                assert rel == "noopener noreferrer"


PUMPED = ["# a" + " " * 5000 + "x", "# " + "#" * 5000 + "x", "\n" * 5000, "`" * 5000, "[" * 5000]


@pytest.mark.parametrize("at", range(len(PUMPED)))
def test_markdown_of_four_times_the_length_takes_no_more_than_linear_time(page: Page, at: int):
    script = """
    const [short, long, done] = arguments;
    import("/page/markdown.js").then(({ markdown }) => {
      const times = [short, long].map((text) => Math.min(...Array.from({ length: 5 }, () => {
        const begun = performance.now();
        for (let time = 0; time < 5; time++) markdown(text);
        return performance.now() - begun;
      })));
      done(times);
    });
    """
    text = PUMPED[at]
    middle = len(text) // 2
    long = text[:middle] + text[middle] * (3 * len(text)) + text[middle:]
    short_time, long_time = page.driver.execute_async_script(script, text, long)
    assert long_time < 10 * short_time + 10  # 16 times, were it quadratic


def test_an_answer_can_be_stopped(page: Page, served: Server):
    seen = len(served.lines)
    page.say_long()
    page.until(lambda: "reading the prompt" in page.text("#working"))
    page.button("Stop").click()
    page.until(lambda: page.text("article.assistant .figures") == "stopped")
    served.wait_for("/api/chat demo.*client went away", since=seen)
    assert page.answer("say go on") == "go on"


def test_a_running_prefill_shows_its_progress_and_is_cancelled(page: Page, served: Server):
    answers: list = []
    body = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": LONG * 2}]}
    client = threading.Thread(
        target=lambda: answers.append(ask(served, "POST", "/v1/messages", body))
    )
    client.start()
    page.until(lambda: " left" in page.text("#working .phase"))
    assert "anthropic /v1/messages" in page.text("#working")
    assert float(page.one("#working progress").get_attribute("value")) > 0
    assert "tokens/s" in page.text("#working .figures")
    page.button("Cancel").click()
    client.join(PATIENCE)
    assert answers[0][0].status == 499
    page.until(lambda: "Nothing is running." in page.text("#requests"))
    page.until(lambda: "cancelled" in page.text("#done tr:first-child"))


def test_a_model_is_pulled_and_deleted_when_asked_twice(page: Page, served: Server, hub: FakeHub):
    hub.pause = 0.2
    page.one("#pull-name").send_keys("tiny:1b")
    page.button("Pull").click()
    page.until(lambda: " of 5 MB" in page.text("#pull-status"))
    assert float(page.one("#pulling progress").get_attribute("value")) < 1
    hub.pause = 0.0
    name = "mlx-community/Tiny-1B-Instruct-4bit"
    page.until(lambda: page.model_row(name))
    assert not page.one("#pulling").is_displayed()
    assert page.answer("say hi", name) == "hi"

    def ask_to_delete() -> None:
        row = page.model_row(name)
        row.find_element("css selector", ".danger").click()
        page.until(lambda: page.one("#question").is_displayed())

    ask_to_delete()
    page.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    page.until(lambda: not page.one("#question").is_displayed())
    ask_to_delete()
    page.button("Delete it").click()
    page.until(lambda: "Really" in page.text("#question"))
    page.button("Keep it").click()
    assert page.model_row(name) and list(served.cache.glob("models--*/snapshots/*/*"))
    ask_to_delete()
    page.button("Delete it").click()
    page.until(lambda: page.button("Really delete it"))
    page.button("Really delete it").click()
    page.until(lambda: name not in page.text("#installed"))
    assert not list(served.cache.glob("models--*"))


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_goes_to_a_model_that_sees(page: Page, foreign: Foreign, way: str):
    page.choose("demo")
    page.driver.execute_script(GIVE, way, PIXEL)
    assert page.text("#chat-note") == "demo cannot see images" and not page.all("#images img")
    page.choose("eyes")
    page.driver.execute_script(GIVE, way, PIXEL)
    page.until(lambda: page.all("#images img"))
    said = {"message": {"content": "a dot"}, "done": True, "eval_count": 2}
    body = json.dumps(said).encode()
    foreign.seen.clear()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n"
    foreign.answer = lambda out: out(head % len(body) + body)
    assert page.answer("what is it?", "eyes") == "a dot"
    sent = json.loads(foreign.seen[0][2])["messages"][-1]
    assert sent["content"] == "what is it?" and sent["images"] == [PIXEL]
    assert page.all("article.user img") and not page.all("#images img")


def test_it_fits_a_phone_and_the_dark(page: Page):
    page.answer("say something that is to be seen")
    ground = "return getComputedStyle(document.body).backgroundColor"

    def emulate(width: int, scheme: str) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    grounds = set()
    try:
        for width in (320, 390, 800, 1300):
            for scheme in ("light", "dark"):
                emulate(width, scheme)
                wide = page.driver.execute_script("return document.documentElement.scrollWidth")
                assert wide <= width
                grounds.add(page.driver.execute_script(ground))
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(grounds) == 2


def test_every_control_is_reached_by_the_keyboard_and_has_a_name(page: Page):
    page.until(lambda: page.model_row("demo"))
    reached = set()
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        active = page.driver.switch_to.active_element
        assert active.accessible_name or active.tag_name in ("body", "div", "html")
        reached.add(active.id)
    controls = page.all("main :is(a, button, input, select, textarea)")
    assert not [one.text for one in controls if one.is_displayed() and one.id not in reached]


def test_a_page_that_nobody_sees_asks_nothing(page: Page):
    script = """
    const done = arguments[0];
    const asked = () => performance.getEntriesByName(new URL("activity", location)).length;
    const turn = (hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    };
    turn(true);
    setTimeout(() => {  // longer than the page's own timer, within the same queue
      const before = asked();
      setTimeout(() => {
        const after = asked();
        turn(false);
        const look = () => (asked() > after ? done([before, after]) : setTimeout(look, 50));
        look();
      }, 3000);
    }, 3000);
    """
    before, after = page.driver.execute_async_script(script)
    assert 0 < before == after


def test_it_outlives_a_restart_of_the_server(driver):
    server = Server()
    page = Page(driver, f"{server.url}/")
    page.answer("say before")
    assert server.stop() == 0
    page.until(lambda: "does not answer" in page.text("#status"))
    page.say("say lost")
    page.until(lambda: "does not answer" in page.text("article .figures"))
    server = Server("--port", str(server.port))
    try:
        page.until(lambda: "up " in page.text("#status"))
        assert page.answer("say after") == "after"
    finally:
        server.stop()
    assert [line for line in page.console() if "net::ERR_" not in line] == []


def test_a_key_is_asked_for_and_kept_for_the_tab(driver):
    server = Server("--api-key", "secret")
    try:
        page = Page(driver, f"{server.url}/", ready=False)
        for key in ("wrong", "secret"):
            page.until(lambda: page.one("#key").is_displayed())
            page.one("#key-value").clear()
            page.one("#key-value").send_keys(key, "\ue007")
        page.until(lambda: "up " in page.text("#status"))
        assert page.answer("say hello") == "hello"
        assert "YOUR_KEY" in page.text("#claude-line")
        driver.refresh()
        page.until(lambda: "up " in page.text("#status"))
        assert not page.one("#key").is_displayed()
        assert "secret" not in driver.page_source
        driver.switch_to.new_window("tab")
        driver.get(f"{server.url}/")
        page.until(lambda: page.one("#key").is_displayed())
        driver.close()
        driver.switch_to.window(driver.window_handles[0])
    finally:
        server.stop()
    driver.get("about:blank")
    page.console()


def test_a_foreign_page_changes_nothing_and_frames_nothing(driver, served: Server):
    class Evil(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,><p>evil</p>")

        def log_message(self, *_):
            pass

    page = Page(driver, f"{served.url}/")
    assert page.answer("say hello") == "hello"
    script = """
    const [url, done] = arguments;
    const ways = [["DELETE", "activity/x"], ["DELETE", "api/delete"], ["POST", "api/generate"]];
    const body = JSON.stringify({ model: "demo", keep_alive: 0 });
    const modes = ["cors", "no-cors"];
    const tries = ways.flatMap(([method, path]) => modes.map((mode) =>
      fetch(url + path, { method, mode, body })
        .then((answer) => answer.status || "opaque", () => "refused")));
    Promise.all(tries).then(done);
    """
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Evil)) as evil:
        driver.get(f"http://evil.localhost:{evil.port}/")
        answers = driver.execute_async_script(script, page.url)
        assert {*answers} <= {"refused", "opaque"}
        frame = "const f = document.createElement('iframe'); f.src = arguments[0];"
        driver.execute_script(f"{frame} document.body.append(f)", page.url)
        page.until(lambda: any("frame-ancestors" in line for line in page.console()))
    loaded = json.loads(ask(served, "GET", "/activity")[1])["loaded"]
    assert "demo" in [model["name"] for model in loaded]  # still in memory
    driver.get("about:blank")
    page.console()
    page.requested()
