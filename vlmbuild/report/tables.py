"""Reports for the terminal, made from the documents that `--json` prints. Tables fit the terminal, and 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmbuild.artifact.manifest import ADAPTER_URI
from vlmbuild.artifact.output import human_size
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.report.layout import Report, facts_table, notes, records_table, table
from vlmbuild.report.losses import losses_table

if TYPE_CHECKING:
    from rich.table import Table

PARITY: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "Parity": lambda record: record["case"],
    "output": lambda record: record.get("output", ""),
    "relative error": lambda record: record["error"],
    "its tolerance": lambda record: record["tolerance"] or f"none: rounded to {', '.join(record['formats'])}",
    "worst token (no limit)": lambda record: record.get("worst_token", ""),
    "adapter effect": lambda record: record.get("effect", ""),
    "same top token": lambda record: f"{record['top1']}/{record['tokens']}" if "top1" in record else "",
    "same generated": lambda record: f"{record['greedy']}/{record['generated']}" if "greedy" in record else "",
}
"""Columns of parity: head -> text of a record."""
_CAVEAT = (
    "tensors only, within 15 % of measurements on a CPU; not measured on a GPU, where the CUDA context and fragmentation "
    "add to it"
)


_SERVED = {
    "gguf": "llama-server -m {path}/model.gguf --mmproj {path}/mmproj.gguf --jinja",
}
"""Target -> what to run in place of `vlmbuild.load`."""
_BESIDE = {
    "gguf": "with the image limits in {path}/llama.cpp.json",
    "compressed-tensors": "or, if vLLM has the model: vllm serve {path}",
}
"""Target -> what to say below that line."""


def build_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild build`."""
    path = document["path"]
    layouts = document["source"][0].get("dequantized")
    trust = ', trust=("code",)' if document["trust"]["code"] else ""
    served, beside = _SERVED.get(document["target"]), _BESIDE.get(document["target"])
    return [
        *passes_table(document["passes"]),
        "",
        roles_table(document),
        *losses_table(document),
        *(["", *notes(f"dequantized from {layouts}")] if layouts else []),
        *_section(parity_table(document["numerics"])),
        "",
        f"{path}: {len(document['files'])} files, {human_size(document['bytes'])}",
        document["id"],
        "",
        f"Serve it:   {served.format(path=path)}"
        if served
        else f'Load it:    model, processor = vlmbuild.load("{path}"{trust})',
        *([f"            {beside.format(path=path)}"] if beside else []),
        f"Inspect it: vlmbuild inspect {path}",
    ]


def plan_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild plan`."""
    parts: Report = [
        facts_table(
            {"source": document["source"], "model": document["architecture"], **recipe_facts(document["recipe"])}
        ),
        "",
        regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        roles_table(document),
    ]
    if "files" in document:
        sizes = [[path, human_size(size)] for path, size in document["files"].items()]
        parts += ["", table(["Files", "size"], sizes, "<>")]
    if document["images"]:
        parts += ["", images_table(document["images"])]
    return [*parts, "", *memory_table(document["memory"])] if "memory" in document else parts


def images_table(images: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table of the costs of images."""
    return records_table(
        {
            "Images": lambda image: image["name"],
            "height x width": lambda image: f"{image['height']} x {image['width']}",
            "rows of the vision tower": lambda image: f"{image['patches']:,}",
            "tokens": lambda image: f"{image['tokens']:,}",
            "cross-attention keys": lambda image: f"{image['cross_keys']:,}" if image["cross_keys"] else "",
        },
        images,
        "<>>>>",
    )


def inspect_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild inspect`."""
    sources = {
        "merged" if entry.get("uri") == ADAPTER_URI else ("processor" if number else "source"): (
            f"{entry.get('uri')} ({len(entry.get('files', []))} files)"
        )
        for number, entry in enumerate(document["source"])
    }
    layouts = document["source"][0].get("dequantized")
    if layouts:
        sources["dequantized from"] = layouts
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    code = ", ".join(document["trust"]["code"]) or "none; loading runs nothing from the artifact"
    recipe = recipe_facts(document["recipe"])
    if "merged" in sources and document["recipe"].get("quantize") is None:
        recipe["quantize"] = "none, because an adapter is merged"
    sizes = [
        [file["path"], file["role"], human_size(file["bytes"])]
        for file in sorted(document["files"], key=lambda file: (file["role"], file["path"]))
    ]
    sizes.append(["total", "", human_size(document["bytes"])])
    return [
        document["name"],
        document["id"],
        "",
        facts_table({**sources, **recipe, "built with": tools, "code": code}),
        "",
        table(["Files", "role", "size"], sizes, "<<>"),
        "",
        regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        roles_table(document),
        *losses_table(document),
        *_section(parity_table(document["numerics"])),
        "",
        f"File contents were not checked. To check them: vlmbuild verify {document['path']}",
    ]


def verify_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild verify`."""
    size = f"{document['files']} files, {human_size(document['bytes'])}"
    head = f"{document['path']}: {size}, all match the manifest"
    signed = [f"signed by the owner of {document['public_key']}"] if document.get("public_key") else []
    return [head, document["id"], *signed, *_section(parity_table(document["numerics"]))]


def sign_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild sign`."""
    return [f"{document['signature']}: signs all files of", document["id"]]


def push_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild push`: what was published, or with the model card what would be."""
    name, commit = document["repository"], document["commit"]
    size = f"{len(document['files'])} files, {human_size(document['bytes'])}"
    where = f"{name} ({'private' if document['private'] else 'public'}{', new' if document['new'] else ''})"
    facts = {"artifact": document["id"], "repository": where, "branch": document["branch"]}
    facts |= {"replaces": document["replaces"]} if document["replaces"] else {}
    facts |= {"deletes": ", ".join(document["removed"])} if document["removed"] else {}
    facts |= {"not known": document["note"]} if document["note"] else {}
    if commit is not None:
        load = f'vlmbuild.load("{name}", revision="{commit}")'
        return [
            f"{document['path']}: {size}, published",
            facts_table(facts | {"commit": commit}),
            "",
            f"Load it: {load}",
        ]
    sizes = [[file["path"], human_size(file["bytes"])] for file in document["files"]]
    return [
        f"{document['path']}: {size}; nothing was uploaded",
        facts_table(facts),
        "",
        table(["Files", "size"], sizes, "<>"),
        "",
        "README.md:",
        "",
        document["card"],
    ]


def parity_table(numerics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Make a table of the parity that the build measured, of logits or of exported models; None if it measured none."""
    if not numerics:
        return None
    return records_table(PARITY, numerics, "<<>>>>>>")


def regions_table(document: Mapping[str, Any]) -> Table:
    """Make a table of the regions."""
    rows = [
        [region["name"], str(region["instances"]), str(region["operators"]), f"{region['parameters']:,}"]
        for region in document["regions"]
    ]
    return table(["Regions", "instances", "operators", "parameters each"], rows, "<>>>")


def passes_table(passes: Iterable[Mapping[str, Any]]) -> Report:
    """Make a table of the rewrites of each pass, with notes on refused sites."""
    rows, refused = [], []
    for report in passes:
        rows.append([report["name"], f"{report['matches']:,}"])
        refused += _refusal_notes(report)
    return [table(["Passes", "rewritten"], rows, "<>"), *refused]


def roles_table(document: Mapping[str, Any]) -> Table:
    """Make a table of parameters, bytes and formats by role."""
    recipe = document["recipe"]
    rows = [
        [role["role"], f"{role['parameters']:,}", human_size(role["bytes"]), storage(role, recipe)]
        for role in document["roles"]
    ]
    rows += [[alias.partition(".")[0], "", "", f"shared with {name}"] for alias, name in document["ties"].items()]
    parameters = sum(role["parameters"] for role in document["roles"])
    rows.append(["total", f"{parameters:,}", human_size(sum(role["bytes"] for role in document["roles"])), ""])
    return table(["Weights", "parameters", "stored", "as"], rows, "<>><")


def memory_table(memory: Mapping[str, Any]) -> Report:
    """Make a table of the memory to load, infer and train, with notes on the batch."""
    weights, state = memory["load"], memory["adapter"] + memory["gradients"] + memory["optimizer"]
    parts = {
        "load": (0, 0),
        "infer": (0, memory["infer_activations"]),
        "train, checkpointing": (state, memory["checkpointed_activations"]),
        "train": (state, memory["train_activations"]),
    }
    rows = [
        [name, *(human_size(size) if size else "" for size in (weights, *sizes)), human_size(weights + sum(sizes))]
        for name, sizes in parts.items()
    ]
    samples, images = memory["batch"], memory["images"]
    batch = f"{samples} sample{'s' * (samples > 1)} of {memory['tokens']:,} tokens"
    batch += f", {images} image{'s' * (images > 1)} in each" if images else ""
    batch += f"; on {memory['device']}, without torch.compile; training: LoRA of rank {memory['rank']}, AdamW"
    columns = table(["Memory", "weights", "LoRA and AdamW", "activations", "total"], rows, "<>>>>")
    return [columns, *notes(batch), *notes(_CAVEAT)]


def _section(part: Table | None) -> Report:
    return [] if part is None else ["", part]


def recipe_facts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Describe a recipe: name of an option -> its value."""
    required = {"required": ", ".join(recipe["require"])} if recipe.get("require") else {}
    facts = {name: str(recipe.get(name)) for name in ("target", "dtype", "attention")}
    return {**facts, "quantize": _quantization(recipe.get("quantize"), facts["target"]), **required}


def _quantization(values: Mapping[str, Any] | None, target: str) -> str:
    if values is None:
        return "as in the source"
    spec = QuantSpec.from_mapping(values, "recipe")
    form = spec.weight_format()
    parts = [
        f"{spec.budget} bits per weight of" if spec.budget else "",
        spec.format if form is None else form.describe(target),
        *(f"{item.pattern} {item.format}" for item in spec.overrides),
        f"except {', '.join(spec.skip)}" if spec.skip else "",
    ]
    return ", ".join(filter(None, parts)) + (f"; {', '.join(spec.roles)}" if form is not None else "")


def storage(role: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Describe how the weights of a role are stored: "nf4 99.9 %, bfloat16 the rest (norms and biases)"."""
    dtype = str(recipe.get("dtype"))
    kept = "; ".join(role["kept"])
    if not role["quantized"]:
        return f"{dtype} ({kept})" if kept else dtype
    if role["quantized"] == role["parameters"] and len(role["formats"]) == 1:
        return str(next(iter(role["formats"])))
    shares = [f"{form} {100 * count / role['parameters']:.1f} %" for form, count in role["formats"].items()]
    rest = f", {dtype} the rest" if role["quantized"] < role["parameters"] else ""
    return f"{'; '.join(shares)}{rest}{f' ({kept})' if kept else ''}"


def _refusal_notes(report: Mapping[str, Any]) -> list[str]:
    """Group refusals ("region: site: reason") by region and reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for refusal in report["refusals"]:
        region, _, rest = refusal.partition(": ")
        site, separator, reason = rest.rpartition(": ")
        grouped.setdefault((region, reason), []).extend([site] if separator else [])
    found = []
    for (region, reason), sites in grouped.items():
        text = f"{report['name']} leaves {', '.join(sites) or 'a site'} of {region}: {reason}"
        found += notes(text)
    return found
