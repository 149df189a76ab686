"""What the pages show works as it stands there."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.rewards.base import Evidence

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page that are whole: an ellipsis stands for what is there already."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    return [block for block in found if "..." not in block]


def test_the_reward_of_the_page():
    space: dict = {"my_function": None, "__name__": "page"}
    exec(next(block for block in blocks("docs/extending/reward.md") if "class" in block), space)
    videos = jnp.stack([jnp.full((2, 8, 8, 3), 0.1), jnp.ones((2, 8, 8, 3))])
    reward = space["Brightness"]()
    scores = reward.score({}, Evidence(videos, jnp.zeros((2, 2, 4, 4))), ())
    np.testing.assert_allclose(scores["brightness"], [0.5, 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match="least"):
        space["Brightness"](least=0.0)


def test_the_algorithm_of_the_page():
    space: dict = {"__name__": "page"}
    exec(next(block for block in blocks("docs/extending/algorithm.md") if "class" in block), space)
    assert space["Weighted"](temperature=2.0).terms >= 1
    with pytest.raises(ValueError, match="temperature"):
        space["Weighted"](temperature=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/rewards.md"])
def test_the_rewards_of_the_pages(page):
    from worldr1_jax.nano import videos as nano

    truth = nano.sample(7, 2, held_out=True)
    space: dict = {
        "videos": truth.video.astype(np.float32) / 255, "prompts": truth.captions,
        "camtoworld": truth.camtoworld,
    }  # fmt: skip
    for block in blocks(page):
        exec(block, space)
    assert space["scores"].valid.all()
    if "gradient" in space:
        assert np.isfinite(space["gradient"]).all()


def test_the_readme_keeps_its_size_and_its_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", text)) <= 40
    for command in (
        "    pip install -e .\n    python launch/tpu_train.py --config=configs/world.py\n",
        '    pip install -e ".[test]" && pytest\n',
    ):
        assert command in text


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT) for p in (ROOT / "docs").rglob("*.md")))
def test_commands_of_the_pages_name_what_exists(page):
    text = (ROOT / page).read_text("utf-8")
    for script in re.findall(r"python (launch/\w+\.py|docs/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m (tests\.[\w.]+|worldr1_jax[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
