"""Memory in huge pages: the same values, and no error where there are none."""

from pathlib import Path

import pytest
import torch

from vlmbuild.runtime import huge_pages as module
from vlmbuild.runtime.huge_pages import huge_bytes, huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COUNT = 24 << 20
"""Numbers of a tensor: 96 MB."""


def kernel_has_them():
    release = tuple(int(part) for part in Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2])
    return release >= (6, 1) and "[never]" not in SWITCH.read_text()


@pytest.mark.skipif(not SWITCH.exists() or not kernel_has_them(), reason="this kernel gives no huge pages on request")
def test_what_is_allocated_lies_in_huge_pages_and_keeps_its_values():
    before = huge_bytes()
    with huge_pages():
        tensor = torch.arange(COUNT, dtype=torch.float32)
    assert huge_bytes() - before > tensor.nbytes / 2
    assert tensor.equal(torch.arange(COUNT, dtype=torch.float32))


def test_systems_without_them_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_collapse", lambda *bounds: asked.append(bounds))
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with huge_pages():
        tensor = torch.zeros(COUNT)
    assert tensor.sum() == 0
    assert not asked
