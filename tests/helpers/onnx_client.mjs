// What a program that uses transformers.js does with an artifact: `node onnx_client.mjs REQUEST.json` prints JSON.
//
// The request: directory (of an artifact), question, images (PNG files, each a prompt of its own), steps (new tokens).
// The answer, for each image: prompt (text), ids (of the prompt), pixels (what the processor made of the image), tokens (generated).

import { readFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers";

const request = JSON.parse(await readFile(process.argv[2], "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(request.directory);
env.useFSCache = false;

const name = basename(request.directory);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name);
const content = [{ type: "image" }, { type: "text", text: request.question }];
const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });

const answers = [];
for (const file of request.images) {
  const image = await RawImage.read(file);
  const inputs = processor.constructor.name === "PixtralProcessor"
    ? await processor(image, prompt, { add_special_tokens: false })
    : await processor(prompt, image);
  const found = await model.generate({ ...inputs, max_new_tokens: request.steps, do_sample: false });
  const ids = inputs.input_ids.tolist()[0].map(Number);
  answers.push({
    prompt, ids,
    pixels: Array.from(inputs.pixel_values.data),
    tokens: found.tolist()[0].map(Number).slice(ids.length),
  });
}
console.log(JSON.stringify(answers));
