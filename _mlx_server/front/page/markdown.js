// Markdown as DOM nodes. Text of a model is only ever put into text nodes and into the addresses of
// http(s) links, never parsed as HTML.

const DEEPEST = 6; // lists and quotes within each other; what is nested deeper is plain text
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)/;
const FENCE = /^ *(`{3,}|~{3,})\s*(\S*)/;
const DELIMITERS = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$/;
const BEGINS = [ITEM, FENCE, /^ {0,3}#{1,6} /, /^ {0,3}>/, /^ {0,3}([-*_])( *\1){2,} *$/];
const INLINE = new RegExp(
  [
    /\\(?<escaped>[\\`*_{}[\]()#+.!|<>~-])/,
    /(?<ticks>`+)(?<code>[^`]|[^`].*?[^`])\k<ticks>(?!`)/s,
    /!?\[(?<label>[^\]\n]{1,500})\]\((?<target>[^()\s]{1,2000})(?: +"[^"\n]*")?\)/,
    /(?<url>https?:\/\/[^\s<>()"'`]*[^\s<>()"'`.,;:!?])/,
    /\*\*(?=\S)(?<strong>[^*\n]+(?:\*[^*\n]+)*)\*\*/,
    /~~(?=\S)(?<del>[^~\n]+)~~/,
    /\*(?=\S)(?<em>[^*\n]+)\*/,
    /(?<!\w)_(?=\S)(?<low>[^_\n]+)_(?!\w)/,
  ].map((part) => part.source).join("|"),
  "gs",
);

/** An element with these properties and children. */
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** The nodes of a Markdown text. */
export function markdown(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const lines = text.split("\n");
  const nodes = [];
  while (lines.length) {
    if (lines[0].trim()) nodes.push(block(lines, depth));
    else takeWhile(lines, (line) => !line.trim());
  }
  return nodes;
}

/** The block that the first of the lines begins; its lines are taken away. */
function block(lines, depth) {
  const [first] = lines;
  const fence = FENCE.exec(first);
  if (fence) return code(lines, fence);
  if (BEGINS[4].test(first)) return lines.shift() && make("hr");
  const heading = /^ {0,3}(#{1,6}) +(.*)$/.exec(first);
  if (heading) {
    const words = heading[2].trimEnd().replace(/(?<=^| )#+$/, "").trimEnd();
    return lines.shift() && make(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(words));
  }
  if (/^ {0,3}>/.test(first)) {
    const quoted = takeWhile(lines, (line) => /^ {0,3}>/.test(line));
    return make("blockquote", {}, ...markdown(quoted.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n"), depth + 1));
  }
  if (ITEM.test(first)) return list(lines, depth);
  if (first.includes("|") && DELIMITERS.test(lines[1] ?? "") && lines[1].includes("|")) return table(lines);
  const text = [lines.shift(), ...takeWhile(lines, (line) => line.trim() && !BEGINS.some((begin) => begin.test(line)))];
  return make("p", {}, ...inline(text.join("\n").trim()));
}

function takeWhile(lines, wanted) {
  const end = lines.findIndex((line) => !wanted(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function code(lines, [, mark, language]) {
  lines.shift();
  const inside = takeWhile(lines, (line) => !(line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "")));
  lines.shift();
  return make("pre", { tabIndex: 0, title: language }, make("code", {}, inside.join("\n")));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const node = ordered ? make("ol", { start: parseInt(mark, 10) }) : make("ul");
  for (let item = ITEM.exec(lines[0]); item && item[1].length === indent.length; item = ITEM.exec(lines[0] ?? "")) {
    if (/\d/.test(item[2]) !== ordered) break;
    lines.shift();
    const inner = " ".repeat(indent.length + 2);
    const more = takeWhile(lines, (line) => !line.trim() || line.startsWith(inner) || !BEGINS.some((begin) => begin.test(line)) && line.startsWith(" "));
    const content = markdown([item[3], ...more.map((line) => line.replace(/^ {0,3}/, "").replace(/^\t/, ""))].join("\n"), depth + 1);
    const tight = content[0]?.nodeName === "P" ? [...content[0].childNodes, ...content.slice(1)] : content;
    node.append(make("li", {}, ...tight));
  }
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (tag, line) => make("tr", {}, ...cells(line).map((content) => make(tag, {}, ...content)));
  const head = make("thead", {}, row("th", lines.shift()));
  lines.shift();
  const rows = takeWhile(lines, (line) => line.includes("|")).map((line) => row("td", line));
  return make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, head, make("tbody", {}, ...rows)));
}

/** The nodes of a text within a block. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index), span(match));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)].filter((node) => node !== "");
}

function span(match) {
  const { escaped, code, label, target, url, strong, del, em, low } = match.groups;
  if (escaped) return escaped;
  if (code) return make("code", {}, code);
  if (url) return link(url, [url]);
  if (label) return /^(https?|mailto):/i.test(target) ? link(target, inline(label)) : match[0];
  if (strong) return make("strong", {}, ...inline(strong));
  if (del) return make("del", {}, ...inline(del));
  return make("em", {}, ...inline(em ?? low));
}

function link(href, children) {
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
