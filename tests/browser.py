"""Pages as Chromium has them, where it is installed."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
  CHROMIUM is None, reason="there is no chromium"
)


def opened(to, tmp_path, fragment="", width=1000, shot=None):
  """Returns the page as Chromium has it, after what it says of errors."""
  log = tmp_path / "net.json"
  command = [
    CHROMIUM,
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    f"--user-data-dir={tmp_path / 'profile'}",
    f"--log-net-log={log}",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    f"--window-size={width},1200",
    f"--screenshot={shot}" if shot else "--dump-dom",
    f"file://{to}{fragment}",
  ]
  result = subprocess.run(
    command, capture_output=True, text=True, timeout=300, check=True
  )
  console = re.findall(r".*CONSOLE.*", result.stderr)
  assert not console, console
  # The browser asks its makers by itself, whatever the page.
  asked = re.findall(r'"url":"(?:https?|wss?)://([^/"]*)', log.read_text())
  assert not [host for host in asked if not host.endswith("google.com")]
  return result.stdout


def main_of(dom):
  return dom[dom.index("<main") : dom.index("</main>")]


def text_of(dom):
  """Returns the cells of tables, and all text, as a reader has them."""
  body = main_of(dom)
  plain = html.unescape(re.sub(r"<[^>]*>", "", body))
  cells = [
    html.unescape(re.sub(r"<[^>]*>", "", cell))
    for cell in re.findall(r"<td[^>]*>(.*?)</td>", body, re.DOTALL)
  ]
  return plain, cells


def shown(value):
  """A number as JavaScript writes it."""
  if isinstance(value, int):
    return f"{value:,}"
  return np.format_float_positional(value, trim="-")
