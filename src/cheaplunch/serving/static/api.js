// The server's API (docs/serve.md). Everything that goes wrong is a Refusal with one line for the person.

/** The server said no, and why; `status` is HTTP's, or 0 where nothing answered. */
export class Refusal extends Error {
  constructor(line, status) {
    super(line);
    this.status = status;
  }
}

const SILENT = "The server does not answer.";

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(SILENT, 0);
  }
  if (!response.ok) throw new Refusal(lineOf(await response.text(), response.status), response.status);
  return response;
}

function lineOf(text, status) {
  try {
    const said = JSON.parse(text);
    if (typeof said.error === "string") return said.error;
  } catch {
    // not ours: a proxy's page, say
  }
  return `The server answered with an error (${status}).`;
}

function asJson(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

const imagePath = (id) => `/api/open/${encodeURIComponent(id)}`;

export const getModel = async () => (await ask("/api/model")).json();
export const getCases = async () => (await (await ask("/api/cases")).json()).cases;
export const openCase = async (id) => (await ask("/api/open", asJson({ case: id }))).json();

/** Sends [{file, path}], and tells `progress` the share that is sent, 0 to 1. */
export function openFiles(files, progress) {
  const form = new FormData();
  for (const { file, path } of files) form.append("files", file, path);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not say how much of a body is sent
    request.open("POST", "/api/open");
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new Refusal(SILENT, 0));
    request.onload = () => {
      if (request.status >= 400) reject(new Refusal(lineOf(request.responseText, request.status), request.status));
      else resolve(JSON.parse(request.responseText));
    };
    request.send(form);
  });
}

/** The image as NIfTI, an ArrayBuffer; `progress` is told the share that has come, where it is known. */
export async function getImage(id, progress) {
  const response = await ask(`${imagePath(id)}/image.nii.gz`);
  const total = Number(response.headers.get("Content-Length"));
  const parts = [];
  let come = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    come += value.length;
    if (total) progress(come / total);
  }
  return new Blob(parts).arrayBuffer();
}

/** What the network makes of `state`: {mask} of the whole volume, or with `slices` {parts: [{slice, mask}]}. */
export async function segment(id, state, slices = null) {
  const body = { prompts: state.prompts, propagate: state.carry || null, ...(slices && { slices }) };
  const said = await (await ask(`${imagePath(id)}/segment`, asJson(body))).json();
  if (!slices) return { mask: await inflate(said.mask) };
  return { parts: await Promise.all(said.parts.map(async (part) => ({ ...part, mask: await inflate(part.mask) }))) };
}

/** The mask as a file: {name, blob}. */
export async function save(id, state, format) {
  const body = { prompts: state.prompts, propagate: state.carry || null, format };
  const response = await ask(`${imagePath(id)}/save`, asJson(body));
  const [, encoded, plain] =
    /filename\*=(?:UTF-8|utf-8)''([^;]+)|filename="?([^";]+)/.exec(response.headers.get("Content-Disposition")) ?? [];
  return { name: encoded ? decodeURIComponent(encoded) : (plain ?? `mask.${format}`), blob: await response.blob() };
}

/** Lets the server forget an image; heard even while the page goes away. */
export function close(id) {
  fetch(imagePath(id), { method: "DELETE", keepalive: true }).catch(() => {});
}

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
