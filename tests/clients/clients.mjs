// The clients for node, as clients.py has those for Python: `node clients.mjs NAME`, a job a line, an answer a line.
// Which certificate to trust is nothing of theirs: node has it from NODE_EXTRA_CA_CERTS.

import { createInterface } from "node:readline";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const MODEL = "phi-3-vision";
const clients = { openai, aiSdk };

async function openai({ url, key, question, picture, stream, retries }) {
  const defaultHeaders = key ? {} : { Authorization: null };
  const client = new OpenAI({ baseURL: url, apiKey: key || "-", maxRetries: retries, defaultHeaders });
  const content = [{ type: "text", text: question }, { type: "image_url", image_url: { url: picture } }];
  const body = { model: MODEL, messages: [{ role: "user", content }], stream };
  const reply = await client.chat.completions.create(body);
  if (!stream) return reply.choices[0].message.content;
  let text = "";
  for await (const chunk of reply) text += chunk.choices[0]?.delta.content ?? "";
  return text;
}

async function aiSdk({ url, key, question, picture, stream, retries }) {
  const model = createOpenAICompatible({ name: "phi3v", baseURL: url, apiKey: key }).chatModel(MODEL);
  const content = [{ type: "text", text: question }, { type: "file", mediaType: "image/png", data: picture }];
  const asked = { model, messages: [{ role: "user", content }], maxRetries: retries };
  if (!stream) return (await generateText(asked)).text;
  let text = "";
  const parts = streamText({ ...asked, onError() {} }).fullStream;
  for await (const part of parts) {
    if (part.type === "error") throw part.error;
    if (part.type === "text-delta") text += part.text;
  }
  return text;
}

for await (const line of createInterface({ input: process.stdin })) {
  let reply;
  try {
    reply = { text: await clients[process.argv[2]](JSON.parse(line)) };
  } catch (error) {
    const status = error.status ?? error.statusCode ?? null;
    reply = { error: error.constructor.name, status, message: error.message };
  }
  console.log(JSON.stringify(reply));
}
