// Run an ONNX artifact in transformers.js: `node transformers_js_worker.mjs JOB.json`; the protocol is in ask.py.

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const MISSING = 86;
const NAME = "@huggingface/transformers";

async function library() {
  for (const folder of (process.env.NODE_PATH ?? "").split(":").filter(Boolean)) {
    try {
      return await import(pathToFileURL(createRequire(join(folder, "x.js")).resolve(join(folder, NAME))).href);
    } catch (error) {
      if (error.code !== "MODULE_NOT_FOUND") throw error;
    }
  }
  console.error(`${NAME} is not in NODE_PATH (${process.env.NODE_PATH ?? "not set"})`);
  process.exit(MISSING);
}

const job = JSON.parse(await readFile(process.argv[2], "utf8"));
const { AutoModelForImageTextToText, AutoProcessor, RawImage, env } = await library();
env.allowRemoteModels = false;
env.localModelPath = dirname(job.model);
env.useFSCache = false;
const name = basename(job.model);
const model = await AutoModelForImageTextToText.from_pretrained(name);
const kind = model.config.model_type;

async function answer(given, number) {
  const shown = { values: {} };
  let stage = "tokens";
  const value = async (key, data, shape) => {
    shown.values[key] = shape;
    await writeFile(join(job.out, `${number}.${key}.f32`), Float32Array.from(data));
  };
  try {
    const processor = await AutoProcessor.from_pretrained(name);
    const messages = given.messages.map(({ role, content }) => ({
      role, content: content.map((part) => (part.type === "image" ? { type: "image" } : part)),
    }));
    const prompt = given.template ? processor.apply_chat_template(messages, { add_generation_prompt: true }) : given.text;
    const images = await Promise.all(given.images.map((file) => RawImage.read(file)));
    const image = images.length > 1 ? images : images[0] ?? null;
    const options = { add_special_tokens: false }; // the prompt has them already
    let inputs;
    if (image === null) inputs = processor.tokenizer(prompt, options);
    else if (["llava", "mistral3"].includes(kind)) inputs = await processor(image, prompt, options);
    else inputs = await processor(prompt, image, ...(kind === "gemma3" ? [options] : []));
    const ids = inputs.input_ids.tolist()[0].map(Number);
    shown.tokens = ids;
    if (inputs.pixel_values) await value("pixels", inputs.pixel_values.data, inputs.pixel_values.dims);
    stage = "greedy";
    const generated = await model.generate({ ...inputs, max_new_tokens: job.steps, do_sample: false });
    shown.greedy = generated.tolist()[0].map(Number).slice(ids.length);
  } catch (error) {
    shown.failed = [stage, String(error).slice(0, 300)];
  }
  return shown;
}

const cases = [];
for (const [number, given] of job.cases.entries()) cases.push(await answer(given, number));
const version = env.version ?? "";
await writeFile(join(job.out, "result.json"), JSON.stringify({ version, cases }));
