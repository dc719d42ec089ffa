"""Results as text: what `care-hub equivariance` prints."""

from care_hub.metrics import METRICS
from care_hub.report.tables import GEOMETRY, STEERING, geometry_text, text_table


def measured(**attributes: float) -> dict:
    numbers = {key: [0.123456, 0.1, 0.2] for key in (*STEERING, *GEOMETRY)}
    families = {"crop": dict(numbers), "flip": dict(numbers)}
    return {"families": families, "attributes": {"projection": attributes, "backbone": attributes}}


def test_columns_are_aligned_below_their_heads():
    rows = [["family", "rotation / invariance", "γ"], ["jitter 0.2", "1", "12345"]]
    assert text_table(rows).splitlines() == [
        "            rotation /       ",
        "family      invariance      γ",
        "jitter 0.2           1  12345",
    ]


def test_a_line_for_each_family_and_encoder():
    first, second = measured(label=51.25, x=0.5), measured(label=52.5, x=0.25)
    first["families"]["flip"]["gamma"] = [None, None, None]  # NaN as JSON has it
    del second["families"]["flip"]
    text = geometry_text({"runs/care": first, "runs/plain": second})
    rows = [line.split() for line in text.splitlines()]
    for keys in (STEERING, GEOMETRY):
        assert ["crop", "care", *["0.1235"] * len(keys)] in rows
        assert ["flip", "plain", *["–"] * len(keys)] in rows
    assert [row.count("–") for row in rows if row[:2] == ["flip", "care"]] == [0, 1]
    assert ["label,", "%", "51.25", "51.25", "52.5", "52.5"] in rows
    assert ["x,", "R²", "0.5", "0.5", "0.25", "0.25"] in rows
    assert max(map(len, text.splitlines())) < 160
    assert all(METRICS[key].meaning in text for key in (*STEERING, *GEOMETRY))


def test_one_encoder_has_no_column_of_names():
    text = geometry_text({"care": measured(label=50.0, **{"an attribute of the user": 1.0})})
    assert ["crop", *["0.1235"] * len(GEOMETRY)] in [line.split() for line in text.splitlines()]
    assert "an attribute of the user" in text


def test_a_name_can_not_forge_a_row():
    rows = [["family", "error"], ["crop\n flip\x1b[2J", "1"]]
    assert text_table(rows).splitlines() == ["family              error", "crop\\n flip\\x1b[2J      1"]
