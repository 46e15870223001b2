"""The model card of an artifact: README.md of its repository on the hub, made from the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlmbuild.artifact.hub import HUB_ID, download
from vlmbuild.artifact.manifest import ADAPTER_URI
from vlmbuild.artifact.output import human_size
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.quant.bnb_config import MIXED
from vlmbuild.report.tables import PARITY, recipe_facts, storage

_HUB = "https://huggingface.co"
_LIBRARIES: Final = {"trainable": "transformers", "compressed-tensors": "transformers", "onnx": "onnx", "gguf": "gguf"}
"""Target -> library under which the hub lists its artifacts; vlmbuild for the others."""
_LICENSE_KEYS = ("license", "license_name", "license_link")

Usage = tuple[str, str, str]
"""Engine, language of the code, and code."""


def model_card(
    reader: ArtifactReader, document: Mapping[str, Any], place: tuple[str, str], base_model: str | None = None
) -> str:
    """Write a model card.

    Args:
        reader: The artifact.
        document: Its `contents`.
        place: Where it will be: "owner/name", and a branch.
        base_model: Hub id of the model that it comes from; None is the manifest's source, if that is one.

    Raises:
        UsageError: The base model is no hub id.
    """
    from huggingface_hub import ModelCardData

    config = json.loads(reader.read("config.json")) if reader.manifest.entry("config.json") else {}
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise UsageError(f"--base-model {base_model!r} is not a hub id. Pass owner/name or owner/name@commit.")
    base, source = base_model or _hub_source(document), place[0] if place[1] == "main" else "@".join(place)
    data = ModelCardData(
        base_model=base.partition("@")[0] if base else None,
        base_model_relation=_relation(document) if base else None,
        library_name=_LIBRARIES.get(document["target"], "vlmbuild"),
        pipeline_tag="image-text-to-text",
        tags=_tags(document, config),
        **(source_license(base) if base else {}),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {place[0].partition('/')[2]}",
        "A vision-language model, compiled by vlmbuild and checked file by file. The figures below are those of its build.",
        _table(["", ""], _facts(document, reader, base)),
        "## Weights",
        _table(["role", "parameters", "stored", "bits per weight", "as"], _roles(document), "<>>><"),
        *_parity(document["numerics"]),
        "## Use",
        *(
            f"### {engine}\n\n```{language}\n{code}\n```"
            for engine, language, code in _usages(document, place, config, reader)
        ),
        *_known(document, reader),
        "## Files",
        _table(
            ["file", "bytes", "SHA-256"],
            [[f"`{entry.path}`", f"{entry.size:,}", f"`{entry.digest}`"] for entry in reader.manifest.files],
            "<><",
        ),
        "They are listed in `manifest.json`, whose SHA-256 is the artifact's id. To compare them:",
        f"```sh\nvlmbuild verify {source} --id {document['id']}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _hub_source(document: Mapping[str, Any]) -> str | None:
    """Return the hub id of the checkpoint that an artifact was built from, with its commit."""
    uri = str(document["source"][0].get("uri")) if document["source"] else ""
    return uri if HUB_ID.fullmatch(uri) else None


def _is_merged(document: Mapping[str, Any]) -> bool:
    return any(entry.get("uri") == ADAPTER_URI for entry in document["source"])


def _relation(document: Mapping[str, Any]) -> str | None:
    """Return how the hub calls what was done to the base model; None leaves it to the hub."""
    if _is_merged(document):
        return "finetune"
    return "quantized" if any(role["quantized"] for role in document["roles"]) else None


def _tags(document: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    formats = [form for role in document["roles"] for form in role["formats"]]
    names = ["vlmbuild", document["target"], config.get("model_type"), *(form.split()[0] for form in formats)]
    return list(dict.fromkeys(str(name).rstrip(",") for name in names if name))


def source_license(base: str) -> dict[str, Any]:
    """Return the licence fields of a model's card on the hub; none if it cannot be read."""
    from huggingface_hub import ModelCard

    name, _, commit = base.partition("@")
    try:
        text = (download(name, commit or None, ["README.md"]) / "README.md").read_text(encoding="utf-8")
        card: Any = ModelCard(text, ignore_metadata_errors=True)
        fields = card.data.to_dict()
    except (SourceError, OSError, ValueError):
        return {}
    found = {key: fields[key] for key in _LICENSE_KEYS if isinstance(fields.get(key), str)}
    if "://" not in (link := found.get("license_link", "://")):
        found["license_link"] = f"{_HUB}/{name}/blob/{commit or 'main'}/{link}"
    return found


def _facts(document: Mapping[str, Any], reader: ArtifactReader, base: str | None) -> Iterable[Sequence[str]]:
    yield ["artifact", f"`{document['id']}`"]
    yield ["digest of its files", f"`{reader.manifest.root_digest}`"]
    name, _, commit = (base or "").partition("@")
    link = f"[{name}]({_HUB}/{name}{f'/tree/{commit}' if commit else ''})"
    uri = document["source"][0]["uri"] if document["source"] else "none"
    at = f"{link} at `{commit}`" if commit else link
    yield ["base model", at if base else f"{uri}; its digests are in manifest.json"]
    for entry in document["source"]:
        for file in entry.get("files", ()) if entry.get("uri") == ADAPTER_URI else ():
            yield ["merged adapter", f"`{file['path']}` `{file['digest']}`"]
    yield from recipe_facts(document["recipe"]).items()
    yield ["size", f"{len(document['files'])} files, {human_size(document['bytes'])}"]
    yield ["built with", ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))]
    yield ["code", ", ".join(document["trust"]["code"]) or "none; loading runs nothing from the artifact"]


def _roles(document: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for role in document["roles"]:
        bits = f"{8 * role['bytes'] / role['parameters']:.2f}" if role["parameters"] else ""
        size = human_size(role["bytes"])
        yield [role["role"], f"{role['parameters']:,}", size, bits, storage(role, document["recipe"])]


def _parity(numerics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Make the section of what the build measured; none if it measured nothing."""
    if not numerics:
        return []
    columns = {head: [text(record) for record in numerics] for head, text in PARITY.items()}
    used = {head: cells for head, cells in columns.items() if any(cells)}
    return ["## Parity", _table(list(used), zip(*used.values(), strict=True))]


def _usages(
    document: Mapping[str, Any], place: tuple[str, str], config: Mapping[str, Any], reader: ArtifactReader
) -> Iterable[Usage]:
    """Yield how each engine that reads the target's files loads them from a branch of a repository."""
    target, (repository, branch) = document["target"], place
    at, flag = ("", "") if branch == "main" else (f', revision="{branch}"', f" --revision {branch}")
    ours = f'"{repository}"{at}, expected_id="{document["id"]}"' + (
        ', trust=("code",)' if document["trust"]["code"] else ""
    )
    if target != "gguf":
        yield "vlmbuild", "python", f"import vlmbuild\n\nmodel, processor = vlmbuild.load({ours})"
    mixed = (config.get("quantization_config") or {}).get("quant_method") == MIXED
    if target in ("trainable", "compressed-tensors") and not mixed:
        theirs = "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        theirs += f'model = AutoModelForImageTextToText.from_pretrained("{repository}"{at})\n'
        yield "transformers", "python", theirs + f'processor = AutoProcessor.from_pretrained("{repository}"{at})'
        if target != "trainable" or "quantization_config" not in config:  # vLLM reads no bitsandbytes checkpoints
            yield "vLLM", "sh", f"vllm serve {repository}{flag}"
    if target == "onnx":
        option = "" if branch == "main" else f', {{ revision: "{branch}" }}'
        code = 'import { AutoModelForImageTextToText, AutoProcessor } from "@huggingface/transformers";\n\n'
        code += f'const processor = await AutoProcessor.from_pretrained("{repository}"{option});\n'
        code += f'const model = await AutoModelForImageTextToText.from_pretrained("{repository}"{option});'
        yield f"transformers.js, if it has `{config.get('model_type')}`", "js", code
    if target == "gguf" and branch == "main":  # neither takes a branch
        from vlmbuild.runtime.gguf.layout import ENGINE_FILE

        arguments = json.loads(reader.read(ENGINE_FILE))["arguments"]
        limits = arguments[arguments.index("--jinja") :]  # before it come the files' names
        yield "llama.cpp", "sh", f"llama-server -hf {repository} {' '.join(limits)}"
        yield "Ollama", "sh", f"ollama run hf.co/{repository}"


def _known(document: Mapping[str, Any], reader: ArtifactReader) -> Iterable[str]:
    """Yield how an engine is known to differ from the model."""
    if document["target"] == "gguf":
        from vlmbuild.runtime.gguf.layout import ENGINE_FILE

        if sizes := json.loads(reader.read(ENGINE_FILE))["sizes"]:
            yield f"Known difference: {sizes}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], alignment: str = "") -> str:
    """Make a table in Markdown."""
    rules = [" ---: " if side == ">" else " --- " for side in alignment.ljust(len(heads), "<")]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (heads, *cells)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def own_card(artifact: Path) -> str | None:
    """Return the README.md that lies beside an artifact, which its owner wrote; None if there is none."""
    try:
        return (artifact / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{artifact / 'README.md'} cannot be read: {error}. Write it as UTF-8, or remove it."
        ) from error
