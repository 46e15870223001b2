"""Peers of `export.py`: transformers' exporters with ONNX Runtime, AOTInductor and OpenVINO, and optimum-intel.

The exporters write no vision encoder for generation, so the tower is exported by itself, and of the parts for generation the
one that takes any number of tokens on a cache. Inputs are what their own capture of `generate` finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.export_sides import Side

PATCHES, GRID = 1024, (1, 32, 32)
VISION, DECODE, COMPILED = "vision", "decode", "compiled.pt2"


class ExportersPeer(Side):
    """Base of the runners of transformers' exporters."""

    def parts(self, checkpoint: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Return the tower and the decoder, with inputs to trace them with."""
        from transformers import AutoModelForImageTextToText, GenerationConfig
        from transformers.exporters.utils import decompose_for_generation

        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 300, (1, 64), generator=generator)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        form = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        stages = decompose_for_generation(model, text, generation_config=form, multi_token_decode=True)
        pixels = torch.randn(PATCHES, 1176, generator=generator)
        tower = {"hidden_states": pixels, "grid_thw": torch.tensor([GRID])}
        self.remember(model.config.get_text_config(), checkpoint)
        return {DECODE: stages[DECODE], VISION: (model.model.visual, tower)}

    def remember(self, config: Any, _checkpoint: Path) -> None:
        """Remember the cache's geometry."""
        heads = config.num_attention_heads
        self.geometry = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // heads)

    def decoder_inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the captured decoder's inputs beside the cache: one row of positions for text, and three."""
        positions = torch.arange(self.past, self.past + ids.shape[1]).expand(4, 1, -1).contiguous()
        return {"input_ids": ids, "position_ids": positions, "use_cache": True, "return_dict": True}

    def tower_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's inputs, with the ones that the exporter computes on the host."""
        from transformers.exporters.utils import precompute_export_inputs

        inputs = {"hidden_states": batch["pixel_values"], "grid_thw": batch["image_grid_thw"]}
        precompute_export_inputs(self.tower_model(), inputs)
        return inputs

    def tower_model(self) -> Any:
        """Make the tower without weights, which the exporter asks for its settings."""
        if not hasattr(self, "_tower"):
            from transformers import AutoConfig, Qwen2VLForConditionalGeneration

            with torch.device("meta"):
                self._tower = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(self.path)).model.visual
        return self._tower

    def open_config(self, output: Path) -> None:
        from transformers import AutoConfig

        self.path = output / DECODE
        self.remember(AutoConfig.from_pretrained(self.path).get_text_config(), output)

    def prompt(self, ids: Tensor) -> Tensor:
        self.past = 0
        self.begin()
        return self._next(ids)

    def step(self, token: int) -> Tensor:
        return self._next(torch.tensor([[token]]))

    def _next(self, ids: Tensor) -> Tensor:
        logits = self.infer(self.decoder_inputs(ids))
        self.past += ids.shape[1]
        return logits[0, -1]

    def begin(self) -> None:
        """Forget the last text."""
        from transformers import DynamicCache

        layers, heads, width = self.geometry
        self.cache: Any = DynamicCache()
        for layer in range(layers):
            empty = torch.zeros(1, heads, 0, width)
            self.cache.update(empty, empty.clone(), layer)

    def infer(self, inputs: dict[str, Any]) -> Tensor:
        """Run the decoder on the cache; logits (1, tokens, vocabulary)."""
        found = self.decoder(**inputs, past_key_values=self.cache)
        self.cache = found["past_key_values"]
        logits: Tensor = found["logits"]
        return logits

    decoder: Any
    tower: Any


class OnnxPeer(ExportersPeer):
    """OnnxExporter with its fusions for ONNX Runtime; `int4` by ONNX Runtime's own quantizer."""

    def __init__(self, options: dict[str, Any], int4: bool = False) -> None:
        super().__init__(options)
        self.int4 = int4

    def export(self, checkpoint: Path, output: Path) -> None:
        from transformers.exporters import OnnxConfig, OnnxExporter

        for name, (module, inputs) in self.parts(checkpoint).items():
            exported = OnnxExporter().export(module, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
            exported.save_pretrained(output / name)
        if self.int4:
            self._quantize(output / DECODE / "model.onnx")

    def _quantize(self, file: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(file), block_size=64, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        (file.parent / f"{file.name}.data").unlink()
        quantizer.model.save_model_to_file(str(file), use_external_data_format=True)
        left = file.parent / f"{file.name}.data"
        self.weights = left.stat().st_size

    def open(self, output: Path) -> None:
        import onnxruntime
        from transformers.exporters import ExportedModel

        self.open_config(output)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        loaded = [
            ExportedModel.from_pretrained(output / name, device="cpu", session_options=options)
            for name in (DECODE, VISION)
        ]
        self.decoder, self.tower = loaded

    def encode(self, batch: dict[str, Tensor]) -> object:
        return self.tower(**self.tower_inputs(batch))

    def bytes_per_token(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir() if file.name.endswith(".data"))


class InductorPeer(ExportersPeer):
    """DynamoExporter, then AOTInductor."""

    def export(self, checkpoint: Path, output: Path) -> None:
        from torch._inductor import aoti_compile_and_package
        from transformers.exporters import DynamoConfig, DynamoExporter

        for name, (module, inputs) in self.parts(checkpoint).items():
            exported = DynamoExporter().export(module, inputs, DynamoConfig(dynamic=True))
            exported.save_pretrained(output / name)
            aoti_compile_and_package(exported.program, package_path=str(output / name / COMPILED))

    def open(self, output: Path) -> None:
        from torch._inductor import aoti_load_package
        from transformers.exporters import ExportedModel

        self.open_config(output)
        for name in (DECODE, VISION):
            exported = ExportedModel.from_pretrained(output / name, device="cpu")
            runner = next(iter(exported.runners.values()))
            runner.module = aoti_load_package(str(output / name / COMPILED))
            setattr(self, "decoder" if name == DECODE else "tower", exported)

    def encode(self, batch: dict[str, Tensor]) -> object:
        return self.tower(**self.tower_inputs(batch))


class OpenVinoPeer(ExportersPeer):
    """OpenVINOExporter, whose model holds the cache; in float32, or in the precision that OpenVINO takes by itself."""

    def __init__(self, options: dict[str, Any], precision: str = "f32") -> None:
        super().__init__(options)
        self.precision = precision

    def export(self, checkpoint: Path, output: Path) -> None:
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        for name, (module, inputs) in self.parts(checkpoint).items():
            OpenVINOExporter().export(module, inputs, OpenVINOConfig(dynamic=True)).save_pretrained(output / name)

    def open(self, output: Path) -> None:
        self.open_config(output)
        self.decoder = _compiled(output / DECODE / "openvino_model.xml", self.precision)
        self.tower = _compiled(output / VISION / "openvino_model.xml", self.precision)

    def encode(self, batch: dict[str, Tensor]) -> object:
        given = self.tower_inputs(batch)
        names = {port.any_name for port in self.tower.model_inputs}
        return self.tower.infer({name: x.numpy() for name, x in given.items() if name in names})

    def begin(self) -> None:
        self.decoder.reset_state()

    def infer(self, inputs: dict[str, Any]) -> Tensor:
        return _inferred(self.decoder, {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"]})


class OptimumPeer(Side):
    """optimum-intel's export, its language model run by OpenVINO itself: one call for each step, without generate's host code."""

    def __init__(self, options: dict[str, Any], int4: bool = False) -> None:
        super().__init__(options)
        self.int4 = int4

    def export(self, checkpoint: Path, output: Path) -> None:
        from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig

        form = {"quantization_config": OVWeightQuantizationConfig(bits=4)} if self.int4 else {"load_in_8bit": False}
        OVModelForVisualCausalLM.from_pretrained(checkpoint, export=True, compile=False, **form).save_pretrained(output)

    def open(self, output: Path) -> None:
        from optimum.intel import OVModelForVisualCausalLM

        self.path = output
        settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        settings |= {} if self.int4 else {"INFERENCE_PRECISION_HINT": "f32"}
        self.whole = OVModelForVisualCausalLM.from_pretrained(output, ov_config=settings)
        self.language = self.whole.language_model
        self.language.compile()

    def encode(self, batch: dict[str, Tensor]) -> object:
        return self.whole.get_vision_embeddings(batch["pixel_values"], batch["image_grid_thw"])

    def prompt(self, ids: Tensor) -> Tensor:
        self.past = 0
        self.language.request.reset_state()
        return self._next(ids)

    def step(self, token: int) -> Tensor:
        return self._next(torch.tensor([[token]]))

    def _next(self, ids: Tensor) -> Tensor:
        import numpy as np

        embeds = self.language.embed_tokens(ids.numpy())
        positions = np.arange(self.past, self.past + ids.shape[1])[None, None].repeat(3, 0)
        self.past += ids.shape[1]
        values = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, self.past), np.int64),
            "position_ids": positions,
            "beam_idx": np.zeros(1, np.int32),
        }
        self.language.request.infer(values, share_inputs=True)
        return torch.from_numpy(self.language.request.get_tensor("logits").data)[0, -1]

    def bytes_per_token(self) -> int:
        return (self.path / "openvino_language_model.bin").stat().st_size


def _compiled(file: Path, precision: str) -> Any:
    """Compile a model to an inference request with one thread."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    return openvino.Core().compile_model(file, "CPU", settings).create_infer_request()


def _inferred(request: Any, inputs: dict[str, Tensor]) -> Tensor:
    import numpy as np

    found = request.infer({name: x.numpy() for name, x in inputs.items()} | {"beam_idx": np.zeros(1, np.int32)})
    return torch.from_numpy(found["logits"])
