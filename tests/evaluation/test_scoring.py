"""Files to scores: what is measured, what is refused, and in which words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from worldr1_jax import media
from worldr1_jax.camera import trajectory
from worldr1_jax.evaluation import scoring
from worldr1_jax.media import write_mp4
from worldr1_jax.rewards import build
from worldr1_jax.workdir import metrics

PROMPT = "Camera push in. A red sphere."
NANO = trajectory.Magnitudes.nano()


@pytest.fixture(scope="module")
def reward():
    weights = {"recon": 1.0, "trajectory": 1.0, "general": 1.0, "mvcs": 0.0}
    options = {"recon": {"likeness": "ssim"}, "reconstruct": {"da3": "nano"}}
    return build(weights, general="palette", **options)


def noise(*shape):
    return np.random.default_rng(0).random((*shape, 3))


def rows(reward, pairs, **options):
    return list(scoring.score(reward, pairs, magnitudes=NANO, most_frames=4, **options))


def ffmpeg(source, *options):
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", "-i", source, *options], check=True)


def test_other_pixel_formats_are_read(tmp_path):
    """16 bits a colour, and gray: as 8-bit RGB."""
    write_mp4(tmp_path / "a.mp4", np.full((3, 16, 24, 3), 0.5), 8)
    for kind in ("rgb48le", "gray"):
        file = tmp_path / f"{kind}.avi"
        ffmpeg(tmp_path / "a.mp4", "-c:v", "rawvideo", "-pix_fmt", kind, "-f", "nut", file)
        got = media.read_video(file, 3)
        assert got.shape == (3, 256, 384, 3)  # write_mp4 enlarges small videos
        np.testing.assert_allclose(got, 0.5, atol=0.02)


def test_read_video_gives_frames(tmp_path):
    video = np.zeros((3, 256, 320, 3))
    video[1, :, :, 0] = 1.0
    write_mp4(tmp_path / "a.mp4", video, 8)
    got = media.read_video(tmp_path / "a.mp4", 3)
    assert got.shape == (3, 256, 320, 3)
    np.testing.assert_allclose(got, video, atol=0.02)  # H.264 in 4:2:0, flat colours


def test_scores_and_picture(reward, tmp_path):
    write_mp4(tmp_path / "a.mp4", noise(3, 32, 32), 8)
    pairs = [(str(tmp_path / "a.mp4"), PROMPT)]
    (row,) = rows(reward, pairs, with_pictures=True)
    assert not row.error
    for name in ("total", "recon", "trajectory", "general", "psnr", "ssim", "mvcs", "rot_err"):
        assert np.isfinite(row.scores[name]), name
    factors = row.scores["trajectory_translation"] * row.scores["trajectory_rotation"]
    assert row.scores["trajectory"] == pytest.approx(factors, rel=1e-5)
    (tmp_path / "a.png").write_bytes(row.picture)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size[1] > 256
    assert "a.mp4" in scoring.table([row], ["total"])


def test_what_cannot_be_judged_says_why(reward, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    write_mp4(tmp_path / "one.mp4", noise(1, 32, 32), 8)
    write_mp4(tmp_path / "long.mp4", noise(5, 32, 32), 8)
    write_mp4(tmp_path / "black.mp4", noise(3, 32, 32) * 0, 8)
    write_mp4(tmp_path / "tiny.mp4", noise(3, 32, 32), 8)
    ffmpeg(tmp_path / "tiny.mp4", "-vf", "scale=6:40", tmp_path / "small.mp4")
    whole = (tmp_path / "tiny.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    names = {
        "none": "does not exist",
        "bad": "no video that ffmpeg can read",
        "cut": "no video that ffmpeg can read",
        "small": "40x6 px: it needs 8 px a side",
        "one": "a camera path needs 2",
        "long": "more than 4 frames",
        "black": "shows next to nothing",
    }
    found = rows(reward, [(str(tmp_path / f"{name}.mp4"), PROMPT) for name in names])
    for row, text in zip(found, names.values(), strict=True):
        assert text in row.error and not row.scores
    assert "shows next to nothing" in scoring.table(found, ["total"])
    with pytest.raises(ValueError, match="none of the 7 videos could be scored"):
        scoring.check_any(found)
    scoring.check_any([*found, scoring.Scored("a.mp4", PROMPT, {"total": 1.0})])
    (row,) = rows(reward, [(str(tmp_path / "tiny.mp4"), "Camera zoom in. X")])
    assert 'the camera cannot "zoom in"' in row.error and not row.scores  # as training refuses it


def test_a_list_that_is_stopped_keeps_what_it_has(tmp_path, capsys):
    """Written while it goes on, and when it ends early; and an old file is not lost to none."""

    def written():
        found = json.loads((tmp_path / "scores.json").read_text())["videos"]
        return [(row["path"], row["picture"]) for row in found]

    def videos():
        yield scoring.Scored("a.mp4", PROMPT, {"total": 1.0}, picture=b"png")
        assert written() == [("a.mp4", True)]
        yield scoring.Scored("b.mp4", PROMPT, {}, error="none")
        raise KeyboardInterrupt

    def stopped_at_once():
        raise KeyboardInterrupt
        yield

    for rows in (videos(), stopped_at_once()):
        with pytest.raises(KeyboardInterrupt):
            scoring.keep(rows, tmp_path, metrics.Progress(3, unit="video"))
    assert written() == [("a.mp4", True), ("b.mp4", False)]
    assert (tmp_path / "001-a.png").read_bytes() == b"png"
    assert "video 2/3" in capsys.readouterr().err


def test_lists(tmp_path):
    path = tmp_path / "videos.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "prompt": "b"}) + "\n\n")
    assert scoring.read_list(path) == [(str(tmp_path / "a.mp4"), "b")]
    for text, error in (("", "empty"), ('{"video": 1}', 'no text under "video" on line 1')):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            scoring.read_list(path)
    with pytest.raises(ValueError, match=r"none\.jsonl: missing"):
        scoring.read_list(tmp_path / "none.jsonl")


@pytest.mark.slow
def test_the_launcher_writes_a_table_json_and_pictures(tmp_path):
    """A good video, one whose name is as long as one may be and no text, and one that breaks off,
    which does not stop the others."""
    write_mp4(tmp_path / "good.mp4", noise(9, 32, 32), 8)
    odd = os.fsencode(tmp_path) + b"/" + b"\xe9" * 251 + b".mp4"
    os.link(tmp_path / "good.mp4", odd)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lines = [{"video": f"{name}.mp4", "prompt": PROMPT} for name in ("bad", "good")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "launch/score.py", "--config=configs/world.py", "--pictures",
         b"--video=" + odd, f"--prompt={PROMPT}", f"--list={tmp_path / 'list.jsonl'}",
         f"--workdir={tmp_path / 'out'}"],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, long, bad, good = done.stdout.strip().splitlines()[-4:]
    assert long.startswith(r"\udce9\udce9")
    assert head.split()[0] == "video" and "trajectory" in head and "psnr" in head
    assert "no video that ffmpeg can read" in bad and good.startswith("good.mp4")
    videos = json.loads((tmp_path / "out" / "scores.json").read_text())["videos"]
    assert videos[1]["error"] and not videos[1]["scores"]
    assert {"psnr", "ssim", "mvcs", "cam_mc", "trajectory_rotation"} <= set(videos[2]["scores"])
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["001-.png", "003-good.png"]


def test_a_picture_has_a_name_whatever_its_video_has():
    for stem in ("x" * 251, "\u4e16" * 83, "\udcff" * 251):
        name = scoring.picture_name(7, f"/a/{stem}.mp4")
        assert name.startswith("007-") and len(os.fsencode(name)) < 200
