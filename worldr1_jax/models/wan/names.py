"""Names of the Wan2.1 DiT's leaves, as `wan_dit.table` makes its rows of them.

Each row is (leaf path here, diffusers' name, name in Wan-Video's own release); `{i}` counts the
blocks, which the files hold apart and the network stacked.
"""

LINEARS = (  # without the suffix .weight or .bias
    ("time_embedder.linear_1", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time_embedder.linear_2", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time_proj", "condition_embedder.time_proj", "time_projection.1"),
    ("text_embedder.linear_1", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text_embedder.linear_2", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("proj_out", "proj_out", "head.head"),
    *(
        (f"blocks.{attn}.{ours}", f"blocks.{{i}}.{attn}.{theirs}", f"blocks.{{i}}.{wan}.{short}")
        for attn, wan in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for ours, theirs, short in (
            ("to_q", "to_q", "q"),
            ("to_k", "to_k", "k"),
            ("to_v", "to_v", "v"),
            ("to_out", "to_out.0", "o"),
        )
    ),
    ("blocks.ffn.linear_1", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
    ("blocks.ffn.linear_2", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
)
COPIES = (
    ("patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias"),
    ("scale_shift_table", "scale_shift_table", "head.modulation"),
    ("blocks.scale_shift_table", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
    *(
        (
            f"blocks.{attn}.{norm}.scale",
            f"blocks.{{i}}.{attn}.{norm}.weight",
            f"blocks.{{i}}.{wan}.{norm}.weight",
        )
        for attn, wan in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for norm in ("norm_q", "norm_k")
    ),
)
CROSS_NORM = (  # only with Config.cross_attn_norm; Wan-Video numbers the norms otherwise
    ("blocks.norm2.scale", "blocks.{i}.norm2.weight", "blocks.{i}.norm3.weight"),
    ("blocks.norm2.bias", "blocks.{i}.norm2.bias", "blocks.{i}.norm3.bias"),
)
