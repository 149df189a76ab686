"""The nano world: geometry of the ray caster, captions, tokenizer, palette."""

import numpy as np
import pytest

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.nano import captions, check, pretrain, tokenizer, videos, world
from worldr1_jax.nano import palette as general
from worldr1_jax.weights.shipped import WEIGHTS


def spec(**fields):
    things = fields.pop("things", (captions.Thing("red", "sphere"),))
    base = {"relation": "", "floor": "tiled", "place": "in a brick room", "commands": ("push_in",)}
    return captions.Spec(things, **(base | fields))


def test_depth_of_a_wall_and_of_a_sphere_is_exact():
    scene = world.build(spec(), np.random.default_rng(0))
    scene = scene.replace(
        center=np.array([[0, 0, 4], [0, 0, 0]], np.float32), half=np.full((2, 3), 0.5, np.float32)
    )
    pose = np.eye(4, dtype=np.float32)[None]
    _, depth = world.render(scene, pose, height=65, width=65, supersample=1)
    assert float(depth[0, 32, 32]) == pytest.approx(
        3.5, abs=1e-4
    )  # the nearest point of the sphere
    assert float(depth[0, 20, 32]) == pytest.approx(world.ROOM[1][2], abs=1e-4)  # the back wall


def test_depth_and_poses_agree_between_frames():
    """A point of frame 0, moved by the poses, lies at frame 8's depth where nothing hides it."""
    truth = videos.render_specs([spec(commands=("orbit_left",))], np.random.default_rng(1))
    matrix = world.intrinsics(videos.SIZE, videos.SIZE)
    a, b = 0, 8
    pixels = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1).reshape(-1, 2) + 0.5
    rays = np.concatenate([(pixels - matrix[:2, 2]) / matrix[0, 0], np.ones((len(pixels), 1))], 1)
    points = rays * truth.depth[0, a].reshape(-1, 1).astype(np.float32)
    to_b = np.linalg.inv(truth.camtoworld[0, b]) @ truth.camtoworld[0, a]
    moved = points @ to_b[:3, :3].T + to_b[:3, 3]
    at = np.floor(moved[:, :2] / moved[:, 2:] * matrix[0, 0] + matrix[:2, 2]).astype(int)
    inside = np.all((at >= 0) & (at < 64), 1)
    found = truth.depth[0, b][at[inside, 1], at[inside, 0]].astype(np.float32)
    error = np.abs(found - moved[inside, 2]) / moved[inside, 2]
    assert np.median(error) < 0.01  # half a pixel of a slanted floor
    assert np.mean(error < 0.1) > 0.9  # the rest is hidden


def test_only_dynamic_scenes_move():
    still = videos.render_specs([spec(commands=("fixed",))], np.random.default_rng(0)).video[0]
    thing = captions.Thing("red", "sphere", "", "moving left")
    moving = videos.render_specs(
        [spec(things=(thing,), commands=("fixed",))], np.random.default_rng(0)
    ).video[0]
    assert np.array_equal(still[0], still[-1])
    left, right = (np.mean(np.nonzero(general_mask(frame))[1]) for frame in (moving[-1], moving[0]))
    assert left < right - 5


def general_mask(frame):
    return (frame[..., 0].astype(int) - frame[..., 1] > 90) & (frame[..., 2] < 60)


def test_captions_say_what_the_spec_holds_and_can_be_read_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = captions.sample_spec(rng, dynamic=bool(rng.random() < 0.3))
        text = drawn.text()
        assert commands.parse(text) == drawn.commands
        named = captions.parse(text)
        assert [(t.color, t.shape, t.size) for t in named] == [
            (t.color, t.shape, t.size) for t in drawn.things
        ]


def test_held_out_scenes_are_in_no_training_prompt():
    sets = captions.prompt_sets(train=100, dynamic=10, test=20)
    assert len(sets.train) == 100 and len(sets.dynamic) == 10 and len(sets.test) == 20
    scenes = {commands.scene(p) for p in sets.train + sets.dynamic}
    assert not scenes & {commands.scene(p) for p in sets.test}
    assert all(commands.parse(p) not in ((), ("fixed",)) for p in sets.test)


def test_every_caption_is_made_of_known_words():
    tokens = tokenizer.build()
    rng = np.random.default_rng(3)
    for _ in range(200):
        text = captions.sample_spec(rng, dynamic=bool(rng.random() < 0.3)).text()
        ids = tokens(text)["input_ids"]
        assert tokens.unk_token_id not in ids and len(ids) <= pretrain.TOKENS


def test_other_commands_leave_the_scene_of_a_caption_as_it_is():
    rng = np.random.default_rng(5)
    for _ in range(50):
        drawn, names = captions.sample_spec(rng), captions.sample_commands(rng)
        text = commands.replaced(drawn.text(), names)
        assert commands.parse(text) == names and commands.scene(text) == drawn.scene_text()


def test_some_captions_of_the_policy_are_dropped_and_some_name_another_movement():
    rng = np.random.default_rng(0)
    text = "Camera pan left. A red sphere on a tiled floor in a brick room."
    seen = [pretrain.spoilt(text, rng) for _ in range(2000)]
    dropped, kept = seen.count("") / 2000, seen.count(text) / 2000
    right = (1 - pretrain.CAPTION_DROPOUT) * (1 - pretrain.CAPTION_ERROR)
    assert dropped == pytest.approx(pretrain.CAPTION_DROPOUT, abs=0.03)  # four standard errors
    # of those that name a movement at random, about one in twelve names the right one
    assert right - 0.04 < kept < right + 0.3 * 0.09 + 0.04


def test_a_mirrored_caption_describes_the_mirrored_video():
    clause = "Camera push in, then pan left."
    text = f"{clause} A red sphere right of a blue box on a tiled floor in a brick room."
    mirrored = pretrain.mirror_caption(text)
    assert commands.parse(mirrored) == ("push_in", "pan_right")
    assert "sphere left of a blue" in mirrored
    pan = np.asarray(trajectory.path(("pan_left",), 5))
    flip = np.diag([-1.0, 1, 1, 1])
    assert np.allclose(flip @ pan @ flip, trajectory.path(("pan_right",), 5), atol=1e-6)


def test_the_same_seed_makes_the_same_videos(tmp_path):
    first = videos.cached(tmp_path, 3, 4, chunk=2)
    again = videos.cached(tmp_path, 3, 4, chunk=2)
    other = videos.sample(4, 2)
    assert np.array_equal(first.video, again.video) and first.captions == again.captions
    assert not np.array_equal(first.video[:2], other.video)


def test_palette_scores_what_is_named_and_not_what_is_missing():
    scenes = [
        spec(things=(captions.Thing(color, "sphere"),)) for color in ("red", "blue", "yellow")
    ]
    truth = videos.render_specs(scenes, np.random.default_rng(0))
    video = truth.video.astype(np.float32) / 255
    right = np.asarray(general.palette(video, general.targets(truth.captions)))
    wrong = np.asarray(
        general.palette(video, general.targets([truth.captions[i] for i in (1, 2, 0)]))
    )
    assert right.min() > 0.7 and wrong.max() < 0.3
    assert np.asarray(general.palette(video, general.targets(["A view."] * 3))) == pytest.approx(
        1.0
    )


def test_neither_noise_nor_a_mosaic_nor_grey_has_the_colours():
    rng = np.random.default_rng(0)
    rgb = np.array(list(general.PALETTE.values()), np.float32)
    tiles = rgb[rng.integers(0, len(rgb), (2, 3, 8, 8))]
    cheats = {
        "noise": rng.uniform(size=(2, 3, 64, 64, 3)).astype(np.float32),
        "mosaic": tiles.repeat(8, axis=2).repeat(8, axis=3),
        "grey": np.full((2, 3, 64, 64, 3), 0.5, np.float32),
    }
    named = general.targets(["A red sphere.", "A blue box left of a green cylinder."])
    for name, video in cheats.items():
        assert np.asarray(general.palette(video, named)).max() < 0.05, name


def test_a_backdrop_is_not_a_thing():
    named = general.targets(["A red box on a tiled floor under a blue sky."])
    assert [color for color, it in zip(general.PALETTE, named[0], strict=True) if it] == ["red"]


def test_an_altered_caption_is_wrong_in_one_thing():
    rng = np.random.default_rng(0)
    known = set(tokenizer.vocabulary())
    for _ in range(300):
        scene = captions.sample_spec(rng).scene_text()
        other = captions.altered(scene, rng)
        assert other != scene
        assert set(other[:-1].lower().split()) <= known
        assert " a orange" not in other.lower()


def test_the_clip_that_ships_finds_a_scene_by_its_sentence():
    """Scenes that it never saw; launch/pretrain_nano.py --stage=check measures it on more."""
    truth = videos.sample(3, 12, held_out=True, every=8)
    found = check.retrieval(WEIGHTS / "clip", truth, among=8, views=3)
    assert found["retrieval"] > 0.7 and found["altered"] > 0.7
