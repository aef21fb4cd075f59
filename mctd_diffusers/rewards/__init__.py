"""Rewards: scores of finished samples, higher is better.

A reward is any callable ``(images, prompts) -> floats``: batch in, batch out, each score a function
of its own picture and prompt alone. ``images`` is a tensor ``[batch, 3, height, width]`` in [0, 1],
or a list of PIL pictures where the reward has the attribute ``wants_pil = True``.

- `calls`: `call_reward` calls one and checks the answer.
- `clip`: `ClipReward`, the agreement of picture and prompt by any `CLIPModel` (PickScore is one).
- `jpeg`, `colourfulness`, `brightness`: rewards that are arithmetic.
- `weighted_sum`: several rewards, each standardised by constants, in one.
- `resolving`: `resolve_reward` turns a name, a folder, a repository or a callable into a reward.
"""
