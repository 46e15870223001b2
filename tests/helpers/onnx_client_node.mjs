// `node onnx_client_node.mjs REQUEST.json` prints the answers as JSON; the request has `directory` in place of `name`.

import { readFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { env } from "@huggingface/transformers";
import { answers } from "./onnx_client.mjs";

const { directory, ...request } = JSON.parse(await readFile(process.argv[2], "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);
env.useFSCache = false;
console.log(JSON.stringify(await answers({ ...request, name: basename(directory) })));
