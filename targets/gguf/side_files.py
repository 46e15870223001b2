"""Files beside a GGUF model that say how to run it: a Modelfile for Ollama, and the arguments of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from vlmbuild.families.gguf import GgufImages, GgufModel
from vlmbuild.runtime.gguf.layout import ENGINE_FILE, MODEL, TOWER

MODELFILE: Final = "Modelfile"


def engine_files(model: GgufModel, images: GgufImages, tokenizer: Any, media: Sequence[int]) -> dict[str, bytes]:
    """Return the files by name; `media` are the tokens of images, first the one that stands for a feature."""
    arguments = ["-m", MODEL, "--mmproj", TOWER, "--jinja"]
    if images.tokens is not None:
        arguments += ["--image-min-tokens", str(images.tokens[0]), "--image-max-tokens", str(images.tokens[1])]
    values = {
        "arguments": arguments,
        "image": model.image,
        "image_tokens": images.tokens,
        "media": list(media),
        "sizes": images.differs,
    }
    modelfile = [f"FROM ./{MODEL}", f"FROM ./{TOWER}", f'TEMPLATE """{model.template}"""']
    if tokenizer.eos_token:
        modelfile.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return {
        ENGINE_FILE: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(),
        MODELFILE: ("\n".join(modelfile) + "\n").encode(),
    }
