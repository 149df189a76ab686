"""A judge in another process, such as a torch model or a server of your own, as a reward.

python docs/examples/judge_over_http.py --port=8000  # the judge's side; put your model in `judge`

    from judge_over_http import HttpJudge  # the trainer's side
    reward = rewards.build({"palette": 1.0, HttpJudge("http://127.0.0.1:8000"): 0.5})

What makes it safe to learn from: a video travels as plain bytes in JSON, so that neither side runs
what the other sends; every answer carries the digest of the video and prompt that it is for, and is
thrown away when that is not the one asked; and whatever goes wrong is NaN, which masks the video
out of its group instead of letting it win or lose.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

MOST_BYTES = 1 << 30  # of a request that is read
# What reading an answer may raise. urllib's own errors and timeouts are OSErrors; the last two are
# of a number with hundreds of digits, and of lists nested by the thousand.
_WRONG = (
    *(OSError, http.client.HTTPException, ValueError, TypeError, KeyError),
    *(OverflowError, RecursionError),
)


# ------------------------------------------------------------------------- the trainer's side


@dataclasses.dataclass(frozen=True)
class HttpJudge:
    """(videos [B F H W 3] in [0, 1], prompts, paths) -> scores [B], NaN where there is no answer.

    Attributes:
      url: of the judge.
      timeout: seconds that one video may take.
      at_once: videos that are asked about at a time.
    """

    url: str
    timeout: float = 60.0
    at_once: int = 4

    __name__ = "http_judge"  # the reward's name in metrics and reports

    def __call__(
        self, videos: np.ndarray, prompts: Sequence[str], camtoworld: np.ndarray
    ) -> np.ndarray:
        with ThreadPoolExecutor(self.at_once) as pool:
            return np.array(list(pool.map(self._ask, videos, prompts)), np.float32)

    def _ask(self, video: np.ndarray, prompt: str) -> float:
        """One answer, or NaN for a judge that is silent, slow, confused or out of its mind."""
        frames = np.round(np.clip(video, 0, 1) * 255).astype(np.uint8)
        digest = digest_of(frames.tobytes(), prompt)
        question = {
            "id": digest,
            "prompt": prompt,
            "shape": frames.shape,
            "video": base64.b64encode(frames.tobytes()).decode(),
        }
        request = urllib.request.Request(
            self.url, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read(1 << 16))
            score = float(answer["score"])
            right = answer["id"] == digest and math.isfinite(score)
        except _WRONG:
            return math.nan
        return score if right else math.nan


def digest_of(frames: bytes, prompt: str) -> str:
    """Names a question by all that it asks."""
    return hashlib.sha256(frames + prompt.encode("utf-8", "replace")).hexdigest()


# --------------------------------------------------------------------------- the judge's side


def judge(video: np.ndarray, prompt: str) -> float:
    """Your model: frames [F H W 3], 0 to 255, and what was asked for -> a score, larger is better.
    Here: how bright the video is."""
    return float(video.mean() / 255)


class Handler(BaseHTTPRequestHandler):
    """Answers a POST of one question with {"id": ..., "score": ...}."""

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if not 0 < length <= MOST_BYTES:
                raise ValueError(f"a question of {length} bytes")
            question = json.loads(self.rfile.read(length))
            shape = tuple(int(n) for n in question["shape"])
            content, prompt = base64.b64decode(question["video"]), str(question["prompt"])
            video = np.frombuffer(content, np.uint8).reshape(shape)
        except (ValueError, TypeError, KeyError) as error:
            self.send_error(400, str(error))
            return
        # The digest is of what arrived, not the one that was sent along.
        self._answer({"id": digest_of(content, prompt), "score": judge(video, prompt)})

    def _answer(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing: a line for each video would flood the terminal."""


def serve(port: int) -> ThreadingHTTPServer:
    """A server on this machine alone; `serve_forever` runs it."""
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    serve(parser.parse_args().port).serve_forever()


if __name__ == "__main__":
    main()
