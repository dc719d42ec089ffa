"""The model card: it says what is true, in one order; its snippets run; what users wrote into it stays."""

import difflib
import re
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from helpers import PHOTO, measured, snippets, stored
from huggingface_hub import ModelCard

import care_hub
from care_hub import cli
from care_hub.config import EncoderConfig
from care_hub.hub.card import BEGIN, END, TAGS, Row, accuracies, card_text, write_card
from care_hub.hub.evaluation_record import add_result
from care_hub.hub.linear_head import LinearHead
from care_hub.hub.push import push_folder


def commit_readme(server, repo_id: str, text: str) -> None:
    """What a user does on the page of a repository."""
    content = stored(server, repo_id) | {"README.md": text.encode()}
    server.repositories[repo_id].commit("main", content)


def test_what_users_wrote_into_the_card_survives(server, export):
    theirs = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- birds\n---\n\n# Birds\n\nAsk Ann before use.\n"
    server.put("lab/birds", {"README.md": theirs.encode()})
    push_folder(export, "lab/birds")
    first = stored(server, "lab/birds")["README.md"].decode()
    assert "Ask Ann before use." in first and BEGIN in first
    commit_readme(server, "lab/birds", first.replace(END, END + "\n\n## Field notes\n\nSeen in May."))
    push_folder(export, "lab/birds")
    last = stored(server, "lab/birds")["README.md"].decode()
    assert last.count(BEGIN) == 1 and last.count("Seen in May.") == 1 and last.count("Ask Ann") == 1
    data = ModelCard(last).data
    assert data.language == "en" and data.tags == [*TAGS, "birds"]
    assert data.license == "apache-2.0"  # the user's choice
    assert {r.metric_name: r.metric_value for r in data.eval_results}["linear probe top-1 (backbone)"] == 61.5


def test_what_users_wrote_into_the_local_card_survives_a_push_over_an_older_one(server, export):
    push_folder(export, "lab/birds")
    readme = export / "README.md"
    readme.write_text(readme.read_text() + "\n## At home\n\nMind the cat.\n")
    online = stored(server, "lab/birds")["README.md"].decode()
    commit_readme(server, "lab/birds", online + "\n## Online\n\nMind the dog.\n")
    for _ in range(2):
        push_folder(export, "lab/birds")
        text = stored(server, "lab/birds")["README.md"].decode()
        assert text.count("Mind the cat.") == text.count("Mind the dog.") == text.count(BEGIN) == 1
    write_card(export)
    assert "Mind the cat." in readme.read_text() and "Mind the dog." not in readme.read_text()


def test_a_marker_that_users_quote_before_the_card_does_not_double_it(export):
    """A stray END made every writing append another copy."""
    readme = export / "README.md"
    readme.write_text(f"Leave what is above {END} alone.\n\n" + readme.read_text().split("---\n", 2)[2])
    for _ in range(2):
        text = write_card(export).read_text()
    assert text.count(BEGIN) == 1 and f"Leave what is above {END} alone." in text


def test_a_card_with_broken_metadata_keeps_its_text(export):
    (export / "README.md").write_text("---\ntags: [a\n---\n\nAsk Ann before use.\n")
    text = write_card(export).read_text()
    assert "Ask Ann before use." in text and ModelCard(text).data.library_name == "care_hub"


def test_a_card_that_is_written_again_or_pushed_keeps_its_order(server, export):
    """Its tags were sorted from the second writing on."""
    add_result(export, "accuracy", "cifar10", {"kNN": {"top1": 30.0}})
    add_result(export, "equivariance", "shapes", measured(label=14.5, x=0.1))
    (export / "README.md").unlink()
    first = write_card(export).read_text()
    assert ModelCard(first).data.tags == TAGS
    assert write_card(export).read_text() == first
    pushed = []
    for _ in range(2):
        push_folder(export, "lab/tiny")
        pushed.append(stored(server, "lab/tiny")["README.md"].decode())
    assert pushed[0] == pushed[1]
    assert (export / "README.md").read_text() == first
    changes = [line for line in difflib.ndiff(first.splitlines(), pushed[0].splitlines()) if line[0] in "+-"]
    named = (
        "- name: ",
        "# ",
        "encoder = ",
        "classifier = ",
        "model = ",
        "source = ",
        "`care-hub verify ",
    )  # only what names the encoder
    assert len(changes) == 14 and all(line[2:].startswith(named) for line in changes), changes


def test_rows_do_not_depend_on_the_order_of_measuring(export, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(export, other)
    results = [
        ("shapes", {"linear probe": {"top1": 62.0, "top5": 98.0, "n_train": 5000, "n_test": 2000}}),
        ("shapes", {"kNN": {"top1": 51.0}}),
        ("cifar10", {"linear probe": {"top1": 40.0}}),
        ("shapes", {"fine-tuned": {"top1": 70.0, "top1_std": 0.5, "seeds": 3}}),
        ("apples", {"kNN": {"top1": 20.0}}),
    ]
    for folder, order in ((export, results), (other, results[::-1])):
        for dataset, found in order:
            add_result(folder, "accuracy", dataset, found)
    rows = [line for line in write_card(export).read_text().splitlines() if line.startswith("| ")]
    assert rows == [line for line in write_card(other).read_text().splitlines() if line.startswith("| ")]
    assert rows[1:9] == [
        "| shapes | kNN top-1 (backbone) | 51.00 |  |",
        "| shapes | kNN, color top-1 (backbone) | 40.00 |  |",
        "| shapes | fine-tuned top-1 | 70.00 | ± 0.50 over 3 seeds |",
        "| shapes | linear probe top-1 (backbone) | 62.00 | 5,000 training images, 2,000 test images |",
        "| shapes | linear probe top-5 (backbone) | 98.00 |  |",
        "| apples | kNN top-1 (backbone) | 20.00 |  |",
        "| cifar10 | linear probe top-1 (backbone) | 40.00 |  |",
        "| measure | value | meaning |",
    ]


def test_the_card_ends_with_what_was_measured_and_its_data_sets_keep_their_order(export):
    for dataset in ("zebras", "shapes", "apples"):
        add_result(export, "equivariance", dataset, measured(label=14.5))
    text = write_card(export).read_text()
    titles = re.findall(r"^## (.*)", text, flags=re.M)
    assert titles.index("Citation") < titles.index("Results") and titles[-2:] == ["Results", "Equivariance"]
    assert re.findall(r"By augmentation on `(\w+)`", text) == ["shapes", "apples", "zebras"]


def test_a_card_says_where_its_data_can_be_had(export):
    for dataset, more in (("cifar10", {}), ("apples", {}), ("mine", {"data": {"dataset_name": "ann/pets"}})):
        add_result(export, "accuracy", dataset, {"kNN": {"top1": 20.0} | more})
    text = write_card(export).read_text()
    assert "- `shapes` is made by care_hub itself.\n- `cifar10` is `uoft-cs/cifar10` on the Hub.\n" in text
    assert "- `apples` is not known to be public: figures on it can't be verified elsewhere.\n" in text
    assert "- `mine` is `ann/pets` on the Hub.\n" in text and f"`care-hub verify {export}`" in text


def test_accuracies_of_a_head_and_of_the_end_of_training_stand_where_nothing_newer_is_recorded():
    config = EncoderConfig("m", 32, 1.0, (0, 0, 0), (1, 1, 1), dataset="a", results={"knn_top1": 50.0})
    heads = [
        LinearHead("b", None, None, [], {"top1": 61.5}),
        LinearHead("c", None, None, [], {"top1": 90.0, "protocol": "finetune"}),
    ]
    assert accuracies(config, heads, {}) == [
        Row("a", "kNN top-1 (backbone)", 50.0),
        Row("b", "linear probe top-1 (backbone)", 61.5),
    ]
    record = {"accuracy": {"b": {"linear probe (adam)": {"top1": 62.0}}}}
    assert accuracies(config, heads, record)[1:] == [Row("b", "linear probe (adam) top-1 (backbone)", 62.0)]


def test_the_card_says_what_the_hub_can_read(server, export):
    for dataset in ("cifar10", "org/pets"):
        add_result(export, "accuracy", dataset, {"kNN": {"top1": 30.0}})
    push_folder(export, "lab/tiny")
    data = ModelCard(stored(server, "lab/tiny")["README.md"].decode()).data
    about = (data.library_name, data.pipeline_tag, data.license)
    assert about == ("care_hub", "image-feature-extraction", "mit")
    values = {r.metric_name: r.metric_value for r in data.eval_results}
    assert values["linear probe top-1 (backbone)"] == 61.5 and values["kNN, color top-1 (backbone)"] == 40.0
    splits = {r.dataset_type: r.dataset_split for r in data.eval_results}
    assert splits == {"shapes": "test", "uoft-cs/cifar10": "test", "org/pets": None}  # it may be "validation"
    assert care_hub.list_models(hub=True) == ["lab/tiny"]
    assert care_hub.list_models(hub=True, author="bob") == []
    done = CliRunner().invoke(cli.main, ["list", "--hub", "--author", "lab"])
    assert done.exit_code == 0 and done.output.strip() == "lab/tiny"


def test_snippets_of_the_card_run_as_they_stand(server, export):
    """In plain timm, from the Hub: in test_hub_push.py, where care_hub can't be imported."""
    encoder = care_hub.load_encoder(export)
    z, h = encoder.encode(PHOTO), encoder.encode(PHOTO, space="backbone")
    local = (export / "README.md").read_text()
    push_folder(export, "lab/tiny")
    for text in (stored(server, "lab/tiny")["README.md"].decode(), local):
        names = {}
        exec(snippets(text)[0], names)
        np.testing.assert_allclose(names["z"], z, atol=1e-5)
        np.testing.assert_allclose(names["h"], h, atol=1e-5)
        assert names["labels"][0].startswith("class ") and names["probabilities"].shape == (1, 10)
    exec(snippets(local)[1], names)
    np.testing.assert_allclose(names["features"], h, atol=1e-5 * np.abs(h).max())


def test_measures_attributes_settings_and_figures_are_shown(export):
    (export / "neighbors.png").write_bytes(b"")
    (export / "neighbours.png").write_bytes(b"")  # of an older version
    add_result(export, "equivariance", "shapes", measured(label=14.5, x=0.123456))
    text = write_card(export).read_text()
    for expected in (
        "![neighbors](neighbors.png)\n\n![neighbours](neighbours.png)",
        "| rotation / invariance | 0.5000 | ",
        "| augmentation | motion | same image, found by R f(x), % | rotation / invariance | Gram deviation | "
        "found by R f(x), % | found by f(x), % |",
        "| crop | - | - | 0.5 (0.4 to 0.6) | - | 31.5 (20 to 40) | - |",
        "- motion: how far an augmentation moves an embedding",
        "with 95 % intervals (200 images, 2 draws):",
        "| label | 14.5 % | 14.5 % |\n| x | 0.123 | 0.123 |",
    ):
        assert expected in text
    settings = re.search(r"```yaml\n(.*?)```", text, flags=re.S)[1]
    assert yaml.safe_load(settings) == {"model": "resnet10_w16_small", "epochs": 2}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weight": 0.3}, "by CARE-simclr (equivariance weight 0.3). In its embedding space"),
        ({"weight": None, "method": None}, "by CARE. In its embedding space an augmentation acts"),
        ({"weight": 0.0, "method": "simclr"}, "by simclr. It is a plain baseline"),
        ({"finetuned": "pets"}, "then fine-tuned with the labels of `pets`. Its embeddings are no longer"),
    ],
)
def test_what_the_encoder_is_follows_from_its_training(values, sentence, export):
    encoder = care_hub.load_encoder(export)
    for name, value in values.items():
        setattr(encoder.config, name, value)
    encoder.save_pretrained(export)
    assert sentence in card_text(export, "lab/tiny")
