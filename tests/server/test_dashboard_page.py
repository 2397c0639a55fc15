"""The dashboard's page in headless Chromium: what its functions draw, and what a person sees of a server."""

import json
import re

import httpx
import pytest

from flexjax.server.dashboard import PAGE
from tests.server.browser import Browser, find_browser, opened
from tests.server.conftest import wait_until
from tests.server.test_dashboard import BODY, numbers

PROGRAM = find_browser()
REASON = "there is no Chromium; `make browser` installs one, FLEXJAX_CHROMIUM names one"
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=REASON)

ZEROS = [0.0] * 60
EVIL = '<img src=x onerror="window.caught = 1">&"\''
ITERATION = {"index": 1, "decode": 2, "prompt": 1, "forward": 0, "backward": 5, "limit": 10, "backward_units": 3}
DATA = {
    "version": "1.2",
    "model": "a model",
    "time": 1_000_000.0 + 3 * 3600 + 120,
    "started": 1_000_000,
    "objective": {"ttft": None, "tpot": 50.0, "itl": 70.0},
    "requests": {"running": 3, "waiting": 1234, "rows": 8},
    "latency": {
        "ttft": {"p50": 120.4, "p99": 300.0, "count": 9},
        "tpot": {"p50": 20.0, "p99": 60.0, "count": 9},
        "itl": {"p50": 10.0, "p99": 65.0, "count": 90},
    },
    "seconds": {
        "output_tokens": [*ZEROS[:58], 100, 400],
        "finetune_tokens": [*ZEROS[:59], 2560],
        "decode": [*ZEROS[:59], 6.0],
        "prompt": ZEROS,
        "forward": [*ZEROS[:59], 9.0],
        "backward": [*ZEROS[:59], 15.0],
    },
    "iterations": [ITERATION, {**ITERATION, "index": 2, "backward": 0}],
    "pages": {"requests": 30, "tapes": 20, "cached": 0, "free": 50, "total": 100},
    "memory": [{"purpose": "weights", "bytes": 3 * 2**29}, {"purpose": "free", "bytes": 100}],
    "adapters": {"places": 12, "resident": 2, "host_bytes": 2048, "names": ["poet"]},
    "jobs": [
        {
            "id": "ftjob-a",
            "name": EVIL,
            "status": "running",
            "step": 30,
            "total_steps": 40,
            "losses": {"train": [[10, 4.0], [20, 2.0], [30, 1.0]], "validation": [[30, 3.0]]},
        },
        {"id": None, "name": "house" * 30, "status": "queued", "step": 0, "total_steps": None}
        | {"losses": {"train": [], "validation": []}},
    ],
}
"""By hand: 500 tokens and 2,560 in ten seconds; of the minute 30 s were spent, 6, 9 and 15 of them by part."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1200, 900)
        yield browser


@pytest.fixture
def page(browser, server) -> Browser:
    """The page, which has had its first answer, and asks no more."""
    visit(browser, server.url)
    browser.wait("at('board').children.length > 0")
    browser.run("window.live = () => {}; setTimeout = () => 0")
    yield browser
    assert not browser.errors


def visit(browser: Browser, url: str) -> None:
    browser.requests.clear()
    browser.errors.clear()
    browser.send("Page.navigate", url=f"{url}/")
    browser.wait("document.readyState === 'complete' && typeof at === 'function'")


def call(browser: Browser, function: str, *arguments):
    return browser.run(f"{function}({', '.join(map(json.dumps, arguments))})")


def texts(browser: Browser) -> dict[str, str]:
    """What stands below each heading of the board."""
    script = "[...document.querySelectorAll('#board section')].map(e => [e.querySelector('h2').innerText, e.innerText])"
    return {name: text.removeprefix(name).strip() for name, text in browser.run(script)}


def test_numbers_as_people_read_them(page):
    cases = {None: "–", 0: "0", 0.5: "0.5", 12.345: "12.3", 99.96: "100", 1234.5: "1,235", 0.00012: "1.2e-4"}
    assert {value: call(page, "number", value) for value in cases} == cases
    sizes = {0: "0 B", 1023: "1,023 B", 1024: "1 KiB", 3 * 2**29: "1.5 GiB"}
    assert {size: call(page, "bytes", size) for size in sizes} == sizes
    times = {5: "5 s", 61: "1 min", 7260: "2 h 1 min", 90_000: "1 d 1 h", -3: "0 s"}
    assert {seconds: call(page, "duration", seconds) for seconds in times} == times


def test_paths_are_in_their_box_and_leave_gaps(page):
    """The box is 100 by 100 and its origin is above: a value in the middle is at 50."""
    points = [[0, 0], [1, 5], [2, None], [4, 10]]
    assert call(page, "path", points, [0, 4], [0, 10]) == "M0.00 100.00L25.00 50.00M100.00 0.00"
    assert call(page, "path", [[7, 3]], [7, 7], [3, 3]) == "M0.00 100.00", "one point needs no distance"


def test_iterations_are_stacked_below_what_they_were_allowed(page):
    """Of 10 ms at the top 2 are decoding's, 1 is prompts', 5 are units'; parts without time are not drawn."""
    drawn = call(page, "iterationBars", DATA["iterations"])
    bars = re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)" style="fill: var\(--(\w+)\)"/>', drawn)
    assert [(part, *map(float, place)) for *place, part in bars] == [
        ("decode", 0, 80, 40, 20),
        ("prompt", 0, 70, 40, 10),
        ("backward", 0, 20, 40, 50),
        ("decode", 50, 80, 40, 20),
        ("prompt", 50, 70, 40, 10),
    ]
    assert 'class="limit" x1="0" x2="100" y1="0.00"' in drawn and "allowed 10 ms" in drawn
    assert "class=\"limit\"" not in call(page, "iterationBars", [{**ITERATION, "limit": None}])
    assert call(page, "iterationBars", []) == '<div class="soft">no iteration yet</div>'


def test_the_objective_is_met_or_not(page):
    found = {"p50": 1.0, "p99": 50.0, "count": 3}
    state = lambda *arguments: re.search(r'<b class="(\w*)">', call(page, "latencyTile", "x", *arguments))[1]
    assert [state(found, objective) for objective in (50.0, 49.9, None)] == ["good", "bad", ""]
    assert state({"p50": None, "p99": None, "count": 0}, 5.0) == ""


def test_the_board_of_known_numbers(page):
    page.run(f"show({json.dumps(DATA)})")
    shown = texts(page)
    assert page.run("at('model').innerText") == "a model"
    assert page.run("at('state').innerText") == "flexjax 1.2 · up 3 h 2 min"
    assert shown["Output tokens/s"].startswith("50\n") and shown["Finetuning tokens/s"].startswith("256\n")
    assert shown["First token, p99"] == "300 ms\np50 120 ms · no objective"
    assert shown["Time per token, p99"] == "60 ms\np50 20 ms · objective 50 ms"
    assert shown["Between tokens, p99"] == "65 ms\np50 10 ms · objective 70 ms"
    states = page.run("[...document.querySelectorAll('b.bad, b.good')].map(e => [e.className, e.innerText])")
    assert states == [["bad", "60 ms"], ["good", "65 ms"]]
    assert shown["Running"] == "3\nof 8 rows · 1,234 waiting"
    parts = ["decode 10 %", "prompts 0 %", "finetuning forward 15 %", "backward units 25 %", "idle 50 %"]
    assert all(part in shown["Time of each iteration"] for part in parts)
    width_of = "bar => [...bar.children].map(each => each.getBoundingClientRect().width)"
    widths = page.run(f"[...document.querySelectorAll('.share')].map({width_of})")
    assert widths[0][0] / widths[0][-1] == pytest.approx(6 / 30, rel=0.02), "zero parts take no room"
    assert [each / sum(widths[1]) for each in widths[1]] == pytest.approx([0.3, 0.2, 0.5], rel=0.02)
    assert "requests 30" in shown["Pages (100)"] and "1.5 GiB" in shown["Memory of a device, as planned"]
    assert shown["Adapters on the device"] == "2 of 12 places · 2 KiB in main memory\npoet"


def test_jobs_have_progress_and_curves_and_their_names_are_text(page):
    page.run(f"show({json.dumps(DATA)})")
    assert page.run("[...document.querySelectorAll('.job b')].map(e => e.innerText)")[0] == EVIL
    assert page.run("document.querySelectorAll('img').length") == 0 and page.run("window.caught") is None
    assert page.run("[...document.querySelectorAll('progress')].map(e => e.position)") == [0.75]
    curves = page.run("[...document.querySelectorAll('.job path')].map(e => e.getAttribute('d'))")
    assert curves == ["M0.00 0.00L50.00 66.67L100.00 100.00", "M100.00 33.33"]
    assert "running · step 30 of 40" in texts(page)["Jobs"] and "validation 3" in texts(page)["Jobs"]


@pytest.mark.parametrize("width", [320, 700, 1200])
def test_nothing_sticks_out_at_any_width(page, width):
    page.resize(width, 4000)  # no scroll bar takes part of it
    try:
        page.run(f"show({json.dumps(DATA)})")
        rights = page.run("[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)")
        assert page.run("document.documentElement.scrollWidth") == width >= max(rights)
        rows = page.run("new Set([...document.querySelectorAll('.tile')].map(e => e.offsetTop)).size")
        assert rows == {320: 3, 700: 2, 1200: 1}[width]
    finally:
        page.resize(1200, 900)


def test_dark_where_the_reader_prefers_it(page):
    colours = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        style = "getComputedStyle(document.body)"
        colours.append(page.run(f"[{style}.backgroundColor, {style}.color]"))
    page.prefer("light")
    assert colours == [["rgb(246, 246, 244)", "rgb(27, 28, 30)"], ["rgb(19, 20, 22)", "rgb(236, 237, 237)"]]


def test_it_shows_what_the_server_does(browser, serving):
    with serving() as server, server.client() as client:
        visit(browser, server.url)
        browser.wait("at('board').innerText.includes('of 4 rows')")
        client.completions.create(prompt=[[1, 2, 3]], n=4, max_tokens=25, **BODY)
        browser.wait("document.querySelector('.tile b').innerText === '10'")
        assert texts(browser)["First token, p99"] != "–" and "requests 0" in texts(browser)["Pages (120)"]
        assert numbers(server)["latency"]["ttft"]["count"] == 4
        assert not browser.errors
        asked = [url for url in browser.requests if not url.startswith("data:")]
        assert set(asked) == {f"{server.url}/", f"{server.url}/dashboard.json"} and len(asked) > 2
    browser.wait("at('state').innerText.includes('does not answer')")


def test_it_asks_for_a_key_and_forgets_it_with_the_tab(browser, owned):
    enter = "at('key').value = '{}'; at('keys').requestSubmit()"
    visit(browser, owned.url)
    browser.wait("!at('ask').hidden")
    assert browser.run("at('board').children.length") == 0
    browser.run(enter.format("sk-eve"))
    browser.wait("!at('ask').hidden && at('state').innerText.includes('not one of')")
    assert browser.run("sessionStorage.length") == 0
    browser.run(enter.format(" sk-bob "))
    browser.wait("at('board').children.length > 0")
    assert texts(browser)["Jobs"] == "none" and browser.run("at('ask').hidden && at('key').value === ''")
    visit(browser, owned.url)
    browser.wait("at('board').children.length > 0")
    assert browser.run("[localStorage.length, document.cookie]") == [0, ""]
    assert not any("sk-bob" in url for url in browser.requests)
    browser.run("sessionStorage.clear()")


def test_no_other_script_runs_in_it(browser, server):
    """Nor is anything asked for elsewhere: the page's own policy forbids it, and it names no address."""
    assert not re.search(r"https?:|//[a-z]", re.sub(r"(?m)^\s*// .*$", "", PAGE))
    headers = httpx.get(f"{server.url}/").headers
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    visit(browser, server.url)
    browser.run("window.made = document.createElement('script'); made.textContent = 'window.caught = 1'")
    browser.run("document.head.append(made)")
    browser.run("document.head.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.caught = 1\">')")
    wait_until(lambda: browser.run("true") and any("Content Security Policy" in each for each in browser.errors))
    assert browser.run("window.caught") is None
