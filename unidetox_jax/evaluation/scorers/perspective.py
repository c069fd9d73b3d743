"""Toxicity by Google's Perspective API: slow, rate-limited, and announced to end on 31 December 2026.

A text that the service refuses (no language that it knows, too long, empty) is reported and scored NaN: it is
never counted as harmless. Scores are kept on disk by the text's hash, so that nothing is asked twice and a
broken run goes on; texts are not stored, and the service is asked not to store them. The key travels in a
header, so that no address, log or error message can hold it.

Environment: PERSPECTIVE_API_KEY; PERSPECTIVE_RATE, requests a second (default 1, the free quota);
PERSPECTIVE_CACHE, a directory; PERSPECTIVE_ENDPOINT, another address.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.progress import Progress

ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
END = "Perspective is announced to end on 31 December 2026: figures made with it cannot be repeated after that day"
ATTEMPTS = 6
TIMEOUT = 30.0  # seconds for one answer
LONGEST_PAUSE = 60.0  # seconds between two attempts
RETRIED = (408, 429, 500, 502, 503, 504)
TEXT_AT_FAULT = 400
KEY_AT_FAULT = (401, 403)


class Unreachable(Exception):
    """The service gives no answer; says why."""


class Refused(Exception):
    """The service will not score this text; says why, in the service's words."""


def scorer(attribute: str, environment: Mapping[str, str] = os.environ) -> Callable[[Sequence[str]], np.ndarray]:
    """`texts → score of attribute`, NaN for texts that the service refuses; logs how many and why.

    Raises:
      UserError: no key, or a rate that is no positive number.
    """
    key = environment.get("PERSPECTIVE_API_KEY", "").strip()
    if not key:
        raise UserError("perspective: no key; set the environment variable PERSPECTIVE_API_KEY")
    rate = environment.get("PERSPECTIVE_RATE", "1")
    try:
        interval = 1 / float(rate)
    except (ValueError, ZeroDivisionError):
        interval = -1.0
    if not 0 < interval < float("inf"):
        raise UserError(f"perspective: PERSPECTIVE_RATE is {rate!r}, expected requests a second, greater than 0")
    logging.warning("%s", END)
    client = Client(key, environment.get("PERSPECTIVE_ENDPOINT", ENDPOINT), attribute, Limiter(interval))
    directory = environment.get("PERSPECTIVE_CACHE", "~/.cache/unidetox_jax/perspective")
    cache = Cache(epath.Path(directory).expanduser() / f"{attribute}.jsonl")
    return lambda texts: _score(texts, client, cache)


def _score(texts: Sequence[str], client: "Client", cache: "Cache") -> np.ndarray:
    wanted = [text for text in dict.fromkeys(texts) if text.strip() and cache.get(text) is None]
    refused: Counter[str] = Counter()
    empty = sum(not text.strip() for text in texts)
    if empty:
        refused["empty"] += empty

    def ask(text: str) -> None:
        try:
            cache.put(text, client.ask(text))
        except Refused as refusal:
            refused[str(refusal)] += texts.count(text)

    # as many at once as the rate needs with answers that take half a second
    with (
        ThreadPoolExecutor(max(1, min(32, round(0.5 / client.limiter.interval)))) as pool,
        Progress(len(wanted), "texts", "perspective") as progress,
    ):
        waiting = [pool.submit(ask, text) for text in wanted]
        try:
            for done in waiting:
                done.result()
                progress.update(1)
        except Unreachable as error:
            for other in waiting:
                other.cancel()
            raise UserError(
                f"perspective: {error}; {len(cache)} scores are kept in {cache.path}, the same command continues"
            ) from None
        except BaseException:
            for other in waiting:
                other.cancel()
            raise
    if refused:
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
        logging.warning("perspective: %d of %d texts have no score: %s", refused.total(), len(texts), reasons)
    scores = (cache.get(text) if text.strip() else None for text in texts)
    return np.array([np.nan if score is None else score for score in scores])


class Limiter:
    """At most one start every `interval` seconds, over all threads."""

    def __init__(self, interval: float):
        self.interval = interval
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Returns when it is the caller's turn."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self.interval
        time.sleep(max(0.0, turn - time.monotonic()))


class Client:
    """One attribute of the service."""

    pause = staticmethod(time.sleep)

    def __init__(self, key: str, endpoint: str, attribute: str, limiter: Limiter):
        self._key, self.endpoint, self.attribute, self.limiter = key, endpoint, attribute, limiter

    def ask(self, text: str) -> float:
        """The score of one text, after as many attempts as it takes.

        Raises:
          Refused: this text cannot be scored. Unreachable: no answer. UserError: the key is not accepted.
        """
        body = {
            "comment": {"text": text},
            "requestedAttributes": {self.attribute: {}},
            "doNotStore": True,
        }
        problem, pause = "", 0.0
        for attempt in range(ATTEMPTS):
            if pause:
                self.pause(pause)
            self.limiter.wait()
            pause = min(LONGEST_PAUSE, 2.0**attempt)
            try:
                return self._send(json.dumps(body).encode())
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code in KEY_AT_FAULT or reason == "API_KEY_INVALID":  # which comes as a 400
                    raise UserError(f"perspective: the key is not accepted ({error.code}: {reason})") from None
                if error.code == TEXT_AT_FAULT:
                    raise Refused(reason) from None
                if error.code not in RETRIED:
                    raise Unreachable(f"{self.endpoint} answers {error.code}: {reason}") from None
                problem = f"{error.code}: {reason}"
                pause = max(pause, _retry_after(error))
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (KeyError, TypeError, ValueError):
                problem = f"an answer without a score for {self.attribute}"
        raise Unreachable(f"no score from {self.endpoint} in {ATTEMPTS} attempts ({problem})")

    def _send(self, body: bytes) -> float:
        headers = {"Content-Type": "application/json", "X-Goog-Api-Key": self._key}
        request = urllib.request.Request(self.endpoint, body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content = json.load(answer)
        return float(content["attributeScores"][self.attribute]["summaryScore"]["value"])


class Cache:
    """Scores by the text's hash, a line each in a local file; a line that a crash cut short is passed
    over."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._lock = threading.Lock()
        self._scores: dict[str, float] = {}
        content = path.read_text() if path.exists() else ""
        self._separator = "" if not content or content.endswith("\n") else "\n"
        for line in content.splitlines():
            try:
                row = json.loads(line)
                self._scores[row["text"]] = float(row["score"])
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, text: str) -> float | None:
        """The text's score, if it has one."""
        return self._scores.get(_hash(text))

    def put(self, text: str, score: float) -> None:
        """Keeps a score, on disk at once."""
        with self._lock:
            self._scores[_hash(text)] = score
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(self._separator + json.dumps({"text": _hash(text), "score": score}) + "\n")
            self._separator = ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _reason(error: urllib.error.HTTPError) -> str:
    """The service's word for what is wrong (LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE), its message, or HTTP's."""
    try:
        content = json.loads(error.read())["error"]
        details = content.get("details", [])
        kinds = [str(detail[name]) for detail in details for name in ("errorType", "reason") if name in detail]
        return kinds[0] if kinds else str(content["message"])[:200]
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return min(LONGEST_PAUSE, float(error.headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return LONGEST_PAUSE
