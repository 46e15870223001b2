"""Reports for the terminal, made from the documents that `--json` prints. No table is wider than 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmbuild.artifact.manifest import ADAPTER_URI
from vlmbuild.artifact.output import human_size

if TYPE_CHECKING:
    from rich.table import Table

    Report = list[str | Table]

_WIDTH = 80
_CAVEAT = (
    "tensors only, within 15 % of measurements on a CPU; not measured on a GPU, where the CUDA context and fragmentation "
    "add to it"
)


def build_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild build`."""
    path = document["path"]
    trust = ', trust=("code",)' if document["trust"]["code"] else ""
    return [
        *passes_table(document["passes"]),
        "",
        roles_table(document),
        *_section(parity_table(document["numerics"])),
        "",
        f"{path}: {len(document['files'])} files, {human_size(document['bytes'])}",
        document["id"],
        "",
        f'Load it:    model, processor = vlmbuild.load("{path}"{trust})',
        f"Inspect it: vlmbuild inspect {path}",
    ]


def plan_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild plan`."""
    parts: Report = [
        _facts({"source": document["source"], "model": document["architecture"], **_recipe_facts(document["recipe"])}),
        "",
        regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        roles_table(document),
    ]
    if document["images"]:
        parts += ["", images_table(document["images"])]
    return [*parts, "", *memory_table(document["memory"])]


def images_table(images: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table of the costs of images."""
    columns = {"rows of the vision tower": "patches", "tokens": "tokens"}
    if any(image["cross_keys"] for image in images):
        columns["cross-attention keys"] = "cross_keys"
    rows = [
        [image["name"], f"{image['height']} x {image['width']}", *(f"{image[key]:,}" for key in columns.values())]
        for image in images
    ]
    return table(["Images", "height x width", *columns], rows, "<>" + ">" * len(columns))


def inspect_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild inspect`."""
    sources = {
        _source_name(number, entry): f"{entry.get('uri')} ({len(entry.get('files', []))} files)"
        for number, entry in enumerate(document["source"])
    }
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    code = ", ".join(document["trust"]["code"]) or "none; loading runs nothing from the artifact"
    recipe = _recipe_facts(document["recipe"])
    if "merged" in sources and document["recipe"].get("quantize") is None:
        recipe["quantize"] = "none, because an adapter is merged"
    return [
        document["name"],
        document["id"],
        "",
        _facts({**sources, **recipe, "built with": tools, "code": code}),
        "",
        files_table(document),
        "",
        regions_table(document),
        "",
        *passes_table(document["passes"]),
        "",
        roles_table(document),
        *_section(parity_table(document["numerics"])),
        "",
        f"File contents were not checked. To check them: vlmbuild verify {document['path']}",
    ]


def verify_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild verify`."""
    size = f"{document['files']} files, {human_size(document['bytes'])}"
    head = f"{document['path']}: {size}, all match the manifest"
    return [head, document["id"], *_section(parity_table(document["numerics"]))]


def parity_table(numerics: Iterable[Mapping[str, Any]]) -> Table | None:
    """Make a table of the parity that the build measured; None if it measured none."""
    numerics = list(numerics)
    if any("output" in record for record in numerics):
        return _export_parity_table(numerics)
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
    heads = ["Parity of logits", "relative error", "tolerance", "adapter effect", "same top token"]
    return table(heads, rows, "<>>>>") if rows else None


def _export_parity_table(numerics: Iterable[Mapping[str, Any]]) -> Table:
    """Make a table of the errors of exported models."""
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
    heads = ["Export parity", "output", "relative error", "tolerance", "same top token", "same generated"]
    return table(heads, rows, "<<>>>>")


def regions_table(document: Mapping[str, Any]) -> Table:
    """Make a table of the regions."""
    rows = [
        [region["name"], str(region["instances"]), str(region["operators"]), f"{region['parameters']:,}"]
        for region in document["regions"]
    ]
    return table(["Regions", "instances", "operators", "parameters each"], rows, "<>>>")


def passes_table(passes: Iterable[Mapping[str, Any]]) -> Report:
    """Make a table of the rewrites of each pass, with notes on refused sites."""
    rows, notes = [], []
    for report in passes:
        rows.append([report["name"], f"{report['matches']:,}"])
        notes += _refusal_notes(report)
    return [table(["Passes", "rewritten"], rows, "<>"), *notes]


def roles_table(document: Mapping[str, Any]) -> Table:
    """Make a table of parameters, bytes and formats by role."""
    recipe = document["recipe"]
    rows = [
        [role["role"], f"{role['parameters']:,}", human_size(role["bytes"]), _storage(role, recipe)]
        for role in document["roles"]
    ]
    rows += [[alias.partition(".")[0], "", "", f"shared with {name}"] for alias, name in document["ties"].items()]
    parameters = sum(role["parameters"] for role in document["roles"])
    rows.append(["total", f"{parameters:,}", human_size(sum(role["bytes"] for role in document["roles"])), ""])
    return table(["Weights", "parameters", "stored", "as"], rows, "<>><")


def memory_table(memory: Mapping[str, Any]) -> Report:
    """Make a table of the memory to load, infer and train, with notes on the batch."""
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
    batch += f"; on {memory['device']}, without torch.compile; training: LoRA of rank {memory['rank']}, AdamW"
    columns = table(["Memory", "weights", "LoRA and AdamW", "activations", "total"], rows, "<>>>>")
    return [columns, *_notes(batch), *_notes(_CAVEAT)]


def files_table(document: Mapping[str, Any]) -> Table:
    """Make a table of files, sorted by role."""
    files = sorted(document["files"], key=lambda file: (file["role"], file["path"]))
    rows = [[file["path"], file["role"], human_size(file["bytes"])] for file in files]
    rows.append(["total", "", human_size(document["bytes"])])
    return table(["Files", "role", "size"], rows, "<<>")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], alignment: str) -> Table:
    """Make a table; `alignment` has "<" or ">" for each column."""
    from rich.table import Table

    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head, side in zip(heads, alignment, strict=True):
        columns.add_column(head, justify="left" if side == "<" else "right", overflow="fold")
    for row in rows:
        columns.add_row(*row)
    return columns


def _section(part: Table | None) -> Report:
    return [] if part is None else ["", part]


def _source_name(number: int, entry: Mapping[str, Any]) -> str:
    if entry.get("uri") == ADAPTER_URI:
        return "merged"
    return f"source{number or ''}"


def _facts(facts: Mapping[str, str]) -> Table:
    columns = table(["", ""], facts.items(), "<<")
    columns.show_header = False
    return columns


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
    notes = []
    for (region, reason), sites in grouped.items():
        text = f"{report['name']} leaves {', '.join(sites) or 'a site'} of {region}: {reason}"
        notes += _notes(text)
    return notes


def _notes(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_long_words=False)
