"""JupyterLab on a project, seen by Chromium without a window, which is driven over its DevTools protocol."""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import websocket
from processes import end_with_tests, wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NOTEBOOK = "[...jupyterapp.shell.widgets('main')].find(tab => tab.sessionContext)"


class Browser:
    """A page of Chromium; `script` evaluates JavaScript in it."""

    def __init__(self, folder: Path):
        port = wait_for(lambda: (folder / "DevToolsActivePort").read_text().split()[0], 30)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            url = next(one for one in json.load(answer) if one["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self.numbers = itertools.count(1)

    def call(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def script(self, text: str):
        result = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, text: str, seconds: float = 60):
        """Wait until a script gives something true, and return it; an error of the page counts as false."""
        return wait_for(lambda: self.script(f"(() => {{ try {{ return {text} }} catch {{ }} }})()"), seconds)

    def center(self, selector: str) -> tuple[float, float]:
        self.script(f"{selector}.scrollIntoView({{block: 'center'}})")
        box = self.script(f"(b => [b.x, b.y, b.width, b.height])({selector}.getBoundingClientRect())")
        return box[0] + box[2] / 2, box[1] + box[3] / 2

    def drag(self, selector: str, *across: int) -> None:
        """Press the mouse on an element, move it by so many pixels, one after the other, and release it."""
        x, y = self.center(selector)
        for kind, shift in [
            ("Pressed", 0),
            *(("Moved", shift) for shift in across),
            ("Released", across[-1]),
        ]:
            where = {"type": f"mouse{kind}", "x": x + shift, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **where, buttons=int(kind != "Released"))


@contextlib.contextmanager
def opened(root: Path, notebook: str, folder: Path, **environment: str):
    """Open a notebook of a project in JupyterLab, run all its cells, and give the browser."""
    settings = {  # what is out of sight is in the page, too; and no news
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }
    for name, text in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    environment |= {name: str(folder / name) for name in homes} | {"PYTHONPATH": str(root)}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address, token = f"127.0.0.1:{free.getsockname()[1]}", secrets.token_hex(16)
    lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={address[10:]}"]
    lab += ["--ServerApp.port_retries=0", "--allow-root", f"--IdentityProvider.token={token}"]
    lab += [f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    chromium = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
    started, stack = [], contextlib.ExitStack()
    try:
        for command in (lab, chromium):
            with open(folder / f"{len(started)}.log", "w") as log:
                options = {"env": os.environ | environment, "stdout": log, "stderr": log}
                options |= {"start_new_session": True, "preexec_fn": end_with_tests}
                started.append(subprocess.Popen(command, **options))
        wait_for(lambda: urllib.request.urlopen(f"http://{address}/api?token={token}", timeout=5).read(), 60)
        browser = Browser(folder)
        stack.callback(browser.socket.close)
        browser.call(
            "Page.navigate", url=f"http://{address}/lab/tree/notebooks/{notebook}.ipynb?token={token}"
        )
        browser.until(f"{NOTEBOOK}.sessionContext.session.kernel.connectionStatus == 'connected'", 60)
        browser.script(f"jupyterapp.shell.activateById({NOTEBOOK}.id)")
        browser.script("jupyterapp.commands.execute('notebook:run-all-cells') && null")
        yield browser
    finally:
        stack.close()
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
