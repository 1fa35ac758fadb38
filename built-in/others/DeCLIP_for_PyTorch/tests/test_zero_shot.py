"""Zero-shot classification: prompts, class features over ranks, evaluation and prediction."""

import sys
from pathlib import Path

import pytest
import torch
from detector_runs import DEVICE
from torch.nn import functional as F

from declip import predict
from declip.config import CARD_OPTIONS, Config
from declip.model import build_model
from declip.tokenizer import Tokenizer, find_vocabulary
from declip.zero_shot import (
    ClassTexts,
    class_features,
    read_prompts,
    similarities,
    tokenize,
)
from zoo_common import checkpoint
from zoo_common.config import load_config
from zoo_common.distributed import Processes, read_environment
from zoo_common.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from declip_runs import CLASSES, VOCABULARY, draw_yfcc, write_recipe

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_yfcc(tmp_path_factory.mktemp("zero_shot"))


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer(find_vocabulary("", data))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "narrow.yaml")


@pytest.fixture(scope="module")
def config(recipe):
    return load_config(Config, [f"--config={recipe}"], CARD_OPTIONS)


@pytest.fixture(scope="module")
def model(config, tokenizer):
    torch.manual_seed(0)
    return build_model(config.model, config.loss, tokenizer.vocab_size).to(DEVICE).eval()


def test_there_are_upstream_s_80_prompts():
    prompts = read_prompts("imagenet80")
    assert len(prompts) == len(set(prompts)) == 80
    assert {"a photo of a {}.", "itap of a {}.", "a tattoo of the {}."} <= set(prompts)


def test_prompts_come_from_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a drawing of a {0}\n\n a {} \n")
    assert read_prompts(str(file)) == ["a drawing of a {}", "a {}"]


@pytest.mark.parametrize("text", ["", "no place", "{} and {}"])
def test_a_file_of_other_lines_is_refused(tmp_path, text):
    file = tmp_path / "odd.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=r"odd\.txt"):
        read_prompts(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "absent.txt"))


@torch.no_grad()
def test_class_features_are_the_mean_of_the_sentences(model, tokenizer, config):
    prompts = ["a photo of a {}.", "one {}", "the small {}"]
    texts = ClassTexts(CLASSES, prompts, tokenizer, config.model.context_length)
    device = torch.device(DEVICE)
    found = class_features(model, texts, read_environment(), device, batch_size=4)
    for number, name in enumerate(CLASSES):
        sentences = [prompt.format(name) for prompt in prompts]
        tokens, ends = tokenize(tokenizer, sentences, config.model.context_length)
        units = F.normalize(model.caption_features(tokens.to(device), ends.to(device)), dim=1)
        torch.testing.assert_close(found[number], F.normalize(units.mean(dim=0), dim=0))


@torch.no_grad()
@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_classes_and_agree(model, tokenizer, config, world_size, monkeypatch):
    texts = ClassTexts(CLASSES, ["a {}", "the {}"], tokenizer, config.model.context_length)
    device = torch.device(DEVICE)
    alone = class_features(model, texts, read_environment(), device, batch_size=4)
    parts = []
    monkeypatch.setattr("declip.zero_shot.sum_across", lambda part: parts.append(part) or part)
    for rank in range(world_size):
        processes = Processes(rank, rank, world_size, world_size, 1)
        class_features(model, texts, processes, device, batch_size=4)
    torch.testing.assert_close(F.normalize(torch.stack(parts).sum(dim=0), dim=1), alone)


@torch.no_grad()
def test_rows_of_the_context_s_length_change_nothing(model, tokenizer, config):
    device = torch.device(DEVICE)
    features = [
        class_features(
            model,
            ClassTexts(CLASSES, ["a {}"], tokenizer, config.model.context_length, static=static),
            read_environment(),
            device,
            batch_size=8,
        )
        for static in (False, True)
    ]
    torch.testing.assert_close(*features)


@torch.no_grad()
def test_a_picture_is_most_like_the_class_with_its_own_features(model):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    own = F.normalize(model.image_features(images), dim=1)
    cosines = similarities(model, images, own)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3, device=DEVICE))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "ckpt.pth.tar"
    torch.save({"model": {f"module.{k}": v.cpu() for k, v in model.state_dict().items()}}, file)
    return file


def test_predict_prints_shares_that_add_up(data, trained, recipe, capsys):
    picture = next((data / "imagenet_val").iterdir())
    words = [str(picture), "--text", "a red circle", "a blue square", "--text", "a green star"]
    words += [f"--checkpoint={trained}", f"--config={recipe}"]
    words += [f"--vocabulary={data / VOCABULARY}", f"--device={DEVICE}"]
    assert predict.main(words) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == str(picture)
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text", "a red circle"], "two different texts"),
        (["--text", "one", "one"], "two different texts"),
        (["--text", "one", "two", "--checkpoint=absent.pth"], "absent.pth"),
        (["absent.jpg", "--text", "one", "two"], "absent.jpg cannot be read as a picture"),
        (["--text", "one", "two", "--vocabulary=absent.gz"], "absent.gz"),
    ],
)
def test_predict_tells_what_is_wrong(data, trained, recipe, capsys, change, message):
    picture = str(next((data / "imagenet_val").iterdir()))
    words = [f"--checkpoint={trained}", f"--config={recipe}", f"--device={DEVICE}"]
    words += [f"--vocabulary={data / VOCABULARY}", *change]
    assert predict.main([picture, *words] if change[0].startswith("--") else words) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) <= 2


def test_a_checkpoint_of_another_width_is_told(data, tokenizer, recipe, tmp_path, capsys):
    words = [f"--config={recipe}", "model.embed_dim=24"]
    other = load_config(Config, words, CARD_OPTIONS)
    weights = build_model(other.model, other.loss, tokenizer.vocab_size).state_dict()
    file = tmp_path / "other.pth"
    checkpoint.save(file, {"format": checkpoint.FORMAT, "model": weights, "config": "{}"})
    picture = str(next((data / "imagenet_val").iterdir()))
    words = [picture, "--text", "one", "two", f"--checkpoint={file}", f"--config={recipe}"]
    words += [f"--vocabulary={data / VOCABULARY}", f"--device={DEVICE}"]
    assert predict.main(words) == 2
    assert "of another shape" in capsys.readouterr().err
