"""The audit before training: what it passes, what it names, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from tiny import make_batch

import vlmbuild
from vlmbuild.errors import GradientError, UsageError
from vlmbuild.runtime.torch.checkpointing import Checkpointing


def batch(layout=((5, (1, 4, 6), 7), (9, (1, 2, 2), 4))):
    tensors, labels = make_batch(layout)
    return {**tensors, "labels": labels}


@pytest.mark.parametrize("quantized", [False, True])
def test_fresh_adapters_pass_though_b_is_zero(model, nf4, quantized):
    model = vlmbuild.load(nf4.path)[0] if quantized else model
    vlmbuild.add_lora(model, r=2, vision=True, dropout=0.1)
    audit = vlmbuild.audit_gradients(model, batch())
    assert set(audit.norms) == {name for name, _ in model.trainable_parameters()}
    assert min(audit.norms.values()) > 0
    assert str(audit).startswith(f"All {len(audit.norms)} trainable parameters get a gradient")


def test_whole_model_passes(model):
    assert len(vlmbuild.audit_gradients(model, batch()).norms) == len(list(model.parameters()))


def test_nothing_is_changed(model):
    vlmbuild.add_lora(model, r=2)
    model.eval().gradient_checkpointing_enable(every_n_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    vlmbuild.audit_gradients(torch.compile(model, backend="eager"), batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and model.checkpointing == Checkpointing(every=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_vision_adapter_without_an_image_is_named(model):
    vlmbuild.add_lora(model, r=2, vision=True)
    with pytest.raises(
        GradientError, match=r"16 of 58 .*visual.blocks.0.attn.*gets no gradient.*The batch has no image"
    ):
        vlmbuild.audit_gradients(model, batch([[5], [9]]))


def test_zero_gradient_is_named(model):
    vlmbuild.add_lora(model, r=2)
    with torch.no_grad():
        model.model.language_model.layers._modules["1"].mlp.down_proj.weight.zero_()
        model.model.language_model.layers._modules["1"].mlp.up_proj.weight.zero_()
        model.model.language_model.layers._modules["1"].mlp.gate_proj.weight.zero_()
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.gate_proj.lora" in name or "layers.1.mlp.up_proj.lora_A" in name:
                parameter.zero_().requires_grad_("up_proj" in name)
    with pytest.raises(GradientError, match=r"layers\.1\.mlp.*gets a gradient of zero"):
        vlmbuild.audit_gradients(model, batch())


def test_gradient_that_is_not_finite_is_named(model):
    vlmbuild.add_lora(model, r=2, layers=[2], target="o_proj")
    with torch.no_grad():
        dict(model.named_parameters())["model.language_model.layers.2.self_attn.o_proj.lora_A.default.weight"].fill_(
            1e38
        )
    with pytest.raises(GradientError, match="not finite"):
        vlmbuild.audit_gradients(model, batch())


def test_lost_in_recomputation_is_named(model, monkeypatch):
    vlmbuild.add_lora(model, r=2, target="q_proj")

    def forgetful(self, block, runner, compiler, tensors):
        with torch.no_grad():
            return tuple(t.requires_grad_() for t in block(*tensors, runner=runner, compiler=compiler))

    monkeypatch.setattr(Checkpointing, "run", forgetful)
    with pytest.raises(GradientError, match=r"q_proj.lora_A.default.weight gets no gradient with checkpointing"):
        vlmbuild.audit_gradients(model, batch())


def test_nothing_to_audit(model):
    with pytest.raises(UsageError, match="needs a batch with labels"):
        vlmbuild.audit_gradients(model, make_batch([[5]])[0])
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        vlmbuild.audit_gradients(model, batch())
