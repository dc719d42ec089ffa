"""`care-hub report`: the page shows what the files say, needs no network, and fits a phone."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from click.testing import CliRunner

from care_hub import cli
from care_hub.evaluate import record
from care_hub.evaluate.equivariance import FAMILIES

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report(*words, ok=True) -> str:
    done = CliRunner().invoke(cli.main, ["report", *map(str, words)])
    assert (done.exit_code == 0) == ok and "Traceback" not in done.output, done.output
    return done.output


@pytest.fixture
def runs(tiny_run, tmp_path):
    """A CARE run and its twin, evaluated; the second one's name wants to be a script and a formula."""
    folders = [tmp_path / "care", tmp_path / "_<script>alert(1)$x"]
    for k, folder in enumerate(folders):
        shutil.copytree(tiny_run, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text()) | ({"weight": 0.0} if k else {})
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        measures = ("rotation_invariance_ratio", "gram_deviation", "gamma", "composition_invariance_ratio", "hit_at_1")
        numbers = {m: [0.1234 + k, 0.1 + k, 0.2 + k] for m in (*measures, "hit_at_1_unrotated", "hit_at_1_random")}
        families = {name: dict(numbers) for name in FAMILIES}
        families["flip"]["rotation_invariance_ratio"] = [None, None, None] if k else [0.7654, 0.7, 0.8]  # NaN of a run that is invariant
        kept = {"projection": {"label": 51.25 + k}, "backbone": {"label": 61.25}}
        record.add(folder / "export", "equivariance", "shapes", {"images": 2000, "draws": 2 + k, "families": families, "kept": kept})
        record.add(folder / "export", "accuracy", "shapes", {"linear probe": {"top1": 71.5 + k, "n_train": 5000}})
    return folders


def test_the_page_shows_the_figures_of_the_files(runs, tmp_path):
    assert "report.html" in report(*runs, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", page)
    results = json.loads((runs[0] / "results.json").read_text())
    for value in (results["gram_deviation"], results["rotation_invariance_ratio"], 71.5, 72.5):
        assert f"{value:.4g}" in cells
    assert "0.123" in cells and "51.2" in cells and "52.2" in cells and "–" in cells
    assert "0.765" in cells and "were measured on different pictures or draws" in page
    assert "<b>72.5</b>" in page and "<b>71.5</b>" not in page
    differ = page[page.index("Settings that differ") :]
    assert re.findall(r"<td>(\w+)</td>", differ[: differ.index("</table>")])[0] == "weight"
    assert page.count("data:image/png;base64,") == 4  # curves, geometry, two sheets


def test_the_page_needs_no_network_and_believes_no_name(runs, tmp_path):
    report(*runs, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(?!data:)\w|url\(|@import|<link|<script", page)
    assert "&lt;script&gt;alert(1)$x" in page


def test_a_run_that_is_not_finished_shows_its_curves(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "half")
    (tmp_path / "half" / "results.json").unlink()
    shutil.rmtree(tmp_path / "half" / "export")
    with (tmp_path / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # being written
    report(tmp_path / "half", tiny_run, "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "half is not finished" in page and f"care-hub equivariance {tiny_run} --dataset-name shapes" in page
    assert page.count("data:image/png;base64,") == 2


def test_what_a_person_gets_wrong(tiny_run, tmp_path):
    assert "not a run folder" in report(tmp_path, "-o", tmp_path / "r.html", ok=False)
    assert "does not exist" in report(tiny_run, "-o", tmp_path / "absent" / "r.html", ok=False)
    assert "is a folder" in report(tiny_run, "-o", tmp_path, ok=False)
    assert "given twice" in report(tiny_run, tiny_run, "-o", tmp_path / "r.html", ok=False)
    shutil.copytree(tiny_run, tmp_path / "torn")
    rows = (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "torn" / "metrics.jsonl").write_text("\n".join([rows[0], rows[1][:20], *rows[2:]]) + "\n")
    assert "ine 2 of" in report(tmp_path / "torn", "-o", tmp_path / "r.html", ok=False)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium at hand")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_phone_and_desktop(runs, tmp_path, width):
    """Only tables and figures scroll sideways, each in its own box."""
    report(*runs, "-o", tmp_path / "report.html")
    measure = "const d = document.getElementsByTagName('iframe')[0].contentDocument.documentElement;"
    measure += "document.title = `${d.scrollWidth} of ${d.clientWidth}`"
    frame = f'<iframe src="report.html" style="border:0;width:{width}px;height:900px" onload="{measure}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    words = [BROWSER, *flags, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    scroll, client = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())
    assert scroll <= client <= width
