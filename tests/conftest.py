"""Shared fixtures: one tiny model, its captured program and its built program for the whole session; copies for tests."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import logging
import os
from contextlib import contextmanager
from functools import partial

import checkpoints
import measured
import pytest
import setups
import tiny
import torch
import traces

from vlmbuild.builder.build import build
from vlmbuild.cli import main
from vlmbuild.families import FAMILIES
from vlmbuild.measure.numerics import Measurement
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.zoo import ZOO

WORKER_BYTES = 3 << 30
"""Memory of a test process: torch, transformers, tiny models and what they compile."""


def pytest_xdist_auto_num_workers(config):
    """Take a process per core, as memory allows, for the whole suite, and none for tests named on the command line."""
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes inherit it: threads of each would wait for the others
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // WORKER_BYTES, 16))


def pytest_addoption(parser):
    parser.addoption(
        "--family-setup",
        action="append",
        default=[],
        metavar="MODULE",
        help="add a family of another distribution to the tests of every family: an importable module as those in "
        "tests/helpers/setups",
    )


def pytest_configure(config):
    for module in config.getoption("family_setup"):
        setups.add(importlib.import_module(module))
    # torch.export and inductor trip over their own deprecations.
    config.addinivalue_line("filterwarnings", "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines for machines, in every failure


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Take what stays for the session (vocabularies, traces, modules) from the garbage collector: trainers run it many times a test,
    and it would visit millions of objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def traced_once():
    """Builds, plans and locks in this process take a model's trace from an earlier one."""
    with pytest.MonkeyPatch.context() as patch:
        for place in traces.PLACES:
            patch.setattr(f"{place}.trace_program", traces.traced)
        yield


@pytest.fixture(autouse=True, scope="session")
def measured_here():
    """Exports are measured in this process, except within `process_of_its_own`."""
    with pytest.MonkeyPatch.context() as patch:
        for place in measured.PLACES:
            patch.setattr(place, measured.MeasuredHere)
        yield


@pytest.fixture(scope="session")
def process_of_its_own(measured_here):
    """A context in which builds start the process that measures them."""

    @contextmanager
    def own():
        with pytest.MonkeyPatch.context() as patch:
            for place in measured.PLACES:
                patch.setattr(place, Measurement)
            yield

    return own


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, stdout, stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def config():
    """Three language layers, two vision blocks, tied head."""
    return tiny.make_config()


@pytest.fixture(scope="session")
def reference(config):
    """transformers' model; tests may run it and zero its gradients, nothing else."""
    return tiny.make_reference(config)


@pytest.fixture(scope="session")
def pristine_program(config):
    return tiny.capture_program(config)


@pytest.fixture(scope="session")
def pristine_built(pristine_program):
    return tiny.build(pristine_program)


@pytest.fixture
def program(pristine_program):
    """Captured and outlined, before any pass; a copy."""
    return copy.deepcopy(pristine_program)


@pytest.fixture
def built(pristine_built):
    """After the passes of the default recipe; a copy."""
    return copy.deepcopy(pristine_built)


@pytest.fixture
def bind(config, reference):
    """Bind a program to the reference model's weights."""

    def bind(program, dtype=torch.float32):
        return VisionLanguageModel(program, tiny.FAMILY, config, copied(reference), dtype).train()

    return bind


@pytest.fixture
def model(built, bind):
    """The trainable module in float32 with the reference's weights."""
    return bind(built)


def copied(reference):
    return {name: tensor.clone() for name, tensor in reference.state_dict().items()}


# Checkpoints and artifacts on disk ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(reference, tmp_path_factory):
    """The reference model as a checkpoint; tests may read it, nothing else."""
    return checkpoints.write_checkpoint(reference, tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="session")
def nf4(checkpoint, tmp_path_factory):
    """Its NF4 artifact in float32, with the build's result."""
    path = tmp_path_factory.mktemp("artifact") / "nf4"
    return build(checkpoint, path, Recipe(quantize=QuantSpec(), dtype="float32"))


@pytest.fixture(scope="session")
def plain(checkpoint, tmp_path_factory):
    """Its unquantized artifact in float32."""
    return build(checkpoint, tmp_path_factory.mktemp("artifact") / "plain", Recipe(dtype="float32"))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """(name of a zoo checkpoint, or of a family that has none) -> its directory; nobody may write to it."""
    return functools.cache(
        lambda name: ZOO.get(name) or checkpoints.write_untrained(name, tmp_path_factory.mktemp("untrained"))
    )


@pytest.fixture(scope="session")
def zoo_artifact(tmp_path_factory, checkpoint_of):
    """(zoo checkpoint, family that has none, or directory, **recipe) -> its artifact, built once; nobody may write to it."""
    built = {}

    def artifact(zoo, **recipe):
        key = (zoo, repr(sorted(recipe.items())))
        if key not in built:
            output = tmp_path_factory.mktemp("zoo") / "artifact"
            built[key] = build(checkpoint_of(zoo) if zoo in FAMILIES else zoo, output, Recipe(**recipe))
        return built[key]

    return artifact


@pytest.fixture(scope="session")
def onnx_artifact(zoo_artifact):
    """(zoo checkpoint, **recipe) -> its ONNX artifact, built once; nobody may write to it."""
    return partial(zoo_artifact, target="onnx")
