"""A model hub on this machine's loopback: what the hub's client asks for, and nothing else.

with Hub({"acme/tiny": "sample/model"}) as hub:
    subprocess.run([...], env=os.environ | hub.environment(cache))
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves folders as models, {name: folder}. Of the names in `gated` every file is a 403;
    downloads of those in `breaking` end after half of the weights. `asked` lists what was asked:
    (method, path)."""

    def __init__(self, models, gated=(), breaking=()):
        self.models = {name: Path(folder) for name, folder in models.items()}
        self.gated, self.breaking, self.asked = set(gated), set(breaking), []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache):
        """The variables that send the hub's client here, with a cache of its own."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        return {
            "HF_ENDPOINT": address,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def answer(self, request):
        """/NAME/resolve/REVISION/FILE; of a name that is not here, anything."""
        path = unquote(request.path.partition("?")[0]).removeprefix("/")
        name, _, file = path.removeprefix("api/models/").partition("/resolve/")
        file = file.partition("/")[2]
        status, body, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
        if name in self.gated:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif name in self.models:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            if (self.models[name] / file).is_file():
                status, body = 200, (self.models[name] / file).read_bytes()
                etag = hashlib.sha256(body).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            if name in self.breaking and file.endswith(".safetensors"):
                body = body[: len(body) // 2]
                request.close_connection = True
            request.wfile.write(body)
        self.asked.append((request.command, path))
