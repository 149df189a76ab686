"""The example of a judge in another process: answers, and every way in which there is none."""

import importlib.util
import json
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from worldr1_jax import rewards

PATH = Path(__file__).parents[2] / "docs" / "examples" / "judge_over_http.py"
VIDEOS = np.stack([np.full((2, 8, 8, 3), level, np.float32) for level in (0.2, 0.6)])
PATHS = np.tile(np.eye(4, dtype=np.float32), (2, 2, 1, 1))
PROMPTS = ["Camera push in. A sphere.", "Camera pan left. A box."]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("judge_over_http", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["judge_over_http"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def url(example):
    """Of the example's server, whose handler a test may change."""
    server = example.serve(0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_each_video_gets_its_own_answer(example, url):
    scores = example.HttpJudge(url)(VIDEOS, PROMPTS, PATHS)
    np.testing.assert_allclose(scores, [0.2, 0.6], atol=0.003)  # 8 bits


@pytest.mark.parametrize(
    "answer",
    [
        {"id": "another", "score": 1.0}, {"score": 1.0}, {"id": "{id}", "score": "high"},
        {"id": "{id}", "score": float("nan")}, {"id": "{id}"}, [1.0], None, "junk",
        {"id": "{id}", "score": 10**400}, "deep",
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_masks_the_video(example, url, monkeypatch, answer):
    def wrong(self, right):
        text = json.dumps(answer).replace("{id}", right["id"])
        body = {"junk": b"{]", "deep": b"[" * 60_000}.get(str(answer), text.encode())
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    monkeypatch.setattr(example.Handler, "_answer", wrong)
    assert np.isnan(example.HttpJudge(url)(VIDEOS, PROMPTS, PATHS)).all()


def test_silence_and_refusal_mask_the_video(example, url, monkeypatch):
    assert np.isnan(example.HttpJudge("http://127.0.0.1:9")(VIDEOS, PROMPTS, PATHS)).all()
    hang = threading.Event()
    monkeypatch.setattr(example.Handler, "_answer", lambda self, right: hang.wait(5))
    slow = example.HttpJudge(url, timeout=0.2)(VIDEOS, PROMPTS, PATHS)
    hang.set()
    assert np.isnan(slow).all()
    monkeypatch.setattr(example, "MOST_BYTES", 10)  # the server refuses with 400
    assert np.isnan(example.HttpJudge(url)(VIDEOS, PROMPTS, PATHS)).all()


def test_it_is_a_reward(example, url):
    reward = rewards.build({"palette": 1.0, example.HttpJudge(url): 0.5})
    scores = reward(VIDEOS, PROMPTS, PATHS)
    np.testing.assert_allclose(scores.parts["http_judge"], [0.2, 0.6], atol=0.003)
    assert scores.valid.all() and isinstance(example.serve(0), ThreadingHTTPServer)
