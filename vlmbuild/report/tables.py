"""Tables that a person can read, made from the documents that `--json` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmbuild.artifact.manifest import ADAPTER_URI
from vlmbuild.artifact.output import human_size

_WIDTH = 100


def build_report(document: Mapping[str, Any]) -> list[str]:
    """What `vlmbuild build` has made."""
    path = document["path"]
    trust = ', trust=("code",)' if document["trust"]["code"] else ""
    return [
        *passes_table(document["passes"]),
        "",
        *roles_table(document),
        *_section(parity_lines(document["numerics"])),
        "",
        f"{path}: {len(document['files'])} files, {human_size(document['bytes'])}",
        document["id"],
        "",
        f'Load it:    model, processor = vlmbuild.load("{path}"{trust})',
        f"Look at it: vlmbuild inspect {path}",
    ]


def plan_report(document: Mapping[str, Any]) -> list[str]:
    """What `vlmbuild build` would make."""
    lines = [
        *_facts({"source": document["source"], "model": document["architecture"], **_recipe_facts(document["recipe"])}),
        "",
        *regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        *roles_table(document),
    ]
    if document["images"]:
        lines += ["", *images_table(document["images"])]
    return [*lines, "", *memory_table(document["memory"])]


def images_table(images: Sequence[Mapping[str, Any]]) -> list[str]:
    """What images cost."""
    columns = {"rows of the vision tower": "patches", "tokens": "tokens"}
    if any(image["cross_keys"] for image in images):
        columns["cross-attention keys"] = "cross_keys"
    rows = [
        [image["name"], f"{image['height']} x {image['width']}", *(f"{image[key]:,}" for key in columns.values())]
        for image in images
    ]
    return table(["Images", "height x width", *columns], rows, "<>" + ">" * len(columns))


def inspect_report(document: Mapping[str, Any]) -> list[str]:
    """What an artifact holds."""
    sources = {
        _source_name(number, entry): f"{entry.get('uri')} ({len(entry.get('files', []))} files)"
        for number, entry in enumerate(document["source"])
    }
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    code = ", ".join(document["trust"]["code"]) or "none: loading it runs nothing from it"
    recipe = _recipe_facts(document["recipe"])
    if "merged" in sources and document["recipe"].get("quantize") is None:
        recipe["quantize"] = "none, since an adapter is merged"
    facts = {"name": document["name"], "id": document["id"], **sources, **recipe}
    return [
        *_facts({**facts, "built with": tools, "code": code}),
        "",
        *files_table(document),
        "",
        *regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        *roles_table(document),
        *_section(parity_lines(document["numerics"])),
        "",
        f"Contents not checked; for that: vlmbuild verify {document['path']}",
    ]


def verify_report(document: Mapping[str, Any]) -> list[str]:
    """That an artifact is what it says."""
    found = f"{document['files']} files, {human_size(document['bytes'])}"
    lines = [f"{document['path']}: {found}, all as the manifest says", document["id"]]
    return [*lines, *_section(parity_lines(document["numerics"]))]


def parity_lines(numerics: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was measured before the artifact was published."""
    numerics = list(numerics)
    if any("output" in record for record in numerics):
        return _export_parity_lines(numerics)
    rows = [
        [
            record["case"],
            record["error"],
            record["tolerance"] or f"none: rounded to {', '.join(record['formats'])}",
            record["effect"],
            f"{record['top1']}/{record['tokens']}",
        ]
        for record in numerics
    ]
    heads = ["Parity of logits", "relative error", "allowed", "adapter's effect", "same best token"]
    return table(heads, rows, "<>>>>") if rows else []


def _export_parity_lines(numerics: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far ONNX models are from the program."""
    rows = [
        [
            record["case"],
            record["output"],
            record["error"],
            record["tolerance"],
            f"{record['top1']}/{record['tokens']}" if "top1" in record else "",
            f"{record['greedy']}/{record['generated']}" if "greedy" in record else "",
        ]
        for record in numerics
    ]
    heads = ["Export against the program", "output", "relative error", "allowed", "same best token", "same generated"]
    return table(heads, rows, "<<>>>>")


def regions_table(document: Mapping[str, Any]) -> list[str]:
    """Graphs and how often they occur."""
    rows = [
        [region["name"], str(region["instances"]), str(region["operators"]), f"{region['parameters']:,}"]
        for region in document["regions"]
    ]
    return table(["Regions", "instances", "operators", "parameters each"], rows, "<>>>")


def passes_table(passes: Iterable[Mapping[str, Any]]) -> list[str]:
    """What each pass rewrote, and what it left alone and why."""
    rows, notes = [], []
    for report in passes:
        rows.append([report["name"], f"{report['matches']:,}"])
        notes += _refusal_notes(report)
    return table(["Passes", "rewritten"], rows, "<>") + notes


def roles_table(document: Mapping[str, Any]) -> list[str]:
    """Parameters and bytes by what they do, and how they are stored."""
    recipe = document["recipe"]
    rows = [
        [role["role"], f"{role['parameters']:,}", human_size(role["bytes"]), _storage(role, recipe)]
        for role in document["roles"]
    ]
    rows += [[alias.partition(".")[0], "", "", f"shared with {name}"] for alias, name in document["ties"].items()]
    parameters = sum(role["parameters"] for role in document["roles"])
    rows.append(["total", f"{parameters:,}", human_size(sum(role["bytes"] for role in document["roles"])), ""])
    return table(["Weights", "parameters", "stored", "as"], rows, "<>><")


def memory_table(memory: Mapping[str, Any]) -> list[str]:
    """What a model needs to load, to infer and to train, and for which batch."""
    state = memory["adapter"] + memory["gradients"] + memory["optimizer"]
    parts = {
        "load": (0, 0),
        "infer": (0, memory["infer_activations"]),
        "train, checkpointing": (state, memory["checkpointed_activations"]),
        "train": (state, memory["train_activations"]),
    }
    rows = [
        [
            name,
            human_size(memory["load"]),
            *(human_size(size) if size else "" for size in sizes),
            human_size(memory["load"] + sum(sizes)),
        ]
        for name, sizes in parts.items()
    ]
    samples, images = memory["batch"], memory["images"]
    batch = f"{samples} sample{'s' * (samples > 1)} of {memory['tokens']:,} tokens"
    batch += f", {images} image{'s' * (images > 1)} in each" if images else ""
    note = f"  - {batch}; on {memory['device']}, without torch.compile; training: LoRA of rank {memory['rank']}, AdamW"
    caveat = (
        "  - tensors only, within 15 % of what is measured on a CPU; never measured on a GPU, where the CUDA context and\n"
        "    fragmentation come on top"
    )
    return [*table(["Memory", "weights", "LoRA and AdamW", "activations", "in all"], rows, "<>>>>"), note, caveat]


def files_table(document: Mapping[str, Any]) -> list[str]:
    """Files in the order of their roles."""
    files = sorted(document["files"], key=lambda file: (file["role"], file["path"]))
    rows = [[file["path"], file["role"], human_size(file["bytes"])] for file in files]
    rows.append(["total", "", human_size(document["bytes"])])
    return table(["Files", "role", "size"], rows, "<<>")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Aligned columns; `alignment` has "<" or ">" for each."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    widths[0] = max(widths[0], 24)

    def line(indent: str, cells: Sequence[str]) -> str:
        padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, alignment, widths, strict=True)]
        return (indent + "  ".join(padded)).rstrip()

    first, *rest = heads
    return [line("", [f"{first:<{widths[0]}}  ", *rest]), *(line("  ", row) for row in rows)]


def _section(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _source_name(number: int, entry: Mapping[str, Any]) -> str:
    if entry.get("uri") == ADAPTER_URI:
        return "merged"
    return f"source{number or ''}"


def _facts(facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def _recipe_facts(recipe: Mapping[str, Any]) -> dict[str, str]:
    quantized = _quantization(recipe.get("quantize"))
    required = {"required": ", ".join(recipe["require"])} if recipe.get("require") else {}
    names = {"target": "target", "dtype": "dtype", "attention": "attention"}
    return {**{name: str(recipe.get(key)) for name, key in names.items()}, "quantize": quantized, **required}


def _quantization(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "as in the source"
    form = str(spec["format"])
    if form in ("none", "source"):
        return form + "".join(f", {item['pattern']} {item['format']}" for item in spec["overrides"])
    text = f"{form} within {spec['budget']} bits per weight" if spec["budget"] else form
    if form != "int8":
        text += f", blocks of {spec['blocksize']}{', scales in 8 bits' if spec['double_quant'] else ''}"
    text += "".join(f", {item['pattern']} {item['format']}" for item in spec["overrides"])
    text += f", except {', '.join(spec['skip'])}" if spec["skip"] else ""
    return f"{text}; {', '.join(spec['roles'])}"


def _storage(role: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """How a role's weights are stored: "nf4 99.9 %, bfloat16 the rest (norms and biases)"."""
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
    """Refusals ("region: place: reason") with the same region and reason on one line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for refusal in report["refusals"]:
        region, _, rest = refusal.partition(": ")
        place, separator, reason = rest.rpartition(": ")
        grouped.setdefault((region, reason), []).extend([place] if separator else [])
    notes = []
    for (region, reason), places in grouped.items():
        text = f"{report['name']} leaves {', '.join(places) or 'a site'} of {region}: {reason}"
        notes += textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return notes
