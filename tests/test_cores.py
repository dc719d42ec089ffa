"""Cores that a process may use: files as Linux writes them, of both versions of control groups."""

import math

import pytest

from care_hub.cores import cores, quota

LIMITS = [
    ("0::/", {"cpu.max": "150000 100000"}, 1.5),
    ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),  # of a parent
    ("0::/docker/abc", {"cpu.max": "50000 100000"}, 0.5),  # a path of the host, seen from in the container
    ("0::/job", {"job/cpu.max": "max 100000"}, math.inf),
    ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
]


@pytest.mark.parametrize(("groups", "files", "expected"), LIMITS)
def test_a_quota_is_the_least_of_all_groups(groups, files, expected, tmp_path):
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text + "\n")
    assert quota(str(tmp_path / "groups"), str(tmp_path / "mount")) == expected


def test_a_part_of_a_core_is_one_and_a_large_quota_makes_no_cores(monkeypatch):
    everywhere = cores()
    for given, expected in ((0.2, 1), (1000, None), (math.inf, None)):
        monkeypatch.setattr("care_hub.cores.quota", lambda given=given: given)
        assert cores() == (expected or max(cores(), everywhere))
    assert quota("/nowhere") == math.inf
