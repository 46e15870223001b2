import torch

import vlmbuild.ops  # noqa: F401  registers the operators

linear_packed = torch.ops.vlmbuild.linear_packed


def test_it_is_a_linear_layer_on_the_values_that_are_stored():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    assert linear_packed(x, weight, bias, "int4").equal(torch.nn.functional.linear(x, weight, bias))
    assert linear_packed(x, weight, None, "int4").equal(torch.nn.functional.linear(x, weight))


def test_shapes_follow_without_data():
    x, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(5, 8, device="meta")
    assert linear_packed(x, weight, None, "int4").shape == (2, 3, 5)
