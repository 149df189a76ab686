"""World-R1 in JAX. The modules in the order in which data flows through them:

settings     the config, checked, and the objects that it asks for
data         prompts: files, groups of K, main and dynamic phases
camera       commands in a prompt -> camera path -> flow -> warped starting noise
models       Wan2.1 (DiT, VAE, text encoder), LoRA, Depth Anything 3; the publishers' files
rollout      schedule, SDE and CPS steps with log-probabilities, the scan over denoising steps
pipeline     prompts -> videos on a mesh, from the parts above
rewards      reconstruct, re-render, S_recon, S_traj, R_gen, and their masked sum
grpo         group advantages, clipped loss, and the update (grpo/update.py: train_step)
train        run(): the loop, top to bottom
evaluate     held-out prompts before and after
generate     prompts to videos, one by one;  scoring  video files to rewards, in words
plan         what a pod needs, from the TPU compiler;  plan_hlo  reads what it compiled
nano         a small world with known truth, and the networks trained on it

What every stage uses: types, sharding, checkpoint, trained (adapters of a run), metrics, memory,
chips, cost.
"""
