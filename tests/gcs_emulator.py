"""An emulator of Google Cloud Storage for Orbax (through tensorstore), gcsfs and tensorboardX."""

import contextlib
import logging
from collections.abc import Iterator
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects
from processes import free_port


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Context: an empty `gs://bucket`; yields the environment variables through which programs find it."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it logs every request
    port = free_port()
    with server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        url = f"http://127.0.0.1:{port}"
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would query the bucket's kind by gRPC for a minute
            "NO_GCE_CHECK": "true",  # there is no metadata server with credentials either
        }


def _download(request, response, storage):
    """As Google does, sends the object's generation, which tensorstore needs to replace it."""
    _downloaded(request, response, storage)
    if response.status < HTTPStatus.MULTIPLE_CHOICES:
        stored = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = stored["generation"]


def _insert(request, response, storage):
    """As Google does, replaces only the generation that the writer expects, so that no concurrent write is lost, and
    asks for the content at once where tensorstore waits a second before it sends some megabytes unasked."""
    if request.get_header("Expect") == "100-continue":
        response._handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    name, expected = (request.query.get(key, [None])[0] for key in ("name", "ifGenerationMatch"))
    stored = storage.objects.get(request.params["bucket_name"], {}).get(name, {"generation": "0"})
    if name is not None and expected not in (None, stored["generation"]):
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        _inserted(request, response, storage)


_downloaded, _inserted = objects.download, objects.insert
objects.download, objects.insert = _download, _insert
for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        handlers[method] = {_downloaded: _download, _inserted: _insert}.get(handler, handler)
