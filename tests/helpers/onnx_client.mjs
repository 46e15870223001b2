// What a program that uses transformers.js does with an artifact, in Node and in a browser alike.

import { AutoModelForImageTextToText, AutoProcessor, RawImage } from "@huggingface/transformers";

// Answers a request: name (of the artifact, under env.localModelPath), question, images (PNG files or addresses, each a prompt
// of its own), steps (new tokens). An answer for each image: prompt (text), ids (of the prompt), pixels (what the processor
// made of the image), tokens (generated).
export async function answers(request) {
  const processor = await AutoProcessor.from_pretrained(request.name);
  const model = await AutoModelForImageTextToText.from_pretrained(request.name);
  const content = [{ type: "image" }, { type: "text", text: request.question }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const found = [];
  for (const file of request.images) {
    const image = await RawImage.read(file);
    const options = { add_special_tokens: false }; // the prompt has them already
    const inputs = ["llava", "mistral3"].includes(model.config.model_type)
      ? await processor(image, prompt, options)
      : await processor(prompt, image, ...(model.config.model_type === "gemma3" ? [options] : []));
    const generated = await model.generate({ ...inputs, max_new_tokens: request.steps, do_sample: false });
    const ids = inputs.input_ids.tolist()[0].map(Number);
    found.push({
      prompt, ids,
      pixels: Array.from(inputs.pixel_values.data),
      tokens: generated.tolist()[0].map(Number).slice(ids.length),
    });
  }
  return found;
}
