"""Evaluation that one can trust: nothing touches the encoder, nothing depends on order, and what is broken is noticed."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from click.testing import CliRunner
from conftest import ROOT, run
from huggingface_hub import ModelCard

import care_hub
from care_hub import augment, cli
from care_hub.config import EvalConfig
from care_hub.data import sources
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate import commands, linear, record
from care_hub.evaluate.equivariance import FAMILIES, augmentations, geometry, recipe_of
from care_hub.evaluate.monitor import some_of
from care_hub.evaluate.readout import fit_ridge, kept, read_numbers, targets


@pytest.fixture
def encoder(tiny_run, tmp_path):
    """A run folder of this test's own."""
    shutil.copytree(tiny_run, tmp_path / "tiny")
    return tmp_path / "tiny"


def words(photos, *more) -> list[str]:
    return [str(w) for w in ("--dataset-name", "imagefolder", "--data-root", photos, *more)]


def eval_linear(encoder, photos, *more, ok=True) -> dict | str:
    done = CliRunner().invoke(cli.eval_linear, ["--encoder", str(encoder), *words(photos, *more)])
    assert (done.exit_code == 0) == ok and "Traceback" not in done.output, done.output
    return json.loads(done.stdout.splitlines()[-1]) if ok else done.output


def care_hub_command(*arguments, ok=True) -> str:
    done = CliRunner().invoke(cli.main, [str(w) for w in arguments])
    assert (done.exit_code == 0) == ok and "Traceback" not in done.output, done.output
    return done.output


def data(photos):
    return commands.labelled("photos", *(sources.load("imagefolder", s, str(photos), 32) for s in ("train", "test")))


def probe(encoder: Encoder, train, test, **options):
    (head,) = linear.probe(encoder, train, test, Accelerator(cpu=True), EvalConfig("here", "imagefolder", **options))
    return head


def test_a_probe_leaves_the_encoder_as_it_was_and_the_order_of_test_images_changes_nothing(tiny_run, photos):
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), data(photos)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    head = probe(encoder, train, test)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    again = probe(encoder, train, test.take(torch.arange(len(test)).flip(0)))
    assert again.metrics["top1"] == head.metrics["top1"] and torch.equal(again.weight, head.weight)


def test_an_encoder_left_in_train_mode_is_noticed(tiny_run, photos, monkeypatch):
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), data(photos)
    monkeypatch.setattr(Encoder, "eval", lambda self: self.train())
    with pytest.raises(CareHubError, match="the encoder changed"):
        probe(encoder.train(), train, test)


def test_shuffled_test_labels_are_noticed(tiny_run, photos):
    """Warm and cold pictures are easily told apart; only a broken evaluation says otherwise."""
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), data(photos)
    assert probe(encoder, train, test).metrics["top1"] > 85
    test.labels = test.labels[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    assert probe(encoder, train, test).metrics["top1"] < 75


def test_two_processes_get_what_one_gets(encoder, photos):
    one = eval_linear(encoder, photos)
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(*launcher, ROOT / "eval_linear.py", "--encoder", encoder, *words(photos))
    two = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.stdout.count('"top1"') == 1
    assert {k: v for k, v in two.items() if "seconds" not in k} == {k: v for k, v in one.items() if "seconds" not in k}


def test_the_published_schedule_also_on_augmented_features(encoder, photos):
    for optimizer in ("adam", "sgd"):
        result = eval_linear(encoder, photos, "--protocol", "sgd", "--optimizer", optimizer, "--augmented-copies", "2", "--seeds", "2")
        assert result["seeds"] == 2 and result["top1"] > 60 and result["top1_std"] >= 0
    rows = {row.metric_name: row.metric_value for row in ModelCard.load(encoder / "export" / "README.md").data.eval_results}
    assert rows["linear probe (sgd) top-1 (backbone)"] == result["top1"]


def test_few_labels_are_drawn_from_each_class_and_leave_the_head_alone(encoder, photos, monkeypatch):
    eval_linear(encoder, photos)
    head = (encoder / "export" / "linear_head.imagefolder.safetensors").read_bytes()
    embed, looked_at = Encoder.embed, []
    monkeypatch.setattr(Encoder, "embed", lambda self, x, *a: looked_at.append(len(x)) or embed(self, x, *a))
    result = eval_linear(encoder, photos, "--label-fraction", "0.1", "--seeds", "3")
    assert result["n_train"] == 4  # two of 24 in each of two classes
    assert sum(looked_at) <= 3 * 4 + 16  # and the test pictures
    assert (encoder / "export" / "linear_head.imagefolder.safetensors").read_bytes() == head
    known = record.read(encoder / "export")["accuracy"]["imagefolder"]
    assert set(known) == {"linear probe", "linear probe, 10 % of the labels"}
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    for fraction, counts in ((0.1, [9, 1, 1]), (0.01, [1, 1, 1]), (1.0, [90, 9, 1])):
        assert labels[linear.subset(labels, fraction, 0)].bincount().tolist() == counts
    assert linear.subset(labels, 0.1, 0).tolist() != linear.subset(labels, 0.1, 1).tolist()


def test_fine_tuning_makes_another_encoder_with_its_head(encoder, photos, tmp_path):
    before = (encoder / "export" / "model.safetensors").read_bytes()
    assert "--output-dir" in eval_linear(encoder, photos, "--protocol", "finetune", ok=False)
    result = eval_linear(encoder, photos, "--protocol", "finetune", "--epochs", "3", "--output-dir", tmp_path / "tuned")
    again = ("--protocol", "finetune", "--output-dir")
    for taken in (tmp_path / "tuned", encoder / "export"):
        assert "already holds an encoder" in eval_linear(encoder, photos, *again, taken, ok=False)
    assert "already holds an encoder" in eval_linear(encoder, photos, "--output-dir", tmp_path / "tuned", ok=False)
    assert (encoder / "export" / "model.safetensors").read_bytes() == before
    tuned = care_hub.load_encoder(tmp_path / "tuned")
    assert tuned.projection is None and tuned.fingerprint != care_hub.load_encoder(encoder).fingerprint
    labels, _ = care_hub.load_classifier(tmp_path / "tuned", dataset="imagefolder").classify(photos / "test")
    right = sum(label == ("cold" if k < 8 else "warm") for k, label in enumerate(labels))
    assert 100 * right / 16 == result["top1"] > 85
    assert "fine-tuned with the labels of `imagefolder`" in (tmp_path / "tuned" / "README.md").read_text()


def test_knn_from_the_command_line_is_kept_in_the_card(encoder, photos):
    def knn(*flags) -> dict:
        lines = care_hub_command("knn", encoder, *words(photos, *flags)).splitlines()
        return json.loads([line for line in lines if line.startswith("{")][-1])  # progress bars may follow

    result = knn()
    assert result["n_train"] == 48 and result["top1"] == 100
    assert "| imagefolder | kNN top-1 (backbone) | 100.00 |" in (encoder / "export" / "README.md").read_text()
    assert knn("--bank", "10")["n_train"] == 10


def test_results_of_other_weights_are_not_believed(encoder, photos):
    care_hub_command("knn", encoder, *words(photos))
    assert record.read(encoder / "export")
    path = encoder / "export" / "evaluation.json"
    text = path.read_text()
    path.write_text(text.replace('"encoder": "', '"encoder": "0'))
    assert record.read(encoder / "export") == {}
    path.write_text(text[: len(text) // 2])  # cut short
    assert record.read(encoder / "export") == {}
    known = json.loads(text)
    for nonsense in ([], {"accuracy": {"a": {"b": {"top1": "<b>"}}}}, {"accuracy": {"a": {"b": {}}}}, {"equivariance": {"a": {"kept": 1}}}):
        path.write_text(json.dumps(known | {"results": nonsense}))  # a stranger's
        assert record.read(encoder / "export") == {}
    path.write_text(text)
    assert record.read(encoder / "export") == known["results"]


# What rotates and what does not: encoders whose answer is known.


class Pixels:
    """Embeds a picture as its own numbers: whatever moves pixels about is an orthogonal map."""

    device = torch.device("cpu")

    def embed(self, x, space="projection"):
        return F.normalize((x if x.dtype != torch.uint8 else x / 255).flatten(1) - 0.5, dim=1)


class Means(Pixels):
    """Knows colours only, and no place."""

    def embed(self, x, space="projection"):
        return F.normalize((x if x.dtype != torch.uint8 else x / 255).mean(dim=(2, 3)), dim=1)


def noise(n, side, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_geometry_of_an_encoder_that_rotates_exactly():
    """Without noise 200 pictures determine the map in 48 dimensions."""
    found = geometry(Pixels(), noise(400, 4), augment.Recipe(4), draws=1, families=["flip"])["flip"]
    assert found["rotation_error"][0] < 1e-6 and found["rotation_invariance_ratio"][0] < 1e-6 and found["invariance_error"][0] > 1
    assert found["gram_deviation"][0] < 1e-10 and found["gamma"][0] < 1e-10 and found["composition_error"][0] < 1e-8
    assert found["hit_at_1"][0] == 100 and found["mrr"] == (1, 1, 1)
    assert found["hit_at_1_unrotated"][0] < 10 and found["hit_at_1_random"][0] < 10
    assert found["composition_residual"][0] < 1e-6  # twice flipped is not flipped


def test_the_geometry_of_an_encoder_that_is_invariant():
    found = geometry(Means(), noise(400, 4), augment.Recipe(4), draws=1, families=["flip"])["flip"]
    assert found["invariance_error"][0] < 1e-10 and found["rotation_invariance_ratio"][0] != found["rotation_invariance_ratio"][0]  # NaN
    assert found["gram_deviation"][0] < 1e-10


def test_all_encoders_are_shown_the_same_augmentations():
    x = noise(6, 16).float() / 255
    for family in FAMILIES:
        first, again, other = (augmentations(family, augment.Recipe(16), 2, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a(x), b(x)) for a, b in zip(first, again, strict=True))
        if family not in ("flip", "greyscale"):
            assert not torch.equal(first[0](x), other[0](x)) and not torch.equal(first[0](x), first[1](x)), family


def test_the_recipe_is_the_one_of_training(tiny_run):
    encoder = Encoder.from_pretrained(tiny_run)
    recipe, config = recipe_of(encoder), care_hub.TrainConfig()
    assert (recipe.scale, recipe.jitter, recipe.blur) == ((config.crop_scale, 1.0), config.jitter, config.blur)
    encoder.care["training"]["jitter"] = ["much"] * 4  # a stranger's config.json
    with pytest.raises(CareHubError, match="makes no sense"):
        recipe_of(encoder)
    encoder.care["training"] = None
    assert recipe_of(encoder) == augment.Recipe(32)


def test_the_parts_of_a_family_do_what_their_name_says():
    x = noise(3, 16).float() / 255
    one = lambda family: augmentations(family, augment.Recipe(16), 1)[0](x)  # noqa: E731
    assert torch.equal(one("flip"), x.flip(3))
    grey = one("greyscale")
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])
    torch.testing.assert_close(augment.rotate(x, 90), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.luma(one("hue")).mean(), augment.luma(x).mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(one("blur").mean(), x.mean(), atol=0.02, rtol=0)


def test_encoders_side_by_side(encoder, photos, tmp_path):
    twin = shutil.copytree(encoder, tmp_path / "twin")
    output = care_hub_command("equivariance", encoder, twin, *words(photos, "--draws", 2, "-o", tmp_path / "o"))
    both = json.loads((tmp_path / "o" / "equivariance.json").read_text())["encoders"]
    first, second = both.values()
    assert first == second and list(both) == [str(encoder), str(twin)]  # the same weights, the same pictures
    assert list(first["families"]) == list(FAMILIES) and set(first["kept"]) == {"projection", "backbone"}
    assert set(first["kept"]["backbone"]) == {"label", "brightness", "contrast", "saturation", "hue"}
    for measure, (mean, low, high) in first["families"]["full recipe"].items():
        assert low <= mean <= high, measure
    assert "full recipe" in output and "hit@1" in output
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"equivariance.json", "equivariance.png", "neighbours.png"}
    assert (encoder / "export" / "equivariance.imagefolder.png").is_file()
    assert "By augmentation on `imagefolder`" in (encoder / "export" / "README.md").read_text()


def test_what_can_not_be_compared_is_refused(encoder, photos, tmp_path):
    Encoder.new("resnet10_w16_small", image_size=40, hidden=8, outputs=4).save_pretrained(tmp_path / "larger")
    shutil.copytree(encoder / "export", tmp_path / "bare")
    (tmp_path / "bare" / "projection.safetensors").unlink()
    assert "32 and 40 px" in care_hub_command("equivariance", encoder, tmp_path / "larger", *words(photos), ok=False)
    assert "no projection head" in care_hub_command("equivariance", tmp_path / "bare", *words(photos), ok=False)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in care_hub_command("equivariance", encoder, *words(photos, "-o", tmp_path / "file"), ok=False)
    assert "no test split" in care_hub_command("knn", encoder, *words(photos / "train"), ok=False)
    assert "--label-fraction" in eval_linear(encoder, photos, "--label-fraction", "2", ok=False)
    assert "--augmented-copies" in eval_linear(encoder, photos, "--augmented-copies", "2", ok=False)


def test_read_outs_find_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(600, 10, generator=g), torch.randn(600, 1, generator=g)
    told = torch.cat([x, 3 * y + 0.1 * torch.randn(600, 1, generator=g)], dim=1)
    assert read_numbers(told[:400], y[:400], told[400:], y[400:]) > 0.99
    assert read_numbers(x[:400], y[:400], x[400:], y[400:]) < 0.05
    weight, bias = fit_ridge(told, y, 1e-9)
    exact = torch.linalg.lstsq(torch.cat([told, torch.ones(600, 1)], dim=1).double(), y.double()).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), exact, rtol=1e-4, atol=1e-6)


def test_colours_of_pictures_are_read_from_colours():
    """Mean colours hold brightness and hue exactly, and nothing of contrast within a picture."""
    base = torch.randint(40, 216, (300, 3, 1, 1), generator=torch.Generator().manual_seed(1))
    pictures = (base + torch.randint(-40, 40, (300, 3, 8, 8), generator=torch.Generator().manual_seed(2))).byte()
    images = sources.Images(8, None, None, pictures)
    classes, numbers = targets(images, pictures)
    assert not classes and numbers["hue"].shape == (300, 2)

    class Colours(Pixels):
        care, projection = {"image_size": 8}, None

        def embed(self, x, space):
            return x.float().mean(dim=(2, 3))

    half = torch.arange(150)
    read = kept(Colours(), images.take(half), images.take(half + 150))["backbone"]
    assert read["brightness"] > 0.999 and read["hue"] > 0.999 and read["contrast"] < 0.5


def test_test_sets_sorted_by_class_are_mixed_before_they_are_halved():
    order = some_of(1000, 400)
    assert len(set(order.tolist())) == 400 and 100 < (order[:200] < 500).sum() * 2 < 300
    assert torch.equal(some_of(1000, 400), order)


def test_transfer_to_real_photos(shared, tmp_path):
    """Trained on drawn shapes, probed on photos of clothes: better than the most frequent class."""
    name = care_hub.list_models(pretrained=True)[0]
    result = eval_linear(name, shared("data/clothing"), "--output-dir", tmp_path / "o")
    assert result["top1"] > 30 and (tmp_path / "o" / "linear_head.imagefolder.safetensors").is_file()
