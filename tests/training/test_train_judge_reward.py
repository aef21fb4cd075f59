"""Both scripts through their real command lines: two steps, recorded losses, a killed run."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageColumn
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.evaluation.judge import SceneJudge, load_judge
from mctd_diffusers.evaluation.scenes import COLOURS, OBJECTS, PlacedObject, SceneItem, make_prompt
from mctd_diffusers.rewards.calls import call_reward
from mctd_diffusers.rewards.clip import ClipReward

FOLDER = Path(__file__).parents[2] / "training"
SMALL_REWARD = [
    "--hidden_size=32",
    "--vision_layers=1",
    "--text_layers=1",
    "--projection_dim=16",
    "--patch_size=16",
    "--vocab_size=600",
]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train_judge = load_script("train_judge")
train_reward = load_script("train_reward")


def scene(number: int) -> dict[str, Any]:
    """A picture of one or two coloured discs that stand for objects, with all its columns."""
    rng = np.random.default_rng(number)
    nouns = [str(noun) for noun in rng.choice(OBJECTS, size=1 + number % 2, replace=False)]
    colours = [str(colour) for colour in rng.choice(COLOURS, size=len(nouns), replace=False)]
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    placed = []
    for place, (noun, colour) in enumerate(zip(nouns, colours, strict=True)):
        x, y = 16 + 32 * place, 20 + 24 * place
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), fill=colour)
        placed.append(PlacedObject(noun, colour, "noto", x / 64, y / 64, 24 / 64))
    items = [SceneItem(noun, 1, colour) for noun, colour in zip(nouns, colours, strict=True)]
    return {
        "image": picture,
        "caption": make_prompt(items).caption(),
        "objects": json.dumps([asdict(one) for one in placed]),
        "half": number % 4 // 2,
        "in_vocabulary": True,
    }


def single(number: int) -> dict[str, Any]:
    """A picture outside the vocabulary."""
    return {
        "image": Image.new("RGB", (64, 64), (40 * number, 90, 200)),
        "caption": f"smiley number {number}",
        "objects": "[]",
        "half": number % 2,
        "in_vocabulary": False,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    splits = {
        "scenes": [scene(number) for number in range(24)],
        "singles": [single(number) for number in range(6)],
        "held_out_scenes": [scene(number) for number in range(100, 106)],
    }
    DatasetDict(
        {
            name: Dataset.from_list(rows).cast_column("image", ImageColumn())
            for name, rows in splits.items()
        }
    ).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    return folder


def run(script: ModuleType, data: Path, output: Path, *options: str) -> None:
    """Runs a script in this process through its command line."""
    small = SMALL_REWARD if script is train_reward else []
    script.main(
        [
            f"--dataset={data}",
            f"--output={output}",
            "--train_batch_size=8",
            "--report_to=none",
            "--warmup_steps=1",
            *small,
            *options,
        ]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return dict(load_file(path))


@pytest.mark.parametrize("script", [train_judge, train_reward], ids=["judge", "reward"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    script: ModuleType, data: Path, autoencoder: Path, tmp_path: Path
) -> None:
    name = "judge" if script is train_judge else "reward_model"
    rounds = [f"--autoencoder={autoencoder}", "--num_round_trips=4"]
    never = ["--validation_split=", *rounds]
    run(script, data, tmp_path / "whole", "--max_train_steps=4", "--decay_steps=4", *never)
    # A run of four steps that was asked to stop in its second, as SIGTERM asks.
    half = ["--max_train_steps=4", "--decay_steps=4", "--checkpointing_steps=2", *never]
    run_until(2, script, data, tmp_path / "killed", *half)
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    run(script, data, tmp_path / "killed", "--resume_from_checkpoint=latest", *half)
    whole, killed = weights(tmp_path / "whole" / name), weights(tmp_path / "killed" / name)
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(killed[key], value, rtol=0, atol=0)


def run_until(step: int, script: ModuleType, data: Path, output: Path, *options: str) -> None:
    """Runs a script that gets its signal to stop in the given step."""
    plain = script.StopRequest.is_agreed
    calls = iter(range(1, 1000))

    def at_step(self: Any, accelerator: Any) -> bool:
        self.is_set = next(calls) == step
        return bool(plain(self, accelerator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.StopRequest, "is_agreed", at_step)
        run(script, data, output, *options)


def test_the_judge_script_makes_a_judge_and_says_how_good_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        train_judge,
        data,
        tmp_path,
        "--max_train_steps=2",
        "--num_validation_images=4",
        "--blank_share=0.25",
    )
    judge = load_judge(tmp_path / "judge")
    assert len(judge.score(torch.rand(1, 3, 64, 64), ["a red cat"]).gold) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "facts_right" in text]
    assert "refused" in line


def test_the_same_captions_give_the_same_tokenizer_every_time() -> None:
    # Many pairs are equally frequent here.
    colours = ("red", "green", "blue", "teal", "pink", "cyan")
    captions = [f"{colour} square number {i} of the {i}" for i, colour in enumerate(colours * 4)]
    options = train_reward.Options()
    tokenizers = [train_reward.make_tokenizer(captions, options) for _ in range(8)]
    for tokenizer in tokenizers[1:]:
        assert tokenizer.get_vocab() == tokenizers[0].get_vocab()
        assert tokenizer(captions).input_ids == tokenizers[0](captions).input_ids


def test_the_reward_script_makes_a_reward_that_reads_any_text(data: Path, tmp_path: Path) -> None:
    run(train_reward, data, tmp_path, "--max_train_steps=2", "--num_validation_images=4")
    reward = ClipReward.from_pretrained(tmp_path / "reward_model")
    prompts = ["a red cat", "ein Zebra, schön 猫!"]
    assert call_reward(reward, torch.rand(2, 3, 64, 64), prompts, [0, 1]).shape == (2,)
    tokens = reward.tokenizer(prompts[1])["input_ids"]
    assert tokens.count(reward.tokenizer.eos_token_id) == 1, "a letter was read as the end"


def test_a_run_can_begin_with_trained_weights(data: Path, tmp_path: Path) -> None:
    quiet = ["--max_train_steps=1", "--validation_split="]
    run(train_reward, data, tmp_path / "first", *quiet)
    begin = f"--init_from={tmp_path / 'first' / 'reward_model'}"
    run(train_reward, data, tmp_path / "second", begin, "--learning_rate=0", *quiet)
    first = weights(tmp_path / "first" / "reward_model")
    for key, value in weights(tmp_path / "second" / "reward_model").items():
        torch.testing.assert_close(value, first[key])


def test_no_path_of_this_machine_is_saved(data: Path, tmp_path: Path) -> None:
    SceneJudge(channels=(8, 8, 8)).save_pretrained(tmp_path / "first")
    quiet = ["--max_train_steps=1", "--validation_split=", "--blank_split="]
    run(train_judge, data, tmp_path / "second", f"--init_from={tmp_path / 'first'}", *quiet)
    saved = (tmp_path / "second" / "judge" / "config.json").read_text("utf-8")
    assert str(tmp_path) not in saved


def test_any_pictures_with_captions_will_do_for_the_reward(tmp_path: Path) -> None:
    rows = [{"image": single(i)["image"], "caption": f"the number {i}"} for i in range(8)]
    dataset = Dataset.from_list(rows).cast_column("image", ImageColumn())
    dataset.save_to_disk(tmp_path / "mine")
    quiet = ["--max_train_steps=1", "--validation_split=", "--extra_split="]
    run(train_reward, tmp_path / "mine", tmp_path / "out", *quiet)
    assert (tmp_path / "out" / "reward_model" / "preprocessor_config.json").is_file()


def test_the_judge_cannot_learn_without_objects(tmp_path: Path) -> None:
    rows = [{"image": single(i)["image"], "caption": f"the number {i}"} for i in range(4)]
    Dataset.from_list(rows).cast_column("image", ImageColumn()).save_to_disk(tmp_path / "mine")
    with pytest.raises(ConfigError, match="column 'objects'"):
        run(train_judge, tmp_path / "mine", tmp_path / "out", "--blank_split=")


def test_augmented_objects_stay_on_their_pictures() -> None:
    row = scene(3)
    image = torch.from_numpy(np.asarray(row["image"]).copy()).permute(2, 0, 1)[None] / 255
    placed = [PlacedObject(**one) for one in json.loads(row["objects"])]
    images, scenes = train_judge.augment(
        image.repeat(16, 1, 1, 1), [placed] * 16, torch.Generator().manual_seed(0)
    )
    for picture, moved in zip(images, scenes, strict=True):
        for before, after in zip(placed, moved, strict=True):
            source = image[0, :, round(before.y * 64), round(before.x * 64)]
            seen = picture[:, round(after.y * 64), round(after.x * 64)]
            assert (source - seen).abs().max() < 0.35, "the centre shows another colour"


def test_false_captions_leave_other_texts_alone() -> None:
    rng = np.random.default_rng(0)
    assert train_reward.false_captions(["hello there"], 2, rng) == []
    assert len(train_reward.false_captions(["two cats", "hello there"], 2, rng)) == 4


def test_the_judge_keeps_its_vocabulary(tmp_path: Path) -> None:
    SceneJudge(nouns=["dog"], colours=["red"], channels=(8, 8, 8)).save_pretrained(tmp_path)
    assert list(load_judge(tmp_path).config.nouns) == ["dog"]
