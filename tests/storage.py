"""A bucket of Google Cloud Storage on loopback, kept in memory.

What gcsfs, TensorStore and google-cloud-storage ask for of its JSON API, with
generations and the conditions on them, which other stand-ins leave out.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
import time
import urllib.parse

NAME = "bucket"
_PATH = re.compile(
  r"(/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)(/o(/(?P<name>.+))?)?"
)


class Bucket:
  """Objects by name; what is done to them is done by one thread at a time."""

  def __init__(self, address):
    self.objects = {}  # content and generation of each
    self.address = address
    # Is asked before all that is done whether that is forbidden.
    self.refuses = lambda method, name: False
    self._next = itertools.count(time.time_ns())
    self._uploads = {}
    self._lock = threading.Lock()

  def environment(self):
    """What sends all three libraries here."""
    return {
      "STORAGE_EMULATOR_HOST": self.address,
      "TENSORSTORE_GCS_HTTP_URL": self.address,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
      # It would ask by gRPC what kind of bucket this is.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def names(self, prefix):
    """The names that begin so, in order, without that beginning."""
    with self._lock:
      every = sorted(self.objects)
    return [n.removeprefix(prefix) for n in every if n.startswith(prefix)]

  def read(self, name):
    return self.objects[name][0]

  def put(self, name, content):
    self.objects[name] = content, next(self._next)

  def answer(self, method, path, query, headers, body):
    """Returns (status, what to send, further headers)."""
    found = _PATH.fullmatch(path)
    if not found or found["bucket"] != NAME:
      return _error(404)
    name = found["name"] and urllib.parse.unquote(found["name"])
    with self._lock:
      if found[1] == "/upload":
        return self._upload(query, headers, body)
      if name and self.refuses(method, name):
        return _error(403)
      if found[3] is None:
        return 200, {"name": NAME, "id": NAME, "location": "US"}, {}
      if name is None:
        return 200, self._listed(query), {}
      if method == "POST":
        name, _, other = name.partition("/moveTo/o/")
        if name not in self.objects:
          return _error(404)
        self.put(other, self.objects.pop(name)[0])
        return 200, self._about(other), {}
      refused = self._refused(name, query)
      if refused or name not in self.objects:
        return _error(refused or 404)
      if method == "DELETE":
        del self.objects[name]
        return 204, b"", {}
      if query.get("alt") != "media":
        return 200, self._about(name), {}
      return self._content(name, headers)

  def _refused(self, name, query):
    """The status where a condition on the generation is not met."""
    now = str(self.objects.get(name, (b"", 0))[1])
    if query.get("ifGenerationNotMatch") == now:
      return 304
    return 0 if query.get("ifGenerationMatch", now) == now else 412

  def _content(self, name, headers):
    content, generation = self.objects[name]
    about = {"x-goog-generation": str(generation)}
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
    if not part:
      return 200, content, about
    first, last = part.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1 if first and last else len(content), len(content))
    if begin >= len(content):
      return _error(416)
    about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
    return 206, content[begin:end], about

  def _upload(self, query, headers, body):
    name, kind = query.get("name"), query["uploadType"]
    if kind == "resumable" and "upload_id" not in query:
      key = str(next(self._next))
      self._uploads[key] = name or json.loads(body)["name"], b"", query
      place = f"{self.address}/upload/storage/v1/b/{NAME}/o"
      place += f"?uploadType=resumable&upload_id={key}"
      return 200, b"", {"Location": place}
    if kind == "resumable":
      key = query["upload_id"]
      name, before, query = self._uploads[key]
      body = before + body
      self._uploads[key] = name, body, query
      whole = headers["Content-Range"].rpartition("/")[2]
      if whole == "*" or len(body) < int(whole):
        return 308, b"", {"Range": f"bytes=0-{len(body) - 1}"}
    if kind == "multipart":
      mark = re.search('boundary="?([^";]+)', headers["Content-Type"])[1]
      parts = re.split(b"\r?\n?--" + re.escape(mark.encode()), body)
      about, body = (
        re.split(b"\r?\n\r?\n", p, maxsplit=1)[1] for p in parts[1:3]
      )
      name = json.loads(about)["name"]
    if self.refuses("POST", name):
      return _error(403)
    if self._refused(name, query):
      return _error(412)
    self.put(name, body)
    return 200, self._about(name), {}

  def _listed(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    found = {"items": [], "prefixes": []}
    for name in sorted(self.objects):
      if name.startswith(prefix) and name >= query.get("startOffset", ""):
        rest = name.removeprefix(prefix)
        if delimiter and delimiter in rest:
          folder = prefix + rest.partition(delimiter)[0] + delimiter
          if folder not in found["prefixes"]:
            found["prefixes"].append(folder)
        else:
          found["items"].append(self._about(name))
    return found

  def _about(self, name):
    content, generation = self.objects[name]
    return {
      "name": name,
      "bucket": NAME,
      "generation": str(generation),
      "size": str(len(content)),
      "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
      "updated": "2026-01-01T00:00:00.000Z",
      "timeCreated": "2026-01-01T00:00:00.000Z",
    }


def _error(status):
  return status, {"error": {"code": status, "message": "refused"}}, {}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize = -1
  bucket: Bucket

  def _route(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    status, content, headers = self.bucket.answer(
      self.command, url.path, query, self.headers, body
    )
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
      headers |= {"Content-Type": "application/json"}
    self.send_response(status)
    for name, value in (headers | {"Content-Length": len(content)}).items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(content)

  do_GET = do_PUT = do_POST = do_DELETE = _route  # noqa: N815

  def log_message(self, *args):
    """Says nothing."""


@contextlib.contextmanager
def serve():
  """Yields an empty bucket, served on a free port until the end."""
  handler = type("Handler", (_Handler,), {})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  server.daemon_threads = True
  # A process that is killed breaks its connections.
  server.handle_error = lambda *about: None
  handler.bucket = Bucket(f"http://127.0.0.1:{server.server_port}")
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield handler.bucket
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
