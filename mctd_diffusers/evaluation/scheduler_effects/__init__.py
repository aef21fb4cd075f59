"""What schedulers do to samples and to searches, compared at equal NFE.

`comparison` says what is compared: every scheduler gets a benchmark of its own (`benchmark`), over
the same prompts, budgets and seeds; `suite` runs it from the same initial noise with the same edge
seeds. `branching` measures aside how far siblings come apart, and how early their value tells.
`effects` has the arithmetic, `report` and `figures` what is written.
"""
