// A request as a command or a program. The key is never written into it.

/** For a shell; the body comes from standard input, since pictures are longer than an argument may be. */
export function asCurl(url, body, needsKey) {
  const lines = [
    `curl -N ${shellQuoted(url)}`,
    ...(needsKey ? ['  -H "Authorization: Bearer $API_KEY"'] : []),
    '  -H "Content-Type: application/json"',
    "  --data-binary @- <<'END'",
  ];
  return `${lines.join(" \\\n")}\n${JSON.stringify(body, null, 2)}\nEND\n`;
}

/** For OpenAI's Python client. */
export function asPython(baseUrl, body, needsKey) {
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`);
  return `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(baseUrl)}, api_key=${needsKey ? 'os.environ["API_KEY"]' : '"none"'})
stream = client.chat.completions.create(
${fields.join("")})
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A JSON value as Python writes it. */
function literal(value, margin) {
  const inner = `${margin}    `;
  const around = (open, items, close) =>
    items.length ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${margin}${close}` : open + close;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return around("[", value.map((item) => literal(item, inner)), "]");
  if (typeof value === "object") {
    const items = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, inner)}`);
    return around("{", items, "}");
  }
  return JSON.stringify(value); // strings and numbers are written alike in both
}

/** Copy a text; browsers offer the newer way to pages of secure origins only. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not let this page copy");
}
