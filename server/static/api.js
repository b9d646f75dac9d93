// The server's API as this page uses it. Addresses are relative, so that the page works below any path.

/** What the server, or the way to it, has to say about a request that failed. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

/** The names of the models that are served. */
export async function modelNames(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/** The events of a chat, as they come. */
export async function* chatEvents(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Problem(event.error.message);
    yield event;
  }
  throw new Problem("The answer broke off: the connection was closed before its end.");
}

/** The data of server-sent events, which may be cut anywhere on their way. */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function headers(key) {
  if (/[^\x20-\x7e]/.test(key)) throw new Problem("The API key has characters that cannot be sent.");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(address(path), { ...options, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached, or it closed the connection.");
  }
  if (!response.ok) throw new Problem(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || response.statusText || "The server gives no reason.";
  }
}
