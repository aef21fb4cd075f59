from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctd_diffusers import EMBEDDED_MODEL
from mctd_diffusers.denoising.scheduler_names import (
    ALIASES,
    SCHEDULERS,
    WORDS,
    named_scheduler,
    parse_schedulers,
    read_scheduler,
    read_schedulers,
    scheduler_from,
)
from mctd_diffusers.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

LATENT = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}

CLASSES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))
LOADS_DIFFUSERS = """
import sys
from mctd_diffusers.cli import main
try:
    main(["generate", "--help"])
finally:
    print(*sorted({"torch", "diffusers"} & set(sys.modules)), file=sys.stderr)
"""


def spellings(name: str) -> st.SearchStrategy[str]:
    """The same name in another case, with spaces, dashes and underscores put in or left out."""

    def join(parts: list[tuple[str, bool]]) -> str:
        letters = [c for c in name if c not in " -_"]
        pairs = zip(letters, parts, strict=True)
        return "".join(gap + (c.upper() if up else c.lower()) for c, (gap, up) in pairs)

    count = len([c for c in name if c not in " -_"])
    gap = st.sampled_from(["", "", "", " ", "-", "_"])
    parts = st.lists(st.tuples(gap, st.booleans()), min_size=count, max_size=count)
    return parts.map(join)


# Names


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_short_name_makes_the_class_and_settings_it_says(name: str) -> None:
    class_name, implied = SCHEDULERS[name]
    named = named_scheduler(name, {})
    assert type(named.scheduler) is getattr(diffusers, class_name)
    assert {key: named.scheduler.config[key] for key in implied} == implied
    assert (named.name, named.eta) == (name, None)


def test_what_a_short_name_implies_is_stronger_than_the_config_of_the_model() -> None:
    config = {**LATENT, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    ode = named_scheduler("DPM++2M", config).scheduler.config
    assert (ode.algorithm_type, ode.solver_order) == ("dpmsolver++", 2)
    by_class = named_scheduler("DPMSolverMultistepScheduler", config).scheduler.config
    assert (by_class.algorithm_type, by_class.solver_order) == ("sde-dpmsolver++", 3)


def test_the_same_names_as_other_programs_have_them() -> None:
    for alias, name in ALIASES.items():
        assert read_scheduler(alias).name == name
    for text, name in {
        "dpm++ 2m sde": "DPM++2M-SDE",
        "SA-Solver": "SASolver",
        "euler-ancestral": "EulerAncestral",
        "ddim": "DDIM",
        "EDM_DPM++_2M": "EDM-DPM++2M",
        "FlowMatchEuler": "FlowEuler",
    }.items():
        assert read_scheduler(text).name == name


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_diffusers_is_known_with_and_without_its_ending(name: str) -> None:
    for ending in ("", "Scheduler", "DiscreteScheduler", "MultistepScheduler"):
        assert read_scheduler(name.removesuffix(ending)).kind is getattr(diffusers.schedulers, name)
    said = read_scheduler(name)
    assert not said.settings
    assert read_scheduler(said.name) == said


@given(st.data())
def test_case_and_spacing_do_not_matter(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SCHEDULERS, *ALIASES, *CLASSES]))
    assert read_scheduler(data.draw(spellings(name))) == read_scheduler(name)


@given(st.data())
def test_a_name_comes_back_as_the_one_way_to_write_it(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SCHEDULERS, *ALIASES, "DPMSolverMultistepScheduler"]))
    known = inspect.signature(read_scheduler(name).kind).parameters
    sigmas = [word for word in ("karras", "exponential", "beta") if WORDS[word][0] in known]
    others = {
        "timestep_spacing": ["trailing", "leading", "linspace"],
        "rescale_betas_zero_snr": ["zero-snr", "rescale_betas_zero_snr=True"],
        "solver_order": ["order=1", "solver_order=2", "order=3"],
        "steps_offset": ["steps_offset=1"],
        "beta_end": ["beta_end=0.02"],
    }
    choices = [some for key, some in others.items() if key in known]
    choices += [["eta=0.5", "eta=1"]] * (name in ("DDIM", "TCD"))
    drawn = [
        data.draw(st.sampled_from([None, *some])) for some in [*choices, *filter(None, [sigmas])]
    ]
    parts = data.draw(st.permutations([part for part in drawn if part is not None]))
    named = named_scheduler(":".join([name, *parts]), {})
    again = named_scheduler(named.name, {})
    assert (again.name, again.eta) == (named.name, named.eta)
    assert type(again.scheduler) is type(named.scheduler)
    assert dict(again.scheduler.config) == dict(named.scheduler.config)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no scheduler is named ''"),
        ("eulr", "no scheduler is named 'eulr'; did you mean 'Euler'. the names are DDIM, DDPM,"),
        ("EulerDiscreteSchedule", "did you mean 'EulerDiscreteScheduler'"),
        ("SchedulerMixin", "no scheduler is named 'SchedulerMixin'"),
        ("dpm", "no scheduler is named 'dpm'"),
        ("DPM++ 2M Karras", r"did you mean 'DPM\+\+2M:karras'"),
        ("eulr:karras", "no scheduler is named 'eulr'"),
        ("eulr:Karras", "no scheduler is named 'eulr'"),
        ("nowhere.at_all:Scheduler", "'nowhere.at_all:Scheduler' cannot be had .* module:Class"),
        ("json:JSONDecoder", "'json:JSONDecoder' is no scheduler: name a class"),
        ("json:Nothing", "'json:Nothing' cannot be had"),
    ],
)
def test_a_wrong_name_says_the_nearest(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_scheduler(text)


def test_the_guide_lists_every_name_and_word() -> None:
    guide = (Path(__file__).parents[1] / "docs/how-to-choose-a-search.md").read_text("utf-8")
    assert [name for name in (*SCHEDULERS, *ALIASES, *WORDS) if f"`{name}`" not in guide] == []


# Settings


@pytest.mark.parametrize(
    ("text", "settings", "eta"),
    [
        ("DDIM:eta=1", {}, 1.0),
        ("DDIM: trailing : eta = 0.5 ", {"timestep_spacing": "trailing"}, 0.5),
        ("DDIM:leading", {"timestep_spacing": "leading"}, None),
        ("DDIM:linspace:zero snr", {"rescale_betas_zero_snr": True}, None),
        ("Euler:Karras", {"use_karras_sigmas": True, "use_beta_sigmas": False}, None),
        ("Euler:exponential", {"use_exponential_sigmas": True}, None),
        ("Euler:beta", {"use_beta_sigmas": True}, None),
        ("Euler:final_sigmas_type=sigma_min", {"final_sigmas_type": "sigma_min"}, None),
        ("Euler:sigma_min=1", {"sigma_min": 1}, None),
        ("EDMEuler:exponential", {"sigma_schedule": "exponential"}, None),
        ("UniPC:order=3", {"solver_order": 3}, None),
        ("UniPC:disable_corrector=[0,1]", {"disable_corrector": [0, 1]}, None),
        ("DPM++2M:order=1", {"solver_order": 1, "algorithm_type": "dpmsolver++"}, None),
        ("DPMSolverMultistep:algorithm_type=sde-dpmsolver++", {"solver_order": 2}, None),
        ("DDIM:clip_sample=True", {"clip_sample": True}, None),
        ("DDIM:beta_end=1", {"beta_end": 1.0}, None),
    ],
)
def test_settings_follow_after_colons(
    text: str, settings: dict[str, Any], eta: float | None
) -> None:
    named = named_scheduler(text, {})
    config = named.scheduler.config
    assert {key: config[key] for key in settings} == settings
    assert named.eta == eta


def test_a_spacing_of_noise_levels_takes_the_place_of_the_models() -> None:
    config = {**LATENT, "use_karras_sigmas": True}
    scheduler = named_scheduler("Euler:exponential", config).scheduler
    assert (scheduler.config.use_karras_sigmas, scheduler.config.use_exponential_sigmas) == (
        False,
        True,
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Euler:use_karras_sigmas=True", "Euler:karras"),
        ("DDIM:timestep_spacing=trailing", "DDIM:trailing"),
        ("DDIM:rescale_betas_zero_snr=True", "DDIM:zero-snr"),
        ("DDIM:rescale_betas_zero_snr=False", "DDIM:rescale_betas_zero_snr=False"),
        ("DPM++2M:trailing:karras", "DPM++2M:karras:trailing"),
        ("DPM++2M:order=2", "DPM++2M"),
        ("UniPC:solver_order=2", "UniPC:order=2"),
        ("UniPC:disable_corrector=[0, 1]", "UniPC:disable_corrector=[0,1]"),
        ("DDIM:eta=1.0:steps_offset=1:trailing", "DDIM:trailing:steps_offset=1:eta=1"),
    ],
)
def test_there_is_one_way_to_write_a_setting(text: str, name: str) -> None:
    assert read_scheduler(text).name == name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("DDIM:karras", "DDIMScheduler has no setting 'karras'; .*it takes trailing, leading"),
        ("Euler:karas", "EulerDiscreteScheduler has no setting 'karas'; did you mean 'karras'"),
        ("Euler:use_karas_sigmas=True", "did you mean 'use_karras_sigmas'"),
        ("DPM++2S:trailing", "DPMSolverSinglestepScheduler has no setting 'trailing'"),
        ("LMS:order=2", "LMSDiscreteScheduler has no setting 'order'"),
        ("DDIM:", "has no setting ''"),
        ("DDIM:0.5", "has no setting '0.5'"),
        ("DDIM:eta=2", "eta is '2'; give the share of fresh noise, a number from 0"),
        ("DDIM:eta=nan", "eta is 'nan'"),
        ("DDIM:eta=much", "eta is 'much'"),
        ("DDIM:eta=0:eta=1", "eta is set twice"),
        ("Euler:karras:beta", "'beta' comes after 'karras', which sets the same"),
        ("Euler:karras:use_karras_sigmas=True", "'karras' comes after 'karras'"),
        ("UniPC:order=2:solver_order=3", "'order=3' comes after 'order=2'"),
        ("UniPC:order=two", "solver_order is 'two'; give a whole number"),
        ("UniPC:order=2.5", "solver_order is '2.5'; give a whole number"),
        ("Euler:use_karras_sigmas=maybe", "use_karras_sigmas is 'maybe'; give True or False"),
        ("DDIM:steps_offset=True", "steps_offset is 'True'; give a whole number"),
        ("DDIM:beta_end=high", "beta_end is 'high'; give a number"),
        ("DDIM:prediction_type=3", "prediction_type is '3'; give a word"),
        ("UniPC:disable_corrector=1", "disable_corrector is '1'; give a list"),
        ("DDIM:timestep_spacing=even", "timestep_spacing is 'even'; give one of trailing, leading"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_scheduler(text)


def test_what_the_class_itself_refuses_is_said_in_one_sentence() -> None:
    for text, reason in {
        "UnCLIP": "only supports `beta_schedule`: 'squaredcos_cap_v2'",
        "DDIM:beta_schedule=steep": "steep is not implemented",
        "Euler:karras:use_lu_lambdas=True": "no setting 'use_lu_lambdas'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            named_scheduler(text, LATENT)


def test_an_eta_that_the_step_does_not_take_is_refused() -> None:
    """It would do nothing: where a search branches, noise is its own ``branch_eta``."""
    assert read_scheduler("TCD:eta=0.3").eta == 0.3
    complaint = "'Euler:eta=0.5' has an eta, and the step of EulerDiscreteScheduler takes none: .*"
    with pytest.raises(ConfigError, match=complaint + "as in beam:branch_eta=0.5"):
        read_scheduler("Euler:eta=0.5")


# Lists


def test_lists_are_cut_at_commas_outside_brackets() -> None:
    text = "DDIM:eta=1, EulerAncestral,UniPC:disable_corrector=[0,1],DPM++2M:karras"
    names = ["DDIM:eta=1", "EulerAncestral", "UniPC:disable_corrector=[0,1]", "DPM++2M:karras"]
    assert [said.name for said in read_schedulers(text)] == names
    assert [named.name for named in parse_schedulers(text, LATENT)] == names


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a name is empty"),
        ("DDIM,,Euler", "a name is empty"),
        ("DDIM,", "a name is empty"),
        ("DDIM,Euler,ddim", "'DDIM' is named twice; name it once"),
        ("Euler:karras,Euler:use_karras_sigmas=True", "'Euler:karras' is named twice"),
        ("DDIM,eulr", "no scheduler is named 'eulr'"),
    ],
)
def test_lists_with_gaps_and_repetitions_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_schedulers(text, LATENT)


# The config of the model


CLIPS = ("clip_sample", "clip_denoised", "thresholding")
CLIPPING = [
    name
    for name in CLASSES
    if {*CLIPS} & {*inspect.signature(getattr(diffusers.schedulers, name)).parameters}
]


@pytest.mark.parametrize("name", CLIPPING)
def test_nothing_is_clipped_where_the_config_is_silent(name: str) -> None:
    config = scheduler_from(getattr(diffusers.schedulers, name), {}).config
    assert not any(config.get(key) for key in CLIPS)


def test_there_are_schedulers_that_would_clip() -> None:
    clip = [name for name in CLIPPING if any(map(read_scheduler(name).kind().config.get, CLIPS))]
    assert {"DDIMScheduler", "DDPMScheduler", "CMStochasticIterativeScheduler"} <= {*clip}


def test_what_the_config_says_of_clipping_holds() -> None:
    assert named_scheduler("DDIM", {**LATENT, "clip_sample": True}).scheduler.config.clip_sample
    assert named_scheduler("DDIM:clip_sample=True", LATENT).scheduler.config.clip_sample


def test_silent_configs_are_read_as_those_of_latent_models() -> None:
    assert named_scheduler("DDIM", LATENT).scheduler.config.set_alpha_to_one is False
    assert named_scheduler("PNDM", LATENT).scheduler.config.skip_prk_steps is True


def test_betas_and_prediction_are_those_of_the_model() -> None:
    config = json.loads((Path(EMBEDDED_MODEL) / "scheduler/scheduler_config.json").read_text())
    for name in ("DDPM", "Euler", "DPM++SDE", "UniPC", "LCM", "Heun"):
        made = named_scheduler(name, config).scheduler.config
        for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
            assert made[key] == config[key]


@pytest.mark.parametrize(
    ("text", "config", "complaint"),
    [
        ("FlowEuler", LATENT, "'FlowEuler' is for flow-matching models.* predicts epsilon.*noise"),
        ("FlowHeun", {"prediction_type": "v_prediction"}, "predicts v_prediction"),
        ("DPM++2M:use_flow_sigmas=True", LATENT, "is for flow-matching models"),
        ("EDMEuler", LATENT, "'EDMEuler' is for models that .* EDM .* such as DDIM"),
        ("CM", LATENT, "'CM' is for models that .* EDM"),
        ("IPNDM", LATENT, "'IPNDM' is one of the samplers that set noise levels of their own"),
        ("DDIM", FLOW, "'DDIM' is for diffusion models .* such as FlowEuler"),
        ("DDIM", {"prediction_type": "flow_prediction"}, "this model is one of the flow-matching"),
        ("EDMEuler", FLOW, "this model is one of the flow-matching"),
        ("Euler", EDM, "'Euler' is for diffusion models .* such as EDMEuler"),
        ("FlowEuler", EDM, "this model is one of the models that were trained .* EDM"),
    ],
)
def test_a_scheduler_for_models_of_another_kind_is_refused(
    text: str, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        named_scheduler(text, config)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("FlowEuler", FLOW),
        ("FlowLCM", FLOW),
        ("LTXEulerAncestralRF", FLOW),
        ("DPM++2M:use_flow_sigmas=True:prediction_type=flow_prediction", FLOW),
        ("UniPC", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("EDM-DPM++2M", EDM),
        ("IPNDM", {}),
    ],
)
def test_a_scheduler_for_models_of_this_kind_is_made(text: str, config: dict[str, Any]) -> None:
    assert named_scheduler(text, config).scheduler is not None


# Schedulers of a user's own

OWN = """
from diffusers import ConfigMixin, EulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config

class Mine(EulerDiscreteScheduler):
    pass

class Cooled(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, cooling: float = 0.5, num_train_timesteps: int = 1000):
        pass

    def step(self, model_output, timestep, sample, eta=0.0):
        return sample

class Bare(SchedulerMixin):
    def step(self, model_output, timestep, sample):
        return sample
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_schedulers_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_schedulers_of_a_test", raising=False)


@pytest.mark.usefixtures("own")
def test_a_users_own_class_is_found_from_the_folder() -> None:
    path = list(sys.path)
    named = named_scheduler("own_schedulers_of_a_test:Mine:karras", LATENT)
    assert type(named.scheduler).__name__ == "Mine"
    assert named.scheduler.config.use_karras_sigmas is True
    assert named.scheduler.config.beta_end == LATENT["beta_end"]
    assert named.name == "own_schedulers_of_a_test:Mine:karras"
    assert read_scheduler(named.name).name == named.name
    assert sys.path == path
    cooled = named_scheduler("own_schedulers_of_a_test:Cooled:cooling=1", LATENT)
    assert cooled.scheduler.config.cooling == 1.0
    assert read_scheduler("own_schedulers_of_a_test:Cooled:eta=1").eta == 1


@pytest.mark.usefixtures("own")
def test_a_users_own_class_must_be_made_from_a_config() -> None:
    with pytest.raises(ConfigError, match=r"'own_.*:Bare' cannot be made from a model's config"):
        read_scheduler("own_schedulers_of_a_test:Bare")
    with pytest.raises(ConfigError, match="Cooled has no setting 'coling'; did you mean 'cooling'"):
        read_scheduler("own_schedulers_of_a_test:Cooled:coling=1")


# What it costs


def test_help_that_lists_the_names_loads_neither_torch_nor_diffusers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS_DIFFUSERS], capture_output=True, text=True, check=False
    )
    assert "DPM++2M" in "".join(done.stdout.split())
    assert done.stderr.strip() == ""
