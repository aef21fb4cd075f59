"""How people name schedulers: a name, and settings after colons.

``"DDIM:eta=1"``, ``"Euler a"``, ``"DPM++2M:karras:trailing"``, ``"UniPC:order=3"``. A name is one
of :data:`SCHEDULERS` or :data:`ALIASES`, a class of diffusers with or without its ending, or
``module:Class`` of a user's own; case, spaces, dashes and underscores do not matter in it. A
setting is a word (:data:`WORDS`), ``eta``, or ``key=value`` of the class's own config. diffusers is
imported when a name is looked up, not with this module.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from mctd_diffusers.errors import ConfigError, UnsupportedSchedulerError
from mctd_diffusers.imports import imported

_DPMPP_2: Final = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_SDE_DPMPP_2: Final = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

SCHEDULERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "DDIM": ("DDIMScheduler", {}),
        "DDPM": ("DDPMScheduler", {}),
        "PNDM": ("PNDMScheduler", {}),
        "Euler": ("EulerDiscreteScheduler", {}),
        "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}),
        "Heun": ("HeunDiscreteScheduler", {}),
        "LMS": ("LMSDiscreteScheduler", {}),
        "KDPM2": ("KDPM2DiscreteScheduler", {}),
        "KDPM2Ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
        "DPM++2M": ("DPMSolverMultistepScheduler", _DPMPP_2),
        "DPM++2M-SDE": ("DPMSolverMultistepScheduler", _SDE_DPMPP_2),
        "DPM++3M": ("DPMSolverMultistepScheduler", {**_DPMPP_2, "solver_order": 3}),
        "DPM++3M-SDE": ("DPMSolverMultistepScheduler", {**_SDE_DPMPP_2, "solver_order": 3}),
        "DPM++2S": ("DPMSolverSinglestepScheduler", _DPMPP_2),
        # As k-diffusion has it; the overview of diffusers names the single-step solver here, which
        # draws no noise.
        "DPM++SDE": ("DPMSolverSDEScheduler", {}),
        "UniPC": ("UniPCMultistepScheduler", {}),
        "DEIS": ("DEISMultistepScheduler", {}),
        "SASolver": ("SASolverScheduler", {}),
        "IPNDM": ("IPNDMScheduler", {}),
        "LCM": ("LCMScheduler", {}),
        "TCD": ("TCDScheduler", {}),
        "CM": ("CMStochasticIterativeScheduler", {}),
        "EDMEuler": ("EDMEulerScheduler", {}),
        "EDM-DPM++2M": ("EDMDPMSolverMultistepScheduler", _DPMPP_2),
        "EDM-DPM++2M-SDE": ("EDMDPMSolverMultistepScheduler", _SDE_DPMPP_2),
        "FlowEuler": ("FlowMatchEulerDiscreteScheduler", {}),
        "FlowHeun": ("FlowMatchHeunDiscreteScheduler", {}),
        "FlowLCM": ("FlowMatchLCMScheduler", {}),
    }
)
"""Short names: the class of diffusers, and the settings that belong to the name."""

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {"Euler a": "EulerAncestral", "DPM2": "KDPM2", "DPM2 a": "KDPM2Ancestral", "PLMS": "PNDM"}
)
"""What k-diffusion and its interfaces call some of them."""

WORDS: Final[Mapping[str, tuple[str, Any]]] = MappingProxyType(
    {
        "karras": ("use_karras_sigmas", True),
        "exponential": ("use_exponential_sigmas", True),
        "beta": ("use_beta_sigmas", True),
        "trailing": ("timestep_spacing", "trailing"),
        "leading": ("timestep_spacing", "leading"),
        "linspace": ("timestep_spacing", "linspace"),
        "zero-snr": ("rescale_betas_zero_snr", True),
    }
)
"""Settings that go by a word."""

_SHORT_KEYS: Final = {"order": "solver_order"}
_SIGMAS: Final = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"
)  # fmt: skip
_ENDINGS: Final = ("Scheduler", "DiscreteScheduler", "MultistepScheduler")
_OUTSIDE_BRACKETS: Final = r"(?![^(\[{]*[)\]}])"

_LATENT: Final = {
    "clip_sample": False,
    "clip_denoised": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""What latent diffusion models want where their config says nothing: defaults are for pixels."""

Levels: TypeAlias = Literal["betas", "flow", "EDM"]
"""What noise levels are made of, in which a model must have been trained."""

_MEANT_FOR: Final[Mapping[Levels, str]] = {
    "betas": "diffusion models whose noise levels follow from betas",
    "flow": "flow-matching models, which predict a velocity between noise and data",
    "EDM": "models that were trained with the preconditioning of EDM (sigma_data)",
}
_INSTEAD: Final[Mapping[Levels, str]] = {
    "betas": "DDIM, Euler or DPM++2M",
    "flow": "FlowEuler, or DPM++2M:use_flow_sigmas=True:prediction_type=flow_prediction",
    "EDM": "EDMEuler or EDM-DPM++2M",
}


@dataclass(frozen=True)
class SchedulerName:
    """What a text asks for, before there is a model.

    Attributes:
        name: the one way to write it: short name, settings in order.
        kind: the class.
        settings: of its config.
        eta: share of fresh noise of its step, 0 to 1; ``None`` where the text says nothing of it.
    """

    name: str
    kind: Any
    settings: Mapping[str, Any]
    eta: float | None


@dataclass(frozen=True)
class NamedScheduler:
    """A scheduler for a model.

    Attributes:
        name: the one way to write it.
        scheduler: made from the model's config.
        eta: share of fresh noise of its step, 0 to 1; ``None`` where the name says nothing of it.
    """

    name: str
    scheduler: Any
    eta: float | None


def named_scheduler(text: str | SchedulerName, config: Mapping[str, Any]) -> NamedScheduler:
    """The scheduler that a text names, made from the config of a model's own.

    Args:
        text: such as ``"DDIM:eta=1"`` or ``"DPM++2M:karras"``, or one that was read.
        config: of the model's scheduler; where it is empty, the defaults of the class hold.

    Raises:
        ConfigError: see :func:`read_scheduler`; or the class cannot be made from this config, or
            is for models of another kind.
    """
    said = read_scheduler(text) if isinstance(text, str) else text
    model = levels_of_model(config)
    if model is not None and said.kind.__module__.startswith("diffusers."):
        _check_levels(said, config, model)
    try:
        scheduler = scheduler_from(said.kind, config, **said.settings)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler {said.name!r} cannot be made from the model's config ({_one_line(error)}): "
            "change a setting, or name another"
        ) from error
    return NamedScheduler(said.name, scheduler, said.eta)


def parse_schedulers(text: str, config: Mapping[str, Any]) -> list[NamedScheduler]:
    """The schedulers that are named with commas between them.

    Raises:
        ConfigError: see :func:`read_schedulers` and :func:`named_scheduler`.
    """
    return [named_scheduler(said, config) for said in read_schedulers(text)]


def read_schedulers(text: str) -> list[SchedulerName]:
    """What schedulers with commas between them are to be.

    Raises:
        ConfigError: see :func:`read_scheduler`; or one is empty, or named twice.
    """
    parts = [part.strip() for part in re.split("," + _OUTSIDE_BRACKETS, text)]
    if not all(parts):
        raise ConfigError(
            f"schedulers {text!r}: a name is empty; write names with commas between them, such as "
            "'DDIM:eta=1,EulerAncestral'"
        )
    said = [read_scheduler(part) for part in parts]
    names = [each.name for each in said]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"schedulers {text!r}: {name!r} is named twice; name it once")
    return said


def read_scheduler(text: str) -> SchedulerName:
    """What a text asks for; needs no model.

    Raises:
        ConfigError: no scheduler has that name, or its class has no such setting; says the nearest.
    """
    name, *parts = (part.strip() for part in re.split(":" + _OUTSIDE_BRACKETS, text))
    known = _known_names().get(_squashed(name))
    if known is not None:
        kind, implied = _class_of(known.class_name), known.implied
        short = known.name
    elif _is_own_class(name, parts):
        short, *parts = f"{name}:{parts[0]}", *parts[1:]
        kind, implied = _own_class(short), {}
    else:
        raise _no_such_name(name)
    reading = _Reading(text, short, kind)
    for part in parts:
        reading.read(part)
    return reading.finish(implied)


def scheduler_from(kind: Any, config: Mapping[str, Any], **settings: Any) -> Any:
    """A scheduler of one class from the config of another.

    Latents are not clipped where the config says nothing of it.

    Args:
        kind: class of diffusers, or one like it.
        config: of any scheduler.
        settings: beside it, or in the place of its own.
    """
    known = inspect.signature(kind).parameters
    silent = {key: value for key, value in _LATENT.items() if key not in config and key in known}
    return kind.from_config(config, **{**silent, **settings})


# Names


@dataclass(frozen=True)
class _Known:
    """A name that is known: how it is shown, what it is short for, and its canonical name."""

    shown: str
    class_name: str
    implied: Mapping[str, Any]
    name: str


def _squashed(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text).lower()


@functools.cache
def _known_names() -> Mapping[str, _Known]:
    """Every name by its squashed form; short names before those of classes."""
    import diffusers.schedulers

    plain = {kind: name for name, (kind, implied) in SCHEDULERS.items() if not implied}
    names = {}
    for kind in dir(diffusers.schedulers):
        if not kind.endswith("Scheduler"):
            continue
        for ending in _ENDINGS:
            shown = kind.removesuffix(ending)
            known = _Known(shown, kind, {}, plain.get(kind, kind.removesuffix("Scheduler")))
            names[_squashed(shown)] = known
        names[_squashed(kind)] = _Known(kind, kind, {}, known.name)
    names |= {_squashed(name): _Known(name, *of, name) for name, of in SCHEDULERS.items()}
    for alias, name in ALIASES.items():
        names[_squashed(alias)] = _Known(alias, *SCHEDULERS[name], name)
    return names


def _no_such_name(name: str) -> ConfigError:
    """What to say of a name that nothing has."""
    squashed, names = _squashed(name), _known_names()
    hint = ""
    near = difflib.get_close_matches(squashed, names, 1, 0.6)
    if near:
        hint = f"did you mean {names[near[0]].shown!r}? "
    for word in WORDS:
        first = squashed.removesuffix(_squashed(word))
        if first != squashed and first in names:
            hint = f"did you mean '{names[first].name}:{word}'? "
    return ConfigError(
        f"no scheduler is named {name!r}; {hint}the names are {', '.join(SCHEDULERS)}, the classes "
        "of diffusers, or module:Class of your own; settings follow after colons, as in "
        "'DPM++2M:karras'"
    )


def _class_of(name: str) -> Any:
    """A class of diffusers.

    Raises:
        ConfigError: it needs a package that is not there.
    """
    import diffusers

    kind: Any = getattr(diffusers.schedulers, name)
    if not issubclass(kind, diffusers.SchedulerMixin):  # stands for the missing class
        try:
            kind()
        except ImportError as error:
            raise ConfigError(f"scheduler {name} cannot be had: {_one_line(error)}") from error
    return kind


def _is_own_class(name: str, parts: Sequence[str]) -> bool:
    """Whether ``name:part`` reads as ``module:Class``, and not as a name and a setting."""
    return (
        bool(parts)
        and parts[0].isidentifier()
        and parts[0][0].isupper()
        and _squashed(parts[0]) not in map(_squashed, WORDS)
        and all(part.isidentifier() for part in name.split("."))
    )


def _own_class(text: str) -> Any:
    """A user's own class.

    Raises:
        ConfigError: it is not there, or is no scheduler that is made from a config.
    """
    from diffusers import ConfigMixin, SchedulerMixin

    kind = imported(text, "module:Class")
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        raise ConfigError(
            f"{text!r} is no scheduler: name a class that is a SchedulerMixin and a ConfigMixin of "
            "diffusers, with set_timesteps and step"
        )
    if not issubclass(kind, ConfigMixin):
        raise ConfigError(
            f"{text!r} cannot be made from a model's config: let it be a ConfigMixin of diffusers "
            "too, with @register_to_config on its __init__"
        )
    return kind


# Settings


class _Reading:
    """Reads the settings of one text.

    Args:
        text: the whole of it, for errors.
        short: name of the scheduler.
        kind: its class.
    """

    def __init__(self, text: str, short: str, kind: Any) -> None:
        self._text = text
        self._short = short
        self._kind = kind
        parameters = inspect.signature(kind).parameters.values()
        self._defaults = {
            each.name: each.default for each in parameters if each.kind != each.VAR_KEYWORD
        }
        step = getattr(kind, "step", None)  # some predict and correct instead
        self._takes_eta = step is not None and "eta" in inspect.signature(step).parameters
        self._parts: dict[str, dict[str, Any]] = {}  # settings by how they are written
        self._eta: float | None = None

    def read(self, part: str) -> None:
        """Read one setting.

        Raises:
            ConfigError: the class has none of that name, or not that value; or it was set before.
        """
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals:
            word = next((word for word in WORDS if _squashed(word) == _squashed(part)), None)
            chosen = None if word is None else self._by_word(word)
            if word is None or chosen is None:
                raise self._unknown(part)
            return self._set(word, chosen)
        if key == "eta" and key not in self._defaults:
            return self._set_eta(value)
        key = _SHORT_KEYS.get(key, key)
        if key not in self._defaults:
            raise self._unknown(part.partition("=")[0])
        chosen_value = self._value(key, value)
        for word in WORDS:
            own = self._by_word(word)
            if own is not None and own.get(key) == chosen_value and chosen_value is not False:
                return self._set(word, own)
        short = {long: short for short, long in _SHORT_KEYS.items()}.get(key, key)
        return self._set(f"{short}={_written(chosen_value)}", {key: chosen_value})

    def finish(self, implied: Mapping[str, Any]) -> SchedulerName:
        """The whole; what the short name implies gives way to what is said."""
        said = {key: value for part in self._parts.values() for key, value in part.items()}
        written = [
            part
            for part, settings in self._parts.items()
            if not all(implied.get(key, ...) == value for key, value in settings.items())
        ]
        words = [word for word in WORDS if word in written]
        written = words + sorted(part for part in written if part not in words)
        if self._eta is not None:
            written.append(f"eta={self._eta:g}")
        return SchedulerName(
            name=":".join([self._short, *written]),
            kind=self._kind,
            settings=MappingProxyType({**implied, **said}),
            eta=self._eta,
        )

    def _by_word(self, word: str) -> dict[str, Any] | None:
        """Settings of a word; ``None`` where the class has no such thing."""
        key, value = WORDS[word]
        if key in self._defaults:
            rivals = _SIGMAS if key in _SIGMAS else ()
            return {key: value, **{r: False for r in rivals if r in self._defaults and r != key}}
        if word in ("karras", "exponential") and "sigma_schedule" in self._defaults:
            return {"sigma_schedule": word}
        return None

    def _set(self, written: str, settings: dict[str, Any]) -> None:
        for other, earlier in self._parts.items():
            if earlier.keys() & settings.keys():
                raise ConfigError(
                    f"scheduler {self._text!r}: {written!r} comes after {other!r}, which sets the "
                    "same; give one of them"
                )
        self._parts[written] = settings

    def _set_eta(self, value: str) -> None:
        if self._eta is not None:
            raise ConfigError(f"scheduler {self._text!r}: eta is set twice; set it once")
        try:
            eta = float(value)
        except ValueError:
            eta = math.nan
        if not 0 <= eta <= 1:
            raise ConfigError(
                f"scheduler {self._text!r}: eta is {value!r}; give the share of fresh noise, a "
                "number from 0 (deterministic) to 1"
            )
        if not self._takes_eta:
            raise ConfigError(
                f"scheduler {self._text!r} has an eta, and the step of {self._kind.__name__} takes "
                "none: leave it out, and give the share of noise to a search, as in "
                f"beam:branch_eta={eta:g}"
            )
        self._eta = eta

    def _value(self, key: str, text: str) -> Any:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        default = self._defaults[key]
        wanted = _wanted(key, value, default)
        if wanted is not None:
            raise ConfigError(f"scheduler {self._text!r}: {key} is {text!r}; give {wanted}")
        return float(value) if type(default) is float and type(value) is int else value

    def _unknown(self, setting: str) -> ConfigError:
        words = [word for word in WORDS if self._by_word(word) is not None]
        shorts = [short for short, key in _SHORT_KEYS.items() if key in self._defaults]
        others = [key for key in self._defaults if key not in _SHORT_KEYS.values()]
        words += ["eta"] * self._takes_eta
        names = {_squashed(name): name for name in (*words, *shorts, *others)}
        near = difflib.get_close_matches(_squashed(setting), names, 1, 0.6)
        hint = f"did you mean {names[near[0]]!r}? " if near else ""
        return ConfigError(
            f"scheduler {self._text!r}: {self._kind.__name__} has no setting {setting!r}; {hint}"
            f"it takes {', '.join([*words, *shorts, *others])}"
        )


def _wanted(key: str, value: Any, default: Any) -> str | None:
    """What to give in the place of a value that does not fit; ``None`` where it fits."""
    if key == "timestep_spacing":
        spacings = [spacing for name, spacing in WORDS.values() if name == key]
        return None if value in spacings else f"one of {', '.join(spacings)}"
    kinds: list[tuple[type, Callable[[], bool], str]] = [
        (bool, lambda: isinstance(value, bool), "True or False"),
        (int, lambda: type(value) is int, "a whole number"),
        (float, lambda: type(value) in (int, float), "a number"),
        (str, lambda: isinstance(value, str), "a word"),
        (list, lambda: isinstance(value, list), "a list, such as [1,2]"),
    ]
    for kind, fits, wanted in kinds:
        if type(default) is kind:
            return None if fits() else wanted
    return None


def _written(value: Any) -> str:
    """A value as it is read."""
    if not isinstance(value, str):
        return repr(value).replace(" ", "")
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)


# What a scheduler and a model must have in common


def levels_of_model(config: Mapping[str, Any]) -> Levels | None:
    """What the noise levels of a model are made of; ``None`` where its config does not say."""
    prediction = config.get("prediction_type")
    if "sigma_data" in config:
        return "EDM"
    if "shift" in config or config.get("use_flow_sigmas") or prediction == "flow_prediction":
        return "flow"
    is_known = prediction in ("epsilon", "v_prediction", "sample")
    return "betas" if is_known or "beta_schedule" in config else None


def check_fits(scheduler: Any, config: Mapping[str, Any]) -> None:
    """Refuse a scheduler for models of another kind than the one whose config is given.

    Raises:
        UnsupportedSchedulerError: says what each of them is for.
    """
    own, model = levels_of_model(scheduler.config), levels_of_model(config)
    if own is not None and model is not None and own != model:
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} is for {_MEANT_FOR[own]}; this model is one of the "
            f"{_MEANT_FOR[model]}: pictures would come out as noise. Use another, such as "
            f"{_INSTEAD[model]}."
        )


def _levels_of_scheduler(said: SchedulerName, config: Mapping[str, Any]) -> Levels | None:
    """What those of a scheduler would be; ``None`` where they are its own."""
    known = inspect.signature(said.kind).parameters
    if "sigma_data" in known:
        return "EDM"
    is_flow = {**config, **said.settings}.get("use_flow_sigmas", False)
    if "shift" in known or ("use_flow_sigmas" in known and is_flow):
        return "flow"
    return "betas" if "beta_schedule" in known else None


def _check_levels(said: SchedulerName, config: Mapping[str, Any], model: Levels) -> None:
    """Refuse a scheduler under which this model would make noise.

    Raises:
        ConfigError: says what each of them is for.
    """
    own = _levels_of_scheduler(said, config)
    if own == model or (own is None and model != "betas"):
        return
    prediction = config.get("prediction_type")
    this = f"one of the {_MEANT_FOR[model]}" + (
        f", and predicts {prediction}" if prediction else ""
    )
    meant = "samplers that set noise levels of their own" if own is None else _MEANT_FOR[own]
    verb = "is one of the" if own is None else "is for"
    raise ConfigError(
        f"scheduler {said.name!r} {verb} {meant}; this model is {this}: pictures would come out as "
        f"noise. Name another, such as {_INSTEAD[model]}"
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
