// The service: docs/studio.md names its addresses. All are relative: nothing leaves the machine that served the page.

/** An answer that is no success: `status` and the server's sentence. */
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// `segdiff serve` on another machine wants a token: /#token=...
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const MOST_WAITS = 60;
const NO_TOKEN = "this service needs its token: open its address with #token=SECRET at the end, and load the page again";

export const getExamples = async (model) => (await ask(`examples?${new URLSearchParams({ model })}`)).json();
export const getBytes = async (url) => new Uint8Array(await (await ask(url.replace(/^\//, ""))).arrayBuffer());

/** The models; waits while they load. */
export async function getModels() {
  for (let waits = 0; ; waits++) {
    try {
      return (await (await ask("models")).json()).models;
    } catch (error) {
      if (error.status !== 503 || waits >= MOST_WAITS) throw error;
      await pause(error.retryAfter);
    }
  }
}

/** A mask file of any kind in the model's ids: {mask: base64 NIfTI, notes, shape}. */
export async function readMask(file, model, otherLabels) {
  const body = form({ model, other_labels: otherLabels });
  body.append("mask", file, file.name);
  return (await ask("masks", { method: "POST", body })).json();
}

/** Paint one image, telling `onEvent(name, data)` of `queued` and `progress`; the finished image's JSON. */
export async function paint(maskBytes, settings, { signal, onEvent }) {
  const response = await askPaint(maskBytes, settings, "text/event-stream", signal, onEvent);
  try {
    for await (const { name, data } of events(response.body)) {
      if (name === "image") return data;
      if (name === "error") throw new Refused(data.status, String(data.detail));
      onEvent(name, data);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refused) throw error; // others are the connection's
  }
  throw new Refused(0, "the server ended before the image was finished: paint again");
}

/** The same image as a zip with a DICOM series and a SEG. */
export async function paintDicom(maskBytes, settings) {
  return (await askPaint(maskBytes, settings, "application/dicom+zip")).blob();
}

async function askPaint(maskBytes, settings, accept, signal, onEvent = () => {}) {
  for (let waits = 0; ; waits++) {
    const body = form(settings);
    body.append("mask", new Blob([maskBytes]), "mask.nii.gz");
    try {
      return await ask("paint", { method: "POST", body, headers: { Accept: accept }, signal });
    } catch (error) {
      if (error.status !== 429 || waits >= MOST_WAITS) throw error;
      onEvent("queued", { position: null });
      await pause(error.retryAfter, signal);
    }
  }
}

function form(values) {
  const body = new FormData();
  for (const [name, value] of Object.entries(values)) if (value !== null && value !== undefined) body.append(name, value);
  return body;
}

async function ask(path, { headers = {}, ...options } = {}) {
  const own = token ? { Authorization: `Bearer ${token}`, ...headers } : headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers: own });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server does not answer: is `segdiff studio` still running?");
  }
  if (response.ok) return response;
  const detail = response.status === 401 ? NO_TOKEN : await detailOf(response);
  const refused = new Refused(response.status, detail);
  refused.retryAfter = Number(response.headers.get("Retry-After")) || 1;
  throw refused;
}

async function detailOf(response) {
  try {
    const { detail } = await response.json();
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `status ${response.status}`;
  }
}

/** Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const field = (name) =>
        block.split(/\r?\n/).filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
      const data = field("data").join("\n");
      if (data) yield { name: field("event")[0] ?? "message", data: JSON.parse(data) };
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}
