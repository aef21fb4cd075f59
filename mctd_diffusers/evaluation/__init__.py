"""What is measured, and by whom: nothing in here is seen by a search or a reward.

- `scenes`: what the model in the box can be asked for, captions and their facts.
- `contradictions`: captions that are wrong in exactly one way.
- `judge`: the gold judge, which reads a scene off its picture.
- `real_scenes`: a sheet of real scenes, and what judge and reward make of them.
- `metrics`: intervals over prompts, distances, diversity.
- `model_report`: what a model draws by itself (``mctd evaluate-model``).
- `benchmark`: methods against each other at equal NFE and at equal cost (``mctd bench``).
- `diagnosis`: where a search falls short: model, reward or search (``mctd diagnose``).
- `ground_truth`: mixtures in closed form: score, values, transitions, what a reward tilts them to.
- `mixture_environment`: a search's world over them; `mixture_worlds`: problems to compare it on.
"""
