"""Video files of strangers: which frames are read, which files are opened, and how much they may
take."""

import os
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from worldr1_jax import media

FRAMES = 9


def ffmpeg(*options):
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", "-y", *map(str, options)], check=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Nine frames that grow brighter, as mp4."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    ramp = np.linspace(0.1, 0.9, FRAMES)[:, None, None, None]
    media.write_mp4(path, np.broadcast_to(ramp, (FRAMES, 64, 64, 3)), 10)
    return path


def levels(path, most=FRAMES):
    return media.read_video(path, most).mean(axis=(1, 2, 3))


def test_every_stored_frame_is_read_once_whatever_the_container(clip, tmp_path):
    """GIF keeps hundredths of a second and mkv thousandths: 30 frames a second fit neither."""
    want = levels(clip)
    assert len(want) == FRAMES and (np.diff(want) > 0.05).all()
    for name in ("b.gif", "b.webm", "b.mkv", "b.avi", "b.apng", "b.ts"):
        ffmpeg("-r", 30, "-i", clip, *(["-c:v", "libvpx"] if name == "b.webm" else []),
               tmp_path / name)  # fmt: skip
        np.testing.assert_allclose(levels(tmp_path / name), want, atol=0.03, err_msg=name)


def test_a_cut_without_encoding_shows_the_frames_of_its_edit_list(clip, tmp_path):
    ffmpeg("-ss", 0.35, "-i", clip, "-c", "copy", tmp_path / "cut.mp4")
    np.testing.assert_allclose(levels(tmp_path / "cut.mp4"), levels(clip)[4:], atol=1e-3)


@pytest.mark.parametrize(
    "times", ["if(lt(N,8),N,N*5)", "if(lt(N,5),N,N+4)", "N+0.3*mod(N,2)"], ids=str
)
@pytest.mark.parametrize("name", ["b.mp4", "b.gif", "b.mkv"])
def test_frames_that_are_not_evenly_spaced_are_refused(clip, tmp_path, times, name):
    ffmpeg("-i", clip, "-vf", f"settb=1/1000,setpts='100*({times})'", "-fps_mode", "passthrough",
           "-enc_time_base", "1/1000" if name != "b.gif" else "1/100", tmp_path / name)  # fmt: skip
    with pytest.raises(ValueError, match=r"ms apart, not evenly spaced: give it a constant rate"):
        media.read_video(tmp_path / name, FRAMES)


@pytest.mark.parametrize("name", ["b.gif", "b.mkv"])
def test_a_cut_file_is_refused_though_ffmpeg_reads_what_is_left(clip, tmp_path, name):
    ffmpeg("-i", clip, "-vf", "noise=alls=20", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.6, 0.9):
        (tmp_path / f"cut{name}").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="is no video that ffmpeg can read to its end"):
            media.read_video(tmp_path / f"cut{name}", FRAMES)


def test_pixels_that_are_not_square_are_refused(clip, tmp_path):
    ffmpeg("-i", clip, "-vf", "setsar=4/3", tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 has pixels of 4:3, not square: scale it"):
        media.read_video(tmp_path / "b.mp4", FRAMES)


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile a.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "playlist"],
)
def test_a_script_opens_no_other_file(clip, tmp_path, script):
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "script.mp4").write_text(script)
    with pytest.raises(ValueError, match=r"script\.mp4 is no video that ffmpeg can read"):
        media.read_video(tmp_path / "script.mp4", FRAMES)


NAMES = ("concat:a|b", "http:x.mp4", "pipe:0", "shot:1.mp4", "-x.mp4", "100%03d.mp4", "a b'\".mp4")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names_of_files(tmp_path, monkeypatch, name):
    """Written and read, also where they begin a path."""
    monkeypatch.chdir(tmp_path)
    media.write_mp4(name, np.full((3, 16, 16, 3), 0.5), 8)
    assert media.read_video(name, 3).shape == (3, 256, 256, 3)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_with_a_colon_can_be_written_to(tmp_path):
    media.write_mp4(tmp_path / "run:1" / "a.mp4", np.full((2, 16, 16, 3), 0.5), 8)
    assert media.read_video(tmp_path / "run:1" / "a.mp4", 2).shape[0] == 2


def test_a_small_file_of_a_large_video_is_refused_before_it_is_decoded(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "color=s=4096x4096:r=10:d=3", "-preset", "ultrafast",
           tmp_path / "a.mp4")  # fmt: skip
    assert (tmp_path / "a.mp4").stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"4096x4096 px and 30 frames or more: a video may take 4"):
        media.read_video(tmp_path / "a.mp4", 81)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, message in (
        (tmp_path / "pipe.mp4", "is no regular file"),
        (tmp_path / "none.mp4", "does not exist"),
        (tmp_path, "is no regular file"),
        ("a" * 5000 + ".mp4", "does not exist"),
        ("gs://bucket/a.mp4", "is a URL"),
    ):
        with pytest.raises(ValueError, match=message):
            media.read_video(path, 3)


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    video = np.full((2, 16, 16, 3), 0.5)
    for path, fps, message in (
        (tmp_path / "file" / "a.mp4", 8, "cannot be made: "),
        (tmp_path / ("a" * 300 + ".mp4"), 8, "cannot be written: ffmpeg says"),
        ("gs://bucket/a.mp4", 8, "is a URL"),
        (tmp_path / "a.mp4", 0, "fps is 0; it must be above 0"),
        (tmp_path / "a.mp4", float("nan"), "fps is nan"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            media.write_mp4(path, video, fps)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
