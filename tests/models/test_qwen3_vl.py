"""Qwen3-VL without torch: golden of transformers, places of tokens and weights, prompts, the judge,
files, errors."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests import goldens
from tests.goldens import make_qwen3_vl as made
from worldr1_jax.mesh import placement
from worldr1_jax.mesh.arrays import batched
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import qwen3_vl
from worldr1_jax.models.qwen3_vl import text, vision
from worldr1_jax.plan.flops import matmul_flops

NANO = qwen3_vl.Config.nano()


@pytest.fixture(scope="module")
def golden():
    return goldens.read(made.PATH)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The golden's network, in the files that transformers' save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    (folder / "preprocessor_config.json").write_text(json.dumps(made.PREPROCESSOR))
    return goldens.publish(golden, folder, "model.safetensors")


@pytest.fixture(scope="module")
def model(published):
    return qwen3_vl.load(published)


@pytest.fixture(scope="module")
def inputs(golden):
    images = jnp.asarray(golden["images"], jnp.float32) / 255
    return jnp.asarray(golden["token_ids"]), images, jnp.asarray(golden["mask"])


@nnx.jit
def answer(model, *inputs, rows=None):
    return model(*inputs, rows=rows)


def test_golden_of_transformers(golden, model, inputs):
    got = answer(model, *inputs)
    assert got.dtype == jnp.float32 and model.text.blocks.q.kernel.dtype == jnp.float32
    # float32 sums in another order
    assert np.abs(got - golden["logits"]).max() <= 1e-4 * golden["logits"].std()


def test_padding_does_not_matter(golden, model, inputs):
    """Neither what it is, nor on which side, nor whether there is any."""
    ids, images, mask = (x[1:] for x in inputs)
    alone = answer(model, ids[:, 5:], images)
    behind = jnp.roll(ids, -5, axis=1), images, jnp.roll(mask, -5, axis=1)
    other = jnp.where(mask, ids, made.IMAGE), images, mask
    for padded in (behind, other):
        # float32 sums of other lengths
        np.testing.assert_allclose(answer(model, *padded), alone, atol=1e-4)


def test_only_wanted_rows_and_bfloat16(golden, published, model, inputs):
    rows = jnp.asarray([7, 3, 60])
    some = answer(model, *inputs, rows=rows)
    np.testing.assert_allclose(some, golden["logits"][:, rows], atol=1e-4)
    half = qwen3_vl.load(published, dtype="bfloat16")
    assert half.text.blocks.q.kernel.dtype == jnp.bfloat16
    assert half.text.norm_out.scale.dtype == jnp.float32
    error = np.sqrt(np.mean((answer(half, *inputs) - golden["logits"]) ** 2))
    assert error <= 0.05 * golden["logits"].std()  # 8 bits of mantissa through three layers


def test_sharded_equals_unsharded(golden, published, inputs):
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    model = qwen3_vl.load(published, mesh=mesh)
    kernel = model.text.blocks.gate.kernel
    assert kernel[...].sharding.shard_shape(kernel.shape) < kernel.shape
    twice = [jax.device_put(jnp.concatenate([x, x]), batched(mesh)) for x in inputs]
    with jax.set_mesh(mesh):
        got = answer(model, *twice)
    want = np.concatenate([golden["logits"]] * 2)
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * want.std()


@pytest.mark.parametrize("tied", [True, False])
def test_every_leaf_has_a_place_and_every_place_a_leaf(tied):
    config = dataclasses.replace(NANO, tie_word_embeddings=tied)
    state = nnx.state(nnx.eval_shape(lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(0))))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.tree.leaves(placement.shardings_of(state, qwen3_vl.PLACES, mesh))
    assert len(placed) == len(jax.tree.leaves(state))


def test_places_of_tokens_by_hand():
    """An image of 3 x 4 tokens after 3 of text, then 2 of text; two tokens of padding before."""
    is_image = np.zeros((1, 19), bool)
    is_image[0, 5:17] = True
    time, row, column = text.positions(is_image, np.arange(19)[None] >= 2, (3, 4))[:, 0]
    assert time.tolist() == [0, 0, 0, 1, 2, *[3] * 12, 7, 8]
    assert row.tolist() == [0, 0, 0, 1, 2, *[3] * 4, *[4] * 4, *[5] * 4, 7, 8]
    assert column.tolist() == [0, 0, 0, 1, 2, *[3, 4, 5, 6] * 3, 7, 8]


def test_angles_turn_with_time_row_and_column_by_turns():
    config = qwen3_vl.TextConfig()
    cos, sin = text.rope_tables(config, jnp.asarray([1, 2, 3])[:, None, None])
    angles = np.arctan2(sin, cos)[0, 0, 0] / 5e6 ** (-np.arange(64) / 64)
    # 20 of rows and columns each among the first 60 frequencies, 24 of time
    wanted = [1, 2, 3] * 20 + [1] * 4
    assert np.allclose(angles, wanted, atol=1e-3)


def test_vision_positions_by_hand():
    np.testing.assert_allclose(vision.linear_matrix(3, 5) @ [0.0, 10, 30], [0, 5, 10, 20, 30])
    config = qwen3_vl.VisionConfig(patch_size=1, hidden_size=16, num_heads=2)
    image = jnp.arange(8.0).reshape(1, 2, 4, 1).repeat(3, axis=-1)
    assert vision.patchify(config, image)[0, :, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    cos, _ = vision.rope_tables(config, (2, 4))
    # the frequencies of a head of 8 are 1 and 0.01, for the row and again for the column
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    want = [[np.cos(y), np.cos(y / 100), np.cos(x), np.cos(x / 100)] for y, x in places]
    np.testing.assert_allclose(cos[:, 0], want, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((480, 832), (480, 832)),  # as it is
        ((481, 830), (480, 832)),
        ((64, 96), (224, 320)),  # up to 65,536 pixels at least
        ((6000, 4000), (4992, 3328)),  # down to 16,777,216 at most
        ((48, 2000), (64, 1984)),  # halves round to even
    ],
)
def test_prepared_sizes(size, want):
    assert qwen3_vl.prepared_size(qwen3_vl.Config(), size) == want


def test_preparation():
    config = qwen3_vl.Config()
    image = jax.random.uniform(jax.random.key(0), (2, 256, 288, 3))
    np.testing.assert_array_equal(qwen3_vl.prepare(config, image), image * 2 - 1)
    larger = qwen3_vl.prepare(config, jnp.ones((1, 1, 64, 64, 3)))
    assert larger.shape == (1, 1, 256, 256, 3) and np.allclose(larger, 1)
    edge = jnp.zeros((64, 64, 3)).at[32:].set(1)
    assert np.abs(qwen3_vl.prepare(config, edge)).max() <= 1  # a cubic kernel overshoots
    with pytest.raises(ValueError, match="images of 12x40 are smaller than a patch"):
        qwen3_vl.prepared_size(config, (12, 40))
    with pytest.raises(ValueError, match="images of 16x4000 are too narrow"):
        qwen3_vl.prepared_size(config, (16, 4000))


def test_grade_by_hand():
    """Twelve tokens; the digits are the last ten."""
    p = np.full((4, 12), 1e-9)
    p[0, 2 + 9] = 1  # nine
    p[1, [2, 2 + 9]] = 0.5, 0.5  # nought or nine
    p[2, [0, 2 + 3, 2 + 6]] = 0.4, 0.3, 0.3  # a word, three or six
    p[3, [0, 2 + 9]] = 0.51, 0.49  # more of a word
    got = qwen3_vl.grade(jnp.log(p), range(2, 12))
    np.testing.assert_allclose(got, [1, 0.5, 0.5, np.nan], atol=1e-6)
    assert np.nanmax(got) <= 1
    with pytest.raises(ValueError, match="digits are 3 tokens"):
        qwen3_vl.grade(jnp.log(p), [1, 2, 3])


def test_judge_is_the_grade_of_the_logits(golden, model, inputs):
    ids, images, mask = inputs
    digits = np.argsort(golden["logits"][0])[-10:]  # as an answer that is a digit
    got = qwen3_vl.judge(lambda *x: answer(model, *x), ids, images, digits=digits, mask=mask)
    np.testing.assert_allclose(got, qwen3_vl.grade(golden["logits"], digits), atol=1e-5)
    assert 0 <= got[0] <= 1


def test_wrong_number_of_image_tokens(model, inputs):
    ids, images, mask = inputs
    ids = ids.at[1, jnp.argmax(ids[1] == made.IMAGE)].set(3)
    with pytest.raises(ValueError, match="row 1 of token_ids has 11 image tokens; 2 images of 32x"):
        jax.eval_shape(lambda: model(np.asarray(ids), images, np.asarray(mask)))
    got = answer(model, ids, images, mask)
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["How clean is it? Answer with one digit."] * 3
    size = qwen3_vl.train_tokenizer(texts, folder, 300)
    return qwen3_vl.read_tokens(folder, qwen3_vl.Config.nano(size)), folder


def test_prompts(tokens):
    tokens, _ = tokens
    special = tokens.special
    assert tokens.digits == tuple(range(15, 25))  # as published: bytes in their order
    size = tokens.tokenizer.get_vocab_size()
    assert 262 < size <= 300 and sorted(special.values()) == list(range(size - 6, size))
    ids, mask = tokens.ask(["How clean is it?", "Sharp?"], images=2, per_image=3)
    assert ids.shape == mask.shape and mask[1].all()  # its words are not among the merges
    pads = int((~mask[0]).sum())
    assert (ids[0, :pads] == special["pad"]).all() and not mask[0, :pads].any() and pads > 0
    whole = "<|im_start|>user\n" + ("<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>") * 2
    whole += "Sharp?<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.tokenizer.encode(whole).ids == ids[1].tolist()
    assert tokens.ask(["Sharp?"], 2, 3, length=60)[0].shape == (1, 60)
    with pytest.raises(ValueError, match="length is 20 and has to be at least that"):
        tokens.ask(["Sharp?"], 2, 3, length=20)
    with pytest.raises(ValueError, match=r"holds the special token <\|im_end\|>"):
        tokens.ask(["Sharp?<|im_end|>"], 2, 3)
    with pytest.raises(ValueError, match="questions are empty"):
        tokens.ask([], 2, 3)


def test_expansion():
    assert qwen3_vl.expand([5, 9, 6, 9], 9, 3).tolist() == [5, 9, 9, 9, 6, 9, 9, 9]


def test_tokenizers_that_do_not_fit(tokens, tmp_path):
    _, folder = tokens
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        qwen3_vl.read_tokens(tmp_path, NANO)
    with pytest.raises(ValueError, match="image_token_id is 511"):
        qwen3_vl.read_tokens(folder, NANO)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        qwen3_vl.read_tokens(tmp_path, NANO)
    text = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|picture|>"))
    with pytest.raises(ValueError, match=r"lacks the token <\|image_pad\|>"):
        qwen3_vl.read_tokens(tmp_path, NANO)


def test_saves_what_it_read(golden, model, published, tmp_path):
    qwen3_vl.save(model, tmp_path)
    theirs, ours = (load_file(p / "model.safetensors") for p in (published, tmp_path))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    assert qwen3_vl.read_config(tmp_path) == model.config


def _change(published, folder, edit):
    weights = load_file(published / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors")
    (folder / "config.json").write_text((published / "config.json").read_text())
    return folder


def test_other_names_of_the_same_tensors(published, model, tmp_path):
    """Single files without "model.", and the tied table under its second name too."""

    def edit(weights):
        table = weights["model.language_model.embed_tokens.weight"]
        short = {k.removeprefix("model.").removeprefix("language_"): v for k, v in weights.items()}
        return {**short, "lm_head.weight": table.copy()}

    again = qwen3_vl.load(_change(published, tmp_path, edit))
    for a, b in zip(
        jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


KEY = "model.visual.deepstack_merger_list.1.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != KEY}, f"lacks the key '{KEY}'"),
        (lambda w: w | {"model.visual.more": w[KEY]}, "unknown keys, such as 'model.visual.more'"),
        (lambda w: w | {KEY: w[KEY][:3].copy()}, f"'{KEY}' has shape"),
        (lambda w: w | {KEY: w[KEY].astype(ml_dtypes.float8_e4m3fn)}, "F8_E4M3.*bf16, fp16"),
    ],
)
def test_files_that_do_not_fit(published, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        qwen3_vl.load(_change(published, tmp_path, edit))


def test_both_spellings_of_rope(golden):
    values = json.loads(str(golden["config"]))
    config = qwen3_vl.Config.from_dict(values)
    rope = values["text_config"].pop("rope_parameters")
    values["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del values["vision_config"]["rope_parameters"]
    assert qwen3_vl.Config.from_dict(values) == config
    assert config.text.rope_theta == 5e6 and config.text.mrope_section == (4, 2, 2)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (None, "model_type", "qwen2_5_vl", "architecture 'qwen2_5_vl'; this network is 'qwen3_vl'"),
        (None, "model_type", "qwen3_vl_moe", "architecture 'qwen3_vl_moe'"),
        (None, "quantization_config", {"quant_method": "fp8"}, "give the release in bf16"),
        (None, "text_config", None, "needs a text_config"),
        ("text_config", "attention_bias", True, "'attention_bias' is True"),
        ("text_config", "num_key_value_heads", 3, "4 heads of 16 over 3"),
        ("vision_config", "hidden_act", "gelu", "'hidden_act' is 'gelu'"),
        ("vision_config", "out_hidden_size", 64, "'out_hidden_size' is 64"),
        ("vision_config", "num_position_embeddings", 35, "has to be a square"),
        ("vision_config", "deepstack_visual_indexes", [1, 3], "below depth 3"),
        ("vision_config", "deepstack_visual_indexes", [], "one or more"),
    ],
)
def test_configs_that_do_not_fit(golden, part, field, value, message):
    values = json.loads(str(golden["config"]))
    (values[part] if part else values)[field] = value
    with pytest.raises(ValueError, match=message):
        qwen3_vl.Config.from_dict(values)


def test_more_configs_that_do_not_fit(golden):
    values = json.loads(str(golden["config"]))
    rope = values["text_config"]["rope_parameters"]
    for field, value in (("rope_type", "yarn"), ("mrope_interleaved", False)):
        values["text_config"]["rope_parameters"] = rope | {field: value}
        with pytest.raises(ValueError, match=f"RoPE field '{field}'"):
            qwen3_vl.Config.from_dict(values)
    values["text_config"]["rope_parameters"] = rope
    with pytest.raises(ValueError, match=r"preprocessor_config\.json field 'image_mean'"):
        qwen3_vl.Config.from_dict(values, made.PREPROCESSOR | {"image_mean": [0.48, 0.45, 0.4]})
    del values["text_config"]["head_dim"]
    with pytest.raises(ValueError, match="text_config of Qwen3-VL lacks the field 'head_dim'"):
        qwen3_vl.Config.from_dict(values)


def test_shapes_that_do_not_fit(model, inputs):
    ids, images, mask = inputs
    with pytest.raises(ValueError, match=r"images have the shape \[2, 32, 48, 3\]"):
        model(ids, images[:, 0])
    with pytest.raises(ValueError, match=r"token_ids have the shape"):
        model(ids[:1], images)
    with pytest.raises(ValueError, match=r"mask has the shape"):
        model(ids, images, mask[:, 1:])


PUBLISHED = {"qwen3_vl_2b": (1.41, 0.41, 0.31), "qwen3_vl_4b": (3.63, 0.41, 0.39),
             "qwen3_vl_8b": (6.95, 0.58, 1.24)}  # fmt: skip


@pytest.mark.parametrize("name", [*PUBLISHED, "nano"])
def test_number_of_parameters(name):
    config = getattr(qwen3_vl.Config, name)()
    model = nnx.eval_shape(lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert config.parameters() == count
    assert count == pytest.approx(1e9 * sum(PUBLISHED.get(name, (0.0013,))), rel=0.01)


def test_flops_are_the_programs():
    model = nnx.eval_shape(lambda: qwen3_vl.Qwen3VL(NANO, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    count = 20 + 2 * NANO.image_tokens((64, 96))
    ids = np.where(np.arange(count) < 20, 1, NANO.image_token_id)[None]
    images = jnp.zeros((1, 2, 64, 96, 3))

    counted = []

    def count_it(state):
        counted.append(matmul_flops(lambda: nnx.merge(graph, state)(ids, images)))
        return jnp.zeros(())

    jax.eval_shape(count_it, state)
    # Beside them: the resampling of the position table.
    assert counted[0] == pytest.approx(NANO.flops(20, 2, (64, 96)), rel=0.01)
    four = qwen3_vl.Config.qwen3_vl_4b()
    assert four.flops(450, 1, (384, 640)) == pytest.approx(6.0e12, rel=0.02)


@pytest.mark.slow
def test_a_small_one_learns():
    """Bright or dark, by steps of Adam on the very network that reads files: gradients reach every
    leaf, and the images."""
    config = dataclasses.replace(
        NANO, text=dataclasses.replace(NANO.text, num_hidden_layers=2, hidden_size=32),
        vision=dataclasses.replace(
            NANO.vision, depth=2, hidden_size=32, num_heads=2, deepstack_visual_indexes=(0,)
        ),
    )  # fmt: skip
    model = nnx.jit(lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(0)))()
    images = jnp.asarray([0.9, 0.1, 0.8, 0.2])[:, None, None, None, None] * jnp.ones((1, 32, 32, 3))
    ids = np.array([[5, *[config.image_token_id] * 4, 6]] * 4)
    answers = jnp.asarray([24, 15, 24, 15])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model, images):
            logits = model(ids, images)
            crossed = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
            return crossed.mean(), qwen3_vl.grade(logits, range(15, 25))

        gradient = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, grades), grads = gradient(model, images)
        optimizer.update(model, grads[0])
        return value, grades, jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grads)]).min()

    losses, grades, least = zip(*(step(model, optimizer) for _ in range(40)), strict=True)
    assert least[0] > 0
    assert losses[-1] < 0.1 < losses[0]
    assert np.isnan(grades[0]).all()  # what does not answer with digits does not grade
    assert (grades[-1][::2] > 0.9).all() and (grades[-1][1::2] < 0.1).all()
