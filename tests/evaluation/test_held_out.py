"""The held-out report, on a stand-in for pipeline and reward: turns, fillers, diversity."""

import types

import jax
import numpy as np
import pytest

from worldr1_jax.evaluation import held_out as evaluate
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.rewards.choice import choose

FRAMES, SIDE = 2, 4


class Pipeline:
    """Its latents are the samples' keys, its videos noise drawn from them."""

    def __init__(self, parts):
        self.mesh = make_mesh({"data": parts}, jax.devices()[:parts])
        self.most = 0  # videos that ever existed together
        self.rolled = []  # (adapters, guidance, prompt)
        self.adapters, self.sampling = "base", types.SimpleNamespace(guidance=2.0)

    def negative(self):
        return "null"

    def roll(self, adapters, prompts, keys, *, sampler, text_null, guidance):
        self.rolled += [(adapters, guidance, prompt) for prompt in prompts]
        if guidance is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, int(10 * guidance))
        paths = np.tile(np.eye(4, dtype=np.float32), (len(prompts), FRAMES, 1, 1))
        return types.SimpleNamespace(
            prompts=prompts, paths=paths, trajectory=types.SimpleNamespace(latents=keys)
        )

    def decode(self, latents):
        self.most = max(self.most, len(latents))
        return jax.vmap(lambda key: jax.random.uniform(key, (FRAMES, SIDE, SIDE, 3)))(latents)


class Reward:
    """It takes every `turns`-th video at a time; each part is a video's mean."""

    def __init__(self, turns):
        self.turns, self.choice = turns, choose({"recon": 1.0, "trajectory": 1.0, "mvcs": 0.0})

    def __call__(self, latents, prompts, paths, *, decode, off, timer, seen):
        means = np.zeros(len(prompts), np.float32)
        for turn in range(self.turns):
            places = np.arange(turn, len(prompts), self.turns)
            means[places] = np.asarray(decode(latents[places], places)).mean((1, 2, 3, 4))
        parts = {name: jax.numpy.asarray(means) for name in ("recon", "trajectory", "mvcs")}
        return types.SimpleNamespace(parts=parts)


def measure(parts, turns, samples=2, count=11, batch=4):
    pipeline = Pipeline(parts)
    prompts = [f"prompt {i}" for i in range(count)]
    exam = evaluate.Exam(prompts, jax.random.key(0), samples, batch)
    found = evaluate.measure(
        pipeline, Reward(turns), None, exam, guidance=1.0, text_null=None
    )  # fmt: skip
    return *found, pipeline


def test_turns_and_the_mesh_change_no_measure():
    whole, first, _ = measure(1, 1)
    parts, same, pipeline = measure(8, 4)
    assert pipeline.most == 2  # a quarter of the 8 videos of a batch
    rewards = {"recon", "trajectory", "mvcs", "total_3d"}
    assert set(whole) == rewards | {"change", "diversity", "diversity_first"}
    for name, values in whole.items():
        assert values.shape == (11,) and np.isfinite(values).all()
        np.testing.assert_allclose(parts[name], values, rtol=1e-6)
    assert first.shape == (evaluate.SHOWN, FRAMES, SIDE, SIDE, 3)
    np.testing.assert_array_equal(first, same)


def test_diversity_is_the_mean_distance_of_a_prompts_videos():
    found, first, pipeline = measure(1, 1, samples=3, count=1, batch=1)
    keys = evaluate.sample_keys(jax.random.key(0), 3, first=0)
    a, b, c = np.asarray(pipeline.decode(keys), np.float64)
    pairs = np.stack([a - b, a - c, b - c])
    for name, apart in (("diversity", pairs), ("diversity_first", pairs[:, :1])):
        distances = np.sqrt((apart**2).mean((1, 2, 3, 4)))
        np.testing.assert_allclose(found[name], [distances.mean()], rtol=1e-5)
    np.testing.assert_allclose(first, [a], rtol=1e-6)


def test_one_video_a_prompt_has_no_diversity():
    found, first, _ = measure(1, 1, samples=1)
    assert "diversity" not in found and len(first) == evaluate.SHOWN


@pytest.mark.parametrize("sweep", [4, 100])
def test_what_the_sweep_has_measured_is_not_measured_again(tmp_path, sweep):
    pipeline, prompts = Pipeline(1), [f"prompt {i}" for i in range(11)]
    exam = evaluate.Exam(prompts, jax.random.key(0), samples=2, batch=4)
    found = evaluate.compare(
        pipeline, Reward(1), "tuned", exam, evaluate.Evaluate(guidances=(1.0, 3.0), sweep=sweep),
        seed=0, workdir=tmp_path,
    )  # fmt: skip
    best = found["heldout_guidance"]["before"]
    assert set(found["heldout_guidance"]["swept"]) == {"1", "2", "3"}
    fillers = {prompts[-1], prompts[min(sweep, 11) - 1]}
    for adapters, guidance in {("base", best), ("base", 2.0), ("tuned", 2.0)}:
        asked = [p for a, g, p in pipeline.rolled if (a, g) == (adapters, guidance)]
        assert set(asked) == set(prompts)
        assert all(asked.count(p) == 2 for p in set(prompts) - fillers)
    whole, shown = evaluate.measure(
        pipeline, Reward(1), "base", exam, guidance=best, text_null="null"
    )
    for name, row in found["heldout"].items():
        assert row["before"] == whole[name].mean(), name
    written = (tmp_path / "videos" / "heldout_before.png").read_bytes()
    assert written == evaluate.contact_sheet(shown, prompts[: evaluate.SHOWN])


@pytest.mark.parametrize(
    ("asked", "samples", "parts", "at_once", "want"),
    [
        (16, 4, 1, 0, 16), (16, 2, 64, 1, 32), (2, 3, 4, 0, 4), (1, 1, 8, 2, 8), (64, 2, 32, 4, 64),
        (3, 1, 1, 2, 4), (20, 2, 16, 2, 32),
    ],
)  # fmt: skip
def test_a_batch_grows_to_what_the_mesh_divides(asked, samples, parts, at_once, want):
    assert evaluate.whole_batch(asked, samples, parts, at_once) == want
    mesh = types.SimpleNamespace(shape={"data": parts, "fsdp": 1, "context": 1, "tensor": 1})
    assert sharding.turns(mesh, want * samples, at_once) >= 1  # which refuses what does not divide


def test_the_base_is_judged_by_what_is_measured():
    """With neither 3D rewards nor R_gen, by what counts; never by a guidance that made no video."""
    assert evaluate.judged_by(choose({"trajectory": 1.0, "general": 0.0})) == (
        "total_3d",
        "general",
    )
    by = evaluate.judged_by(choose({"hps": 1.0, "pickscore": 0.0}, general={}))
    assert by == ("hps",)
    scores = {1.0: [np.nan] * 2, 2.0: [0.1, np.nan], 3.0: [0.3, 0.1], 4.0: [0.0, 0.0]}
    measured = {g: {"hps": np.array(values)} for g, values in scores.items()}
    assert evaluate.best_guidance({g: measured[g] for g in (2.0, 3.0, 4.0)}, by) == 3.0
    assert evaluate.best_guidance({1.0: measured[1.0], 4.0: measured[4.0]}, by) == 4.0


def test_guidances_are_compared_on_the_same_prompts():
    """One that fails at seven of eight and is good at the last is not the base's best."""
    few = np.array([np.nan] * 7 + [1.9])
    measured = {2.0: {"hps": few}, 4.0: {"hps": np.array([1.8] * 7 + [1.95])}}
    assert evaluate.best_guidance(measured, ("hps",)) == 4.0


@pytest.mark.parametrize("scored", [0, 1, 7])
def test_a_guidance_that_mostly_fails_does_not_choose_for_the_others(scored):
    """Nor does it leave the first of those that were scored at all prompts."""
    failing = np.where(np.arange(16) < scored, 0.5, np.nan)
    values = {1.0: np.r_[1.3, [0.9] * 15], 2.7: np.r_[0.9, [1.25] * 15], 12.0: failing}
    measured = {g: {"hps": x} for g, x in values.items()}
    assert evaluate.best_guidance(measured, ("hps",)) == 2.7


def test_a_report_says_how_many_prompts_it_is_of():
    before = np.linspace(0, 1, 40)
    after = np.where(np.arange(40) < 2, np.nan, before + 0.1)
    whole, most, few = (
        evaluate.table(evaluate.report({"x": a}, {"x": b}, 0)).splitlines()[1]
        for a, b in ((before, before + 0.1), (before, after), (before[:8], after[:8]))
    )
    assert whole.endswith("]") and most.endswith("of 38 prompts, not 40")
    assert few.endswith("of 6 prompts only")


def test_a_video_that_is_not_finite_is_shown_and_ends_no_report(tmp_path):
    class Broken(Pipeline):
        def decode(self, latents):
            return super().decode(latents).at[0, 0, 0, 0].set(np.nan)

    exam = evaluate.Exam(["a", "b"], jax.random.key(0), samples=2, batch=2)
    found = evaluate.compare(
        Broken(1), Reward(1), "tuned", exam, evaluate.Evaluate(), seed=0, workdir=tmp_path
    )
    assert found["heldout"]["recon"]["pairs"] == 1
    assert (tmp_path / "videos" / "heldout_after.png").is_file()
