"""Attention of one device: kernels for TPUs and GPUs, each with a backward pass.

A kernel is called as `kernel(q, k, v, scale=, length=)` with [B N H D] arrays of one device; keys
from `length` on are padding. `forward` and `backward` are its two halves for the ring
(attention_context.py): the first also returns the logarithm of the softmax's sum, [B H N] float32;
the second takes that sum over all keys and gives the share of these keys in each gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from worldr1_jax.nn.layers import SAVED

LANES = 128  # a TPU kernel's blocks are multiples of it
# Queries and keys a block of the splash kernel, by generation of the chip: the largest that the
# compiler fits into the core's memory, forward and backward.
BLOCKS = {"v4": 512, "v5e": 1024, "v5p": 1024, "v6e": 2048, "tpu7x": 2048}
BLOCK_BYTES = 32 << 20  # logits of all heads that `Blocks` holds at a time
CPU_ROWS = 384  # queries (or keys) of one head that `Blocks` takes at a time on a CPU
NOWHERE = float(jnp.finfo(jnp.float32).min)
# Keys from which on it costs more to attend to them again than to keep the result and the sum of
# the softmax for the backward pass (see `name_of`).
LONG = 2048


class Kernel(Protocol):
    """What attention_context.py asks of a kernel of one device."""

    multiple: int  # numbers of tokens have to be multiples of it

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, length: jax.Array | int
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Plain XLA on blocks, one after the other: of queries, and backward, of keys, where logits are
    computed again.

    Attributes:
      rows: queries (backward, keys) of a block, of one head of one video at a time: XLA's CPU
        backend is twice as fast at products of two matrices as at batches of them. None: blocks of
        all heads of all videos, as accelerators want.
      logits_bytes: with all heads, about what a block's logits take.
    """

    rows: int | None = None
    logits_bytes: int = BLOCK_BYTES
    multiple: int = 1

    def __call__(self, q, k, v, *, scale, length):
        """[B N H D]."""
        every = isinstance(length, int) and length >= k.shape[1]
        return _attend(self, scale, q, k, v, None if every else length)

    def forward(self, q, k, v, *, scale, length):
        """Output [B N H D] and log-sum-exp [B H N]; length None: all keys are real."""
        size = self._size(q, k)

        def head(q, k, v):
            values = v.T
            parts = jax.lax.map(
                lambda rows: _block_forward(rows, k, values, scale, length), _block(q, size)
            )
            return [_unblock(x, q.shape[0]) for x in parts]

        out, lse = self._each(head, *(_head_by_head(x) for x in (q, k, v)))
        return _by_video(out, q.shape[0]), lse.reshape(q.shape[0], -1, q.shape[1])

    def backward(self, q, k, v, out, lse, grad, *, scale, length):
        """Gradients of q, k and v through these keys, given `lse` and `out` over all keys.

        By blocks of keys, with the keys as rows: the three sums are then products of matrices as
        they lie, two of them whole. Blocks of queries, whose gradients of keys and values are
        products of transposed matrices and add up over blocks, take XLA's CPU backend 1.4x the
        processor time (4,096 tokens).
        """
        size = self._size(k, q)
        delta = jnp.einsum("bnhd,bnhd->bhn", out.astype(jnp.float32), grad.astype(jnp.float32))

        def head(q, k, v, grad, lse, delta):
            def one(dq, block):
                keys, values, places = block
                logits = _logits(keys, q, scale)
                if real is not None:
                    logits = jnp.where(places[:, None] < real, logits, NOWHERE)
                weights = jnp.exp(logits - lse)
                d_weights = jnp.einsum("md,nd->mn", values, grad, preferred_element_type=dq.dtype)
                d_logits = weights * (d_weights - delta)
                dk = jnp.einsum("mn,nd->md", d_logits, q.astype(jnp.float32)) * scale
                dv = jnp.einsum("mn,nd->md", weights, grad)
                return dq + jnp.einsum("md,mn->dn", keys.astype(jnp.float32), d_logits), (dk, dv)

            blocks = _block(k, size), _block(v, size)
            places = jnp.arange(blocks[0].shape[0] * size).reshape(-1, size)
            padded = places.size > k.shape[0]
            real = k.shape[0] if padded and length is None else length
            zeros = jnp.zeros(q.shape[::-1], jnp.float32)
            dq, (dk, dv) = jax.lax.scan(one, zeros, (*blocks, places))
            return dq.T * scale, _unblock(dk, k.shape[0]), _unblock(dv, k.shape[0])

        per_token = (_head_by_head(x) for x in (q, k, v, grad.astype(jnp.float32)))
        stats = (x.reshape(-1, x.shape[-1]) for x in (lse, delta))
        return tuple(
            _by_video(x, q.shape[0]) for x in self._each(head, *per_token, *stats)
        )  # fmt: skip

    def _each(self, head, *inputs):
        """Calls `head` on each head of each video: one after the other, or all together."""
        if self.rows is None:
            return jax.vmap(head)(*inputs)
        return jax.lax.map(lambda one: head(*one), inputs)

    def _size(self, q, k) -> int:
        """Rows of q a block: at most `rows`, or what `logits_bytes` hold; all blocks alike."""
        batch, length, heads = q.shape[:3]
        most = self.rows or self.logits_bytes // (4 * batch * heads * k.shape[1]) // 8 * 8
        count = -(-length // max(most, 8))
        return min(-(-length // count // 8) * 8, length)


@dataclasses.dataclass(frozen=True)
class Splash:
    """jax's splash attention for TPUs: flash attention forward and backward, logits never in HBM.

    Attributes:
      block: queries and keys of a block; smaller ones where there are fewer.
      keys: that a block of the backward pass has in the core's memory at a time. The kernel gives
        the shares of all these blocks in the gradient of the queries apart, in HBM, so that few
        and large ones cost least; `keys_in` says what fits.
      interpret: run the kernel's arithmetic on any device, slowly, for tests.
    """

    block: int = 1024
    keys: int = 2048
    interpret: bool = False
    multiple: int = LANES

    def __call__(self, q, k, v, *, scale, length):
        """[B N H D]."""
        q, k, v = (_heads_first(x) for x in (q * jnp.asarray(scale, q.dtype), k, v))
        segments = self._segments(q, k, length)
        call = functools.partial(self._kernel(q, k), segment_ids=segments)
        return _heads_first(jax.vmap(call)(q, k, v))

    def forward(self, q, k, v, *, scale, length):
        """Output [B N H D] and log-sum-exp [B H N]; a query that sees no key has a very low one."""
        q, k, v = (_heads_first(x) for x in (q * jnp.asarray(scale, q.dtype), k, v))
        segments = self._segments(q, k, length)
        call = functools.partial(self._kernel(q, k, residuals=True), segment_ids=segments)
        out, (lse, *_) = jax.vmap(call)(q, k, v)
        return _heads_first(out), lse

    def backward(self, q, k, v, out, lse, grad, *, scale, length):
        """Gradients of q, k and v through these keys, given `lse` and `out` over all keys.

        jax has no public name for the kernel's backward half, which is what a ring needs.
        """
        scaled, keys, values, out, grad = (
            _heads_first(x) for x in (q * jnp.asarray(scale, q.dtype), k, v, out, grad)
        )
        kernel, segments = self._kernel(scaled, keys), self._segments(scaled, keys, length)
        names = (
            "save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name",
            "mask_function", "attn_logits_soft_cap", "interpret",
        )  # fmt: skip
        static: list[Any] = [kernel.kwargs[name] for name in names]

        def one(q, k, v, out, lse, grad):
            saved = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
            backward: Any = splash._splash_attention_bwd
            return backward(*static, saved, grad)[3:6]

        dq, dk, dv = jax.vmap(one)(scaled, keys, values, out, lse, grad)
        return tuple(
            _heads_first(x).astype(jnp.float32) for x in (dq * jnp.asarray(scale, dq.dtype), dk, dv)
        )

    def block_of(self, tokens: int) -> int:
        """Queries or keys of a block where there are so many, a multiple of `LANES`."""
        return _divisor(tokens, self.block)

    def keys_of(self, tokens: int) -> int:
        """Keys of a block of the backward pass where there are so many; see `keys`."""
        return _divisor(tokens, self.keys, _computed(self.block_of(tokens)))

    def cost(self, tokens: int) -> float:
        """Of attention of so many tokens to each other, in no unit; a rule of thumb.

        Forward, blocks of 128, 256, 384 and 512 take 6.5, 2.4, 1.7 and 1.1 times as long on v5p as
        those of 1024 (tests/measure/kernels.py --block). A gradient that the backward pass holds
        counts 1/500 of a forward, about twice what it takes to write and read it, for memory.
        """
        forward = 1 + 5.5 * (LANES / self.block_of(tokens)) ** 2
        return tokens**2 * (forward + tokens // self.keys_of(tokens) / 500)

    def _kernel(self, q, k, residuals: bool = False) -> Any:
        heads, rows, columns = q.shape[1], q.shape[2], k.shape[2]
        block_q, block_k = self.block_of(rows), self.block_of(columns)
        sizes = splash.BlockSizes(
            block_q=block_q, block_kv=block_k, block_kv_compute=_computed(block_k),
            block_q_dkv=_divisor(rows, 1024), block_kv_dkv=self.keys_of(columns),
            block_kv_dkv_compute=_computed(block_k), use_fused_bwd_kernel=True,
        )  # fmt: skip
        mask = masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads)
        return splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=residuals,
            residual_checkpoint_name=name_of(columns), interpret=self.interpret,
        )  # fmt: skip

    def _segments(self, q, k, length):
        """Segment 0 for queries and keys, 1 for padded keys: nobody looks there."""
        return splash.SegmentIds(
            q=jnp.zeros(q.shape[2], jnp.int32),
            kv=(jnp.arange(k.shape[2]) >= length).astype(jnp.int32),
        )


@dataclasses.dataclass(frozen=True)
class CuDnn:
    """cuDNN's fused attention on NVIDIA GPUs, forward and backward; half precision only."""

    multiple: int = 1

    def __call__(self, q, k, v, *, scale, length):
        """[B N H D]."""
        batch = q.shape[0]
        queries = jnp.full(batch, q.shape[1], jnp.int32)
        keys = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (batch,))
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, implementation="cudnn", query_seq_lengths=queries,
            key_value_seq_lengths=keys,
        )  # fmt: skip


def named(*found: jax.Array, keys: int) -> tuple[jax.Array, ...]:
    """The same arrays under the name of `name_of`."""
    name = name_of(keys)
    return tuple(checkpoint_name(x, name) for x in found) if name else found


def name_of(keys: int) -> str | None:
    """By which a remat policy may keep what a kernel found (layers.scan_layers); None for few
    keys."""
    return SAVED if keys >= LONG else None


def keys_in(memory: int) -> int:
    """Keys of a block of the splash kernel's backward pass that fit into so many bytes of a core's
    memory: 16, 32 and 48 MiB hold 2048, 4096 and 8192, as the compiler has it (4.2 KB a key)."""
    return 1 << ((memory // 4608).bit_length() - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks, scale, q, k, v, length):
    """`Blocks` with its own backward half: what jax derives computes each output once more."""
    return blocks.forward(q, k, v, scale=scale, length=length)[0]


def _attend_forward(blocks, scale, q, k, v, length):
    out, lse = named(*blocks.forward(q, k, v, scale=scale, length=length), keys=k.shape[1])
    return out, (q, k, v, length, out, lse)


def _attend_backward(blocks, scale, saved, grad):
    q, k, v, length, out, lse = saved
    grads = blocks.backward(q, k, v, out, lse, grad, scale=scale, length=length)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _block_forward(rows, k, values, scale, length):
    """Output [n D] and log-sum-exp [n] of n queries of one head; values [D m].

    Keys are the rows here too: XLA's CPU backend takes 0.85 of the time for the softmax over rows.
    """
    logits = _logits(k, rows, scale)
    if length is not None:
        logits = jnp.where(jnp.arange(k.shape[0])[:, None] < length, logits, NOWHERE)
    top = jnp.max(logits, axis=0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=0)
    # Divided after the product, which has fewer numbers than the weights.
    out = jnp.einsum(
        "dm,mn->dn", values, weights.astype(values.dtype), preferred_element_type=jnp.float32
    )
    return (out / total).astype(values.dtype).T, top + jnp.log(total)


def _logits(x, y, scale):
    """Of each row of x [n D] with each row of y [m D]: [n m]."""
    return jnp.einsum("nd,md->nm", x, y, preferred_element_type=jnp.float32) * scale


def _block(x, size):
    """[N ...] -> [blocks size ...], zeros at the end."""
    count = -(-x.shape[0] // size)
    x = jnp.pad(x, ((0, count * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(count, size, *x.shape[1:])


def _unblock(x, length):
    """[blocks size ...] -> [N ...]."""
    return x.reshape(-1, *x.shape[2:])[:length]


def _head_by_head(x):
    """[B N H D] -> [B*H N D]."""
    return _heads_first(x).reshape(-1, x.shape[1], x.shape[3])


def _by_video(x, batch):
    """[B*H N D] -> [B N H D]."""
    return _heads_first(x.reshape(batch, -1, *x.shape[1:]))


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _computed(block: int) -> int:
    """Keys of a block that the kernel multiplies at a time."""
    return _divisor(block, 1024)


def _divisor(length: int, largest: int, unit: int = LANES) -> int:
    """The largest multiple of `unit` up to `largest`, or `unit`, that divides the length."""
    if length % LANES:
        raise ValueError(
            f"splash attention got {length} tokens a device; it needs a multiple of {LANES}"
        )
    most = max(min(length, largest), unit)
    return max(n for n in range(unit, most + 1, unit) if length % n == 0)
