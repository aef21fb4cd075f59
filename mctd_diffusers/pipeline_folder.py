"""The folder of a pipeline, as it is saved and pushed: what of it is ours, and its card.

The folder is that of the stock pipeline; our parts lie in folders of their own, and
``model_index.json`` names them under a private key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.hub import card_text, hub_errors, is_repository
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.rewards.clip import ClipReward

OUR_KEY = "_mctd"
"""Key of ``model_index.json`` for what is ours; private, so that stock loaders drop it unseen."""
REWARD_FOLDER = "reward_model"
PREVIEW_FOLDER = "preview_vae"
IGE_FOLDER = "ige"
FEATURE_FOLDER = "feature_decoder"
FEATURE_DECODER = [FeatureToLatent.__module__, FeatureToLatent.__name__]
"""What the index says of a saved feature decoder."""
OUR_FOLDERS = (FEATURE_FOLDER, IGE_FOLDER, PREVIEW_FOLDER, REWARD_FOLDER)


def read_model_index(source: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Read ``model_index.json`` of a folder or repository."""
    cure = "pass a folder or Hub repository that holds the model_index.json of a pipeline"
    with hub_errors("load the pipeline of", source, hub.get("revision"), cure=cure):
        if Path(source).is_dir():
            path = Path(source) / "model_index.json"
        elif is_repository(source):
            path = Path(hf_hub_download(source, "model_index.json", **hub))
        else:
            raise OSError("there is no such folder")
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError(f"{path.name} holds no object but {index!r:.40}")
    return index


def dtype_of(name: str, arguments: dict[str, Any]) -> Any:
    """The dtype that a part is loaded in, by the arguments of ``from_pretrained``."""
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    return dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype


def saved_as(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """How a part of ours is loaded from its folder, by the arguments of ``from_pretrained``."""
    variant = arguments.get("variant")
    was_saved = variant is not None and any(folder.glob(f"*.{variant}*"))
    return {
        "dtype": dtype_of(folder.name, arguments),
        "variant": variant if was_saved else None,
    }


def resolve_ige(spec: Any, **arguments: Any) -> InformationGainEvaluator:
    """Turn what a user wrote for a head into a head; one that is an object stays as it is."""
    if isinstance(spec, str | os.PathLike):
        return InformationGainEvaluator.from_pretrained(spec, **arguments)
    if not isinstance(spec, InformationGainEvaluator):
        raise ConfigError(
            f"ige={spec!r} is a {type(spec).__name__}: pass an InformationGainEvaluator, its "
            "folder, or the name of its Hub repository"
        )
    return spec


def parts_of(index: dict[str, Any]) -> list[str]:
    """Names of the parts that lie in folders of their own, by a ``model_index.json``."""
    return [
        name
        for name, entry in index.items()
        if name[0] != "_" and isinstance(entry, list) and entry and None not in entry
    ]


def parts_beside(folder: Path) -> dict[str, Any]:
    """Our entries for the parts of ours that lie in a folder whose index names none."""
    ours: dict[str, Any] = {}
    if (folder / REWARD_FOLDER / "config.json").is_file():
        ours["reward_model"] = "clip"
    if (folder / PREVIEW_FOLDER / "config.json").is_file():
        ours["preview_vae"] = ["diffusers", "AutoencoderTiny"]
    if (folder / IGE_FOLDER / "config.json").is_file():
        ours["ige"] = [InformationGainEvaluator.__module__, InformationGainEvaluator.__name__]
    if (folder / FEATURE_FOLDER / "config.json").is_file():
        ours["feature_decoder"] = FEATURE_DECODER
    return ours


def restore_reward(folder: Path, entry: Any) -> RewardFn:
    """Load the reward that was saved with a pipeline."""
    settings: Any = {"kind": entry} if isinstance(entry, str) else entry
    if not isinstance(settings, dict) or set(settings) - {"kind", "scale"}:
        raise ConfigError(
            f"the saved reward is {entry!r}, known are its kind and scale: pass reward_model=... "
            "instead"
        )
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind != "clip":
        raise ConfigError(
            f"the saved reward is of kind {kind!r}, known is 'clip': pass reward_model=... instead"
        )
    return ClipReward.from_pretrained(folder, **settings)


def pipeline_card(
    repo_id: str, stock_class: str, parts: Mapping[str, str], base_model: str | None
) -> str:
    """Model card that says what the parts are and how to load them.

    Args:
        repo_id: name of the repository.
        stock_class: name of the stock pipeline's class.
        parts: class name of each part.
        base_model: repository that the pipeline was loaded from, if any.
    """
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": base_model,
        "tags": ["mctd-diffusers"],
    }
    rows = "\n".join(f"| `{row}` | `{part}` |" for row, part in parts.items())
    name = repo_id.rsplit("/", maxsplit=1)[-1]
    return card_text(
        metadata,
        f"""# {name}

A `{stock_class}` with what a search over its denoising needs:

| part | class |
| --- | --- |
{rows}

With mctd-diffusers, which searches:

```python
from mctd_diffusers import MCTDPipeline

pipe = MCTDPipeline.from_pretrained("{repo_id}")
```

The stock pipeline opens it as well, and leaves out what is for the search:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
```
""",
    )
