#!/usr/bin/env python3
"""The page of a running `lacuna serve` in headless Chromium: clicks, streams, stops, regenerates, compares, and looks into
the document; leaves pictures. Exits 1 if anything is not as a user expects.

    pip install playwright
    lacuna serve --plan teal=0.5 --port 8080 &
    tools/check_page.py http://127.0.0.1:8080 /tmp/pictures [--chromium /usr/bin/chromium] [--key KEY]
"""

import argparse
import pathlib
import re
import sys

from playwright.sync_api import sync_playwright

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("url")
args.add_argument("out", type=pathlib.Path)
args.add_argument("--chromium", default="/usr/bin/chromium")
args.add_argument("--key", help="the server wants this key")
args.add_argument("--prompt", default="Once upon a time, there was a little girl named Lily.")
args = args.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
failures = []


def check(name, good, shown=""):
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' if shown != '' else ''}{shown}", flush=True)
    if not good:
        failures.append(name)


def opened(browser, scheme, size, scale=1):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=scale,
                                  permissions=["clipboard-read", "clipboard-write"],
                                  # What a user types where the browser asks.
                                  http_credentials={"username": "key", "password": args.key} if args.key else None)
    page = context.new_page()
    page.problems, page.outside = [], []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") and "401" not in m.text else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(args.url) else page.outside.append(r.url))
    page.goto(args.url)
    page.wait_for_selector("#model-b option", state="attached")
    return page


def idle(page):
    page.wait_for_selector("body:not(.is-busy)", timeout=120_000)


def ask(page, text=None):
    page.fill("#prompt", text or args.prompt)
    # A small model may be done before one looks, so this waits for a token and not for the busy page.
    turns = page.locator(".turn").count()
    page.keyboard.press("Enter")
    page.locator(".turn").nth(turns).wait_for()
    page.wait_for_selector(".turn:last-child .tok")


def last(page, css):
    return page.locator(f".turn:last-child {css}")


def setting(page, name, value):
    page.click("#settings-open")
    page.fill(f"#s-{name}", str(value))
    page.locator("#settings .go").click()


def one_answer(page):
    setting(page, "max_tokens", 48)
    setting(page, "seed", 7)
    ask(page)
    idle(page)
    text = last(page, ".out").inner_text()
    tokens = last(page, ".tok").count()
    check("an answer streams", len(text) > 10 and tokens > 5, f"{tokens} tokens")
    figures = last(page, ".figures").inner_text()
    check("figures", bool(re.search(r"\d tokens/s", figures) and "per token" in figures), figures)
    check("pictures", page.locator(".probe.has .heat").count() == 1 and page.locator(".probe.has .strip").count() == 1)
    last(page, ".tok").nth(3).hover()
    check("probabilities on hover", page.locator("#peek .alt").count() >= 2 and "%" in page.locator("#peek").inner_text())
    check("the picture of that token", page.locator(".probe.has .when").inner_text() == "token 4", page.locator(".probe.has .when").inner_text())
    page.mouse.move(5, 400)
    last(page, ".out").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    check("tokens by keyboard", last(page, ".tok.at").count() == 1 and page.locator("#peek").is_visible())
    page.locator(".probe.has .heat").focus()
    page.keyboard.press("ArrowDown")
    check("the heat map by keyboard", "kept" in page.locator("#peek").inner_text(), page.locator("#peek").inner_text())
    page.locator("#prompt").focus()
    page.keyboard.press("Alt+r")
    page.wait_for_timeout(100)
    idle(page)
    check("regenerated with its seed: the same words", last(page, ".out").inner_text() == text and page.locator(".turn").count() == 1)
    last(page, "button:has-text('Copy')").click()
    check("copied", page.evaluate("navigator.clipboard.readText()").strip() == text.strip())


def stopped(page):
    setting(page, "max_tokens", 400)
    setting(page, "seed", "")
    for _ in range(4):
        ask(page)
        page.keyboard.press("Escape")
        idle(page)
        if "stopped" in last(page, ".figures").inner_text():
            break
    check("Escape stops", "stopped" in last(page, ".figures").inner_text(), last(page, ".figures").inner_text())
    for _ in range(4):
        # The model may end before the click.
        ask(page)
        page.click("#send")
        idle(page)
        if "stopped" in last(page, ".figures").inner_text():
            break
    check("the button stops", "stopped" in last(page, ".figures").inner_text())
    page.keyboard.press("Alt+n")
    check("a new conversation", page.locator("#empty").is_visible() and page.locator(".turn").count() == 0)


def escaped(page):
    """Text of the model and of the user is text."""
    page.evaluate("window.hit = false")
    bad = "<img src=x onerror='window.hit=true'><script>window.hit=true</script>"
    setting(page, "max_tokens", 3)
    ask(page, bad)
    idle(page)
    check("markup is text", last(page, ".said").inner_text() == bad and page.locator(".log img, .log script").count() == 0)
    blocked = page.evaluate("""() => { const s = document.createElement('script'); s.textContent = 'window.hit = true';
        document.body.append(s); return !window.hit; }""")
    check("the policy stops scripts that are written into the page", blocked)
    page.problems[:] = [p for p in page.problems if "Content Security Policy" not in p]
    page.keyboard.press("Alt+n")


def pair(page, live=None):
    page.locator(".modes label", has_text="Side by side").click()
    setting(page, "max_tokens", 90)
    setting(page, "seed", 7)
    setting(page, "temperature", 0)
    ask(page)
    if live:
        page.wait_for_timeout(300)
        page.screenshot(path=args.out / live)
    idle(page)
    check("two answers", last(page, ".answer.done").count() == 2)
    line = last(page, ".compared").inner_text()
    check("compared", "words" in line and "read" in line, line)
    check("two pictures", page.locator(".probe.has").count() == 2)


with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
    page = opened(browser, "light", (1280, 800))
    page.wait_for_timeout(400)
    page.screenshot(path=args.out / "empty.png")
    one_answer(page)
    last(page, ".tok").nth(8).hover()
    page.screenshot(path=args.out / "light.png")
    page.mouse.move(5, 400)
    page.click("#settings-open")
    page.screenshot(path=args.out / "settings.png")
    page.keyboard.press("Escape")
    stopped(page)
    escaped(page)
    models = page.locator("#model-b option").count()
    if models > 1:
        pair(page, "pair-live.png")
        page.screenshot(path=args.out / "pair-light.png")
    check("no errors in the console", page.problems == [], page.problems)
    check("no requests to others", page.outside == [], page.outside)

    page = opened(browser, "dark", (1280, 800))
    if models > 1:
        pair(page)
    else:
        ask(page)
        idle(page)
    last(page, ".answer:last-child .tok").nth(12).hover()
    page.screenshot(path=args.out / "dark.png")

    page = opened(browser, "light", (390, 844), 2)
    wide = page.evaluate("document.documentElement.scrollWidth")
    check("nothing is wider than the phone", wide <= 390, wide)
    ask(page)
    idle(page)
    page.screenshot(path=args.out / "phone.png")
    page.click("#fold")
    page.wait_for_timeout(200)
    page.screenshot(path=args.out / "phone-open.png")
    check("the picture unfolds", page.locator(".probe.has .heat").is_visible())
    browser.close()

print(f"\n{len(failures)} failed" + "".join(f"\n  {f}" for f in failures))
sys.exit(bool(failures))
