"""Pages seen by a browser: Debian's chromium, or another Chromium on the path, driven by Playwright."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"wide": {"width": 1000, "height": 800}, "phone": {"width": 420, "height": 800}}


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: run `make browser-test`")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on the path: on Debian, `apt-get install chromium`")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield running
        running.close()


@pytest.fixture(params=SIZES)
def page(browser, request):
    """A page without a network. `page.faults` lists requests that went out or failed, and errors of scripts."""
    context = browser.new_context(viewport=SIZES[request.param], offline=True)
    opened = context.new_page()
    opened.faults = []
    opened.on("request", lambda r: r.url.startswith("http") and opened.faults.append(f"asks for {r.url}"))
    opened.on("requestfailed", lambda r: opened.faults.append(f"lacks {r.url}"))
    # jupyter-book names Thebe's address twice, which the browser minds; nothing loads Thebe
    opened.on("pageerror", lambda error: "THEBE_JS_URL" in str(error) or opened.faults.append(str(error)))
    yield opened
    context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks, with a home of its own: it trusts none of them."""
    work, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "notebooks", work / "notebooks", ignore=shutil.ignore_patterns("src", ".*"))
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # all cells are on the page, also those far below, so that they can be counted
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}"]
    options += ["--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={work}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **own, "PYTHONPATH": str(ROOT)}
    log = (home / "log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (home / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()
