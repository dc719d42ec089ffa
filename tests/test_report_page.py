"""`care-hub report`: the page shows what the files say, needs no network, and fits a phone."""

import json
import re
import shutil

import pytest
import yaml
from helpers import BROWSER, care_hub_command, in_browser

from care_hub.evaluate.equivariance import FAMILIES
from care_hub.hub.evaluation_record import add_result

PNG = "data:image/png;base64,"


def report(*words, ok=True) -> str:
    return care_hub_command("report", *words, ok=ok)


@pytest.fixture
def runs(tiny_run, tmp_path):
    """A CARE run and its twin, evaluated; the second one's name wants to be a script and a formula."""
    folders = [tmp_path / "care", tmp_path / "_<script>alert(1)$x"]
    for k, folder in enumerate(folders):
        shutil.copytree(tiny_run, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text()) | ({"weight": 0.0} if k else {})
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        add_result(folder / "export", "equivariance", "shapes", equivariance(k))
        add_result(
            folder / "export", "accuracy", "shapes", {"linear probe": {"top1": 71.5 + k, "n_train": 5000}}
        )
    return folders


def equivariance(k: int) -> dict:
    """What `care-hub equivariance` measured of the k-th run."""
    measures = (
        "rotation_invariance_ratio",
        "gram_deviation",
        "gamma",
        "composition_invariance_ratio",
        "hit_at_1",
    )
    measures += ("hit_at_1_unrotated", "hit_at_1_random")
    families = {name: {m: [0.1234 + k, 0.1 + k, 0.2 + k] for m in measures} for name in FAMILIES}
    # NaN of a run that is invariant
    families["flip"]["rotation_invariance_ratio"] = [None, None, None] if k else [0.7654, 0.7, 0.8]
    attributes = {"projection": {"label": 51.25 + k}, "backbone": {"label": 61.25}}
    return {"images": 2000, "draws": 2 + k, "families": families, "attributes": attributes}


def test_the_page_shows_the_numbers_of_the_files(runs, tmp_path):
    assert "report.html" in report(*runs, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", page)
    results = json.loads((runs[0] / "results.json").read_text())
    for value in (results["gram_deviation"], results["rotation_invariance_ratio"], 71.5, 72.5):
        assert f"{value:.4g}" in cells
    assert "0.123" in cells and "51.2" in cells and "52.2" in cells and "–" in cells
    assert "0.765" in cells and "were measured on different images or draws" in page
    assert "<b>72.5</b>" in page and "<b>71.5</b>" not in page
    differ = page[page.index("Settings that differ") :]
    options = re.findall(r'<th scope="row">(\w+)</th>', differ[: differ.index("</table>")])
    assert options == ["weight"]
    assert page.count(PNG) == 2  # two sheets
    labels = re.findall(r'aria-label="([^"]*)"', page)
    assert "speed, images/s, over the images seen" in labels
    assert "rotation / invariance, by augmentation of shapes" in labels


def test_the_page_needs_no_network_and_believes_no_name(runs, tmp_path):
    report(*runs, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(?!data:)\w|url\((?!#)|@import|<link|<script", page)
    assert "&lt;script&gt;alert(1)$x" in page


def test_figures_share_no_ids(runs, tmp_path):
    report(*runs, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids and len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) == set(ids)


def test_a_run_that_is_not_finished_shows_its_curves(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "half")
    (tmp_path / "half" / "results.json").unlink()
    shutil.rmtree(tmp_path / "half" / "export")
    with (tmp_path / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # being written
    report(tmp_path / "half", tiny_run, "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "half is not finished" in page
    assert f"care-hub equivariance {tiny_run} --dataset-name shapes" in page
    assert page.count(PNG) == 1 and "InfoNCE, over the images seen" in page
    (tmp_path / "half" / "metrics.jsonl").unlink()
    report(tmp_path / "half", "-o", tmp_path / "r.html")
    assert "<svg" not in (tmp_path / "r.html").read_text()


def test_a_run_of_an_earlier_version_is_read(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "old")
    (folder / "export" / "neighbors.png").rename(folder / "export" / "neighbours.png")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"greyscale": config.pop("grayscale"), "blur_taps": config.pop("blur_kernel_size")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report(folder, tiny_run, "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count(PNG) == 2 and "one configuration" in page


def test_user_errors(tiny_run, tmp_path):
    assert "not a run folder" in report(tmp_path, "-o", tmp_path / "r.html", ok=False)
    assert "does not exist" in report(tiny_run, "-o", tmp_path / "absent" / "r.html", ok=False)
    assert "is a folder" in report(tiny_run, "-o", tmp_path, ok=False)
    assert "given twice" in report(tiny_run, tiny_run, "-o", tmp_path / "r.html", ok=False)
    shutil.copytree(tiny_run, tmp_path / "torn")
    rows = (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "torn" / "metrics.jsonl").write_text("\n".join([rows[0], rows[1][:20], *rows[2:]]) + "\n")
    assert "ine 2 of" in report(tmp_path / "torn", "-o", tmp_path / "r.html", ok=False)
    assert not (tmp_path / "r.html").exists()


ROWS = [b"7\n7", b'{"loss": 1}\n{}', b'{"step": "a"}\n{}', b'{"step": 1e999}\n{}', b"\xff\n{}"]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_are_none_are_refused(rows, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    assert "is no row of metrics" in report(tmp_path, "-o", tmp_path / "page.html", ok=False)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "results.json").write_bytes(rows)
    assert "does not contain the results" in report(tmp_path, "-o", tmp_path / "page.html", ok=False)
    (tmp_path / "results.json").write_text('{"training_seconds": "long"}')
    assert "does not contain the results" in report(tmp_path, "-o", tmp_path / "page.html", ok=False)


@pytest.mark.launches
@pytest.mark.skipif(BROWSER is None, reason="no Chromium at hand")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_phone_and_desktop(runs, tmp_path, width):
    """Only tables scroll sideways, each in its own box."""
    report(*runs, "-o", tmp_path / "report.html")
    script = "return [d.documentElement.scrollWidth, d.documentElement.clientWidth]"
    scroll, client = in_browser(tmp_path / "report.html", width, script)
    assert scroll <= client <= width


@pytest.mark.launches
@pytest.mark.skipif(BROWSER is None, reason="no Chromium at hand")
def test_the_second_run_is_in_sight_on_a_phone(runs, tmp_path):
    """In every table; and the first column stays where it is when the others are scrolled."""
    report(*runs, "-o", tmp_path / "report.html")
    script = """return [...d.querySelectorAll('.wide')].map(box => {
        const row = [...box.querySelectorAll('tbody tr')].find(row => row.cells.length > 2);
        const right = box.getBoundingClientRect().right;
        const seen = right - row.cells[2].getBoundingClientRect().left;
        box.scrollLeft = 1000;
        return [seen, row.cells[0].getBoundingClientRect().left - box.getBoundingClientRect().left];
    })"""
    boxes = in_browser(tmp_path / "report.html", 390, script)
    assert len(boxes) == 5  # about, results, settings, families, attributes
    for seen, moved in boxes:
        assert seen > 40 and moved == 0
