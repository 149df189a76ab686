"""World-R1's configuration: nano (default, any machine), small (Wan2.1-1.3B) and large
(Wan2.1-14B).

    --config=configs/world.py          --config=configs/world.py:small
    --config=configs/world.py:nano,grpo (another algorithm, with its fields in config.algorithm)
    --config=configs/world.py:small,fast (what nano learns by)
    --config.sample.steps=20

Values marked [paper] are World-R1's (arXiv 2604.24764), [released] those of its code, [Wan] those
of Wan2.1; the others say where they come from. --help drops a mark where a value is another. All
variants have the same fields, and the same code reads them: each section is passed whole to the
dataclass that is named beside it, which says more, and what values it takes.
"""

import ml_collections

from worldr1_jax.algorithms import base

VARIANTS = ("nano", "small", "large")
# Flow-GRPO is the paper's. Nano learns by `_fast`: there, Flow-GRPO gains less than turning
# guidance on does, and what it gains is in part stillness (docs/results).
DEFAULTS = {"nano": "fast"}


def get_config(variant: str = "nano") -> ml_collections.ConfigDict:
    """The configuration of a variant, of "variant", "variant,algorithm" or "variant,fast"; raises
    ValueError for a name that is none."""
    variant, _, algorithm = variant.partition(",")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}': use one of {', '.join(VARIANTS)}")
    algorithm = algorithm or DEFAULTS.get(variant, "grpo")
    config = _paper("nft" if algorithm == "fast" else algorithm)
    config.variant = variant
    if variant == "nano":
        _nano(config)
    else:
        _wan(config, variant)
    if algorithm == "fast":
        _fast(config)
    config.lock()
    return config


def _paper(algorithm: str) -> ml_collections.ConfigDict:
    """World-R1 at full size, as far as the paper says, learning by this algorithm."""
    c = ml_collections.ConfigDict()
    c.variant = ""
    c.seed = 0  # every random choice of a run follows from it
    c.num_updates = 600  # rollouts, each followed by one update; ours: the paper does not say
    c.checkpoint_every = 10  # updates
    c.checkpoint_keep = 3  # newest checkpoints that stay on disk
    c.videos_every = 10  # updates between sample videos in workdir/videos
    c.groups = 48  # prompts per update [paper]
    c.group_size = 8  # K, videos per prompt [paper]
    c.frames, c.height, c.width = 81, 480, 832  # of the videos; frames = 1 + 4 k [paper]
    c.fps = 16.0  # of the mp4 files [Wan]
    # -1: what is left; data 0: all four as they suit the devices and the model
    c.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
    # networks that wait in the hosts' pinned memory while no stage uses them: text (the encoder),
    # vae, policy (its frozen weights), rewards
    c.idle_on_host = ()
    # "world": ours, 60 to 120 words each, the length the release trains on; "world_short": the same
    # scenes in one sentence; "nano": of the nano world; else a folder with train.txt, dynamic.txt
    # and test.txt, or one .txt or .jsonl
    c.prompts = "world"

    c.policy = ml_collections.ConfigDict()  # (policies/base.py: Options)
    # folder in diffusers' layout, of Wan-Video's own release, or of launch/convert_weights.py
    c.policy.weights = ""
    # what training starts from: the workdir of another run, or a file or folder of LoRA; "": fresh
    c.policy.adapters = ""
    # folder of launch/encode_prompts.py, with which the text encoder is not loaded; "": encode
    c.policy.text_cache = ""
    # decode by chunks of frames: memory that does not grow with their number
    c.policy.chunked_vae = True
    c.policy.lora_rank, c.policy.lora_alpha = 32, 64.0  # of the adapters [paper]
    # what has them: attention [paper], or cross, where the prompt enters, alone
    c.policy.lora_layers = "attention"
    # of matmuls and resting weights; adapters, norms and softmax stay float32
    c.policy.dtype = "bfloat16"
    # what the backward pass recomputes: none, dots, attention, full, whole, the least memory last
    c.policy.remat = "full"
    c.policy.text_tokens = 512  # padded length of prompts [Wan]

    c.sample = ml_collections.ConfigDict()  # (policies/stages.py: Sampling)
    c.sample.steps = 50  # T [paper]
    c.sample.shift = 3.0  # of the schedule; Wan at 480p (5 at 720p)
    c.sample.guidance = 5.0  # classifier-free guidance; 1 is off [paper]
    c.sample.negative_prompt = ""  # what guidance leads away from
    # that a device samples, decodes or scores at a time; 0: all that it has
    c.sample.videos_at_once = 0

    c.camera = ml_collections.ConfigDict()  # (camera/injection.py: Camera)
    # how camera motion enters: initial (warped starting noise) [paper], step, none
    c.camera.mode = "initial"
    # 0: plain noise, 1: warped noise alone; released: 0.35 Small, 0.40 Large
    c.camera.strength = 0.35
    c.camera.degradation = 0.35  # fresh noise blended into the warped noise [released]
    c.camera.flow_scale = 16  # resolution of the warp over that of the latents [released]
    c.camera.magnitudes = "released"  # how far a command goes: released (1000 units deep) or nano

    c.rewards = ml_collections.ConfigDict()  # (rewards/base.py: a section for each reward)
    # 0: not learnt from, but in the held-out report and in scores; None, in a file such as this,
    # leaves a reward out
    c.rewards.weights = ml_collections.ConfigDict(
        {"recon": 1.0, "trajectory": 1.0, "meta_view": 1.0, "general": 1.0, "mvcs": 0.0}
    )
    c.rewards.weights.judge = ml_collections.config_dict.placeholder(float)
    # R_gen: rewards that are "general", averaged with these weights: hps (HPSv2.1) [paper],
    # pickscore
    c.rewards.general = ml_collections.ConfigDict({"hps": 1.0, "pickscore": 0.0})
    c.rewards.reconstruct = ml_collections.ConfigDict()  # (rewards/reconstruct.py: Reconstruct)
    c.rewards.reconstruct.da3 = ""  # folder of Depth Anything 3 with Gaussian head
    c.rewards.reconstruct.frame_stride = 1  # the 3D network sees every so many frames
    # render the Gaussians of so many frames, evenly spaced, where all are too many; 0: all
    c.rewards.reconstruct.gaussian_frames = 0
    c.rewards.recon = ml_collections.ConfigDict()  # (rewards/recon.py: Recon)
    c.rewards.recon.likeness = "lpips"  # what S_recon compares with: lpips [paper], or ssim
    c.rewards.recon.lpips = ""  # folder of LPIPS (AlexNet v0.1); see models/lpips.py
    # frames that S_recon renders again, evenly spaced; 0: all that were reconstructed
    c.rewards.recon.views = 0
    # S_recon counts only what standing still cannot explain; try 0.1
    c.rewards.recon.change_floor = 0.0
    # unlikeness of frames below which S_recon shrinks; try less than what the base's videos have
    c.rewards.recon.change_min = 0.0
    c.rewards.recon.texture_min = 0.02  # local contrast below which S_recon shrinks; ours
    c.rewards.trajectory = ml_collections.ConfigDict()  # (rewards/trajectory.py: Trajectory)
    # typical depth in the 3D network's units; scales the tolerance on still cameras
    c.rewards.trajectory.depth_scale = 1.0
    # "paper"; "segments": run by run; "released": by the formula of World-R1's code
    c.rewards.trajectory.mode = "paper"
    c.rewards.trajectory.segment = 3  # frames of a run, of those that are reconstructed
    for name, fit in (("hps", "pad"), ("pickscore", "crop")):  # (rewards/preference.py)
        c.rewards[name] = judge = ml_collections.ConfigDict()
        # HPS_v2.1_compressed.pt, or the folder PickScore_v1; "nano": the one that ships
        judge.weights = ""
        judge.tokenizer = ""  # folder of CLIP's tokenizer; "": that of the weights
        judge.frames = 8  # of a video that are looked at, evenly spaced
        # to CLIP's square: pad (black bars) or crop, each as published, or squeeze
        judge.fit = fit

    c.rewards.meta_view = ml_collections.ConfigDict()  # (rewards/meta_view.py: MetaView)
    c.rewards.meta_view.angle = 9.0  # degrees, between the path and where the exam is held
    c.rewards.meta_view.split = "alternate"  # of the frames that have to agree; or halves

    c.rewards.judge = ml_collections.ConfigDict()  # (rewards/judge.py: Judge)
    c.rewards.judge.weights = ""  # folder of a Qwen3-VL [paper: 4B]; "nano": the one that ships
    c.rewards.judge.question = ""  # that one digit answers; "": ours, about flaws alone
    c.rewards.judge.angle = 9.0  # degrees between the middle camera and the views; ours
    c.rewards.judge.height, c.rewards.judge.width = 0, 0  # of the views; 0: about the frames' own
    c.rewards.judge.mode = "offset"  # or released: pose and question of World-R1's code

    # What learns, with its fields (algorithms/base.py); :nano,grpo names another.
    c.algorithm = ml_collections.ConfigDict(base.section(algorithm))
    if algorithm == "grpo":
        g = c.algorithm
        g.clip = 1e-3  # half-width of the ratio's interval [paper]
        g.kl_weight = 0.004  # beta [paper]
        g.sde = "flow"  # noise of the window: flow (flow-SDE) or cps (coefficients-preserving)
        g.eta = 0.7  # its amount; Flow-GRPO
        g.level = "sd3"  # sigma -> noise level of the flow-SDE: sd3, linear, constant
        g.window = 3  # W, stochastic steps, the only ones that are trained (Flow-GRPO-Fast)
        g.window_range = (0, 25)  # steps that the window may cover
        g.window_place = "random"  # or progressive, from noise to data, as MixGRPO; or group
        g.window_interval = 25  # updates at one place, progressive only
        # what a group has in common before its window: none, noise, or prefix, computed once
        g.share = "none"

    c.advantage = ml_collections.ConfigDict()  # (algorithms/advantage.py: Advantage)
    c.advantage.rewards = "sum"  # or each: every reward by its own std, then the weighted sum
    c.advantage.std = "group"  # or batch, or global
    c.advantage.floor = 0.0  # least std of a reward, when each
    c.advantage.clip = 5.0  # largest that counts in full [paper]

    c.train = ml_collections.ConfigDict()  # (algorithms/update.py: Rules)
    c.train.learning_rate = 1e-4  # AdamW [paper]
    c.train.warmup = 0  # optimizer steps
    c.train.weight_decay = 1e-4  # Flow-GRPO
    # Adam's epsilon; at full size a gradient is near 1e-9 a parameter, and 1e-8 would swallow it
    c.train.adam_eps = 1e-15
    # largest norm of a gradient, in multiples of the mean norm of those before it; 0: any
    c.train.clip_norm = 3.0
    c.train.epochs = 1  # passes over one rollout
    c.train.minibatches = 2  # optimizer steps per pass; more than one, or the clip never acts
    # parts of a minibatch, evaluated one after the other; 0: sample.videos_at_once a device
    c.train.microbatches = 1
    c.train.ema_decay, c.train.ema_every = 0.9, 8  # average of the adapters [paper]

    c.dynamic = ml_collections.ConfigDict()  # (data/phases.py: Phases)
    # periodic decoupled training [paper]
    c.dynamic.main_updates, c.dynamic.dynamic_updates = 100, 50
    # rewards that the dynamic phase turns off [paper: R_3D]
    c.dynamic.off = ("recon", "trajectory", "meta_view", "judge")

    c.watch = ml_collections.ConfigDict()  # (workdir/watch.py: Watch)
    # end the run when a prompt's videos differ by less than this share of what they did; 0: never
    c.watch.diversity = 0.75
    c.watch.kl = 0.0  # or when the mean KL to the base is larger; 0: never
    c.watch.patience = 10  # updates over which both are averaged
    c.watch.idle = 8  # updates in a row from which nothing could be learnt

    c.evaluate = ml_collections.ConfigDict()  # (evaluation/held_out.py: Evaluate)
    c.evaluate.prompts = 64  # held-out prompts of the before/after report; 0: no report
    c.evaluate.samples = 2  # videos per prompt, for the diversity
    c.evaluate.batch = 16  # prompts at a time, or so many more that the mesh divides their videos
    # guidance of the base that the report compares with: the best of these
    c.evaluate.guidances = ()
    c.evaluate.sweep = 16  # prompts on which that is found
    return c


def _nano(c: ml_collections.ConfigDict) -> None:
    """Two CPU cores, ten minutes. What differs from the paper differs because of size, and is
    measured in docs/results."""
    # 40 cost seed 0 half as much diversity again, for S_traj within its interval (docs/results)
    c.num_updates, c.checkpoint_every, c.videos_every = 32, 8, 10
    c.groups = 4
    c.frames, c.height, c.width, c.fps = 17, 64, 64, 8.0
    c.prompts = "nano"
    c.policy.weights = "nano"
    c.policy.chunked_vae = False  # 17 frames of 64 pixels: the whole fits, and is faster
    c.policy.lora_rank, c.policy.lora_alpha = 16, 32.0
    c.policy.dtype, c.policy.remat, c.policy.text_tokens = "float32", "dots", 32
    # 3 is the best of the base; what is learnt moves the camera more, and needs less guidance
    c.sample.steps, c.sample.guidance = 10, 2.7
    c.camera.flow_scale, c.camera.magnitudes = 4, "nano"
    # one frame for each latent frame
    c.rewards.reconstruct.da3, c.rewards.reconstruct.frame_stride = "nano", 4
    c.rewards.trajectory.depth_scale = 4.0
    # R_gen is nano's own CLIP, 64 pixels square; colours are a witness that is not learnt from.
    c.rewards.hps.weights, c.rewards.hps.fit = "nano", "squeeze"
    c.rewards.weights.palette = 0.0
    c.rewards.judge.weights = "nano"  # for a rewards.weights.judge; why it has none: docs/rewards
    c.rewards.recon.likeness = "ssim"  # LPIPS means little at 64 pixels
    # At this size S_recon is won by stillness and blur, and S_meta by stillness: they are measured
    # and not learnt from.
    c.rewards.weights.recon = c.rewards.weights.meta_view = 0.0
    c.rewards.weights.general = 0.5
    # Where a movement is beyond the base policy, S_traj is all but noise, which a group's own std
    # would blow up to the size of a signal.
    c.advantage.rewards, c.advantage.std = "each", "batch"
    if "window_range" in c.algorithm:
        c.algorithm.window_range = (0, 6)
    c.train.learning_rate, c.train.minibatches, c.train.ema_every = 6e-4, 1, 1
    if c.algorithm.name == "grpo":
        c.algorithm.clip = 1e-2
    c.dynamic.main_updates, c.dynamic.dynamic_updates = 20, 2
    # By 15% the gain is spent; it takes 15 updates to tell that from other prompts (docs/results).
    c.watch.diversity, c.watch.patience = 0.85, 15
    c.evaluate.prompts, c.evaluate.samples = 128, 2
    c.evaluate.guidances, c.evaluate.sweep = (2.0, 3.0, 4.0), 64


def _fast(c: ml_collections.ConfigDict) -> None:
    """What nano learns by: a contrast of captions beside DiffusionNFT. It takes 34 forwards of the
    policy for a video and update on nano and 54 on Wan2.1 (tests/test_settings.py counts them)."""
    # Captions are contrasted video by video: more prompts teach more than larger groups.
    c.groups, c.group_size = c.groups * c.group_size // 2, 2
    c.algorithm.contrast, c.algorithm.draws = 4.0, 2
    c.algorithm.levels = (0.55, 1.0)  # the camera is decided near 1
    c.algorithm.decay, c.algorithm.kl_weight = 0.75, 0.0
    c.advantage.rewards, c.advantage.std = "each", "batch"
    # Captions that differ in the camera differ where the prompt enters. Adapters there alone move
    # the camera as far as those on all attention, and cost less diversity (docs/results).
    c.policy.lora_layers = "cross"
    # One optimizer step: the noise of a group's losses cancels where its members are together.
    c.train.warmup, c.train.minibatches = 4, 1
    if c.variant == "nano":
        c.train.learning_rate = 7e-4
    else:  # not trained yet: the recipe is nano's, the rate the paper's
        c.sample.steps, c.algorithm.solver = 20, "unipc"


def _wan(c: ml_collections.ConfigDict, variant: str) -> None:
    c.mesh.data = 0
    c.checkpoint_every = 1  # an update takes longer than a machine's notice before it is taken
    c.sample.videos_at_once, c.train.microbatches = 1, 0
    # Each is used once or twice an update: the encoder alone is 11 GB, of a v5e's 16, and on one
    # chip the decoder leaves no room for the policy.
    c.idle_on_host = ("text", "vae", "policy", "rewards")
    if variant == "large":
        c.camera.strength = 0.40
