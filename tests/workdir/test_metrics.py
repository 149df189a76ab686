"""Metrics: files that survive a kill, videos that are the same bits, numbers that are right."""

import io
import json

import imageio_ffmpeg
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from worldr1_jax import media
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.timing import StageTimer
from worldr1_jax.workdir import metrics


def _records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _video(frames=5, height=16, width=24):
    return np.random.default_rng(0).random((frames, height, width, 3)).astype(np.float32)


def test_resume_leaves_each_update_once(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for update in range(5):
            writer.write(update, {"loss": jnp.float32(update), "bad": float("nan")})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"update": 5, "lo')  # killed in the middle of a line
    with metrics.MetricsWriter(tmp_path, restart_update=3) as writer:
        for update in range(3, 6):
            writer.write(update, {"loss": 10.0 + update, "bad": np.float32(1)})
    records = _records(tmp_path)
    assert [r["update"] for r in records] == list(range(6))
    assert [r["loss"] for r in records] == [0, 1, 2, 13, 14, 15]
    assert [r["bad"] for r in records] == [None] * 3 + [1.0] * 3
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 0}\noops\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON record"):
        metrics.MetricsWriter(tmp_path, restart_update=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update": 0}\noops\n'


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with metrics.MetricsWriter(tmp_path / "run") as writer:
        writer.write(0, {"loss": 1.0})
        writer.video(0, "sample", _video(), fps=8)
    assert not (tmp_path / "run").exists()


def test_stage_timer_adds_up_and_starts_afresh():
    begun = []
    timer = StageTimer(on_stage=begun.append)
    for _ in range(2):
        with timer("rollout") as wait_for:
            value = wait_for(jnp.ones(3) + 1)
    assert value.tolist() == [2.0, 2.0, 2.0] and begun == ["rollout"] * 2
    seconds = timer.collect()
    assert list(seconds) == ["seconds/rollout"] and seconds["seconds/rollout"] > 0
    assert timer.collect() == {}


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_per_update_in_a_log():
    log = io.StringIO()
    progress = metrics.Progress(num_updates=4, first_update=2, stream=log)
    progress.stage("rollout")
    progress.update(2, {"reward": 0.51234})
    progress.update(3)
    progress.close()
    first, second = log.getvalue().splitlines()
    assert first.startswith("update 3/4  reward 0.5123  ") and first.endswith(" left")
    assert second.startswith("update 4/4  ") and second.endswith("0:00:00 left")


def test_progress_rewrites_one_line_on_a_terminal():
    terminal = _Terminal()
    progress = metrics.Progress(num_updates=2, stream=terminal)
    progress.stage("rollout")
    progress.update(0)
    progress.stage("rewards")
    progress.close()
    text = terminal.getvalue()
    assert "update 1/2  rollout" in text and "update 2/2  rewards" in text
    assert text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize(("shape", "size"), [((16, 24), (384, 256)), ((15, 17), (306, 270))])
def test_mp4_is_enlarged_readable_and_the_same_bits(tmp_path, shape, size):
    video = np.broadcast_to(np.linspace(0, 1, 5)[:, None, None, None], (5, *shape, 3))
    media.write_mp4(tmp_path / "a" / "v.mp4", video, fps=8)
    media.write_mp4(tmp_path / "b.mp4", video, fps=8)
    assert (tmp_path / "a" / "v.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["v.mp4"]
    # Not imageio_ffmpeg.read_frames, which leaves its pipes open and forks our threads.
    frames = 255 * media.read_video(tmp_path / "b.mp4", 5)
    assert frames.shape == (5, size[1], size[0], 3)
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "b.mp4"))
    assert count == 5 and seconds == pytest.approx(5 / 8, abs=0.01)  # ffmpeg prints hundredths
    # H.264 and the limited range of yuv420p each cost a grey level or two.
    np.testing.assert_allclose(frames.mean((1, 2, 3)), np.linspace(0, 255, 5), atol=3)


def test_mp4_refuses_bad_videos(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(5, 16, 24\)"):
        media.write_mp4(tmp_path / "v.mp4", _video()[..., 0], fps=8)
    with pytest.raises(ValueError, match="not finite"):
        media.write_mp4(tmp_path / "v.mp4", _video() * np.nan, fps=8)
    assert not list(tmp_path.iterdir())


def test_video_grid_fills_rows_and_leaves_black():
    videos = np.stack([_video() for _ in range(3)]) + np.arange(3).reshape(3, 1, 1, 1, 1)
    grid = media.video_grid(videos, columns=2)
    assert grid.shape == (5, 32, 48, 3)
    np.testing.assert_array_equal(grid[:, :16, 24:], videos[1])
    np.testing.assert_array_equal(grid[:, 16:, :24], videos[2])
    assert not grid[:, 16:, 24:].any()
    with pytest.raises(ValueError, match="columns is 0"):
        media.video_grid(videos, columns=0)


def test_contact_sheet_is_a_png_with_a_row_per_video():
    videos = np.stack([_video(), _video()])
    sheet = Image.open(io.BytesIO(media.contact_sheet(videos, columns=3)))
    assert sheet.format == "PNG" and sheet.size == (3 * 24 * 8, 2 * 16 * 8)
    captioned = media.contact_sheet(videos, ["a red sphere " * 40, "слон"], columns=3)
    assert Image.open(io.BytesIO(captioned)).size[1] > sheet.size[1]
    with pytest.raises(ValueError, match="1 captions for 2 videos"):
        media.contact_sheet(videos, ["one"])


def test_writer_keeps_videos(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.video(3, "sample", _video(), fps=8)
    assert (tmp_path / "videos" / "sample_000003.mp4").stat().st_size > 0


def test_summary_is_json_without_nan(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_summary(path, {"a": {"before": np.float32(0.5), "ci": (float("inf"), 1)}})
    assert json.loads(path.read_text()) == {"a": {"before": 0.5, "ci": [None, 1]}}
    metrics.write_summary(path, {"seed": 1})
    assert json.loads(path.read_text()) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_bootstrap_interval_matches_the_normal_one_and_its_seed():
    generator = np.random.default_rng(1)
    before = generator.normal(size=400)
    after = before + 0.3 + 0.1 * generator.normal(size=400)
    low, high = paired_bootstrap_ci95(before, after, seed=0)
    difference = after - before
    half = 1.96 * difference.std(ddof=1) / np.sqrt(400)
    # 10,000 resamples leave about 2% of the half width as noise, skew a little more.
    np.testing.assert_allclose(
        [low, high], difference.mean() + half * np.array([-1, 1]), atol=0.1 * half
    )
    assert (low, high) == paired_bootstrap_ci95(before, after, seed=0)
    assert paired_bootstrap_ci95(np.zeros(3), np.ones(3), seed=0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [([1.0], [1.0], "N >= 2"), ([1, 2], [1, 2, 3], "N >= 2"), ([1, np.nan], [1, 2], "finite")],
)
def test_bootstrap_refuses(before, after, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap_ci95(before, after, seed=0)


def test_a_video_that_is_not_finite_is_shown_in_magenta(tmp_path):
    video = np.full((3, 16, 16, 3), 0.5)
    video[1, :, :, 2] = np.nan
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.video(0, "a", video, 8)
    shown = media.read_video(tmp_path / "videos/a_000000.mp4", 3).mean(axis=(1, 2))
    np.testing.assert_allclose(shown, [[0.5] * 3, [1, 0, 1], [0.5] * 3], atol=0.03)  # H.264
