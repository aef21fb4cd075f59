"""Logs of denoising trajectories, from which models of a search are learned.

- `plan`: what a log is to hold, its shards, and the closed formulas of what they take.
- `shards`: runs the trajectories of a shard.
- `files`: the folder: columns, shards, settings.
- `logging`: writes a log, and says beforehand what it will take.
- `relabelling`: the same log under another reward, without a call of the denoiser.
- `card`: its README.
- `searches`: what saved searches observed of jumps, as data to learn from too.
"""
