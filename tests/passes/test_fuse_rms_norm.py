import tiny
import torch

from vlmbuild.ir.program import COMPUTE_DTYPE, Slot
from vlmbuild.passes import FuseRmsNorm, Normalize
from vlmbuild.rewrite.pass_manager import run

WEIGHT = Slot("norm.weight", (16,), COMPUTE_DTYPE, "parameter", "language")


def norm(weight, x, dtype=COMPUTE_DTYPE):
    wide = x.to(torch.float32)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype),)


def program(function):
    return tiny.region_program(tiny.make_region("r", function, [WEIGHT], [("1", "tokens", 16)], ("r.0", "r.1")))


def test_one_site_becomes_one_operator_of_the_same_values():
    built = program(norm)
    (_, report) = run((Normalize(), FuseRmsNorm()), built)
    region = built.regions["r"]
    assert tiny.operators(region) == ["aten.rms_norm.default"]
    assert report.matches == 2  # instances
    weight, x = torch.randn(16), torch.randn(1, 5, 16)
    torch.testing.assert_close(region.graph(weight, x), norm(weight, x, torch.float32), rtol=1e-6, atol=1e-6)


def test_second_run_finds_nothing():
    built = program(norm)
    run((Normalize(), FuseRmsNorm()), built)
    (report,) = run((FuseRmsNorm(),), built)
    assert report.matches == 0


def test_what_only_looks_alike_stays():
    def cubed(weight, x):
        wide = x.to(torch.float32)
        return (weight * (wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + 1e-5)).to(COMPUTE_DTYPE),)

    def over_rows(weight, x):
        wide = x.to(torch.float32)
        return (weight * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-5)).to(COMPUTE_DTYPE),)

    def root_is_read_twice(weight, x):
        wide = x.to(torch.float32)
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (weight * (wide * root).to(COMPUTE_DTYPE), root)

    for function in (cubed, over_rows, root_is_read_twice):
        (_, report) = run((Normalize(), FuseRmsNorm()), program(function))
        assert report.matches == 0, function.__name__
