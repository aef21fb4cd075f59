"""The folder of a pipeline, as it is saved and pushed: what of it is ours, and its card.

The folder is that of the stock pipeline; our parts lie in folders of their own, and
``model_index.json`` names them under a private key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny
from huggingface_hub import hf_hub_download, snapshot_download

from mctd_diffusers.denoising.protocols import RewardFn
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.hub import card_text, hub_errors, is_repository
from mctd_diffusers.models.feature_decoder import FeatureToLatent
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.rewards.clip import ClipReward
from mctd_diffusers.rewards.resolving import resolve_reward

OUR_KEY = "_mctd"
"""Key of ``model_index.json`` for what is ours; private, so that stock loaders drop it unseen."""
REWARD_FOLDER = "reward_model"
PREVIEW_FOLDER = "preview_vae"
IGE_FOLDER = "ige"
FEATURE_FOLDER = "feature_decoder"
FEATURE_DECODER = [FeatureToLatent.__module__, FeatureToLatent.__name__]
"""What the index says of a saved feature decoder."""
OUR_FOLDERS = (REWARD_FOLDER, PREVIEW_FOLDER, IGE_FOLDER, FEATURE_FOLDER)

AS_SAVED: Any = object()
"""In place of a reward or a head in ``from_pretrained``: what was saved, if anything."""


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


def _dtype_of(name: str, arguments: dict[str, Any]) -> Any:
    """The dtype that a part is loaded in, by the arguments of ``from_pretrained``."""
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    return dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype


def _saved_as(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """How a part of ours is loaded from its folder, by the arguments of ``from_pretrained``."""
    variant = arguments.get("variant")
    was_saved = variant is not None and any(folder.glob(f"*.{variant}*"))
    return {
        "dtype": _dtype_of(folder.name, arguments),
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


@dataclass(frozen=True)
class SavedParts:
    """What is ours of a pipeline's folder or repository, and is loaded from there.

    Attributes:
        folder: that holds the parts.
        entries: of the parts that are loaded, by name, as ``model_index.json`` has them.
        arguments: of ``from_pretrained``.
        hub: those of them that name a version on the Hub and how to get it.
    """

    folder: Path
    entries: dict[str, Any]
    arguments: dict[str, Any]
    hub: dict[str, Any]

    def load_preview(self) -> AutoencoderTiny | None:
        """The saved decoder of previews."""
        if PREVIEW_FOLDER not in self.entries:
            return None
        folder = self.folder / PREVIEW_FOLDER
        preview: AutoencoderTiny = AutoencoderTiny.from_pretrained(
            folder, **_saved_as(folder, self.arguments)
        )
        return preview

    def load_feature_decoder(self) -> FeatureToLatent | None:
        """The saved decoder of features."""
        if FEATURE_FOLDER not in self.entries:
            return None
        return FeatureToLatent.from_pretrained(self.folder / FEATURE_FOLDER)

    def load_ige(self, given: Any) -> InformationGainEvaluator | None:
        """The head that was given, or the saved one.

        Raises:
            ConfigError: it cannot be resolved.
        """
        if IGE_FOLDER in self.entries:
            folder = self.folder / IGE_FOLDER
            return InformationGainEvaluator.from_pretrained(
                folder, **_saved_as(folder, self.arguments)
            )
        if given is AS_SAVED or given is None:
            return None
        elsewhere = {name: option for name, option in self.hub.items() if name != "revision"}
        return resolve_ige(given, dtype=_dtype_of(IGE_FOLDER, self.arguments), **elsewhere)

    def load_reward(self, given: Any) -> RewardFn | None:
        """The reward that was given, or the saved one.

        Raises:
            ConfigError: it cannot be resolved.
        """
        if REWARD_FOLDER in self.entries:
            return restore_reward(self.folder / REWARD_FOLDER, self.entries[REWARD_FOLDER])
        return None if given is AS_SAVED or given is None else resolve_reward(given)


def saved_parts(
    source: str,
    index: dict[str, Any],
    replaced: Collection[str],
    arguments: dict[str, Any],
    hub: dict[str, Any],
) -> SavedParts:
    """Find what is ours of a pipeline, and download it where it is not at hand.

    Args:
        source: folder or repository of the pipeline.
        index: its ``model_index.json``.
        replaced: names of parts of ours that are given, so that saved ones are not loaded.
        arguments: of ``from_pretrained``.
        hub: as for `SavedParts`.

    Raises:
        ConfigError: the index has no object for ours, the folder lacks a part, or the Hub cannot be
            reached.
    """
    folder = Path(source)
    ours = index.get(OUR_KEY)
    if ours is None:  # a folder that a script put together; ours always have the key
        ours = parts_beside(folder)
    if not isinstance(ours, dict):
        raise ConfigError(
            f"{OUR_KEY} in model_index.json of {source!r} is {ours!r}, not an object: take the "
            f"entry out, and pass reward_model=..."
        )
    entries = {name: ours[name] for name in OUR_FOLDERS if name in ours and name not in replaced}
    if folder.is_dir():
        parts = [*(name for name in parts_of(index) if name not in arguments), *entries]
        if lacking := [name for name in parts if not (folder / name).is_dir()]:
            raise ConfigError(
                f"the pipeline in {source!r} lacks {', '.join(lacking)}, which its "
                "model_index.json names: copy or download the whole folder again, or pass "
                "these parts"
            )
    elif entries:
        patterns = [f"{name}/*" for name in entries]
        with hub_errors("load the pipeline of", source, hub.get("revision")):
            folder = Path(snapshot_download(source, allow_patterns=patterns, **hub))
    return SavedParts(folder, entries, arguments, hub)


def index_with_ours(
    index: dict[str, Any], stock_class: str, reward_model: Any, feature_decoder: Any
) -> dict[str, Any]:
    """The stock index of a pipeline, with our entries under a private key.

    Args:
        index: as the stock class writes it of all modules.
        stock_class: name of the stock pipeline's class.
        reward_model: of the pipeline; named where it is a [`ClipReward`], which is saved.
        feature_decoder: the same; named where it is a `FeatureToLatent`.
    """
    index = index | {"_class_name": stock_class}
    index.pop("_name_or_path", None)
    ours: dict[str, Any] = {}
    for name in (PREVIEW_FOLDER, IGE_FOLDER):
        part = index.pop(name, None)
        if part and part[0] is not None:
            ours[name] = part
    if type(reward_model) is ClipReward:
        ours[REWARD_FOLDER] = {"kind": "clip", "scale": reward_model.scale}
    if isinstance(feature_decoder, FeatureToLatent):
        ours[FEATURE_FOLDER] = FEATURE_DECODER
    return index | {OUR_KEY: ours}


def our_files(folder: Path) -> list[str]:
    """Files of our parts in a pipeline's folder, from there."""
    return [
        f"{name}/{file.name}"
        for name in sorted(OUR_FOLDERS)
        for file in sorted((folder / name).glob("*"))
    ]


def strip_configs(folder: Path) -> None:
    """Take out of the configs of a folder's parts what names a path of this machine."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        drop = {"_name_or_path"}
        if config.get("_class_name") == "AutoencoderTiny":
            drop.add("block_out_channels")  # it writes this itself, and warns when it reads it
        if drop & set(config):
            kept = {name: entry for name, entry in config.items() if name not in drop}
            text = json.dumps(kept, indent=2, sort_keys=True)
            path.write_text(text + "\n", encoding="utf-8")


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
