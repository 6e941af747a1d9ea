// Markdown as DOM nodes. Raw HTML is shown as text, and the result contains no element or attribute but those below.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";

const POLICY = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "start"], // their values are no addresses
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) =>
  text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  renderer: {
    html: ({ text }) => escape(text),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    // An image would tell its server that this text is being read.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

export function render(text) {
  const content = DOMPurify.sanitize(marked.parse(text), POLICY);
  for (const link of content.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  content.querySelectorAll("pre").forEach(addHeader);
  for (const table of content.querySelectorAll("table")) {
    table.replaceWith(scrollable("div", "table", "Table", table.cloneNode(true)));
  }
  return content;
}

// An element that scrolls by itself, also with the keyboard.
function scrollable(name, className, label, ...children) {
  const element = Object.assign(document.createElement(name), { className, tabIndex: 0, role: "region", ariaLabel: label });
  element.append(...children);
  return element;
}

// Put the language of a code block, and a button that copies it, above the block.
function addHeader(pre) {
  const code = pre.firstElementChild;
  const language = /^language-(\S+)$/.exec(code?.className ?? "")?.[1] ?? "";
  const header = Object.assign(document.createElement("div"), { className: "code-header" });
  header.append(Object.assign(document.createElement("span"), { textContent: language || "text" }));
  if (navigator.clipboard) { // browsers have it for HTTPS and localhost only
    header.append(Object.assign(document.createElement("button"), { className: "copy-code", textContent: "Copy code" }));
  }
  const block = Object.assign(document.createElement("div"), { className: "code" });
  pre.replaceWith(block);
  block.append(header, scrollable("pre", "", language ? `Code in ${language}` : "Code", ...pre.childNodes));
}

// Show Markdown in an element, and keep the blocks that have not changed: their selection and scroll position survive.
export function update(element, text) {
  const blocks = [...render(text).childNodes];
  let same = 0;
  while (same < blocks.length && element.childNodes[same]?.isEqualNode(blocks[same])) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same));
}
