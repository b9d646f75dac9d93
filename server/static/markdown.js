// Markdown as models write it, to DOM nodes. What is not understood stays text, HTML above all.

import { el } from "./dom.js";

// No part of these can take what the next one takes as well: a reply's line may be long, and is read many times.
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])(?:\s+|$)/;
const TABLE_CELL = /^:?-+:?$/;

// Lists and quotes inside of each other; deeper ones are paragraphs.
const DEEPEST = 8;

/** The nodes of a text. */
export function renderMarkdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [node, next] = block(lines, at, depth);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

/** The block that begins at a line, and the line behind it. */
function block(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return code(lines, at);
  const heading = HEADING.exec(line);
  // The page has headings of its own: those of a reply begin below them.
  if (heading) return [el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(withoutHashes(heading[2]))), at + 1];
  if (RULE.test(line)) return [el("hr"), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

/** A heading may end as it begins. */
function withoutHashes(title) {
  const text = title.trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return text.slice(0, end).trim();
}

function code(lines, at) {
  const [, fence, about] = FENCE.exec(lines[at]);
  const [language] = /^[\w+#.-]*/.exec(about.trim());
  const isEnd = (line) => line.trim().startsWith(fence) && line.trim().replaceAll(fence[0], "") === "";
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  // A block that is wider than the page is scrolled, which needs the focus for those without a mouse.
  return [el("pre", { tabindex: 0, "data-language": language || null }, el("code", {}, text)), end + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [el("blockquote", {}, ...blocks(inner, depth + 1)), end];
}

function list(lines, at, depth) {
  const [, margin, number] = ITEM.exec(lines[at]);
  const ordered = number !== undefined;
  const node = el(ordered ? "ol" : "ul", ordered && number !== "1" ? { start: number } : {});
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length > margin.length + 1 || (item[2] !== undefined) !== ordered) break;
    const first = end;
    end = itemEnd(lines, first + 1, item[1].length);
    const inner = [lines[first].slice(item[0].length), ...lines.slice(first + 1, end).map((line) => outdent(line, item[0].length))];
    node.append(el("li", {}, ...tight(blocks(inner, depth + 1))));
    while (end < lines.length && lines[end].trim() === "" && ITEM.test(lines[end + 1] ?? "")) end += 1;
  }
  return [node, end];
}

/** The line behind an item: lines that are indented further belong to it, and those that go on with its text. */
function itemEnd(lines, at, margin) {
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const indented = /^\s*/.exec(line)[0].length > margin + 1;
    if (line.trim() === "") {
      if (!/^\s{2,}\S/.test(lines[end + 1] ?? "")) break;
    } else if (!indented && (ITEM.test(line) || startsBlock(line))) break;
    end += 1;
  }
  return end;
}

const outdent = (line, most) => line.slice(Math.min(most, /^\s*/.exec(line)[0].length));

/** An item's only paragraph needs no element of its own. */
function tight(nodes) {
  return nodes[0]?.tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function isTable(lines, at) {
  const below = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !below.includes("-")) return false;
  return cells(below).every((cell) => TABLE_CELL.test(cell)) && cells(below).length === cells(lines[at]).length;
}

function table(lines, at) {
  const row = (tag, line) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell))));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const body = lines.slice(at + 2, end).map((line) => row("td", line));
  const node = el("table", {}, el("thead", {}, row("th", lines[at])), el("tbody", {}, ...body));
  return [el("div", { class: "scroll", tabindex: 0 }, node), end];
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "") {
    if (depth < DEEPEST && (startsBlock(lines[end]) || ITEM.test(lines[end]))) break;
    if (isTable(lines, end)) break;
    end += 1;
  }
  return [el("p", {}, ...inline(lines.slice(at, end).join("\n").trim())), end];
}

// By the character that they begin with; the bounds keep a text full of openings quick to read.
const styled = (tag) => (match) => el(tag, {}, ...inline(match[1]));
const RULES = {
  "\\": [[/\\([!-/:-@[-`{-~])/y, (match) => match[1]]],
  "`": [[/(`+)(?!`)([^]{1,2000}?)(?<!`)\1(?!`)/y, (match) => el("code", {}, match[2].trim() || match[2])]],
  "*": [
    [/\*\*\*(?=[^\s*])([^]{0,2000}?[^\s*])\*\*\*(?!\*)/y, (match) => el("strong", {}, el("em", {}, ...inline(match[1])))],
    [/\*\*(?=\S)([^]{0,2000}?\S)\*\*/y, styled("strong")],
    [/\*(?=[^\s*])([^]{0,2000}?[^\s*])\*(?!\*)/y, styled("em")],
  ],
  _: [
    [/(?<!\w)__(?=\S)([^]{0,2000}?\S)__(?!\w)/y, styled("strong")],
    [/(?<!\w)_(?=[^\s_])([^]{0,2000}?[^\s_])_(?!\w)/y, styled("em")],
  ],
  "~": [[/~~(?=\S)([^]{0,2000}?\S)~~/y, styled("del")]],
  "[": [[/\[([^[\]]{1,500})\]\(((?:[^\s()]|\([^\s()]{0,500}\)){1,2000})\)/y, (match) => link(match[2], inline(match[1]), match[0])]],
  h: [[/(?<!\w)https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/y, (match) => link(match[0], [match[0]], match[0])]],
};

/** Nodes and texts of what stands in a line. */
function inline(text) {
  const found = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const [node, end] = match(text, at);
    if (node === null) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (plain) found.push(plain);
    plain = "";
    found.push(node);
    at = end;
  }
  if (plain) found.push(plain);
  return found;
}

function match(text, at) {
  for (const [pattern, make] of Object.hasOwn(RULES, text[at]) ? RULES[text[at]] : []) {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) return [make(found), at + found[0].length];
  }
  return [null, at];
}

/** A link to the web; any other address stays the text that it is. */
function link(address, children, source) {
  const url = URL.parse?.(address) ?? null;
  if (!url || !["http:", "https:"].includes(url.protocol)) return source;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
