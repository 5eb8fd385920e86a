"""TensorBoard's tab "Batch size".

TensorBoard imports this module at its start, by the entry point in setup.cfg,
and does not start at all if that fails. So it imports tensorboard and the
standard library and nothing else, and our own modules that do the same.
"""

import gzip
import pathlib
import urllib.parse

from tensorboard import plugin_util
from tensorboard.plugins import base_plugin

from keras_batchsize.tensorboard import series
from keras_batchsize.tensorboard import tags

_STATIC = pathlib.Path(__file__).parent / "static"
_FILES = (
    "charts.js",
    "data.js",
    "index.js",
    "style.css",
    "tables.js",
    "uPlot.iife.min.js",
    "uPlot.min.css",
)
# Not from `mimetypes`: some systems have JavaScript registered as what browsers
# do not take for a module.
_KINDS = {".css": "text/css", ".js": "text/javascript"}
_JSON = "application/json"
_POINTS = 1000  # TensorBoard's own default for scalars.


class BatchSizePlugin(base_plugin.TBPlugin):
    """Serves the page and its data.

    Args:
        context: The `base_plugin.TBContext`.
    """

    plugin_name = tags.PLUGIN

    def __init__(self, context):
        self._data_provider = context.data_provider
        hints = context.sampling_hints or {}
        self._points = hints.get("scalars", _POINTS)

    def is_active(self):
        """Returns False: TensorBoard finds our tensors by itself."""
        return False

    def frontend_metadata(self):
        """Names the tab and the module that draws it."""
        return base_plugin.FrontendMetadata(
            es_module_path="/index.js", tab_name="Batch size"
        )

    def get_plugin_apps(self):
        """Returns the WSGI applications by their routes."""
        files = {f"/{name}": _file_app(name) for name in _FILES}
        return {"/runs": self._serve_runs, "/run": self._serve_run, **files}

    def _serve_runs(self, environ, start_response):
        runs = self._reader(environ).runs()
        return _answer(environ, start_response, series.dumps(runs), _JSON)

    def _serve_run(self, environ, start_response):
        query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        name = query.get("name", [None])[0]
        run = None if name is None else self._reader(environ).run(name)
        status = "200 OK"
        if run is None:
            status = "404 Not Found"
            error = (
                "`name` must be a run that keras_batchsize has written. "
                f"Received: name={name!r}. Use one that /runs lists."
            )
            run = {"error": error}
        text = series.dumps(run)
        return _answer(environ, start_response, text, _JSON, status)

    def _reader(self, environ):
        return series.Reader(
            self._data_provider,
            plugin_util.context(environ),
            plugin_util.experiment_id(environ),
            self._points,
        )


def _file_app(name):
    """Returns an application that serves a file of the page."""
    kind = _KINDS[pathlib.Path(name).suffix]

    def app(environ, start_response):
        text = (_STATIC / name).read_text(encoding="utf-8")
        return _answer(environ, start_response, text, kind)

    return app


def _answer(environ, start_response, text, kind, status="200 OK"):
    """Answers a WSGI request with a text."""
    content = text.encode()
    headers = [
        ("Content-Type", f"{kind}; charset=utf-8"),
        ("Cache-Control", "no-cache, must-revalidate"),
        ("X-Content-Type-Options", "nosniff"),
        ("Vary", "Accept-Encoding"),
    ]
    if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
        content = gzip.compress(content, compresslevel=3, mtime=0)
        headers.append(("Content-Encoding", "gzip"))
    headers.append(("Content-Length", str(len(content))))
    start_response(status, headers)
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [content]
