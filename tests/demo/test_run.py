"""The demo from end to end, with fewer steps: it teaches what the checkpoint could not do."""

from __future__ import annotations

import pytest

from vlmbuild import verify
from vlmbuild.demo.run import PUBLISHED, run
from vlmbuild.zoo import CHECKPOINTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.release] * (name != "qwen2_vl")) for name in CHECKPOINTS]
)
def test_demo_teaches_a_new_question(family, tmp_path):
    lines = []
    result = run(tmp_path / "new", family=family, steps=40, echo=lines.append)
    assert result.reading >= 0.93
    assert result.before < 0.3
    assert result.after > result.before + 0.3
    assert verify(result.artifact).id == result.artifact_id
    assert (result.adapter / "adapter_model.safetensors").is_file()
    text = "\n".join(lines)
    for stage in ("[1/6] Plan", "[2/6] Build", "[3/6] Verify", "[4/6] Load", "[5/6] Fine-tune", "[6/6] Ask again"):
        assert stage in text
    assert "vlmbuild.load" in text and PUBLISHED[family] in text
