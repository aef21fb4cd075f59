"""Does the search pay? Methods on the same prompts, judged by what none of them saw.

- `plan`: what is compared, cut into tasks.
- `pipeline_suite`, `mixture_suite`: what is searched: a pipeline with a gold, or mixtures with
  exact answers; `metering` says what a call took.
- `identity`: hashes of the weights and the code that results depend on.
- `cells`: results in files; a benchmark that is stopped goes on where it was.
- `prompts`: the committed lists, and files of others.
- `pricing`: what an image costs.
- `comparison`: means, paired differences and tests: pure arithmetic on cells.
- `claims`: what the search should show, and whether it does.
- `report`: ``results.csv`` and ``report.md``.
- `curves`: ``curves.png``.
"""
