// Markdown to DOM nodes. Text only ever becomes text nodes and the attributes set below, so nothing that a model
// writes can become markup, a script, or a request: images are shown as links, and links are limited to three schemes.
//
// `render` is called again and again while an answer grows. The text is cut into blocks, and only the blocks whose
// source has changed are built anew: in practice the last one.

import { highlight } from "./highlight.js";

const DEEPEST = 12; // lists and quotes within each other; what lies deeper is shown plain
const LONGEST = 10_000; // characters of one paragraph that are searched for marks; a longer one is shown plain
const LINK_SCHEMES = /^(https?:|mailto:)/i;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function element(tag, children = [], attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- blocks

/** Cut lines into blocks: [{source, build}], `build()` making the node. */
function blocks(lines) {
  const found = [];
  let at = 0;
  const add = (end, build) => {
    found.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let end = at + 1;
    let match;
    if (!line.trim()) { at = end; continue; }
    if ((match = FENCE.exec(line))) {
      const [, fence, info] = match;
      const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
      while (end < lines.length && !closing.test(lines[end])) end++;
      const code = lines.slice(at + 1, end).join("\n");
      add(Math.min(end + 1, lines.length), () => codeBlock(code, info.trim().split(/\s/)[0].toLowerCase()));
    } else if ((match = HEADING.exec(line))) {
      const [, marks, text] = match;
      add(end, () => element(`h${marks.length}`, inline(text)));
    } else if (RULE.test(line)) {
      add(end, () => element("hr"));
    } else if (/^ {0,3}>/.test(line)) {
      while (end < lines.length && lines[end].trim() && !FENCE.test(lines[end])) end++;
      const inner = lines.slice(at, end).map((text) => text.replace(/^ {0,3}> ?/, ""));
      add(end, () => element("blockquote", build(inner)));
    } else if (ITEM.test(line)) {
      while (end < lines.length && belongsToList(lines, end)) end++;
      const items = lines.slice(at, end);
      add(end, () => list(items));
    } else if (line.includes("|") && end < lines.length && lines[end].includes("|") && TABLE_RULE.test(lines[end])) {
      while (end < lines.length && lines[end].includes("|")) end++;
      const rows = lines.slice(at, end);
      add(end, () => table(rows));
    } else {
      while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end++;
      const text = lines.slice(at, end).map((part) => part.trim()).join("\n");
      add(end, () => element("p", inline(text)));
    }
  }
  return found;
}

let depth = 0; // of lists and quotes within each other

function build(lines) {
  if (depth >= DEEPEST) return [element("p", [lines.join("\n")])];
  depth++;
  try {
    return blocks(lines).map((block) => block.build());
  } finally {
    depth--;
  }
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line);

function belongsToList(lines, at) {
  const line = lines[at];
  if (ITEM.test(line) || /^\s{2,}\S/.test(line)) return true;
  if (line.trim()) return !startsBlock(line) && lines[at - 1].trim() !== "";
  // A blank line stays within the list if an item or an indented line follows it.
  const next = lines.slice(at).find((later) => later.trim());
  return next !== undefined && (ITEM.test(next) || /^\s{2,}\S/.test(next));
}

function list(lines) {
  const [, margin, marker] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length < margin.length + 2) {
      items.push({ indent: match[0].length, lines: [line.slice(match[0].length)] });
    } else {
      const item = items[items.length - 1];
      const indent = /^\s*/.exec(line)[0].length;
      item.lines.push(line.slice(Math.min(indent, item.indent)));
    }
  }
  const ordered = /\d/.test(marker);
  const nodes = items.map(({ lines: inner }) => {
    const children = build(inner);
    // An item of one paragraph is tight: its text stands without a <p>.
    if (children.length && children[0].tagName === "P" && !inner.some((line, i) => i && !line.trim())) {
      children.splice(0, 1, ...children[0].childNodes);
    }
    return element("li", children);
  });
  return element(ordered ? "ol" : "ul", nodes, ordered && parseInt(marker) !== 1 ? { start: parseInt(marker) } : {});
}

function table(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
  const row = (source, tag) => element("tr", cells(source).map((cell) => element(tag, inline(cell))));
  const head = element("thead", [row(rows[0], "th")]);
  const body = element("tbody", rows.slice(2).map((source) => row(source, "td")));
  return element("div", [element("table", [head, body])], { class: "table" });
}

function codeBlock(code, language) {
  const copy = element("button", ["Copy"], { type: "button", "data-copy": "" });
  const bar = element("div", [element("span", [language || "code"]), copy]);
  return element("div", [bar, element("pre", [element("code", highlight(code, language))], { tabindex: "0" })], { class: "code" });
}

// ---- inline

const INLINE = [
  { pattern: /\\([\\`*_{}[\]()#+\-.!|~<>])/y, node: ([, character]) => document.createTextNode(character) },
  { pattern: /(`+)(?!`)([^]*?[^`])\1(?!`)/y, node: ([, , code]) => element("code", [code.replace(/^ (.+) $/, "$1")]) },
  { pattern: /!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/y, node: ([, text, target]) => link(inline(text || target), target) },
  { pattern: /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y, node: ([, target]) => link([target], target) },
  { pattern: /\bhttps?:\/\/(?:[^\s<>"'`()\]]|\([^\s()<>]*\))*(?:[^\s<>"'`()\].,;:!?]|\([^\s()<>]*\))/y, node: ([target]) => link([target], target) },
  { pattern: /\*\*(?=\S)([^]*?\S)\*\*/y, node: ([, text]) => element("strong", inline(text)) },
  { pattern: /(?<!\w)__(?=\S)([^]*?\S)__(?!\w)/y, node: ([, text]) => element("strong", inline(text)) },
  { pattern: /\*(?=[^\s*])((?:\*\*[^*]*\*\*|[^*])*?[^\s*])\*(?!\*)/y, node: ([, text]) => element("em", inline(text)) },
  { pattern: /(?<!\w)_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/y, node: ([, text]) => element("em", inline(text)) },
  { pattern: /~~(?=\S)([^]*?\S)~~/y, node: ([, text]) => element("del", inline(text)) },
  { pattern: / *\n/y, node: () => element("br") },
];
const SPECIAL = /[\\`*_~<!\[\n]|h(?=ttps?:\/\/)/g;

/** The nodes of a text with marks in it. */
function inline(text) {
  if (text.length > LONGEST) return [document.createTextNode(text)];
  const nodes = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) break;
    plain += text.slice(at, next.index);
    at = next.index;
    let made = null;
    for (const { pattern, node } of INLINE) {
      pattern.lastIndex = at;
      const match = pattern.exec(text);
      if (match) { made = node(match); at += match[0].length; break; }
    }
    if (!made) { plain += text[at++]; continue; }
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(made);
  }
  plain += text.slice(at);
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function link(children, target) {
  if (!LINK_SCHEMES.test(target)) return element("span", children);
  return element("a", children, { href: target, target: "_blank", rel: "noopener noreferrer" });
}

// ---- rendering

const shown = new WeakMap(); // container -> the sources of the blocks that it shows

/** Make `container` show `text`. */
export function render(container, text) {
  const old = shown.get(container) ?? [];
  const found = blocks(text.replace(/\r\n?/g, "\n").split("\n"));
  let same = 0;
  while (same < old.length && same < found.length && old[same] === found[same].source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...found.slice(same).map((block) => block.build()));
  shown.set(container, found.map((block) => block.source));
}
