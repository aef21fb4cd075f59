"""Which checks do not apply to which family, and why.

A check that does not apply is run too, and must fail: so a reason that no longer holds is found.
"""

from __future__ import annotations

from typing import Final

_NO_SLICES: Final = "its transformer has no `set_attention_slice`"
_AN_INPUT: Final = "its guidance is an input of the transformer, made once before the first step"

NOT_APPLICABLE: Final[dict[str, dict[str, str]]] = {
    "test_guidance_changes_on_the_way": {
        "FluxPipeline": _AN_INPUT,
        "Flux2Pipeline": _AN_INPUT,
        "Flux2KleinPipeline": "its steps read `guidance_scale` of the call, not of the pipeline",
        "QwenImagePipeline": "its steps read `true_cfg_scale`, which the pipeline does not keep",
    },
    "test_attention_in_slices": {
        "StableDiffusion3Pipeline": _NO_SLICES,
        "FluxPipeline": _NO_SLICES,
        "Flux2Pipeline": _NO_SLICES,
        "Flux2KleinPipeline": _NO_SLICES,
        "QwenImagePipeline": _NO_SLICES,
        "ZImagePipeline": _NO_SLICES,
    },
}
"""Name of the test -> name of the stock class -> reason."""
