"""A small world with known truth: rooms and open floors with spheres, boxes and cylinders, ray cast
in JAX.

World axes are those of the first camera (x right, y down, z forward, in units of about a metre),
which stands at the origin at eye height over the floor. Everything is inside one box: a room's
walls, or a far backdrop painted as sky, so every ray hits something and depth is always finite.
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldr1_jax.nano.captions import COLORS, FLOORS, MOTIONS, PLACES, SHAPES, Spec

MAX_THINGS = 2
EYE_HEIGHT = 1.1
PIXEL_FILTER = 0.7  # standard deviation in pixels
FOCAL = 1.2  # in image widths, as published for the camera conditioning
LIGHT = np.array([-0.45, -0.8, -0.4], np.float32) / np.linalg.norm(
    [-0.45, -0.8, -0.4]
)  # towards the light
ROOM = ((-3.6, -1.9, -4.0), (3.6, EYE_HEIGHT, 6.5))  # low and high corner of a room
FIRST_SKY = PLACES.index("under a blue sky")  # places from here on are open
OPEN = ((-14.0, -9.0, -8.0), (14.0, EYE_HEIGHT, 15.0))


@flax.struct.dataclass
class Scene:
    """Geometry of one scene; unused places of `kind` hold -1."""

    kind: Int[Array, " O"]  # index into SHAPES
    color: Float[Array, "O 3"]
    center: Float[Array, "O 3"]  # at time 0
    half: Float[
        Array, "O 3"
    ]  # half extents; spheres use half[0], cylinders half[0] (radius) and half[1] (half height)
    yaw: Float[Array, " O"]  # radians about the vertical
    motion: Int[Array, " O"]  # index into MOTIONS
    floor: Int[Array, ""]  # index into FLOORS
    place: Int[Array, ""]  # index into PLACES
    phase: Float[Array, " 4"]  # shifts of floor and wall patterns


def build(spec: Spec, rng: np.random.Generator) -> Scene:
    """Places the spec's things: exact positions, sizes, turns and pattern phases come from
    `rng`."""
    kind = np.full(MAX_THINGS, -1, np.int32)
    color, center, half = (np.zeros((MAX_THINGS, 3), np.float32) for _ in range(3))
    yaw, motion = np.zeros(MAX_THINGS, np.float32), np.zeros(MAX_THINGS, np.int32)
    places = _places(spec, rng)
    for i, thing in enumerate(spec.things):
        size = {"": 1.0, "small": 0.65, "large": 1.35, "tall": 1.0}[thing.size] * rng.uniform(
            0.93, 1.07
        )
        width, height = 0.52 * size, (0.95 if thing.size == "tall" else 0.5) * size
        half[i] = (width, width if thing.shape == "sphere" else height, width)
        kind[i] = SHAPES.index(thing.shape)
        color[i] = COLORS[thing.color]
        center[i] = (places[i][0], EYE_HEIGHT - half[i][1], places[i][1])
        yaw[i] = rng.uniform(0, np.pi / 2)
        motion[i] = MOTIONS.index(thing.motion)
    fields = {
        "kind": kind,
        "color": color,
        "center": center,
        "half": half,
        "yaw": yaw,
        "motion": motion,
        "floor": np.int32(FLOORS.index(spec.floor)),
        "place": np.int32(PLACES.index(spec.place)),
        "phase": rng.uniform(0, 1, 4).astype(np.float32),
    }
    return Scene(**{name: jnp.asarray(value) for name, value in fields.items()})


def _places(spec: Spec, rng: np.random.Generator) -> list[tuple[float, float]]:
    """(x, z) of each thing, about 4 units ahead."""
    z = rng.uniform(3.7, 4.3)
    if len(spec.things) == 1:
        return [(rng.uniform(-0.3, 0.3), z)]
    gap = rng.uniform(0.72, 0.88)
    if spec.relation == "in front of":
        side = rng.uniform(0.25, 0.45) * rng.choice([-1.0, 1.0])
        return [(-side, z - 0.75), (side, z + 0.75)]
    sign = -1.0 if spec.relation == "left of" else 1.0
    return [(sign * gap, z + rng.uniform(-0.2, 0.2)), (-sign * gap, z + rng.uniform(-0.2, 0.2))]


def intrinsics(height: int, width: int) -> np.ndarray:
    """The pinhole camera of every nano video `[3 3]`, in pixels."""
    focal = FOCAL * width
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


@partial(jax.jit, static_argnames=("height", "width", "supersample"))
def render(
    scene: Scene,
    camtoworld: Float[Array, "F 4 4"],
    *,
    height: int = 64,
    width: int = 64,
    supersample: int = 2,
) -> tuple[Float[Array, "F H W 3"], Float[Array, "F H W"]]:
    """Ray casts one scene. Returns the video in [0, 1] and the exact depth along the optical axis
    at pixel centres.

    Pixels are means of `supersample`^2 rays, then filtered (PIXEL_FILTER).
    """
    times = jnp.linspace(0.0, 1.0, camtoworld.shape[0])
    matrix = intrinsics(height, width)

    def frame(inputs):
        pose, time = inputs
        fine, _ = _cast(scene, pose, time, _pixel_grid(height, width, supersample), matrix)
        coarse = fine.reshape(height, supersample, width, supersample, 3).mean((1, 3))
        coarse = _pixel_filter(coarse)
        _, depth = _cast(scene, pose, time, _pixel_grid(height, width, 1), matrix)
        return coarse, depth.reshape(height, width)

    return jax.lax.map(frame, (camtoworld, times))


def _pixel_filter(image: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    """Gaussian reconstruction filter over neighbouring pixels, edges repeated: with a box alone,
    edges of 64-pixel images flicker as they move."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / PIXEL_FILTER) ** 2)
    for axis in (0, 1):
        size = image.shape[axis]
        padded = jnp.pad(image, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(5)]
        image = sum(tap * part for tap, part in zip(taps / taps.sum(), shifted, strict=True))  # type: ignore[assignment]
    return image


def _pixel_grid(height: int, width: int, supersample: int) -> np.ndarray:
    y = (np.arange(height * supersample) + 0.5) / supersample
    x = (np.arange(width * supersample) + 0.5) / supersample
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)


def _cast(
    scene: Scene, pose: Array, time: Array, pixels: np.ndarray, matrix: np.ndarray
) -> tuple[Array, Array]:
    """Colour `[P 3]` and depth `[P]` of rays through pixels; ray directions have unit depth, so t
    is depth."""
    local = np.concatenate([(pixels - matrix[:2, 2]) / matrix[0, 0], np.ones((len(pixels), 1))], 1)
    direction = jnp.asarray(local, jnp.float32) @ pose[:3, :3].T
    origin = pose[:3, 3]
    depth, normal, albedo = _enclosure(scene, origin, direction, time)
    for i in range(MAX_THINGS):
        t, n = _hit_thing(scene, i, origin, direction, time)
        nearer = t < depth
        depth = jnp.where(nearer, t, depth)
        normal = jnp.where(nearer[:, None], n, normal)
        albedo = jnp.where(nearer[:, None], scene.color[i], albedo)
    # Surfaces with no normal (the sky) shine by themselves.
    lit = 0.55 + 0.45 * jnp.maximum(normal @ LIGHT, 0.0) - 0.12 * jnp.maximum(-normal @ LIGHT, 0.0)
    shade = jnp.where(jnp.any(normal != 0, -1), lit, 1.0)
    return jnp.clip(albedo * shade[:, None], 0.0, 1.0), depth


def _thing_center(scene: Scene, i: int, time: Array) -> Array:
    reach = 1.5 * (time - 0.5)
    none = jnp.zeros(3)
    offsets = jnp.stack([
        none,
        jnp.array([-1.0, 0, 0]) * reach,
        jnp.array([1.0, 0, 0]) * reach,
        jnp.array([0, 0, -1.0]) * reach,
        jnp.array([0, 0, 1.0]) * reach,
        jnp.array([0, -1.0, 0]) * 0.7 * jnp.abs(jnp.sin(2 * jnp.pi * time)),
    ])  # fmt: skip
    return scene.center[i] + offsets[scene.motion[i]]


def _hit_thing(
    scene: Scene, i: int, origin: Array, direction: Array, time: Array
) -> tuple[Array, Array]:
    """Distance (inf for a miss) and outward normal of the nearest hit with thing i, in its own
    turned frame."""
    cos, sin = jnp.cos(scene.yaw[i]), jnp.sin(scene.yaw[i])
    turn = jnp.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    o, d = turn @ (origin - _thing_center(scene, i, time)), direction @ turn.T
    half = scene.half[i]
    t, n = jax.lax.switch(  # a scene is not batched here, so only its own shape is computed
        scene.kind[i] + 1,
        [
            lambda: (jnp.full(d.shape[0], jnp.inf), jnp.zeros_like(d)),
            lambda: _hit_sphere(o, d, half[0]),
            lambda: _hit_box(o, d, half),
            lambda: _hit_cylinder(o, d, half[0], half[1]),
        ],
    )
    return jnp.where(t > 1e-2, t, jnp.inf), n @ turn


def _hit_sphere(o: Array, d: Array, radius: Array) -> tuple[Array, Array]:
    a, b, c = jnp.sum(d * d, -1), d @ o, o @ o - radius**2
    inside = b * b - a * c
    t = jnp.where(inside > 0, (-b - jnp.sqrt(jnp.maximum(inside, 0.0))) / a, jnp.inf)
    point = o + jnp.where(jnp.isfinite(t), t, 0.0)[:, None] * d
    return t, point / radius


def _hit_box(o: Array, d: Array, half: Array) -> tuple[Array, Array]:
    inverse = 1.0 / jnp.where(jnp.abs(d) < 1e-6, 1e-6, d)
    near = (-jnp.sign(inverse) * half - o) * inverse
    far = (jnp.sign(inverse) * half - o) * inverse
    enter, leave = near.max(-1), far.min(-1)
    t = jnp.where((enter < leave) & (enter > 0), enter, jnp.inf)
    axis = jax.nn.one_hot(near.argmax(-1), 3)
    return t, -axis * jnp.sign(d)


def _hit_cylinder(o: Array, d: Array, radius: Array, half_height: Array) -> tuple[Array, Array]:
    flat_d, flat_o = d[:, ::2], o[::2]
    a, b, c = jnp.sum(flat_d**2, -1), flat_d @ flat_o, flat_o @ flat_o - radius**2
    inside = b * b - a * c
    side = jnp.where(inside > 0, (-b - jnp.sqrt(jnp.maximum(inside, 0.0))) / a, jnp.inf)
    y = o[1] + jnp.where(jnp.isfinite(side), side, 0.0) * d[:, 1]
    side = jnp.where(jnp.abs(y) < half_height, side, jnp.inf)
    point = flat_o + jnp.where(jnp.isfinite(side), side, 0.0)[:, None] * flat_d
    side_normal = jnp.stack([point[:, 0], jnp.zeros_like(y), point[:, 1]], -1) / radius
    dy = jnp.where(jnp.abs(d[:, 1]) < 1e-6, 1e-6, d[:, 1])
    cap = (-half_height - o[1]) / dy  # the upper cap: y points down
    on_cap = jnp.sum((flat_o + cap[:, None] * flat_d) ** 2, -1) < radius**2
    cap = jnp.where(on_cap & (cap > 0), cap, jnp.inf)
    up = jnp.array([0.0, -1.0, 0.0])
    return jnp.minimum(side, cap), jnp.where((cap < side)[:, None], up, side_normal)


def _enclosure(
    scene: Scene, origin: Array, direction: Array, time: Array
) -> tuple[Array, Array, Array]:
    """The walls, floor and ceiling or sky: distance, inward normal (0 for sky) and painted
    colour."""
    is_open = scene.place >= FIRST_SKY
    low = jnp.where(is_open, jnp.array(OPEN[0]), jnp.array(ROOM[0]))
    high = jnp.where(is_open, jnp.array(OPEN[1]), jnp.array(ROOM[1]))
    safe = jnp.where(jnp.abs(direction) < 1e-6, 1e-6, direction)
    exits = jnp.maximum((low - origin) / safe, (high - origin) / safe)
    axis, t = exits.argmin(-1), exits.min(-1)
    point = origin + t[:, None] * direction
    is_floor = (axis == 1) & (direction[:, 1] > 0)
    wall = _paint_wall(scene, point, axis, direction)
    floor = _paint_floor(scene, point, t) * _contact_shadow(scene, point, time)[:, None]
    normal = -jax.nn.one_hot(axis, 3) * jnp.sign(direction)
    normal = jnp.where((is_open & ~is_floor)[:, None], 0.0, normal)
    return t, normal, jnp.where(is_floor[:, None], floor, wall)


def _soft(wave: Array) -> Array:
    """A sine sharpened towards a square, in [0, 1].

    Edges are soft and patterns coarse, a dozen pixels or more at the objects' distance: finer ones
    alias at 64 pixels.
    """
    return jax.nn.sigmoid(4.0 * wave)


def _mix(a, b, weight: Array) -> Array:
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return a + weight[:, None] * (b - a)


def _paint_floor(scene: Scene, point: Array, t: Array) -> Array:
    x, z = point[:, 0] + scene.phase[0], point[:, 2] + scene.phase[1]
    wave_x, wave_z = jnp.sin(jnp.pi * x / 1.2), jnp.sin(jnp.pi * z / 1.2)
    patterns = (
        lambda: _soft(2 * wave_x * wave_z),
        lambda: _soft(jnp.sin(jnp.pi * x / 0.8)),
        lambda: jnp.maximum(_soft(1 - 4 * jnp.abs(wave_x)), _soft(1 - 4 * jnp.abs(wave_z))),
        lambda: 0.5 + 0.5 * jnp.sin(4.5 * x) * jnp.cos(1.1 * z + 2 * jnp.floor(x / 1.4)),
    )
    paints = jnp.array([
        ((0.25, 0.25, 0.28), (0.80, 0.80, 0.78)),  # checkered
        ((0.30, 0.42, 0.50), (0.72, 0.76, 0.70)),  # striped
        ((0.62, 0.72, 0.70), (0.25, 0.35, 0.38)),  # tiled
        ((0.45, 0.28, 0.15), (0.66, 0.46, 0.27)),  # wooden
    ])  # fmt: skip
    weight = jax.lax.switch(scene.floor, patterns)
    fade = jnp.exp(-((t / 9.0) ** 2))  # far patterns would alias
    dark, light = paints[scene.floor]
    return _mix(dark, light, 0.5 + fade * (weight - 0.5))


def _paint_wall(scene: Scene, point: Array, axis: Array, direction: Array) -> Array:
    along = jnp.where(axis == 0, point[:, 2], point[:, 0]) + scene.phase[2]
    y = jnp.where(axis == 1, point[:, 2], point[:, 1]) + scene.phase[3]

    def bricks():
        shift = 0.5 * (jnp.floor(y / 1.1) % 2)
        joints = (
            jnp.abs(jnp.sin(jnp.pi * y / 1.1)),
            jnp.abs(jnp.sin(jnp.pi * (along / 2.2 + shift))),
        )
        return _mix((0.58, 0.30, 0.22), (0.74, 0.68, 0.60), _soft(1 - 5 * jnp.minimum(*joints)))

    def stripes():
        return _mix((0.40, 0.45, 0.62), (0.78, 0.78, 0.74), _soft(jnp.sin(jnp.pi * along / 1.1)))

    def dots():
        wave = 2 * jnp.sin(jnp.pi * along / 1.2) * jnp.sin(jnp.pi * y / 1.2)
        return _mix((0.78, 0.72, 0.60), (0.42, 0.55, 0.42), _soft(wave - 0.8))

    def sky(low, high, clouds):
        ray = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
        wave = jnp.sin(6 * ray[:, 0] + 6.28 * scene.phase[2]) + jnp.sin(
            14 * ray[:, 1] + 5 * ray[:, 0]
        )
        painted = _mix(low, high, jnp.clip(-1.8 * ray[:, 1], 0, 1))
        return painted + clouds * _soft(wave - 0.6)[:, None]

    places = (
        bricks,
        stripes,
        dots,
        lambda: sky((0.70, 0.84, 0.95), (0.25, 0.50, 0.88), 0.21),
        lambda: sky((0.98, 0.66, 0.38), (0.42, 0.30, 0.55), 0.14),
    )
    return jax.lax.switch(scene.place, places)


def _contact_shadow(scene: Scene, point: Array, time: Array) -> Array:
    shadow = jnp.ones(point.shape[0])
    for i in range(MAX_THINGS):
        center = _thing_center(scene, i, time)
        distance = jnp.sum((point[:, ::2] - center[::2]) ** 2, -1) / (1.25 * scene.half[i][0]) ** 2
        lift = jnp.maximum(EYE_HEIGHT - scene.half[i][1] - center[1], 0.0)
        strength = jnp.where(scene.kind[i] >= 0, 0.55 * jnp.exp(-lift), 0.0)
        shadow *= 1 - strength * jnp.exp(-(distance**2))
    return shadow
