"""ClipReward: how well a picture agrees with its prompt, by any CLIPModel.

A CLIP-like reward is three things that belong together: the model, its tokenizer and the way
pictures are prepared for it. They load from and save to one folder in the standard format of
transformers, so that the folder also opens with `CLIPModel`, `CLIPTokenizer` and
`CLIPImageProcessor`. PickScore, HPS and CLIP score are such folders.

Pictures are prepared in torch, on their own device and without going through 8 bits or torchvision:
the same resize, crop and normalisation as `CLIPImageProcessor`, within a rounding of 1/255.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mctd_diffusers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

logger = logging.getLogger(__name__)

PREPROCESSOR_FILE = "preprocessor_config.json"
_RESAMPLE_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that torch has as well."""
_ALIGNMENT = 64
"""Bytes to which torch aligns what it allocates on a CPU."""


@dataclass(frozen=True)
class Preprocessing:
    """How pictures in [0, 1] become pixel values of a CLIP model, as in `CLIPImageProcessor`.

    Attributes:
        size: pixels of the shortest edge after resizing, or ``(height, width)`` to force both.
        crop: ``(height, width)`` of the centre crop, or ``None``.
        resample: PIL's number of the filter: 0 nearest, 2 bilinear, 3 bicubic (with antialiasing).
        mean: per channel, subtracted.
        std: per channel, divided by; above 0.

    Raises:
        ConfigError: a filter that torch does not have, or a standard deviation not above 0.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.resample not in _RESAMPLE_MODES:
            raise ConfigError(
                f"resample={self.resample} in {PREPROCESSOR_FILE}: only {sorted(_RESAMPLE_MODES)} "
                "(nearest, bilinear, bicubic) can be done in torch; set one of them"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"image_std={self.std} in {PREPROCESSOR_FILE}: must be above 0")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocessing:
        """Read the fields of a ``preprocessor_config.json``, in any of the forms CLIP folders use.

        Raises:
            ConfigError: a field is missing or has a form that is not CLIP's.
        """
        try:
            size = config["size"]
            if isinstance(size, dict):
                size = size["shortest_edge"] if "shortest_edge" in size else _height_width(size)
            crop = (
                _height_width(config["crop_size"]) if config.get("do_center_crop", True) else None
            )
            return cls(
                size=size if isinstance(size, int) else tuple(size),
                crop=crop,
                resample=int(config.get("resample", 3)),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{PREPROCESSOR_FILE} is not one of CLIP's ({type(error).__name__}: {error}): it "
                "needs 'size', 'crop_size', 'image_mean' and 'image_std'"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """Return the fields of a ``preprocessor_config.json``, as `CLIPImageProcessor` has them."""
        if isinstance(self.size, int):
            size = {"shortest_edge": self.size}
        else:
            size = {"height": self.size[0], "width": self.size[1]}
        crop = self.crop or (self.size if isinstance(self.size, tuple) else (self.size, self.size))
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": crop[0], "width": crop[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Resize, crop the centre and normalise; clips what a bicubic filter overshoots."""
        height, width = images.shape[-2:]
        if isinstance(self.size, int):
            short, long = sorted((height, width))
            longer = int(self.size * long / short)
            target = (self.size, longer) if height <= width else (longer, self.size)
        else:
            target = self.size
        images = images.float()
        if target != (height, width):
            mode = _RESAMPLE_MODES[self.resample]
            smooth = mode != "nearest-exact"
            images = functional.interpolate(images, target, mode=mode, antialias=smooth).clamp(0, 1)
        if self.crop is not None:
            images = _centre_crop(images, self.crop)
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std


def _height_width(size: int | dict[str, int]) -> tuple[int, int]:
    """Return ``(height, width)`` of a size as transformers writes it."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _centre_crop(
    images: Float[Tensor, "batch 3 height width"], crop: tuple[int, int]
) -> Float[Tensor, "batch 3 rows columns"]:
    """Crop the centre, padding with black where it is smaller, as `CLIPImageProcessor` does."""
    height, width = images.shape[-2:]
    pad_rows, pad_columns = max(crop[0] - height, 0), max(crop[1] - width, 0)
    if pad_rows or pad_columns:
        top, left = (pad_rows + 1) // 2, (pad_columns + 1) // 2
        images = functional.pad(images, (left, pad_columns - left, top, pad_rows - top))
        height, width = images.shape[-2:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


class ClipReward:
    """Scores each picture by the cosine of its embedding and its prompt's.

    With ``scale="logit_scale"`` (the default) the cosine is multiplied by the model's learnt
    ``exp(logit_scale)``, as PickScore and HPS report it; ``"cosine"`` leaves it in [-1, 1]. Both
    order pictures alike. Prompts longer than the tokenizer's ``model_max_length`` are cut there. A
    prompt's embedding is computed by itself and kept, so a score does not depend on the other
    prompts of a batch.

    Reference: Radford et al., "Learning transferable visual models from natural language
    supervision" (2021); Kirstain et al., "Pick-a-Pic" (2023), equation 1, for the scaled form.

    Attributes:
        model: the `CLIPModel`, in evaluation mode.
        tokenizer: its `CLIPTokenizer`.
        preprocessing: what is done to pictures before the model sees them.
        scale: "logit_scale" or "cosine".
        name_or_path: where it was loaded from, or ``None`` where it was made in memory.

    Raises:
        ConfigError: an unknown ``scale``.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocessing: Preprocessing,
        *,
        scale: str = "logit_scale",
        name_or_path: str | None = None,
    ) -> None:
        if scale not in ("logit_scale", "cosine"):
            raise ConfigError(f"scale={scale!r}: choose 'logit_scale' or 'cosine'")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.scale = scale
        self.name_or_path = name_or_path
        self._text_embeddings: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        *,
        processor: str | Path | None = None,
        scale: str = "logit_scale",
        dtype: torch.dtype = torch.float32,
        **hub_arguments: Any,
    ) -> ClipReward:
        """Load any `CLIPModel` folder or repository.

        Args:
            folder_or_repo: holds ``config.json`` and weights, and tokenizer and
                ``preprocessor_config.json`` unless ``processor`` says where those are.
            processor: folder or repository of tokenizer and preprocessing.
            scale: as in the class.
            dtype: of the weights in memory, whatever they were saved in.
            hub_arguments: what transformers takes to find files: ``subfolder``, ``revision``,
                ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            ConfigError: there is no such folder or repository, it is not a `CLIPModel`, or
                tokenizer or preprocessing are missing.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        source, processor = str(folder_or_repo), str(processor or folder_or_repo)
        try:
            config = AutoConfig.from_pretrained(source, **hub_arguments)
            if config.model_type != "clip":
                raise ConfigError(
                    f"{source!r} holds a model of type {config.model_type!r}, not 'clip': pass the "
                    "folder or repository of a CLIPModel, or a callable (images, prompts) -> "
                    "floats"
                )
            model = CLIPModel.from_pretrained(source, dtype=dtype, **hub_arguments)
            _align_weights(model)
            tokenizer = CLIPTokenizer.from_pretrained(processor, **hub_arguments)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):
                raise ValueError(f"the tokenizer in {processor!r} is missing: it knows no words")
            preprocessing = Preprocessing.from_config(_read_preprocessor(processor, hub_arguments))
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"no CLIPModel reward could be loaded from {source!r} (tokenizer and preprocessing "
                f"from {processor!r}): {_first_line(error)}; pass a folder that "
                "ClipReward.save_pretrained wrote, or a repository that can be reached from here"
            ) from error
        return cls(model, tokenizer, preprocessing, scale=scale, name_or_path=source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors), tokenizer and preprocessing into one folder; creates it."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.preprocessing.to_config(), indent=2)
        (folder / PREPROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")

    def to(self, device: torch.device | str) -> ClipReward:
        """Move the model to a device and return the reward itself."""
        self.model.to(device)
        self.forget_prompts()
        return self

    def forget_prompts(self) -> None:
        """Forget the embeddings of prompts; needed after the model's weights have changed."""
        self._text_embeddings.clear()

    @torch.no_grad()
    def image_embeddings(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels"]:
        """Return embeddings of unit length, float32, of pictures in [0, 1]."""
        pixels = self.preprocessing(images.to(self.model.device)).to(self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def text_embedding(self, prompt: str) -> Float[Tensor, " channels"]:
        """Return the embedding of one prompt, of unit length, float32; computed once."""
        if prompt not in self._text_embeddings:
            tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt")
            features = self.model.get_text_features(**tokens.to(self.model.device))
            self._text_embeddings[prompt] = _unit(features)[0]
        return self._text_embeddings[prompt]

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Return the score of each picture for its own prompt, float32."""
        texts = torch.stack([self.text_embedding(prompt) for prompt in prompts])
        cosines = (self.image_embeddings(images) * texts).sum(dim=-1)
        return cosines * self.model.logit_scale.float().exp() if self.scale != "cosine" else cosines


def _unit(features: Any) -> Float[Tensor, "batch channels"]:
    """Normalise the rows of what ``get_*_features`` returned (transformers 5: an object)."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return functional.normalize(tensor.float(), dim=-1)


def _align_weights(model: torch.nn.Module) -> None:
    """Copy weights that lie at odd addresses to where torch would have put them.

    transformers leaves them where the file was mapped. Kernels sum in another order there, so a
    reward that was saved and loaded would differ in its last bits from the one in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _read_preprocessor(folder_or_repo: str, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """Read ``preprocessor_config.json`` of a folder or repository."""
    from transformers.utils import cached_file

    path = cached_file(folder_or_repo, PREPROCESSOR_FILE, **hub_arguments)
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return config


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, without what to look up on the Hub."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". Checkout ")[0].rstrip(". ")
