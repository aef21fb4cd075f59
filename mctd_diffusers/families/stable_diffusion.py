"""Stable Diffusion 1.x and 2.x: the stock pipeline, searched."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from jaxtyping import Float
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from mctd_diffusers.calls import Prepared, SearchOptions, as_config_errors, num_prompts
from mctd_diffusers.denoising.denoiser import FeatureTap, chunks
from mctd_diffusers.denoising.protocols import Outputs
from mctd_diffusers.errors import ConfigError
from mctd_diffusers.models.ige import InformationGainEvaluator
from mctd_diffusers.pipeline import MCTDPipeline
from mctd_diffusers.results import MCTDPipelineOutput
from mctd_diffusers.search.runner import Strategy


@dataclass
class StableDiffusionNetwork:
    """The UNet, called as `StableDiffusionPipeline.__call__` calls it.

    Attributes:
        unet: the network.
        conditional: ``[problems, tokens, channels]`` embeddings of the prompts.
        unconditional: of the negative prompts; ``None`` where no guidance is used.
        image_embeds: of each IP adapter, ``[rows, images, channels]``: negative rows, then
            positive.
        timestep_cond: embedding of the guidance scale, where it is an input of the network.
        guidance_scale: as in the stock pipeline.
        guidance_rescale: as in the stock pipeline.
        cross_attention_kwargs: as in the stock pipeline.
        rows_per_latent: 2 with classifier-free guidance, else 1.
    """

    unet: UNet2DConditionModel
    conditional: Float[Tensor, "problems tokens channels"]
    unconditional: Float[Tensor, "problems tokens channels"] | None
    image_embeds: list[Tensor] | None
    timestep_cond: Float[Tensor, "problems channels"] | None
    guidance_scale: float
    guidance_rescale: float
    cross_attention_kwargs: dict[str, Any] | None
    rows_per_latent: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows_per_latent = 1 if self.unconditional is None else 2

    def __call__(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timesteps: Tensor,
        problems: Sequence[int],
    ) -> Outputs:
        """Evaluate scaled inputs at per-row timesteps, each under its problem's conditioning."""
        rows = torch.as_tensor(problems, dtype=torch.long, device=self.conditional.device)
        timesteps = timesteps.to(latents.device)
        embeds = self.conditional[rows]
        image_rows = rows
        timestep_cond = None if self.timestep_cond is None else self.timestep_cond[rows]
        if self.unconditional is not None:
            # The order of the stock pipeline: negative rows, then positive ones.
            latents = torch.cat([latents] * 2)
            timesteps = torch.cat([timesteps] * 2)
            embeds = torch.cat([self.unconditional[rows], embeds])
            image_rows = torch.cat([rows, rows + len(self.conditional)])
        added = None
        if self.image_embeds is not None:
            added = {"image_embeds": [part[image_rows] for part in self.image_embeds]}
        output = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=embeds,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        if self.unconditional is None:
            return Outputs(output, None)
        unconditional, conditional = output.chunk(2)
        return Outputs(conditional, unconditional)

    def combine(
        self, outputs: Outputs, guidance: float | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Guided output, by the arithmetic of the stock pipeline."""
        if outputs.unconditional is None:
            return outputs.conditional
        scale = self.guidance_scale if guidance is None else guidance
        guided = outputs.unconditional + scale * (outputs.conditional - outputs.unconditional)
        if self.guidance_rescale > 0.0:
            guided = rescale_noise_cfg(
                guided, outputs.conditional, guidance_rescale=self.guidance_rescale
            )
        return guided


@dataclass(frozen=True)
class VaeDecoder:
    """Decodes latents by an autoencoder, and denormalises as the stock image processor does."""

    vae: AutoencoderKL | AutoencoderTiny

    def __call__(
        self, latents: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1]."""
        images = self.vae.decode(
            latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False
        )[0]
        return (images * 0.5 + 0.5).clamp(0, 1)


class MCTDStableDiffusionPipeline(MCTDPipeline, StableDiffusionPipeline):
    r"""Text-to-image generation with Stable Diffusion 1.x and 2.x, searched for the best reward.

    This model inherits from [`MCTDPipeline`] and [`StableDiffusionPipeline`]. Check the latter for
    the generic methods (downloading, saving, offloading, LoRA, IP adapters, textual inversion).

    Args:
        vae ([`AutoencoderKL`]):
            As in the stock pipeline.
        text_encoder ([`~transformers.CLIPTextModel`]):
            As in the stock pipeline.
        tokenizer ([`~transformers.CLIPTokenizer`]):
            As in the stock pipeline.
        unet ([`UNet2DConditionModel`]):
            As in the stock pipeline.
        scheduler ([`SchedulerMixin`]):
            As in the stock pipeline. A search steps a copy of it, or DDIM where it cannot be
            branched.
        safety_checker ([`StableDiffusionSafetyChecker`], *optional*):
            As in the stock pipeline.
        feature_extractor ([`~transformers.CLIPImageProcessor`], *optional*):
            As in the stock pipeline.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*):
            As in the stock pipeline.
        requires_safety_checker (`bool`, *optional*, defaults to `True`):
            As in the stock pipeline.
        preview_vae ([`AutoencoderTiny`], *optional*):
            Decoder by which unfinished samples are valued cheaply.
        reward_model (*optional*):
            What a search maximises: a callable `(images, prompts) -> floats`, a short name, or the
            folder or repository of a `CLIPModel`.
        ige ([`InformationGainEvaluator`], *optional*):
            Predicts what strides tell and cost.
    """

    stock_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->preview_vae->vae"
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusionPipeline._optional_components,
        "preview_vae",
        "ige",
    ]
    # Small, and called between calls of the UNet: it stays on the accelerator.
    _exclude_from_cpu_offload: ClassVar[list[str]] = [
        *StableDiffusionPipeline._exclude_from_cpu_offload,
        "ige",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        preview_vae: AutoencoderTiny | None = None,
        reward_model: Any = None,
        ige: InformationGainEvaluator | None = None,
    ) -> None:
        StableDiffusionPipeline.__init__(
            self,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._set_up_search(preview_vae, reward_model, ige)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  # as the stock pipeline
        *,
        search: str | Strategy | None = "mctd",
        compute: float | None = None,
        nfe_budget: int | None = None,
        cost_budget: float | None = None,
        time_budget_s: float | None = None,
        reward_model: Any = None,
        reward_prompt: str | list[str] | None = None,
        strides: Sequence[int] | None = None,
        stride_policy: str | None = None,
        search_scheduler: SchedulerMixin | None = None,
        wave_size: int | None = None,
        rows_per_call: int | None = None,
        include_plain: bool = False,
        save_to: str | os.PathLike[str] | None = None,
        save_every_s: float = 60.0,
        online_ige: bool = False,
        **kwargs: Any,
    ) -> MCTDPipelineOutput | tuple[Any, ...]:
        r"""The call function to the pipeline for generation.

        The arguments before `search` are those of [`StableDiffusionPipeline`], in its order and
        with its meaning.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts to guide image generation. If not defined, you need to pass
                `prompt_embeds` (and, for a search, `reward_prompt`).
            height (`int`, *optional*, defaults to what the unet is made for):
                The height in pixels of the generated image.
            width (`int`, *optional*, defaults to what the unet is made for):
                The width in pixels of the generated image.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps of one sample.
            timesteps (`list[int]`, *optional*):
                Custom timesteps, for schedulers that support them.
            sigmas (`list[float]`, *optional*):
                Custom sigmas, for schedulers that support them.
            guidance_scale (`float`, *optional*, defaults to 7.5):
                Weight of classifier-free guidance, which is used above 1.
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts to guide away from.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                The number of images to generate per prompt; each is searched by itself.
            eta (`float`, *optional*, defaults to 0.0):
                Noise of [`~schedulers.DDIMScheduler`], ignored by others. Where a search branches
                it injects noise of its own.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws the first noise of each image, from which all its other seeds derive. With one
                generator an image, an image does not depend on the others.
            latents (`torch.Tensor`, *optional*):
                First noise of each image, in place of drawing it.
            prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated text embeddings.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated negative text embeddings.
            ip_adapter_image (`PipelineImageInput`, *optional*):
                Optional image input to work with IP adapters.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Pre-generated image embeddings for IP adapters.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`MCTDPipelineOutput`] instead of a plain tuple.
            cross_attention_kwargs (`dict`, *optional*):
                Passed along to the attention processors.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                Rescales the guided output against overexposure.
            clip_skip (`int`, *optional*):
                Number of layers of the text encoder to skip from its end.
            callback_on_step_end (`Callable`, *optional*):
                As in the stock pipeline, with `search=None` only: a search has no single line of
                steps.
            callback_on_step_end_tensor_inputs (`list`, *optional*):
                As in the stock pipeline.
            search (`str` or `Strategy`, *optional*, defaults to `"mctd"`):
                Name of a search, or a strategy object with its settings. `None` is the stock
                pipeline, bit for bit.
            compute (`float`, *optional*, defaults to 8 where no other budget is named):
                Budget for each image, in plain samples: so many times `num_inference_steps` NFE, or
                twice that where the scheduler takes two network calls a step. One NFE is one
                evaluated latent, with guidance two rows through the network.
            nfe_budget (`int`, *optional*):
                The same budget in NFE.
            cost_budget (`float`, *optional*):
                Budget for each image in row-equivalents, decodes and reward calls included, by
                prices that are measured before the search.
            time_budget_s (`float`, *optional*):
                Budget for the whole call, in seconds; every image still finishes one sample.
            reward_model (*optional*, defaults to `self.reward_model`):
                Reward of this call: a callable `(images, prompts) -> floats`, a short name, or the
                folder or repository of a `CLIPModel`.
            reward_prompt (`str` or `list[str]`, *optional*, defaults to `prompt`):
                What the reward reads in place of the prompt.
            strides (`Sequence[int]`, *optional*, defaults to those of the strategy):
                Schedule steps that an edge of the tree may cross; the candidates hold 1.
            stride_policy (`str`, *optional*, defaults to that of the strategy):
                What chooses the strides: the plan of a rollout (`"budget"`), a rule (`"uniform"`,
                `"fixed:4"`, `"random"`, `"ays"`, `"gits"`, `"x0hat"`), or the pipeline's
                information gain evaluator (`"ige"`, or `"ige:truncation_error"` and others).
            search_scheduler ([`SchedulerMixin`], *optional*, defaults to the pipeline's own):
                Scheduler of the search. Without it a pipeline's scheduler that cannot be branched
                is replaced by DDIM made from its config, with a warning.
            wave_size (`int`, *optional*, defaults to that of the strategy):
                Nodes chosen on one snapshot of the tree and evaluated together.
            rows_per_call (`int`, *optional*, defaults to what fits the device and the size):
                Latents in every call of the network, the decoders and the reward; shorter batches
                are padded, because pictures are bit-equal at equal numbers only.
            include_plain (`bool`, *optional*, defaults to `False`):
                Whether to score the plain sample too, out of the same budget; the answer is then
                never worse than it, by the searched reward.
            save_to (`str` or `os.PathLike`, *optional*):
                Folder to save the search into while it runs, at its end and at Ctrl-C;
                [`~MCTDPipeline.resume`] goes on from there. Models and rewards are not saved.
            save_every_s (`float`, *optional*, defaults to 60):
                Seconds between two saves, at least; saving takes a tenth of the time at most. 0
                saves after every wave.
            online_ige (`bool`, *optional*, defaults to `False`):
                Whether the pipeline's information gain evaluator learns from what this search
                observes, once it has ended: this search asks it as it was, later ones as it is
                then. What is predicted worse after an update than before, of images that are never
                learned from, undoes it. `save_pretrained` and `push_to_hub` write it as it is.
            kwargs (*optional*):
                `callback` and `callback_steps`, deprecated, as in the stock pipeline.

        Examples:
            ```py
            >>> import torch
            >>> from mctd_diffusers import EMBEDDED_MODEL, MCTDPipeline

            >>> pipe = MCTDPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> out = pipe(
            ...     "a red octopus above two blue cars",
            ...     num_inference_steps=32,
            ...     guidance_scale=4.0,
            ...     search="mctd",
            ...     compute=8,
            ...     generator=torch.Generator().manual_seed(0),
            ... )
            >>> out.images[0], out.rewards[0], out.nfe[0]
            ```

        Returns:
            [`MCTDPipelineOutput`] or `tuple`:
                If `return_dict` is `True` an [`MCTDPipelineOutput`] is returned, otherwise a
                `tuple` of its fields that begins as the stock one: images, then what the safety
                checker says.

        Raises:
            ConfigError: an argument cannot work; before the first call of the network.
            BudgetError: a budget is too small to finish one sample.
            UnsupportedSchedulerError: `search_scheduler` cannot be branched.
            RewardError: the reward raised or answered in the wrong form; `partial` holds the output
                so far.
            NonFiniteRewardError: a reward is NaN or infinite; `partial` likewise.
        """
        self._check_names(kwargs)
        stock = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt,
            "eta": eta,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "output_type": output_type,
            "return_dict": return_dict,
            "cross_attention_kwargs": cross_attention_kwargs,
            "guidance_rescale": guidance_rescale,
            "clip_skip": clip_skip,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            **kwargs,
        }
        options = SearchOptions(
            search=search,
            compute=compute,
            nfe_budget=nfe_budget,
            cost_budget=cost_budget,
            time_budget_s=time_budget_s,
            reward_model=reward_model,
            reward_prompt=reward_prompt,
            strides=strides,
            stride_policy=stride_policy,
            search_scheduler=search_scheduler,
            wave_size=wave_size,
            rows_per_call=rows_per_call,
            include_plain=include_plain,
            save_to=save_to,
            save_every_s=save_every_s,
            online_ige=online_ige,
        )
        if search is None:
            return self._plain_call(stock, options)
        return self._search_call(stock, options)

    def _check_call(self, stock: dict[str, Any]) -> None:
        """Fill in the size as the stock call does, and check by its code."""
        if not stock["height"] or not stock["width"]:
            size = self.unet.config.sample_size
            height, width = (size, size) if self._is_unet_config_sample_size_int else size
            stock["height"] = height * self.vae_scale_factor
            stock["width"] = width * self.vae_scale_factor
        with as_config_errors():
            self.check_inputs(
                stock["prompt"],
                stock["height"],
                stock["width"],
                None,
                stock["negative_prompt"],
                stock["prompt_embeds"],
                stock["negative_prompt_embeds"],
                stock["ip_adapter_image"],
                stock["ip_adapter_image_embeds"],
            )
        shape = self._latent_shape(stock)
        if stock["latents"] is not None and tuple(stock["latents"].shape) != shape:
            raise ConfigError(
                f"latents have shape {tuple(stock['latents'].shape)}, expected {shape} (images, "
                f"channels, rows, columns) for {stock['height']}x{stock['width']} pixels: pass one "
                "row an image"
            )

    def _latent_shape(self, stock: dict[str, Any]) -> tuple[int, int, int, int]:
        images = num_prompts(stock) * stock["num_images_per_prompt"]
        rows = stock["height"] // self.vae_scale_factor
        columns = stock["width"] // self.vae_scale_factor
        return images, self.unet.config.in_channels, rows, columns

    def _default_rows_per_call(self, stock: dict[str, Any]) -> int:
        """8 for small latents on a CPU, 1 for others; an accelerator takes more."""
        _, _, rows, columns = self._latent_shape(stock)
        if self._execution_device.type == "cpu":
            return 8 if rows * columns <= 32 * 32 else 1
        return 64 if rows * columns <= 32 * 32 else 8

    def _feature_channels(self) -> dict[str, int]:
        """Two of each block's channels, as `FeatureTap` reads them, and three of the latents'."""
        channels = self.unet.config.block_out_channels
        blocks = {f"down.{i}": 2 * number for i, number in enumerate(channels)}
        if self.unet.mid_block is not None:
            blocks["mid"] = 2 * channels[-1]
        return blocks | {"estimate": 3 * self.unet.config.in_channels}

    def _set_timesteps(self, stock: dict[str, Any]) -> None:
        """Prepare ``self.scheduler``, as the stock call does."""
        timesteps, _ = retrieve_timesteps(
            self.scheduler,
            stock["num_inference_steps"],
            self._execution_device,
            stock["timesteps"],
            stock["sigmas"],
        )
        self._num_timesteps = len(timesteps)

    def _prepare(
        self, stock: dict[str, Any], prompts_per_call: int, draws: int | None = None
    ) -> Prepared:
        """Encode prompts and images and draw the first noise, by the stock code."""
        device = self._execution_device
        self._guidance_scale = stock["guidance_scale"]
        self._guidance_rescale = stock["guidance_rescale"]
        self._clip_skip = stock["clip_skip"]
        self._cross_attention_kwargs = stock["cross_attention_kwargs"]
        self._interrupt = False
        conditional, unconditional = self._encode(stock, prompts_per_call)
        images, channels, *_ = self._latent_shape(stock)
        image_embeds = None
        if stock["ip_adapter_image"] is not None or stock["ip_adapter_image_embeds"] is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                stock["ip_adapter_image"],
                stock["ip_adapter_image_embeds"],
                device,
                images,
                self.do_classifier_free_guidance,
            )
        first_latents = self.prepare_latents(
            images if draws is None else draws,
            channels,
            stock["height"],
            stock["width"],
            conditional.dtype,
            device,
            stock["generator"],
            stock["latents"],
        )
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            timestep_cond = self.get_guidance_scale_embedding(
                torch.tensor(self.guidance_scale - 1).repeat(images),
                embedding_dim=self.unet.config.time_cond_proj_dim,
            ).to(device=device, dtype=first_latents.dtype)
        network = StableDiffusionNetwork(
            unet=self.unet,
            conditional=conditional,
            unconditional=unconditional,
            image_embeds=image_embeds,
            timestep_cond=timestep_cond,
            guidance_scale=self.guidance_scale,
            guidance_rescale=self.guidance_rescale,
            cross_attention_kwargs=self.cross_attention_kwargs,
        )
        return Prepared(
            network=network,
            decoder=VaeDecoder(self.vae),
            preview=None if self.preview_vae is None else VaeDecoder(self.preview_vae),
            first_latents=first_latents,
            features=FeatureTap(self.unet, rows_per_latent=network.rows_per_latent),
        )

    def _encode(self, stock: dict[str, Any], prompts_per_call: int) -> tuple[Tensor, Tensor | None]:
        """Embeddings of every image's prompt and negative prompt.

        In calls of ``prompts_per_call``, filled up by repetition, so that a prompt's embedding does
        not depend on how many others there are.
        """
        scale = self.cross_attention_kwargs and self.cross_attention_kwargs.get("scale")
        n = stock["num_images_per_prompt"]

        def part(name: str, rows: list[int]) -> Any:
            given = stock[name]
            if isinstance(given, str):
                return [given] * len(rows)
            if isinstance(given, Tensor):
                return given[rows]
            return given and [given[row] for row in rows]

        conditional, unconditional = [], []
        for some, filled in chunks(num_prompts(stock), prompts_per_call):
            rows = [some.start + row for row in filled]
            positive, negative = self.encode_prompt(
                part("prompt", rows),
                self._execution_device,
                n,
                self.do_classifier_free_guidance,
                part("negative_prompt", rows),
                prompt_embeds=part("prompt_embeds", rows),
                negative_prompt_embeds=part("negative_prompt_embeds", rows),
                lora_scale=scale,
                clip_skip=self.clip_skip,
            )
            useful = n * (some.stop - some.start)
            conditional.append(positive[:useful])
            if self.do_classifier_free_guidance:
                unconditional.append(negative[:useful])
        return torch.cat(conditional), torch.cat(unconditional) if unconditional else None

    def _check_safety(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """What the stock safety checker says; it blackens what it finds."""
        if self.safety_checker is None:
            return images, None
        device, dtype = self._execution_device, self.unet.dtype
        # It takes images as the autoencoder gives them, in [-1, 1].
        _, nsfw = self.run_safety_checker(images * 2 - 1, device, dtype)
        seen = torch.tensor(nsfw, device=images.device)
        return torch.where(seen[:, None, None, None], 0.0, images), list(nsfw)
