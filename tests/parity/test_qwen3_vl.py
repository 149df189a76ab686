"""Qwen3-VL against transformers, on tiny random weights in float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.goldens import make_qwen3_vl as made
from worldr1_jax.mesh.placement import leaf_path
from worldr1_jax.models import qwen3_vl
from worldr1_jax.models.qwen3_vl import text, vision

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both sides are float32 and sum in different orders: 1e-4 of the spread of the logits is the
# contract; 1e-6 to 1e-5 is usual.
TOLERANCE = 1e-4
CASES = {  # text fields, vision fields, others, images, their size, padding of each row
    "tied": ({}, {}, {}, 1, (32, 48), (0, 3)),
    "untied": (
        {"num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5},
        {},
        {"tie_word_embeddings": False},
        2, (48, 16), (0, 0),
    ),
    "deep": (
        {"num_hidden_layers": 6, "hidden_size": 48, "head_dim": 16},
        {"depth": 7, "deepstack_visual_indexes": [1, 4, 6], "num_heads": 4,
         "out_hidden_size": 48, "num_position_embeddings": 49},
        {}, 3, (80, 112), (7, 0, 2),
    ),
    "published_patches": (
        {}, {"patch_size": 16, "deepstack_visual_indexes": [2, 3], "hidden_size": 32}, {},
        1, (96, 160), (1, 0),
    ),
}  # fmt: skip


@nnx.jit
def logits(model, *arguments):
    return model(*arguments)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_images_and_text(case, tmp_path):
    *fields, images, size, pads = CASES[case]
    fields = made.fields_of(*fields[:2], **fields[2])
    for seed in range(3):
        reference = made.make_reference(fields, seed)
        model = qwen3_vl.load(made.save_reference(reference, tmp_path / str(seed)))
        ids, mask, pictures = made.make_inputs(fields, images, size, seed, pads)
        want = made.run_reference(reference, fields, ids, mask, pictures)
        inputs = [jnp.asarray(ids), jnp.asarray(pictures)] + (
            [jnp.asarray(mask)] if any(pads) else []
        )
        got = np.asarray(logits(model, *inputs))
        error = np.abs(got - want).max() / want.std()
        print(case, seed, f"{error:.1e}")
        assert error <= TOLERANCE, f"{case}, seed {seed}: {error:.1e}"


def test_every_part_is_seen():
    """With any of its tensors turned over, the publisher's logits change by more than ten times
    what the comparison lets pass."""
    fields = made.fields_of()
    reference = made.make_reference(fields, 0)
    inputs = made.make_inputs(fields, 2, (32, 48), 0, (0, 3))
    want = made.run_reference(reference, fields, *inputs)
    for name, parameter in reference.named_parameters():
        kept = parameter.data
        parameter.data = kept.flip(0)
        got = made.run_reference(reference, fields, *inputs)
        parameter.data = kept
        assert np.abs(got - want).max() > 10 * TOLERANCE * want.std(), name


def test_positions_are_the_publishers():
    fields = made.fields_of()
    reference = made.make_reference(fields, 0)
    for seed, (size, pads) in enumerate([((32, 48), (0, 4)), ((80, 16), (3, 0)), ((16, 16), (0,))]):
        ids, mask, pictures = made.make_inputs(fields, 3, size, seed, pads)
        grids = made.pixel_values(fields, pictures.reshape(-1, *size, 3))[1]
        want, _ = reference.model.get_rope_index(
            torch.from_numpy(ids).long(), torch.from_numpy((ids == made.IMAGE).astype(np.int32)),
            torch.from_numpy(grids), attention_mask=torch.from_numpy(mask.astype(np.int64)),
        )  # fmt: skip
        is_image = jnp.asarray((ids == made.IMAGE) & mask)
        got = text.positions(is_image, jnp.asarray(mask), (size[0] // 16, size[1] // 16))
        np.testing.assert_array_equal(np.where(mask, got, 0), want.numpy())


@pytest.mark.parametrize("size", [(64, 96), (37, 53), (300, 411), (256, 256), (45, 1000), (17, 18)])
def test_preprocessing_is_the_publishers(size):
    """Of bytes, as PIL resizes them: within 1.5 levels of 255 where it does, else equal. Of grey
    noise, for cubic kernels may leave [0, 1], and PIL clips between columns and rows."""
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 65_536, "longest_edge": 200_000},
    )  # fmt: skip
    config = qwen3_vl.Config(max_pixels=200_000)
    noise = np.random.default_rng(sum(size)).integers(64, 192, (*size, 3), np.uint8)
    out = processor(images=[noise], input_data_format="channels_last", return_tensors="np")
    pixels = qwen3_vl.prepare(config, jnp.asarray(noise[None], jnp.float32) / 255)
    height, width = pixels.shape[1:3]
    assert out["image_grid_thw"].tolist() == [[1, height // 16, width // 16]]
    flat = np.asarray(vision.patchify(config.vision, pixels)[0])
    theirs = out["pixel_values"].reshape(len(flat), 3, 2, 16, 16)
    np.testing.assert_array_equal(theirs[:, :, 0], theirs[:, :, 1])
    theirs = theirs[:, :, 0].transpose(0, 2, 3, 1).reshape(flat.shape)
    levels = 1e-4 if (height, width) == size else 1.5
    assert np.abs(flat - theirs).max() <= levels * 2 / 255


@pytest.mark.parametrize("name", ["qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b"])
def test_published_sizes_have_the_publishers_tensors(name):
    """Names and shapes of every tensor, and their number of parameters, without their memory."""
    config = getattr(qwen3_vl.Config, name)()
    with torch.device("meta"):
        theirs = transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(**config.to_dict())
        )
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    model = nnx.eval_shape(lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(0)))
    leaves = {
        leaf_path(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    found = {}
    counts = {
        "i": config.vision.depth,
        "j": config.text.num_hidden_layers,
        "k": len(config.vision.deepstack_visual_indexes),
    }
    for key, leaf, _ in qwen3_vl.table(config):
        letter = next((n for n in counts if f"{{{n}}}" in key), None)
        for number in range(counts[letter] if letter else 1):
            path = leaf.format(**dict.fromkeys(counts, number))
            stacked = letter is not None and path == leaf
            found[key.format(**dict.fromkeys(counts, number))] = leaves[path][int(stacked) :]
    assert found.keys() == shapes.keys()
    assert all(sorted(found[key]) == sorted(shapes[key]) for key in shapes)
    assert config.parameters() == sum(p.numel() for p in theirs.parameters())


def test_saved_folder_is_read_by_transformers(tmp_path):
    reference = made.make_reference(made.fields_of(tie_word_embeddings=False), 5)
    made.save_reference(reference, tmp_path / "theirs")
    qwen3_vl.save(qwen3_vl.load(tmp_path / "theirs"), tmp_path / "ours")
    read = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for key, value in reference.state_dict().items():
        assert torch.equal(read.state_dict()[key], value), key
    ours, theirs = read.config.to_dict(), reference.config.to_dict()
    for part in ("text_config", "vision_config"):
        assert {k: v for k, v in ours[part].items() if k != "dtype"} == {
            k: v for k, v in theirs[part].items() if k != "dtype"
        }


def test_small_tokenizer_is_read_by_transformers(tmp_path):
    """The whole prompt, as a string with its special tokens, has the ids that we put together."""
    size = qwen3_vl.train_tokenizer(["How sharp is it? One digit."] * 3, tmp_path, 300)
    tokens = qwen3_vl.read_tokens(tmp_path, qwen3_vl.Config.nano(size))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    picture = "<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>"
    prompt = (
        f"<|im_start|>user\n{picture * 2}How sharp? 7 of 10.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, mask = tokens.ask(["How sharp? 7 of 10."], images=2, per_image=3)
    assert mask.all()
    assert ids[0].tolist() == theirs(prompt, add_special_tokens=False)["input_ids"]
